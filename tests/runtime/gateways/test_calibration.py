"""Tests of gateways/calibration.py, with a router and a clock that take what the test says."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from arllm.runtime.gateways.calibration import LEAST_DEADLINE, LENGTHS, LONGEST, RUNS, Calibration, measure

MS = 1e-3


class Machine:
    """A router of ``seconds(length)``, plus what ``noise(run, now)`` adds to its n-th run, by its own clock."""

    def __init__(
        self, seconds: Callable[[int], float], noise: Callable[[int, float], float] = lambda run, now: 0.0
    ) -> None:
        self.now, self.lengths = 0.0, list[int]()
        self._seconds, self._noise = seconds, noise

    def clock(self) -> float:
        return self.now

    def route(self, text: str) -> None:
        self.now += self._seconds(len(text)) + self._noise(len(self.lengths), self.now)
        self.lengths.append(len(text))

    def measured(self, limit: float = 2 * MS) -> Calibration:
        return measure(self.route, limit, self.clock)


def linear(length: int) -> float:
    return 0.1 * MS + min(length, 1000) * 0.01 * MS


def test_each_length_is_judged_by_its_median() -> None:
    found = Machine(linear).measured()
    assert found.inline_bytes == 128  # 1.38 ms; 256 bytes would take 2.66
    assert found.typical == pytest.approx(1.38 * MS)
    assert found.p99 == pytest.approx(10.1 * MS)
    assert Machine(linear).measured(20 * MS).inline_bytes == LONGEST
    assert Machine(linear).measured(0.0).inline_bytes == 0
    assert Machine(lambda length: 0.0).measured(0.0).inline_bytes == LONGEST


def test_cold_runs_count_nothing() -> None:
    cold: dict[int, int] = {}

    def seconds(length: int) -> float:
        cold[length] = cold.get(length, 0) + 1
        return linear(length) + (50 * MS if cold[length] == 1 else 0.0)

    found, warm = Machine(seconds).measured(), Machine(linear).measured()
    assert (found.inline_bytes, found.p99) == (warm.inline_bytes, pytest.approx(warm.p99))


def test_a_burst_of_other_work_changes_nothing() -> None:
    """As long as it takes less than half of the rounds: wherever it begins, and whatever it costs a run."""
    quiet = Machine(linear)
    expected = quiet.measured()
    for cost in (1 * MS, 10 * MS, 100 * MS):
        for part in range(100):
            begin = quiet.now * part / 100

            def burst(run: int, now: float, begin: float = begin, cost: float = cost) -> float:
                return cost if begin <= now < begin + 0.05 else 0.0

            busy = Machine(linear, burst).measured()
            assert busy.inline_bytes == expected.inline_bytes
            assert busy.p99 == pytest.approx(expected.p99)


@pytest.mark.parametrize("seed", range(5))
def test_single_spikes_do_not_make_the_deadline(seed: int) -> None:
    spikes = random.Random(seed)
    taken = [15 * MS if spikes.random() < 0.01 else 0.0 for _ in range(2000)]
    found = Machine(lambda length: 0.3 * MS, lambda run, now: taken[run]).measured()
    assert found.inline_bytes == LONGEST
    assert found.default_deadline == LEAST_DEADLINE


def test_a_tail_of_the_routers_own_does() -> None:
    """Every part run takes 8 ms: that is how this router is."""
    found = Machine(lambda length: 0.3 * MS, lambda run, now: 8 * MS if run % 10 == 0 else 0.0).measured()
    assert found.default_deadline == pytest.approx(3 * 8.3 * MS)


def test_a_slow_router_is_not_measured_for_long() -> None:
    machine = Machine(lambda length: 250 * MS)
    assert machine.measured().inline_bytes == 0
    assert set(machine.lengths) == {LENGTHS[0], LONGEST}
    assert len(machine.lengths) < 2 * RUNS


@pytest.mark.parametrize(
    ("found", "deadline", "by_operator", "words"),
    [
        (Calibration(0, 0.5, 0.002, 0.1), 1.5, False, ["all queries run in threads", "3 times", "1500.0 ms"]),
        (Calibration(0, 0.5, 0.002, 0.1), 0.05, True, ["deadline 50.0 ms: as set", "p99 is 500.00 ms"]),
        (Calibration(128, 0.02, 0.002, 0.001), 0.06, False, ["up to 128 bytes", "1.00 ms, the limit is 2"]),
        (Calibration(LONGEST, 0.001, 0.002, 0.001), 0.01, False, ["all queries run in the event loop", "the least"]),
    ],
)
def test_the_log_says_what_was_chosen_and_why(
    found: Calibration, deadline: float, by_operator: bool, words: list[str]
) -> None:
    told = found.told(deadline, by_operator=by_operator)
    assert all(word in told for word in words), told
