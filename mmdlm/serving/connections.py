"""Connections that do not get on: a head that never ends, an answer that nobody reads, more of them than files.

uvicorn bounds how long a connection may idle between two requests. What it leaves open is bounded here: the time and
size of a request's head (slowloris holds a connection with a byte now and then), and how long an answer may lie unread.
How long a body and a whole request may take the door says (`mmdlm.serving.door`).
"""

from __future__ import annotations

import asyncio
from typing import Any

HEAD_BYTES = 64 * 2**10
MOST_FILES = 65_536
OTHER_FILES = 64  # the model's, the log's, the event loop's own


def patient(protocol: type[Any], seconds: float) -> Any:
    """`protocol`, one of uvicorn's two for HTTP/1.1, as a class whose connections cannot be held for nothing.

    `seconds`: from a connection's or a request's first byte to the end of its head; and how long the write buffer may
    be full, or something be in it when the connection is to be closed.
    """

    class Patient(protocol):  # type: ignore[misc]
        _head: asyncio.TimerHandle | None = None  # runs while the end of a head is waited for
        _unread: asyncio.TimerHandle | None = None
        _heading, _head_bytes = False, 0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._head = self.loop.call_later(seconds, self._give_up)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._heading:  # h11 has a bound of its own, httptools none
                self._head_bytes += len(data)
                if self._head_bytes > HEAD_BYTES:
                    self.transport.abort()
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop_waiting()
            elif self._head is None and not self.transport.is_closing():
                self._head = self.loop.call_later(seconds, self._give_up)

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            self._read_on()
            super().connection_lost(exc)

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._heading, self._head_bytes = True, 0

        def on_headers_complete(self) -> None:
            self._heading = False
            super().on_headers_complete()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._unread = self._unread or self.loop.call_later(seconds, self.transport.abort)

        def resume_writing(self) -> None:
            self._read_on()
            super().resume_writing()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.transport.get_write_buffer_size() and self._unread is None:
                self.loop.call_later(seconds, self._close_unread)

        def _close_unread(self) -> None:
            if self.transport.is_closing():  # else it may have had another answer meanwhile
                self.transport.abort()

        def _give_up(self) -> None:
            self._head = None
            self.transport.close()

        def _stop_waiting(self) -> None:
            if self._head is not None:
                self._head.cancel()
                self._head = None

        def _read_on(self) -> None:
            if self._unread is not None:
                self._unread.cancel()
                self._unread = None

    return Patient


def most_connections() -> int | None:
    """How many connections this process may hold, its limit of open files raised as far as it may; None: not known.

    A connection too many is then answered with a 503. Where no file can be opened any more nobody is answered at all.
    """
    try:
        import resource
    except ImportError:  # no such limit on Windows
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft == resource.RLIM_INFINITY or soft >= most:
        most = MOST_FILES if soft == resource.RLIM_INFINITY else soft
    else:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return max(1, most - OTHER_FILES)
