"""Turns in an event loop: of callers that would each hold the loop for a moment, one runs per round of the loop.

Between two turns the loop does everything else that is ready, so it never stalls for longer than one turn.
"""

from __future__ import annotations

import asyncio
from collections import deque


class Turns:
    """First come, first served. Belongs to one event loop; nothing here is a thread's business."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._taken = False
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def queued(self) -> int:
        return len(self._waiting)

    async def take(self) -> None:
        """Wait for a turn. Whoever got one calls :meth:`release`."""
        if not self._taken:
            self._taken = True
            return
        turn: asyncio.Future[None] = self._loop.create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # the turn came together with the cancellation: pass it on
                self.release()
            else:
                self._waiting.remove(turn)
            raise

    def release(self) -> None:
        """End the turn; the next one begins after a round of the loop."""
        self._loop.call_soon(self._next)

    def _next(self) -> None:
        if self._waiting:
            self._waiting.popleft().set_result(None)
        else:
            self._taken = False
