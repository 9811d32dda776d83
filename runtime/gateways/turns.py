"""Turns in an event loop: calls that hold the loop for a moment share a budget of seconds per round of the loop.

Between two turns the loop does everything else that is ready. Knows nothing about what is called.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Turns:
    """First come, first served. Belongs to one event loop; nothing here is a thread's business.

    A round takes calls until ``budget`` is spent, or as much time as everything else took in the round before: a loop
    whose rounds are long for other reasons is not held much longer by us, and who waits does not wait for many of
    them. So a turn is one call at least, and holds the loop for the larger of the two and one call at most.

    Args:
        budget: seconds.
        clock: seconds, monotonic.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, budget: float, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._loop, self._least, self._clock = loop, budget, clock
        self._budget = budget  # of this round
        self._spent = 0.0
        self._began = 0.0
        self._counting = False  # whether this round's end is waited for
        self._waiting: deque[tuple[asyncio.Future[Any], Callable[[], Any]]] = deque()

    @property
    def queued(self) -> int:
        return len(self._waiting)

    async def run(self, call: Callable[[], T]) -> T:
        """What ``call()`` gives, or raises. At once where this round has time left and nobody waits; else in turn."""
        if not self._counting:
            self._counting, self._began = True, self._clock()
            self._loop.call_soon(self._next_round)
        if not self._waiting and self._spent < self._budget:
            return self._timed(call)
        answer: asyncio.Future[T] = self._loop.create_future()
        self._waiting.append((answer, call))
        try:
            return await answer
        except asyncio.CancelledError:  # the caller goes, perhaps before its turn
            with contextlib.suppress(ValueError):
                self._waiting.remove((answer, call))
            raise

    def _timed(self, call: Callable[[], T]) -> T:
        started = self._clock()
        try:
            return call()
        finally:
            self._spent += self._clock() - started

    def _next_round(self) -> None:
        now = self._clock()
        others = now - self._began - self._spent  # seconds of the round that ended
        self._began, self._spent, self._budget = now, 0.0, max(self._least, others)
        while self._waiting:
            answer, call = self._waiting.popleft()
            if answer.done():  # cancelled, and its caller has not run since
                continue
            try:
                answer.set_result(self._timed(call))
            except Exception as error:
                answer.set_exception(error)
            if self._spent >= self._budget:
                break
        self._counting = bool(self._waiting or self._spent)
        if self._counting:
            self._loop.call_soon(self._next_round)
        else:
            self._budget = self._least
