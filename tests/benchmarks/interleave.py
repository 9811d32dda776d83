"""Arms that time themselves, interleaved as ``arllm bench`` interleaves its subjects.

An arm is a way to do one piece of work: of this process, or of a worker in another environment. Knows nothing about
what is compared. Milliseconds of a shared machine say little; a ratio within one round says much, since both met the
same neighbours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from statistics import median
from typing import TypeVar

from worker import clock

from arllm.train.latency.rounds import Bound, Burst, Run, interleave
from arllm.train.latency.stats import Ratio, ratio

Name = TypeVar("Name", bound=Hashable)
Arm = Callable[[], float]  # does its work once and returns the milliseconds that it took

LONG_MS = 1000.0  # an arm that takes longer needs no warming, and nobody waits for it twice in a round
ENOUGH_MS = 60.0  # of measured calls in a round


def stopwatch(function: Callable[[], object]) -> Arm:
    """An arm of a function of this process."""

    def arm() -> float:
        started = clock()
        function()
        return (clock() - started) / 1e6

    return arm


def interleaved(arms: Mapping[Name, Arm], rounds: int) -> dict[Name, list[float]]:
    """Milliseconds of every arm, one figure a round: the median of its calls."""
    work = {0: {place: _run(arm) for place, arm in enumerate(arms.values())}}
    found = interleave(work, Bound(0.0, rounds), time.perf_counter_ns)
    return {name: [median(burst.times) / 1e6 for burst in found[0, place]] for place, name in enumerate(arms)}


def _run(arm: Arm) -> Run:
    """A burst: one call unmeasured, then as many as asked for, or until ``ENOUGH_MS`` have been measured."""

    def run(_: int, calls: int) -> Burst:
        first = arm()
        measured = [first] if first >= LONG_MS else [arm()]
        while len(measured) < calls and sum(measured) < ENOUGH_MS:
            measured.append(arm())
        times = tuple(max(1, round(ms * 1e6)) for ms in measured)
        return Burst(times, sum(times))

    return run


def times_faster(slower: Sequence[float], faster: Sequence[float]) -> Ratio:
    """How many times as fast, round by round.

    Raises:
        ValueError: the two were not taken in the same rounds, or in none.
    """
    return ratio([a / b for a, b in zip(slower, faster, strict=True)])
