"""Tests of gateways/calls.py: time, failure and load.

A machine of CI's may stand still for a few hundred milliseconds: what must happen *before* some time has that much
room.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from pace import Clock, until

from arllm.runtime.gateways.calibration import Calibration
from arllm.runtime.gateways.calls import Calls, Outcome, Question
from arllm.runtime.gateways.config import GatewayConfig
from arllm.runtime.gateways.engine import Engine


class Bench:
    """Calls of the stub."""

    def __init__(
        self,
        stub: Any,
        *,
        inline: int = 10_000,
        deadline_ms: float = 1000.0,
        clock: Callable[[], float] = time.perf_counter,
        **settings: Any,
    ) -> None:
        config = GatewayConfig(default_model="small", deadline_ms=deadline_ms, **settings)
        self.engine = Engine.of(stub, config, Calibration(inline, 0.01, 0.002, 0.001))
        self.calls, self._clock = Calls(config, self.engine.deadline, clock), clock

    async def ask(self, query: str = "large") -> Outcome:
        return await self.calls.route(self.engine, Question(query, 0.0, None, None, self._clock()))


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


class Panic(BaseException):
    """As of tokenizers' Rust half: no Exception."""


@pytest.mark.parametrize("error", [RuntimeError, Panic, SystemExit])
@pytest.mark.parametrize("inline", [0, 10_000])
def test_an_error_is_an_outcome(stub: Any, inline: int, error: type[BaseException]) -> None:
    def behave() -> None:
        raise error("the session is gone")

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
        bench = Bench(stub, inline=0, deadline_ms=300, breaker_failures=2, breaker_seconds=3600)
        stub.behave = gate.wait
        assert [(await bench.ask()).cause for _ in range(4)] == ["deadline", "deadline", "breaker", "breaker"]
        gate.set()
        bench.calls.close()

    asyncio.run(main())


def test_many_that_wait_for_one_stall_are_one_failure(stub: Any) -> None:
    async def main() -> None:
        gate = threading.Event()
        bench = Bench(stub, inline=0, deadline_ms=400, breaker_failures=3, breaker_seconds=3600)
        stub.behave = gate.wait
        assert [outcome.cause for outcome in await asyncio.gather(*(bench.ask() for _ in range(9)))] == [
            "deadline"
        ] * 9
        assert not bench.calls.breaker.open
        assert not bench.calls.breaker.trusted
        assert [(await bench.ask()).cause for _ in range(3)] == ["deadline", "deadline", "breaker"]
        gate.set()
        bench.calls.close()

    asyncio.run(main())


def test_what_a_thread_brings_too_late_counts_no_more(stub: Any) -> None:
    async def main() -> None:
        gate = threading.Event()
        bench = Bench(stub, inline=0, deadline_ms=300, breaker_failures=2)
        stub.behave = gate.wait
        assert (await bench.ask()).cause == "deadline"
        gate.set()
        until(lambda: bench.calls._workers.finished == 1)
        await asyncio.sleep(0.01)
        assert not bench.calls.breaker.open  # no second failure
        assert not bench.calls.breaker.trusted  # and no success
        bench.calls.close()

    asyncio.run(main())


def test_a_decision_that_the_loop_hears_of_too_late_is_used_and_no_failure(
    stub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *args: None)  # the deadline's timer comes first
        bench = Bench(stub, inline=0, deadline_ms=800, breaker_failures=1)
        outcome = await bench.ask()
        assert outcome.cause == "routed"
        assert outcome.decision is not None
        assert bench.calls.breaker.trusted
        bench.calls.close()

    asyncio.run(main())


def test_a_call_that_had_to_wait_is_judged_by_its_own_time(stub: Any) -> None:
    """One thread, two calls, each most of a deadline long: there is too much to do, and the router is fine."""

    async def main() -> None:
        gate = threading.Event()
        bench = Bench(stub, inline=0, deadline_ms=2000, breaker_failures=1)
        stub.behave = lambda: time.sleep(1.5) if len(stub.calls) == 1 else gate.wait()
        outcomes = await asyncio.gather(bench.ask(), bench.ask())
        assert [outcome.cause for outcome in outcomes] == ["routed", "overload"]
        gate.set()
        until(lambda: bench.calls._workers.running == 0)
        await asyncio.sleep(1.6)  # past the time at which the second would be overdue
        assert bench.calls.breaker.trusted
        bench.calls.close()

    asyncio.run(main())


