"""Tests of train/importers.py: the outcomes folder that every importer writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arllm.runtime.errors import OutcomesError
from arllm.train.importers import write_outcomes
from arllm.train.outcomes import Outcomes

NAN = float("nan")
Helper = Callable[..., Any]


def fails(match: str) -> Any:
    return pytest.raises(OutcomesError, match=match)


def outcomes_of(correct: Sequence[Sequence[float]]) -> Outcomes:
    n, m = len(correct), len(correct[0])
    return Outcomes(
        query_ids=tuple(f'id,"{i}"' for i in range(n)),
        queries=tuple(f"é\u2028\r\nline {i} ✓" for i in range(n)),
        datasets=("d",) * n,
        subsets=("s",) * n,
        splits=("train", "", "ood")[:n],
        candidates=tuple(f"org/m,{j}" for j in range(m)),
        correct=np.array(correct, dtype=np.float32),
    )


def test_writing_round_trips_and_is_byte_equal(tmp_path: Path, assert_round_trip: Helper) -> None:
    outcomes = outcomes_of([[0, 1], [NAN, 1 / 3], [0.1, 1 - 2**-24]])
    assert_round_trip(outcomes, tmp_path / "one")
    (tmp_path / "two").mkdir()  # an empty folder is fine
    write_outcomes(outcomes, tmp_path / "two")
    for name in ("queries.jsonl.gz", "labels.csv.gz"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
        assert (tmp_path / "one" / name).read_bytes()[4:8] == bytes(4)  # no time of writing
    assert sorted(p.name for p in tmp_path.rglob("*")) == sorted(
        ["one", "two", *["labels.csv.gz", "queries.jsonl.gz"] * 2]
    )


def test_writing_refuses_what_is_there_and_leaves_nothing_half_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = outcomes_of([[0, 1]])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with fails("full: exists and is not an empty folder"):
        write_outcomes(outcomes, tmp_path / "full")
    with fails("candidate 'query_id' stands twice"):
        write_outcomes(replace(outcomes, candidates=("query_id", "b")), tmp_path / "new")
    two = outcomes_of([[0], [1]])
    with fails("query id 'x' stands twice"):
        write_outcomes(replace(two, query_ids=("x", "x")), tmp_path / "new")

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.rename", full_disk)
    with fails("new: can't be written: No space left on device"):
        write_outcomes(outcomes, tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["full"]
