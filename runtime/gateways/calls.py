"""Calls of the router under a deadline: in the event loop or in a thread, bounded, behind a circuit breaker.

Knows nothing about requests. Whatever the router does (fail, hang, or be too slow for what comes in), a call ends
near the deadline with a cause.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
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
    """Short queries run in the loop, within a budget per round of it; the others in threads.

    A thread costs more than ``nano``'s whole inference, since it and the event loop hand the interpreter lock to
    each other (tests/benchmarks/gateway_calls.py). After any failure, calls go to threads until one succeeds: a
    router that hangs holds the loop once at most.

    What the breaker is told, once per request at most:

    - a failure: the router raised; or its inference alone took longer than the deadline (a decision that comes all
      the same is used); or the deadline passed and nothing at all was finished meanwhile. A request that was waiting
      already when such a timeout was counted adds none: many may wait for one stall.
    - a success: a decision whose inference kept the deadline.
    - nothing: too much to do, or a client that went away. What a thread brings after its request was answered
      counts no more.
    """

    def __init__(
        self, config: GatewayConfig, deadline: float, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._max_queue, self._budget, self._clock = config.max_queue, config.inline_ms / 1e3, clock
        self.breaker = Breaker(config.breaker_failures, config.breaker_seconds)
        self._workers = Workers(config.workers, config.max_queue, _STUCK * deadline)
        self._turns: WeakKeyDictionary[asyncio.AbstractEventLoop, Turns] = WeakKeyDictionary()
        self._timed_out = float("-inf")  # by the clock, when a timeout was counted last

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
            turns = self._turns[loop] = Turns(loop, self._budget, self._clock)
        if turns.queued >= self._max_queue:
            return Outcome(verdict.OVERLOAD)
        asked = self._clock()
        return await turns.run(lambda: self._here(engine, question, asked))

    def _here(self, engine: Engine, question: Question, asked: float) -> Outcome:
        started = self._clock()
        queue_ms = (started - asked) * 1e3
        if started - question.arrived > engine.deadline:
            return Outcome(verdict.OVERLOAD, None, queue_ms)
        try:
            decision = question.ask(engine)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a panic of the tokenizer's is no Exception
            return self._failed(error, queue_ms)
        return self._decided(engine, decision, self._clock() - started, queue_ms)

    async def _in_thread(self, engine: Engine, question: Question) -> Outcome:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[None] = loop.create_future()

        def settle() -> None:
            if not answer.done():
                answer.set_result(None)

        def done() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(settle)

        job = Job(lambda: question.ask(engine), done)
        asked, finished = self._clock(), self._workers.finished
        remaining = engine.deadline - (asked - question.arrived)
        # Who could not be served in time is not let in: he would wait for nothing, and those behind him too.
        if remaining <= self._workers.expected() or not self._workers.submit(job):
            return Outcome(verdict.OVERLOAD)
        timer = loop.call_later(remaining, settle)
        try:
            await answer
        finally:  # also where the client went away
            timer.cancel()
            self._workers.withdraw(job)
        now = self._clock()
        started = job.started or now
        queue_ms = (started - asked) * 1e3
        if job.ended is None:
            working, progress = now - started, self._workers.finished != finished
            if progress and working < engine.deadline:
                loop.call_later(engine.deadline - working, self._overdue, job, question.arrived)
            else:
                self._count_timeout(question.arrived)
            shed = progress and working < engine.deadline / 2  # there is only too much to do
            return Outcome(verdict.OVERLOAD if shed else verdict.DEADLINE, None, queue_ms)
        if job.error is not None:
            return self._failed(job.error, queue_ms)
        return self._decided(engine, job.result, job.ended - started, queue_ms)

    def _decided(self, engine: Engine, decision: Decision, seconds: float, queue_ms: float) -> Outcome:
        """The router's decision is here after ``seconds`` of its own, so it is used."""
        if seconds > engine.deadline:
            self.breaker.failure()
        else:
            self.breaker.success()
        return Outcome(verdict.ROUTED, decision, queue_ms)

    def _overdue(self, job: Job, arrived: float) -> None:
        """A call whose request was answered by the deadline has had a whole deadline of a thread by now."""
        if job.started is not None and job.ended is None:
            self._count_timeout(arrived)

    def _count_timeout(self, arrived: float) -> None:
        if arrived >= self._timed_out:
            self._timed_out = self._clock()
            self.breaker.failure()

    def _failed(self, error: BaseException, queue_ms: float) -> Outcome:
        _LOGGER.error("the router failed", exc_info=error)
        self.breaker.failure()
        return Outcome(verdict.ERROR, None, queue_ms)
