"""Tests of train/latency/rounds.py, with a clock that only the fake work moves: order, counting, pairing."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from arllm.train.latency.rounds import (
    BURST_NS,
    LEAST_CALLS,
    LEAST_ROUNDS,
    MOST_CALLS,
    Bound,
    Burst,
    Run,
    calls_of,
    every_item,
    interleave,
    many_callers,
    no_collection,
    one_caller,
    paired,
    per_second,
    throughputs,
    turned,
)

MS = 1_000_000


class Machine:
    """A clock, and work that moves it."""

    def __init__(self) -> None:
        self.now = 0
        self.log: list[tuple[str, int, int]] = []

    def clock(self) -> int:
        return self.now

    def work(self, name: str, cost: int) -> Run:
        """A burst whose calls take ``cost`` ns each, noted with its round and number of calls."""

        def run(number: int, calls: int) -> Burst:
            self.log.append((name, number, calls))
            self.now += calls * cost
            return Burst((cost,) * calls, calls * cost)

        return run


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(3) as found:
        yield found


def test_every_round_does_every_work_by_every_subject_whose_turn_moves_on(machine: Machine) -> None:
    works = {w: {s: machine.work(f"{w}{s}", MS) for s in range(3)} for w in "ab"}
    found = interleave(works, Bound(1.0, rounds=3), machine.clock)
    order = [" ".join(name for name, number, _ in machine.log if number == r) for r in range(4)]
    assert order == ["a0 a1 a2 b0 b1 b2", "a1 a2 a0 b1 b2 b0", "a2 a0 a1 b2 b0 b1", "a0 a1 a2 b0 b1 b2"]
    assert set(found) == {(w, s) for w in "ab" for s in range(3)}
    assert {len(bursts) for bursts in found.values()} == {3}  # the warm-up round is not counted


def test_the_warm_up_says_how_many_calls_a_burst_has_by_the_slowest(machine: Machine) -> None:
    works = {"a": {0: machine.work("fast", MS), 1: machine.work("slow", 4 * MS)}}
    found = interleave(works, Bound(1.0, rounds=1), machine.clock)
    assert {calls for _, number, calls in machine.log if number == 1} == {BURST_NS // (4 * MS)}
    assert [len(found["a", s][0].times) for s in (0, 1)] == [5, 5]


def test_works_that_belong_together_make_the_same_number_of_calls(machine: Machine) -> None:
    works = {(n, by): {0: machine.work(f"{n} {by}", n * by * MS)} for n in (1, 2) for by in (1, 2)}
    interleave(works, Bound(1.0, rounds=1), machine.clock, together=lambda work: work[0])
    calls = {name: calls for name, number, calls in machine.log if number == 1}
    assert calls == {"1 1": 10, "1 2": 10, "2 1": 5, "2 2": 5}


def test_seconds_end_before_a_round_that_would_overrun(machine: Machine) -> None:
    # A round is a burst of 5 calls of 4 ms, the warm-up one of 4: 16 + 4 * 20 = 96 ms, and one more is too many.
    found = interleave({"a": {0: machine.work("a", 4 * MS)}}, Bound(0.1), machine.clock)
    assert len(found["a", 0]) == 4
    assert machine.now == 96 * MS


def test_however_slow_there_are_rounds_to_compare(machine: Machine) -> None:
    found = interleave({"a": {0: machine.work("a", 1000 * MS)}}, Bound(0.1), machine.clock)
    assert len(found["a", 0]) == LEAST_ROUNDS


def test_the_collector_rests_while_timing_and_is_as_before_afterwards(machine: Machine) -> None:
    seen = []

    def run(number: int, calls: int) -> Burst:
        seen.append(gc.isenabled())
        return Burst((1,), 1)

    assert gc.isenabled()
    interleave({"a": {0: run}}, Bound(1.0, rounds=1), machine.clock)
    assert seen == [False, False]
    assert gc.isenabled()
    with pytest.raises(RuntimeError), no_collection():
        raise RuntimeError
    assert gc.isenabled()
    gc.disable()
    try:
        with no_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_burst_has_as_many_calls_as_fit_within_bounds() -> None:
    assert calls_of(Burst((2 * MS,) * 4, 8 * MS)) == 10
    assert calls_of(Burst((1,), 1)) == MOST_CALLS
    assert calls_of(Burst((0,), 0)) == MOST_CALLS
    assert calls_of(Burst((3600 * 1000 * MS,), 1)) == LEAST_CALLS
    assert calls_of(Burst((90 * MS, 2 * MS, 2 * MS, 2 * MS), 96 * MS)) == 10  # one call was preempted


def test_one_caller_goes_on_through_the_items_and_times_each_call(machine: Machine) -> None:
    routed: list[int] = []

    def call(cost: int) -> int:
        routed.append(cost)
        machine.now += cost
        return -cost

    run = one_caller(call, [1, 2, 3], machine.clock, keep=lambda answer: answer * 10)
    first, second = run(0, 2), run(1, 2)
    assert routed == [1, 1, 2, 1, 3, 1]  # each burst begins with a call that is not counted
    assert first == Burst((1, 2), 3, (-10, -20))
    assert second == Burst((3, 1), 4, (-30, -10))
    assert one_caller(call, [5], machine.clock)(0, 2) == Burst((5, 5), 10)


def test_every_item_is_called_once_a_round(machine: Machine) -> None:
    def call(cost: int) -> None:
        machine.now += cost

    assert every_item(call, [4, 6], machine.clock)(7, 99) == Burst((4, 6), 10)


def test_callers_at_once_route_the_same_items_each_in_its_own_thread(pool: ThreadPoolExecutor) -> None:
    by_thread: dict[int, list[str]] = {}
    met = threading.Barrier(3)

    def call(item: str) -> None:
        if threading.current_thread() is threading.main_thread():
            return  # the call that is not counted
        met.wait(timeout=20)  # passes only if three calls are under way at once
        by_thread.setdefault(threading.get_ident(), []).append(item)

    burst = many_callers(call, ["a", "b", "c", "d"], pool, 3, time.perf_counter_ns)(1, 2)
    assert sorted("".join(items) for items in by_thread.values()) == ["cd", "cd", "dc"]
    assert len(burst.times) == 6
    assert burst.wall >= max(burst.times)


def test_a_caller_that_fails_fails_the_benchmark(pool: ThreadPoolExecutor) -> None:
    def call(item: str) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError(item)

    with pytest.raises(RuntimeError, match="a"):
        many_callers(call, ["a"], pool, 2, time.perf_counter_ns)(0, 1)


def test_how_many_times_as_fast_is_by_pairs_of_calls() -> None:
    first = [Burst((10, 20, 30), 60), Burst((40, 40, 40), 120)]
    this = [Burst((5, 10, 3000), 3015), Burst((10, 10, 10), 30)]  # twice as fast but for one call; four times
    found = paired(first, this)
    assert (found.median, found.low, found.high) == (3.0, 2.0, 4.0)


def test_throughput_is_calls_over_the_time_of_all() -> None:
    alone = [Burst((1000 * MS,) * 2, 2000 * MS)]
    both = [Burst((1000 * MS,) * 4, 2000 * MS)]
    assert per_second(alone) == pytest.approx(1.0)
    assert per_second(both) == pytest.approx(2.0)
    assert throughputs(alone, both).median == pytest.approx(2.0)


def test_turning_goes_round() -> None:
    assert turned("abc", 4) == ["b", "c", "a"]
    assert turned([], 3) == []
