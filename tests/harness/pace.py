"""Time in tests: a clock that a test moves on, and waiting for what a thread does. Of the tests."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(true: Callable[[], object]) -> None:
    """Wait for a state that another thread brings about."""
    stop = time.monotonic() + 20
    while not true():
        assert time.monotonic() < stop
        time.sleep(0.002)


class Clock:
    """A clock that only what a test does moves on; seconds."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds
