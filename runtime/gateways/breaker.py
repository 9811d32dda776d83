"""A circuit breaker: after failures in a row, nobody waits for the router for a while. Monotonic time.

Knows nothing about what a failure is: whoever calls the router says so (calls.py).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Breaker:
    """Closed, open, or half open: then one request in ``seconds`` probes the router. Thread-safe."""

    def __init__(self, failures: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._seconds, self._clock = failures, seconds, clock
        self._failed = 0  # in a row
        self._retry_at = 0.0
        self._lock = threading.Lock()

    @property
    def open(self) -> bool:
        return self._failed >= self._limit

    @property
    def trusted(self) -> bool:
        """Whether the last decision was made in time: else none is made in the event loop."""
        return self._failed == 0

    def allow(self) -> bool:
        """Whether a decision may be tried now. While open, True once in ``seconds``: a probe."""
        if self._failed < self._limit:
            return True
        with self._lock:
            now = self._clock()
            if now < self._retry_at:
                return False
            self._retry_at = now + self._seconds  # a probe that never reports back blocks nobody
            return True

    def success(self) -> None:
        if self._failed:
            with self._lock:
                self._failed = 0

    def failure(self) -> None:
        with self._lock:
            self._failed += 1
            if self._failed >= self._limit:
                self._retry_at = self._clock() + self._seconds
