"""Calls of the router under a deadline: in the event loop or in a thread, bounded, behind a circuit breaker.

Knows nothing about requests. Whatever the router does (fail, hang, or be too slow for what comes in), a call ends
near the deadline with a cause.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from arllm.runtime.answer import Decision
from arllm.runtime.gateways import verdict
from arllm.runtime.gateways.breaker import Breaker
from arllm.runtime.gateways.config import GatewayConfig
from arllm.runtime.gateways.engine import Engine
from arllm.runtime.gateways.turns import Turns
from arllm.runtime.gateways.workers import Job, Workers

_LOGGER = logging.getLogger("arllm.gateway")
_STUCK = 10.0  # deadlines after which a thread counts as lost
_LATE = TimeoutError()


@dataclass(frozen=True)
class Question:
    """Arguments of ``Router.route``, and when the request arrived (``time.perf_counter()``)."""

    query: str
    beta: float
    policy: str | None
    candidates: list[str] | None
    arrived: float

    def ask(self, engine: Engine) -> Decision:
        return engine.router.route(self.query, self.beta, self.policy, self.candidates)


@dataclass(frozen=True)
class Outcome:
    """A decision, or the cause why there is none. ``queue_ms``: waiting for a thread, or a turn in the loop."""

    cause: str
    decision: Decision | None = None
    queue_ms: float = 0.0


class Calls:
    """Short queries run in the loop, one per round of it; the others in threads.

    A thread costs more than ``nano``'s whole inference, since it and the event loop hand the interpreter lock to
    each other (tests/benchmarks/gateway_calls.py). After any failure, calls go to threads until one succeeds: a
    router that hangs holds the loop once at most.
    """

    def __init__(self, config: GatewayConfig, deadline: float) -> None:
        self._max_queue = config.max_queue
        self.breaker = Breaker(config.breaker_failures, config.breaker_seconds)
        self._workers = Workers(config.workers, config.max_queue, _STUCK * deadline)
        self._turns: WeakKeyDictionary[asyncio.AbstractEventLoop, Turns] = WeakKeyDictionary()

    @property
    def queued(self) -> int:
        """Calls that wait for a thread, or for their turn in an event loop."""
        return self._workers.queued + sum(turns.queued for turns in list(self._turns.values()))

    def close(self) -> None:
        self._workers.close()

    async def route(self, engine: Engine, question: Question) -> Outcome:
        if not self.breaker.allow():
            return Outcome(verdict.BREAKER)
        size = len(question.query) * (1 if question.query.isascii() else 4)  # bytes, at most
        if size > engine.calibration.inline_bytes or not self.breaker.trusted:
            return await self._in_thread(engine, question)
        loop = asyncio.get_running_loop()
        turns = self._turns.get(loop)
        if turns is None:
            turns = self._turns[loop] = Turns(loop)
        if turns.queued >= self._max_queue:
            return Outcome(verdict.OVERLOAD)
        asked = time.perf_counter()
        await turns.take()
        try:
            return self._here(engine, question, asked)
        finally:
            turns.release()

    def _here(self, engine: Engine, question: Question, asked: float) -> Outcome:
        started = time.perf_counter()
        queue_ms = (started - asked) * 1e3
        if started - question.arrived > engine.deadline:
            return Outcome(verdict.OVERLOAD, None, queue_ms)
        try:
            decision = question.ask(engine)
        except Exception as error:
            return self._failed(error, queue_ms)
        if time.perf_counter() - started > engine.deadline:
            self.breaker.failure()  # the decision is there, so it is used; the next ones run in a thread
        else:
            self.breaker.success()
        return Outcome(verdict.ROUTED, decision, queue_ms)

    async def _in_thread(self, engine: Engine, question: Question) -> Outcome:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[tuple[Decision | None, BaseException | None]] = loop.create_future()

        def settle(decision: Decision | None, error: BaseException | None) -> None:
            if not answer.done():
                answer.set_result((decision, error))

        def done(decision: Decision | None, error: BaseException | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(settle, decision, error)

        job = Job(lambda: question.ask(engine), done)
        asked, progress = time.perf_counter(), self._workers.finished
        remaining = engine.deadline - (asked - question.arrived)
        if remaining <= 0 or not self._workers.submit(job):
            return Outcome(verdict.OVERLOAD)
        timer = loop.call_later(remaining, settle, None, _LATE)
        try:
            decision, error = await answer
        finally:  # also where the client went away
            timer.cancel()
            self._workers.withdraw(job)
        queue_ms = ((job.started or time.perf_counter()) - asked) * 1e3
        if error is None:
            self.breaker.success()
            return Outcome(verdict.ROUTED, decision, queue_ms)
        if error is not _LATE:
            return self._failed(error, queue_ms)
        works = self._workers.finished != progress
        if works and (job.started is None or time.perf_counter() - job.started < engine.deadline / 2):
            return Outcome(verdict.OVERLOAD, None, queue_ms)  # the router is fine, there is only too much to do
        self.breaker.failure()
        return Outcome(verdict.DEADLINE, None, queue_ms)

    def _failed(self, error: BaseException, queue_ms: float) -> Outcome:
        _LOGGER.error("the router failed", exc_info=error)
        self.breaker.failure()
        return Outcome(verdict.ERROR, None, queue_ms)
