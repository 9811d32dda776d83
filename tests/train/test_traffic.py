"""Tests of train/traffic.py: the forms of traffic, what is left out, and a router's predictions on it."""

from __future__ import annotations

import csv
import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arllm.runtime.errors import CandidateError, OutcomesError
from arllm.train import preferences
from arllm.train.outcomes import Outcomes
from arllm.train.traffic import held_out, predict_traffic, read_traffic

NAN = float("nan")
TEXTS = ["What is 2 + 2?", 'Say "why",\nthen how.', "What is 2 + 2?"]


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / name
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    if plain.suffix == ".jsonl":
        plain.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif plain.suffix == ".csv":
        with plain.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.Table.from_pylist(rows), plain)
    if plain != path:
        path.write_bytes(gzip.compress(plain.read_bytes()))
    return path


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz", "t.csv", "t.csv.gz", "t.parquet"])
def test_queries_alone(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name, [{"time": i, "query": text, "split": "x"} for i, text in enumerate(TEXTS)])
    found = read_traffic(path)
    assert found.queries == tuple(TEXTS)
    assert found.candidates == ()
    assert found.splits == ("", "", "")


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv", "t.parquet"])
def test_outcomes_are_told_by_their_fields(tmp_path: Path, name: str) -> None:
    row = {"query": TEXTS[0], "dataset": "d", "split": "val"}
    path = write(tmp_path, name, [{**row, "model": m, "correct": c} for m, c in (("a", 1.0), ("b", 0.0))])
    found = read_traffic(path)
    assert (found.queries, found.candidates, found.splits) == ((TEXTS[0],), ("a", "b"), ("val",))
    assert found.correct.tolist() == [[1.0, 0.0]]


def test_a_folder_of_outcomes(outcomes_folder: Path) -> None:
    assert len(read_traffic(outcomes_folder).candidates) > 2


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("t.jsonl", "", "t.jsonl: no rows"),
        ("t.jsonl", '{"query": "a"}\n{"text": "b"}\n', 't.jsonl:2: no "query"'),
        ("t.csv", "text\nb\n", 't.csv:1: no column "query"'),
        ("t.csv", "query\n", "t.csv: no rows"),
        ("t.txt", "a\n", "unknown form"),
    ],
)
def test_traffic_that_cannot_be_read(tmp_path: Path, name: str, text: str, complaint: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(OutcomesError, match=complaint):
        read_traffic(tmp_path / name)


def test_training_queries_are_left_out(tmp_path: Path) -> None:
    splits = ["train", "val", "", "test"]
    rows = [{"query": f"q {split}", "split": split} for split in splits]
    found = read_traffic(write(tmp_path, "t.jsonl", rows))
    assert held_out(found).queries == ("q val", "q ", "q test")
    assert held_out(found, ("train",)).queries == ("q train",)
    with pytest.raises(OutcomesError, match="the file has: none, test, train, val"):
        held_out(found, ("ood",))


# --- the gateway --------------------------------------------------------------------------------------------


def few_of(folder: Path) -> Outcomes:
    return read_traffic(folder).rows(range(24))


def test_choices_are_the_gateways(tiny_bundle: Path, outcomes_folder: Path) -> None:
    from arllm.runtime import Router

    router = Router.load(tiny_bundle)
    few = few_of(outcomes_folder)
    some = router.pool.names[1:]
    for allowed in (None, some):
        traffic, _ = predict_traffic(router, few, "hdp", allowed)
        assert traffic.names == (allowed or router.pool.names)
        path = preferences.sweep(traffic)
        for k in range(0, len(path.low), 5):
            beta = path.beta(k)
            decided = [router.route(text, beta, "hdp", allowed) for text in few.queries]
            assert [traffic.names[c] for c in traffic.choices(beta)] == [d.model for d in decided]
            spent = float(np.mean([d.cost[d.model] for d in decided]))
            assert spent == pytest.approx(float(path.mean(traffic.costs)[k]))
    with pytest.raises(CandidateError, match="unknown candidate 'nobody'"):
        predict_traffic(router, few, "hdp", ["nobody"])


def test_accuracy_is_measured_only_where_everyone_was_evaluated(tiny_bundle: Path, outcomes_folder: Path) -> None:
    from arllm.runtime import Router

    router = Router.load(tiny_bundle)
    few = few_of(outcomes_folder)
    rng = np.random.default_rng(0)
    full = replace(few, correct=rng.integers(0, 2, few.correct.shape).astype(np.float32))
    traffic, notes = predict_traffic(router, full, "hdp")
    assert notes == []
    assert traffic.correct is not None
    at = full.candidates.index(traffic.names[-1])
    np.testing.assert_array_equal(traffic.correct[:, -1], full.correct[:, at])

    patchy = replace(full, correct=full.correct.copy())
    patchy.correct[:6, at] = NAN
    traffic, notes = predict_traffic(router, patchy, "hdp")
    assert traffic.correct is None
    assert f"1 of {len(traffic.names)} candidates" in notes[0]
    assert f"{full.candidates[at]} on 75%" in notes[0]
    without, notes = predict_traffic(router, patchy, "hdp", traffic.names[:-1])
    assert without.correct is not None

    strangers = replace(full, candidates=tuple(f"x{i}" for i in range(len(full.candidates))))
    traffic, notes = predict_traffic(router, strangers, "hdp")
    assert traffic.correct is None
    assert notes == ["accuracy was not measured: the outcomes are of other models"]
