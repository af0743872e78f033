"""Stopping when asked: SIGTERM (a scheduler's limit, a container's stop) and Ctrl-C become a question of the loop."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_ONE_REQUEST = 5.0  # seconds


class StopRequest:
    """`with StopRequest() as stop:` - `stop.asked` is True once a signal came; the old handlers return at the end.

    A signal some seconds later is for those who will not wait: it does what it did before. One that follows at once is
    the same request: schedulers signal torchrun and its workers, and torchrun passes it on to these.
    """

    def __init__(self) -> None:
        self.asked = False
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python sets handlers there only
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.asked:
            self.asked, self._since = True, time.monotonic()
        elif time.monotonic() - self._since > _ONE_REQUEST:
            self._restore()
            os.kill(os.getpid(), number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
