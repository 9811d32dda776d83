"""Tests of gateways/turns.py, workers.py and breaker.py: who runs when, and what fails."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
from pace import Clock, until

from arllm.runtime.gateways.breaker import Breaker
from arllm.runtime.gateways.turns import Turns
from arllm.runtime.gateways.workers import MAX_LOST, Job, Workers


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
    jobs = [Job(gate.wait, lambda: ended.append(True)) for _ in range(4)]
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
    assert not workers.submit(Job(gate.wait, lambda: None))


def test_how_long_a_job_would_take_is_known_from_the_last_ones() -> None:
    workers, gate = Workers(1, 8, 60.0), threading.Event()
    assert workers.expected() == 0.0  # nothing is known
    jobs = [Job(lambda: time.sleep(0.02), lambda: None) for _ in range(3)]
    assert all(workers.submit(job) for job in jobs)
    until(lambda: all(job.ended for job in jobs))
    until(lambda: not workers.running)
    assert workers.expected() == 0.0  # a thread is free
    assert all(workers.submit(Job(gate.wait, lambda: None)) for _ in range(3))
    until(lambda: workers.running)
    one = sorted(job.ended - job.started for job in jobs)[1]  # type: ignore[operator]
    assert 3 * one <= workers.expected() <= 4 * one  # two wait, and this one; the first may have begun just now
    gate.set()
    workers.close()


def test_a_job_that_raises_anything_is_answered() -> None:
    workers, ended = Workers(1, 8, 60.0), []

    def end() -> None:
        raise SystemExit(3)

    jobs = [Job(end, lambda: ended.append(True)) for _ in range(2)]
    assert all(workers.submit(job) for job in jobs)
    until(lambda: len(ended) == 2)
    assert [type(job.error) for job in jobs] == [SystemExit, SystemExit]
    assert all(job.ended is not None for job in jobs)
    workers.close()


def test_threads_that_hang_are_replaced_up_to_a_bound() -> None:
    workers, gate, ended = Workers(1, 2, 0.0), threading.Event(), []
    for i in range(MAX_LOST + 1):
        assert workers.submit(Job(gate.wait, lambda: ended.append("late")))
        until(lambda i=i: workers.running == 1 and workers.queued == 0)
        time.sleep(0.001)  # longer than stuck_seconds
    quick = Job(lambda: None, lambda: ended.append("quick"))
    assert workers.submit(quick)
    assert workers.queued == 1  # no more threads are lost than the bound allows
    gate.set()
    until(lambda: ended.count("late") == MAX_LOST + 1)
    until(lambda: "quick" in ended)
    until(lambda: sum(t.name == "arllm-router" for t in threading.enumerate()) <= 2)
    workers.close()


def rounds_of(calls: int, others: float, *, each: float = 0.75) -> list[int]:
    """How many of ``calls`` that arrive at once are made in each round of a loop that else works ``others`` a round.

    The budget is 2 (milliseconds, say; the numbers are exact in binary).
    """
    clock, made = Clock(), [0]

    async def main() -> None:
        loop = asyncio.get_running_loop()
        turns = Turns(loop, 2.0, clock)

        def work() -> None:  # what else the loop does; in each round after the turns
            clock.work(others)
            if made[-1] or turns.queued:
                made.append(0)
                loop.call_soon(work)

        def call() -> None:
            clock.work(each)
            made[-1] += 1

        tasks = [asyncio.create_task(turns.run(call)) for _ in range(calls)]
        loop.call_soon(work)
        await asyncio.gather(*tasks)
        assert turns.queued == 0

    asyncio.run(main())
    return [count for count in made if count]


def test_turns_share_a_budget_of_every_round() -> None:
    assert rounds_of(10, 0.0) == [3, 3, 3, 1]  # the third begins within the budget
    assert rounds_of(3, 0.0) == [3]  # no round is waited for without need
    assert rounds_of(3, 0.0, each=5.0) == [1, 1, 1]  # one at least


def test_in_a_loop_that_is_slow_for_other_reasons_nobody_waits_many_rounds() -> None:
    assert rounds_of(30, 9.0) == [3, 12, 12, 3]
    assert rounds_of(30, 100.0) == [3, 27]


def test_turns_come_in_order_and_bring_results_and_errors() -> None:
    async def main() -> None:
        clock, made = Clock(), []
        turns = Turns(asyncio.get_running_loop(), 0.001, clock)

        def call(name: str) -> str:
            clock.work(0.001)
            made.append(name)
            if name == "c":
                raise ValueError(name)
            return name

        tasks = [asyncio.create_task(turns.run(lambda name=name: call(name))) for name in "abcd"]
        await asyncio.sleep(0)
        assert turns.queued == 3
        late = asyncio.create_task(turns.run(lambda: call("e")))
        found = await asyncio.gather(*tasks, late, return_exceptions=True)
        assert made == list("abcde")
        assert [*map(str, found)] == list("abcde")
        assert isinstance(found[2], ValueError)

    asyncio.run(main())


@pytest.mark.parametrize("rounds", range(4))
def test_a_caller_that_leaves_takes_no_turn_and_holds_up_nobody(rounds: int) -> None:
    async def main() -> None:
        clock, made = Clock(), []
        turns = Turns(asyncio.get_running_loop(), 0.001, clock)

        def call(name: str) -> None:
            clock.work(0.001)
            made.append(name)

        tasks = [asyncio.create_task(turns.run(lambda name=name: call(name))) for name in "abcd"]
        for _ in range(1 + rounds):
            await asyncio.sleep(0)
        gone = tasks[2].cancel()
        assert turns.queued == max(0, 3 - rounds)
        await asyncio.gather(*tasks, return_exceptions=True)
        assert ("c" in made) == (rounds >= 2)
        assert gone == (rounds < 3)
        assert [name for name in made if name != "c"] == list("abd")
        assert turns.queued == 0

    asyncio.run(main())
