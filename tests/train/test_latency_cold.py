"""Tests of train/latency/cold.py and child.py: fresh processes, their parts, order, memory and failures."""

from __future__ import annotations

import subprocess
import sys

import pytest

from arllm.runtime.errors import ArllmError
from arllm.train.latency import cold as latency_cold
from arllm.train.latency.child import peak_bytes
from arllm.train.latency.cold import ColdSubject, Start, cold_starts, start, summary
from arllm.train.latency.rounds import Bound

PARTS = ["interpreter", "import", "bundle", "tokenizer", "session", "first_route"]
NANO = ColdSubject("nano", "nano", "cpu-int8", 1, "What is 17 * 23?")


def test_a_fresh_process_says_where_its_time_went() -> None:
    found = start(NANO)
    assert list(found.parts) == PARTS
    assert all(seconds > 0 for seconds in found.parts.values())
    assert sum(found.parts.values()) <= found.whole * 1.001
    assert 20e6 < found.peak_bytes < 1e9


def test_the_memory_is_the_child_s_own_not_the_parent_s() -> None:
    # ru_maxrss would survive the fork: a parent with 400 MB must not show in the child.
    parent = (
        "import subprocess, sys\n"
        "ballast = bytearray(400_000_000)\n"
        "ballast[::4096] = bytes(len(ballast[::4096])).replace(b'\\0', b'x')\n"
        "from arllm.train.latency.child import peak_bytes\n"
        "child = 'from arllm.train.latency.child import peak_bytes; print(peak_bytes())'\n"
        "out = subprocess.run([sys.executable, '-c', child], capture_output=True, text=True, check=True).stdout\n"
        "print(peak_bytes(), out)"
    )
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True)
    mine, child = map(int, done.stdout.split())
    assert mine > 400_000_000
    if sys.platform == "linux":
        assert child < 100_000_000


def test_the_peak_is_in_bytes() -> None:
    assert 5e6 < peak_bytes() < 1e11


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(ArllmError, match=r"^broken: a fresh process could not .*no variant 'none'"):
        start(ColdSubject("broken", "nano", "none", 1, "x"))


def at(whole: float, peak: int = 1) -> Start:
    return Start(dict.fromkeys(PARTS, whole / 6), whole, peak)


def test_processes_are_interleaved_the_first_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def fake(subject: ColdSubject) -> Start:
        order.append(subject.label)
        return at(2.0 if subject.label == "a" else 0.5)

    monkeypatch.setattr(latency_cold, "start", fake)
    rows = cold_starts([ColdSubject(label, "nano", "v", 1, "x") for label in "ab"], Bound(1.0, rounds=3))
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert [(row.subject, row.processes) for row in rows] == [("a", 3), ("b", 3)]
    assert rows[0].faster is None
    assert rows[1].faster is not None
    assert rows[1].faster.median == pytest.approx(4.0)


def test_seconds_bound_the_processes_but_leave_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_cold, "start", lambda subject: at(1.0))
    (row,) = cold_starts([NANO], Bound(1e-9))
    assert row.processes == latency_cold.LEAST
    (row,) = cold_starts([NANO], Bound(1e9))
    assert row.processes == latency_cold.MOST


def test_a_row_has_medians_and_the_worst() -> None:
    row = summary("x", [at(0.3, 5_000_000), at(0.6, 7_000_000), at(1.2, 6_000_000)], None)
    assert row.parts["import"] == pytest.approx(100.0)
    assert (row.whole_ms, row.slowest_ms, row.peak_mb) == pytest.approx((600.0, 1200.0, 7.0))
