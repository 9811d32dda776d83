"""Timing interleaved round by round, so that the machine's drift falls on every subject alike. Free of torch.

A *work* is one thing to time (64 tokens by one caller, say), a *subject* who does it. A round does every work once,
and within a work every subject in turn, the turn moving on by one subject each round. The first round is a warm-up:
it is not counted, and tells how many calls make a burst long enough to time. Python's cyclic garbage collector rests
meanwhile, as it does in ``timeit``. Knows nothing about routers.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median, median_low
from typing import Any, TypeVar

from arllm.train.latency.stats import Ratio, ratio

Clock = Callable[[], int]  # nanoseconds, like time.perf_counter_ns
W = TypeVar("W", bound=Hashable)
T = TypeVar("T")

WARMUP_ROUNDS = 1
LEAST_ROUNDS = 2  # counted ones, whatever the time
FIRST_CALLS = 4  # of a burst in the warm-up round
LEAST_CALLS, MOST_CALLS = 3, 100
BURST_NS = 20_000_000  # what a burst should last: long against the clock, short against the machine's drift


@dataclass(frozen=True)
class Bound:
    """When to stop: after so many counted rounds, or before the seconds are over (then at least LEAST_ROUNDS)."""

    seconds: float
    rounds: int | None = None


@dataclass(frozen=True)
class Burst:
    """Calls in a row: the duration of each and of all together, in ns, and what was kept of each answer.

    ``cpu`` is what callers at once used of the processors' time, in ns.
    """

    times: tuple[int, ...]
    wall: int
    kept: tuple[Any, ...] = ()
    cpu: int = 0


Run = Callable[[int, int], Burst]  # (round, calls) → what was timed


@contextmanager
def no_collection() -> Iterator[None]:
    """Cyclic garbage collection off, and afterwards as it was."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def interleave(
    works: Mapping[W, Mapping[int, Run]],
    bound: Bound,
    clock: Clock,
    together: Callable[[W], Hashable] = lambda work: work,
) -> dict[tuple[W, int], list[Burst]]:
    """The counted bursts of every work and subject, one a round: (work, subject) → [R].

    All subjects of a work, and of works that are ``together``, make the same number of calls in a burst, by the
    slowest of them, so that their calls can be compared one by one.
    """
    found: dict[tuple[W, int], list[Burst]] = {(work, s): [] for work, runs in works.items() for s in runs}
    calls: dict[Hashable, int] = {}
    with no_collection():
        began = before = clock()
        number = 0
        while True:
            for work, runs in works.items():
                group = together(work)
                asked = FIRST_CALLS if number < WARMUP_ROUNDS else calls[group]
                bursts = {s: runs[s](number, asked) for s in turned(list(runs), number)}
                if number < WARMUP_ROUNDS:
                    calls[group] = min(calls.get(group, MOST_CALLS), *map(calls_of, bursts.values()))
                    continue
                for s, burst in bursts.items():
                    found[work, s].append(burst)
            number += 1
            now = clock()
            counted = number - WARMUP_ROUNDS
            if bound.rounds is not None:
                if counted >= bound.rounds:
                    return found
            elif counted >= LEAST_ROUNDS and 2 * now - before - began > bound.seconds * 1e9:
                return found  # another round like this one would overrun
            before = now


def turned(items: Sequence[T], by: int) -> list[T]:
    """The items, beginning ``by`` places later and going round."""
    at = by % max(1, len(items))
    return [*items[at:], *items[:at]]


def calls_of(burst: Burst) -> int:
    """How many calls make a burst of BURST_NS, by the lower median of these (one call may have been preempted)."""
    return max(LEAST_CALLS, min(MOST_CALLS, BURST_NS // max(1, median_low(burst.times))))


def one_caller(
    call: Callable[[T], Any], items: Sequence[T], clock: Clock, keep: Callable[[Any], Any] | None = None
) -> Run:
    """Calls one after the other, the items in order and going on from round to round.

    One call before them is not counted: it brings back to the caches what another subject has driven out.

    Args:
        keep: what the burst keeps of each answer; None: nothing.
    """

    def run(number: int, calls: int) -> Burst:
        call(items[0])
        return _timed(call, _portion(items, number * calls, calls), clock, keep)[0]

    return run


def every_item(call: Callable[[T], Any], items: Sequence[T], clock: Clock) -> Run:
    """Each of the items once a round, however many calls are asked for, and no call before them."""
    return lambda number, calls: _timed(call, items, clock)[0]


def many_callers(call: Callable[[T], Any], items: Sequence[T], pool: ThreadPoolExecutor, n: int, clock: Clock) -> Run:
    """As :func:`one_caller`, by ``n`` threads of ``pool`` at once: each calls with the same items, turned by one."""

    def run(number: int, calls: int) -> Burst:
        call(items[0])
        gate = threading.Barrier(n)

        def caller(k: int) -> tuple[Burst, int]:
            mine = turned(_portion(items, number * calls, calls), k)
            gate.wait()
            return _timed(call, mine, clock)

        used = time.process_time_ns()
        done = [future.result() for future in [pool.submit(caller, k) for k in range(n)]]
        times = tuple(time for burst, _ in done for time in burst.times)
        wall = max(start + burst.wall for burst, start in done) - min(start for _, start in done)
        return Burst(times, wall, cpu=time.process_time_ns() - used)

    return run


def paired(first: Sequence[Burst], this: Sequence[Burst]) -> Ratio:
    """How many times as fast ``this`` is: each round the median over its pairs of calls, then over the rounds."""
    return ratio(
        [
            median(a / max(1, b) for a, b in zip(one.times, other.times, strict=True))
            for one, other in zip(first, this, strict=True)
        ]
    )


def throughputs(first: Sequence[Burst], this: Sequence[Burst]) -> Ratio:
    """How many times the calls a second of ``first`` ``this`` makes, round by round."""
    return ratio([per_second([b]) / per_second([a]) for a, b in zip(first, this, strict=True)])


def per_second(bursts: Sequence[Burst]) -> float:
    """Calls a second over all bursts."""
    return sum(len(b.times) for b in bursts) / max(1, sum(b.wall for b in bursts)) * 1e9


def _portion(items: Sequence[T], start: int, count: int) -> list[T]:
    return [items[(start + i) % len(items)] for i in range(count)]


def _timed(
    call: Callable[[T], Any], items: Sequence[T], clock: Clock, keep: Callable[[Any], Any] | None = None
) -> tuple[Burst, int]:
    """The burst, and when it began."""
    times, kept = [], []
    began = clock()
    for item in items:
        start = clock()
        answer = call(item)
        times.append(clock() - start)
        if keep is not None:
            kept.append(keep(answer))
    return Burst(tuple(times), clock() - began, tuple(kept)), began
