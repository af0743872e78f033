"""A request to stop, heard once or twice, and one that will not wait."""

from __future__ import annotations

import os
import signal

import pytest

from mmdlm.training import interrupts


def test_a_second_signal_some_seconds_later_ends_at_once(monkeypatch: pytest.MonkeyPatch):
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    clock = [100.0]
    monkeypatch.setattr(interrupts.time, "monotonic", lambda: clock[0])
    try:
        with interrupts.StopRequest() as stop:
            assert not stop.asked
            for seconds, expected in ((0.0, 0), (0.5, 0), (6.0, 1)):
                clock[0] = 100.0 + seconds
                os.kill(os.getpid(), signal.SIGTERM)
                assert stop.asked and len(heard) == expected
        os.kill(os.getpid(), signal.SIGTERM)
        assert len(heard) == 2
    finally:
        signal.signal(signal.SIGTERM, before)
