"""Tests of export/latency.py: which lengths are timed, on what, and that variants take turns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from arllm.export import latency

IDS = [np.arange(5, 12), np.arange(40, 60)]


class Recorder:
    """A session that notes what it is asked; ``log`` is shared, so that the order shows."""

    def __init__(self, name: str, log: list[tuple[str, int]]) -> None:
        self.name, self.log = name, log

    def run_many(self, outputs: tuple[str, ...], inputs: dict[str, Any]) -> list[Any]:
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        assert outputs == ("query_vector", "familiarity")
        assert ids.shape == mask.shape == (1, ids.shape[1])
        assert mask.all()
        np.testing.assert_array_equal(ids[0], np.resize(np.concatenate(IDS), 256)[: ids.shape[1]])
        self.log.append((self.name, ids.shape[1]))
        return []


def measured(max_tokens: int) -> tuple[dict[str, Any], list[tuple[str, int]]]:
    log: list[tuple[str, int]] = []
    sessions: Any = {name: Recorder(name, log) for name in ("a", "b")}
    return latency.measure(sessions, IDS, max_tokens), log


@pytest.fixture(autouse=True)
def _no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "SECONDS", 0.0)


@pytest.mark.parametrize(
    ("max_tokens", "lengths"), [(512, [16, 64, 256]), (256, [16, 64, 256]), (255, [16, 64]), (15, [])]
)
def test_the_buckets_that_the_budget_allows(max_tokens: int, lengths: list[int]) -> None:
    figures, log = measured(max_tokens)
    assert sorted({length for _, length in log}) == lengths
    for name in ("a", "b"):
        assert list(figures[name]["ms"]) == [str(length) for length in lengths]
        assert figures[name]["machine"] == latency.processor() != ""
        assert figures[name]["threads"] == 1


def test_variants_take_turns() -> None:
    _, log = measured(16)
    names = [name for name, _ in log]
    assert names == ["a", "b"] * (len(names) // 2)
    assert len(names) == 2 * (1 + latency.LEAST_ROUNDS)


def test_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "SECONDS", 1e9)
    _, log = measured(16)
    assert len(log) == 2 * (1 + latency.MOST_ROUNDS)


def test_it_is_the_median_without_the_first_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of 50, then 1, 9, 2, 9, 1, 3, 2 ms: sorted 1 1 2 2 3 9 9."""
    lasting = iter([50, 1, 9, 2, 9, 1, 3, 2])
    clock = iter([t for d in lasting for t in (0, d * 1_000_000)])
    monkeypatch.setattr(latency.time, "perf_counter_ns", lambda: next(clock))
    sessions: Any = {"a": Recorder("a", [])}
    assert latency.measure(sessions, IDS, 16)["a"]["ms"] == {"16": 2.0}
