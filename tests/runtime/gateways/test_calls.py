"""Tests of gateways/breaker.py, workers.py, turns.py and calls.py: time, failure and load."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from arllm.runtime.gateways.breaker import Breaker
from arllm.runtime.gateways.calls import Calls, Outcome, Question
from arllm.runtime.gateways.config import GatewayConfig
from arllm.runtime.gateways.engine import Calibration, Engine
from arllm.runtime.gateways.turns import Turns
from arllm.runtime.gateways.workers import MAX_LOST, Job, Workers


def until(true: Callable[[], object]) -> None:
    """Wait for a state that another thread brings about."""
    stop = time.monotonic() + 20
    while not true():
        assert time.monotonic() < stop
        time.sleep(0.002)


def test_the_breaker_opens_probes_and_closes() -> None:
    now = [0.0]
    breaker = Breaker(2, 5.0, lambda: now[0])
    breaker.failure()
    breaker.success()
    breaker.failure()
    assert not breaker.trusted
    assert not breaker.open
    breaker.failure()
    assert breaker.open
    assert not breaker.allow()
    now[0] = 5.0
    assert [breaker.allow(), breaker.allow()] == [True, False]  # one probe
    now[0] = 10.0
    assert breaker.allow()  # the probe never reported back: the next one
    breaker.failure()
    now[0] = 14.9
    assert not breaker.allow()
    now[0] = 15.0
    assert breaker.allow()
    breaker.success()
    assert not breaker.open
    assert all(breaker.allow() for _ in range(3))


def test_the_queue_is_bounded_and_jobs_can_leave_it() -> None:
    workers, gate, ended = Workers(1, 2, 60.0), threading.Event(), []
    jobs = [Job(gate.wait, lambda result, error: ended.append(result)) for _ in range(4)]
    assert workers.submit(jobs[0])
    until(lambda: workers.running)
    assert [workers.submit(job) for job in jobs[1:]] == [True, True, False]
    assert (workers.queued, workers.running) == (2, 1)
    workers.withdraw(jobs[1])
    workers.withdraw(jobs[0])  # runs already: nothing happens
    assert workers.queued == 1
    gate.set()
    until(lambda: workers.finished == 2)
    assert jobs[1].started is None
    until(lambda: ended == [True, True])
    workers.close()
    assert not workers.submit(Job(gate.wait, lambda result, error: None))


def test_a_job_that_raises_anything_is_answered() -> None:
    workers, errors = Workers(1, 8, 60.0), []

    def end() -> None:
        raise SystemExit(3)

    for _ in range(2):
        assert workers.submit(Job(end, lambda result, error: errors.append(type(error))))
    until(lambda: errors == [SystemExit, SystemExit])
    workers.close()


def test_threads_that_hang_are_replaced_up_to_a_bound() -> None:
    workers, gate, ended = Workers(1, 2, 0.0), threading.Event(), []
    for i in range(MAX_LOST + 1):
        assert workers.submit(Job(gate.wait, lambda result, error: ended.append("late")))
        until(lambda i=i: workers.running == 1 and workers.queued == 0)
        time.sleep(0.001)  # longer than stuck_seconds
    quick = Job(lambda: None, lambda result, error: ended.append("quick"))
    assert workers.submit(quick)
    assert workers.queued == 1  # no more threads are lost than the bound allows
    gate.set()
    until(lambda: ended.count("late") == MAX_LOST + 1)
    until(lambda: "quick" in ended)
    until(lambda: sum(t.name == "arllm-router" for t in threading.enumerate()) <= 2)
    workers.close()


def test_turns_are_one_per_round_and_in_order() -> None:
    async def main() -> list[Any]:
        loop = asyncio.get_running_loop()
        turns, events = Turns(loop), []

        async def caller(name: str) -> None:
            await turns.take()
            events.append(name)
            loop.call_soon(events.append, "other work")
            turns.release()

        tasks = [asyncio.create_task(caller(name)) for name in "abc"]
        await asyncio.sleep(0)
        assert turns.queued == 2
        await asyncio.gather(*tasks)
        await asyncio.sleep(0.01)
        await asyncio.wait_for(turns.take(), 5)  # free again
        return events

    assert asyncio.run(main()) == ["a", "other work", "b", "other work", "c", "other work"]


def test_a_caller_that_leaves_loses_no_turn() -> None:
    async def main() -> None:
        turns = Turns(asyncio.get_running_loop())
        await turns.take()
        waiting = [asyncio.create_task(turns.take()) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[1].cancel()
        await asyncio.sleep(0)
        assert turns.queued == 2
        turns.release()
        while turns.queued == 2:
            await asyncio.sleep(0)
        if not waiting[0].done():
            waiting[0].cancel()  # together with its turn
        await asyncio.gather(waiting[0], return_exceptions=True)
        if not waiting[0].cancelled():
            turns.release()
        await asyncio.wait_for(waiting[2], 5)

    asyncio.run(main())


class Bench:
    """Calls of the stub."""

    def __init__(self, stub: Any, *, inline: int = 10_000, deadline_ms: float = 1000.0, **settings: Any) -> None:
        config = GatewayConfig(default_model="small", deadline_ms=deadline_ms, **settings)
        self.engine = Engine.of(stub, config, Calibration(inline, 0.01))
        self.calls = Calls(config, self.engine.deadline)

    async def ask(self, query: str = "large") -> Outcome:
        return await self.calls.route(self.engine, Question(query, 0.0, None, None, time.perf_counter()))


def test_short_queries_run_in_the_loop_and_long_ones_in_a_thread(stub: Any) -> None:
    async def main() -> None:
        bench = Bench(stub, inline=10)
        for query in ("large", "large " * 10, "ééé", "日本"):
            outcome = await bench.ask(query)
            assert outcome.cause == "routed"
            assert outcome.decision is not None
        bench.calls.close()

    asyncio.run(main())
    assert ["router" in name for name in stub.threads] == [False, True, True, False]


@pytest.mark.parametrize("inline", [0, 10_000])
def test_an_error_is_an_outcome(stub: Any, inline: int) -> None:
    def behave() -> None:
        raise RuntimeError("the session is gone")

    async def main() -> None:
        bench = Bench(stub, inline=inline, breaker_failures=3)
        stub.behave = behave
        outcomes = [(await bench.ask()).cause for _ in range(5)]
        assert outcomes == ["error", "error", "error", "breaker", "breaker"]
        assert len(stub.calls) == 3
        assert bench.calls.breaker.open
        bench.calls.close()

    asyncio.run(main())


def test_a_router_that_hangs_holds_nobody_longer_than_the_deadline(stub: Any) -> None:
    async def main() -> None:
        gate = threading.Event()
        bench = Bench(stub, inline=0, deadline_ms=40, breaker_failures=2, breaker_seconds=3600)
        stub.behave = gate.wait
        assert [(await bench.ask()).cause for _ in range(4)] == ["deadline", "deadline", "breaker", "breaker"]
        gate.set()
        bench.calls.close()

    asyncio.run(main())


def test_after_a_stall_in_the_loop_the_next_call_is_in_a_thread(stub: Any) -> None:
    async def main() -> None:
        bench = Bench(stub, deadline_ms=20)
        stub.behave = lambda: time.sleep(0.05)
        stalled = await bench.ask()
        assert stalled.cause == "routed"  # late, but there
        assert (await bench.ask()).cause == "deadline"
        stub.behave = lambda: None
        until(lambda: bench.calls._workers.running == 0)
        assert [(await bench.ask()).cause for _ in range(3)] == ["routed"] * 3
        bench.calls.close()

    asyncio.run(main())
    assert ["router" in name for name in stub.threads] == [False, True, True, False, False]


def test_a_probe_closes_the_breaker(stub: Any) -> None:
    async def main() -> None:
        bench = Bench(stub, breaker_failures=1, breaker_seconds=0.05)
        stub.behave = lambda: 1 / 0
        assert [(await bench.ask()).cause for _ in range(2)] == ["error", "breaker"]
        stub.behave = lambda: None
        await asyncio.sleep(0.06)
        assert [(await bench.ask()).cause for _ in range(3)] == ["routed"] * 3
        bench.calls.close()

    asyncio.run(main())


@pytest.mark.parametrize("inline", [0, 10_000])
def test_too_many_at_once_are_shed_at_once(stub: Any, inline: int) -> None:
    async def main() -> list[Outcome]:
        bench = Bench(stub, inline=inline, max_queue=4, deadline_ms=20_000)
        outcomes = await asyncio.gather(*(bench.ask() for _ in range(20)))
        assert bench.calls.queued == 0
        assert not bench.calls.breaker.open
        bench.calls.close()
        return outcomes

    causes = [outcome.cause for outcome in asyncio.run(main())]
    assert set(causes) == {"routed", "overload"}
    assert 4 <= causes.count("routed") <= 6  # those that wait, and those that run


@pytest.mark.parametrize("inline", [0, 10_000])
def test_who_waited_too_long_is_shed_and_the_breaker_stays_closed(stub: Any, inline: int) -> None:
    async def main() -> list[str]:
        bench = Bench(stub, inline=inline, max_queue=1000, deadline_ms=100, breaker_failures=1)
        stub.behave = lambda: time.sleep(0.01)
        outcomes = await asyncio.gather(*(bench.ask() for _ in range(60)))
        assert not bench.calls.breaker.open
        bench.calls.close()
        return [outcome.cause for outcome in outcomes]

    causes = asyncio.run(main())
    assert set(causes) == {"routed", "overload"}
    assert len(stub.calls) < 30  # no work for those who are gone


def test_a_caller_that_goes_away_leaves_the_queue(stub: Any) -> None:
    async def main() -> None:
        gate = threading.Event()
        stub.behave = gate.wait
        bench = Bench(stub, inline=0, deadline_ms=20_000)
        tasks = [asyncio.create_task(bench.ask()) for _ in range(3)]
        while not (stub.calls and bench.calls.queued == 2):
            await asyncio.sleep(0.001)
        tasks[2].cancel()
        await asyncio.gather(tasks[2], return_exceptions=True)
        assert bench.calls.queued == 1
        gate.set()
        assert [(await task).cause for task in tasks[:2]] == ["routed", "routed"]
        bench.calls.close()

    asyncio.run(main())
    assert len(stub.calls) == 2
