"""Tests of tests/benchmarks/interleave.py: turns, warming, and ratios that survive a drifting machine."""

from __future__ import annotations

import pytest
from interleave import ENOUGH_MS, LONG_MS, interleaved, times_faster


class Machine:
    """Arms whose time is a cost times how slow the machine is by then; it slows down with every call."""

    def __init__(self, slower_by: float = 1.0) -> None:
        self.calls: list[str] = []
        self._slow, self._slower_by = 1.0, slower_by

    def arm(self, name: str, cost: float):
        def run() -> float:
            self.calls.append(name)
            self._slow *= self._slower_by
            return cost * self._slow

        return run


def turns(calls: list[str]) -> list[str]:
    """The calls with repetitions taken out."""
    return [name for i, name in enumerate(calls) if i == 0 or calls[i - 1] != name]


def test_every_round_begins_with_another_arm() -> None:
    machine = Machine()
    found = interleaved({name: machine.arm(name, 1.0) for name in "abc"}, 3)
    rounds = [turns(machine.calls)[i : i + 3] for i in range(0, 9, 3)]
    assert [sorted(one) for one in rounds] == [list("abc")] * 3
    assert len({one[0] for one in rounds}) == 3
    assert {name: len(ms) for name, ms in found.items()} == dict.fromkeys("abc", 3)


def test_ratios_survive_a_machine_that_slows_down() -> None:
    machine = Machine(slower_by=1.01)
    found = interleaved({"slow": machine.arm("slow", 6.0), "fast": machine.arm("fast", 2.0)}, 12)
    assert found["slow"][-1] > 2 * found["slow"][0]  # the drift is there
    assert times_faster(found["slow"], found["fast"]).median == pytest.approx(3.0, rel=0.05)


def test_a_first_call_is_not_measured() -> None:
    costs = {"a": 0}

    def colder_first() -> float:
        costs["a"] += 1
        return 500.0 if costs["a"] % 4 == 1 else 10.0  # with three measured calls, every fourth begins a burst

    other = Machine().arm("b", 30.0)
    assert interleaved({"a": colder_first, "b": other}, 1)["a"][0] == 10.0


def test_an_arm_that_takes_long_runs_once_a_round() -> None:
    machine = Machine()
    found = interleaved({"long": machine.arm("long", LONG_MS), "short": machine.arm("short", 1.0)}, 2)
    assert machine.calls.count("long") == 3  # a warm-up round, and two that count
    assert found["long"] == [LONG_MS, LONG_MS]


def test_a_burst_ends_when_enough_is_measured() -> None:
    machine = Machine()
    interleaved({"a": machine.arm("a", ENOUGH_MS), "b": machine.arm("b", 1.0)}, 1)
    assert machine.calls.count("a") == 2 * 2  # of either round, one call to warm and one measured


def test_ratios_need_the_same_rounds() -> None:
    with pytest.raises(ValueError):
        times_faster([1.0, 2.0], [1.0])
    with pytest.raises(ValueError):
        times_faster([], [])