def test_one_call_that_hangs_while_others_end_is_a_failure(stub: Any) -> None:
    async def main() -> None:
        gate = threading.Event()
        bench = Bench(stub, inline=0, deadline_ms=1000, breaker_failures=1, breaker_seconds=3600, workers=2)
        stub.behave = lambda: gate.wait() if stub.calls[-1][0] == "hang" else None
        hanging = asyncio.create_task(bench.ask("hang"))
        while not stub.calls:
            await asyncio.sleep(0.001)
        assert (await bench.ask()).cause == "routed"
        assert (await hanging).cause == "deadline"
        while not bench.calls.breaker.open:
            await asyncio.sleep(0.001)
        gate.set()
        bench.calls.close()

    asyncio.run(main())


@pytest.mark.parametrize("other_work", [0.0, 0.006])
def test_in_a_slow_loop_nobody_is_shed_whom_there_was_time_for(stub: Any, other_work: float) -> None:
    """30 at once, 0.3 ms each, and a deadline of 40: one inference a round of 6 would serve six of them."""

    async def main() -> list[str]:
        clock = Clock()
        loop = asyncio.get_running_loop()
        bench = Bench(stub, deadline_ms=40, max_queue=100, clock=clock)
        stub.behave = lambda: clock.work(0.0003)
        asking = [asyncio.create_task(bench.ask()) for _ in range(30)]

        def work() -> None:
            clock.work(other_work)
            if not all(task.done() for task in asking):
                loop.call_soon(work)

        loop.call_soon(work)
        causes = [(await task).cause for task in asking]
        bench.calls.close()
        return causes

    assert asyncio.run(main()) == ["routed"] * 30


def test_after_a_stall_in_the_loop_the_next_call_is_in_a_thread(stub: Any) -> None:
    async def main() -> None:
        bench = Bench(stub, deadline_ms=800)
        stub.behave = lambda: time.sleep(1.8)
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
        bench = Bench(stub, breaker_failures=1, breaker_seconds=1.0)
        stub.behave = lambda: 1 / 0
        assert [(await bench.ask()).cause for _ in range(2)] == ["error", "breaker"]
        stub.behave = lambda: None
        await asyncio.sleep(1.1)
        assert [(await bench.ask()).cause for _ in range(3)] == ["routed"] * 3
        bench.calls.close()

    asyncio.run(main())


@pytest.mark.parametrize("inline", [0, 10_000])
def test_too_many_at_once_are_shed_at_once(stub: Any, inline: int) -> None:
    async def main() -> list[Outcome]:
        bench = Bench(stub, inline=inline, inline_ms=1e-3, max_queue=4, deadline_ms=20_000)
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
        bench = Bench(stub, inline=inline, max_queue=1000, deadline_ms=2000, breaker_failures=1)
        stub.behave = lambda: time.sleep(0.2)
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


def test_under_overload_those_are_let_in_whom_there_is_time_for(stub: Any) -> None:
    """A router that can answer a third of them: without a look ahead, each would wait and nearly all in vain."""

    async def main() -> list[Outcome]:
        bench = Bench(stub, inline=0, deadline_ms=1200)
        stub.behave = lambda: time.sleep(0.4)
        await bench.ask()
        asking = []
        for _ in range(30):
            asking.append(asyncio.create_task(bench.ask()))
            await asyncio.sleep(0.132)
        outcomes = [await task for task in asking]
        assert bench.calls.breaker.trusted
        bench.calls.close()
        return outcomes

    outcomes = asyncio.run(main())
    causes = [outcome.cause for outcome in outcomes]
    assert {"routed", "overload"} <= set(causes)
    assert causes.count("routed") >= len(stub.calls) / 2  # most decisions are waited for
    assert sum(outcome.queue_ms == 0.0 for outcome in outcomes) >= 30 - len(stub.calls)  # the others knew at once
