"""Fixtures of the importers' tests: rows and run folders as lm-evaluation-harness writes them, and what comes out.

Most fixtures here are functions: with --import-mode=importlib, test files can't import from each other.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arllm.train.importers import write_outcomes
from arllm.train.outcomes import Outcomes, read_outcomes

STAMP = "2024-06-16T22-09-58.078705"
DOCS = [{"question": f"What is {i} + {i}?", "answer": str(2 * i), "level": f"L{i % 2}"} for i in range(4)]


@pytest.fixture
def docs() -> list[dict[str, str]]:
    """Four documents of a task."""
    return [dict(doc) for doc in DOCS]


@pytest.fixture
def sample() -> Callable[..., dict[str, Any]]:
    """``sample(doc_id, correct, doc=None, **more)``: a row of that document."""
    return make_sample


@pytest.fixture
def write_samples() -> Callable[..., Path]:
    """``write_samples(root, model, rows, task="sums", *, stamp, suffix, results)``: the path of a run's samples."""
    return write_run


@pytest.fixture
def correct_of() -> Callable[[Outcomes], dict[str, dict[str, float]]]:
    """``correct_of(outcomes)``: {query: {model: correct}} without the blanks, so that order plays no part."""
    return by_query


@pytest.fixture
def assert_round_trip() -> Callable[[Outcomes, Path], None]:
    """``assert_round_trip(outcomes, folder)``: what is written is read back the same."""
    return write_and_compare


def make_sample(doc_id: int, correct: Any, doc: Mapping[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """A row as --log_samples writes it; metric ``acc`` unless ``more`` gives its own ``metrics``."""
    doc = DOCS[doc_id] if doc is None else doc
    row = {
        "doc_id": doc_id,
        "doc": doc,
        "target": "0",
        "arguments": {"gen_args_0": {"arg_0": f"FEW-SHOT CONTEXT\n\n{doc}", "arg_1": " 4"}},
        "resps": [[["-1.2", "False"]]],
        "filtered_resps": [["-1.2", "False"]],
        "filter": "none",
        "metrics": ["acc"],
        "doc_hash": hashlib.sha256(json.dumps(doc).encode()).hexdigest(),
        "prompt_hash": "p",
        "target_hash": "t",
        "acc": correct,
    }
    return {**row, **more}


def write_run(
    root: Path,
    model: str,
    rows: Sequence[Mapping[str, Any]],
    task: str = "sums",
    *,
    stamp: str = STAMP,
    suffix: str = ".jsonl",
    results: bool = True,
) -> Path:
    """A run folder as the harness lays it out: <org>__<name>/samples_<task>_<stamp>.jsonl and its results file."""
    folder = root / model.replace("/", "__")
    folder.mkdir(parents=True, exist_ok=True)
    if results:
        (folder / f"results_{stamp}.json").write_text(json.dumps({"results": {}, "model_name": model}))
    path = folder / f"samples_{task}_{stamp}{suffix}"
    text = (
        json.dumps(rows) if ".json" in suffix and ".jsonl" not in suffix else "\n".join(map(json.dumps, rows)) + "\n"
    )
    path.write_bytes(gzip.compress(text.encode()) if suffix.endswith(".gz") else text.encode())
    return path


def by_query(outcomes: Outcomes) -> dict[str, dict[str, float]]:
    return {
        query: {m: v for m, v in zip(outcomes.candidates, row, strict=True) if v == v}
        for query, row in zip(outcomes.queries, outcomes.correct.tolist(), strict=True)
    }


def write_and_compare(outcomes: Outcomes, folder: Path) -> None:
    write_outcomes(outcomes, folder)
    again = read_outcomes(folder)
    for field in ("query_ids", "queries", "datasets", "subsets", "splits", "candidates"):
        assert getattr(again, field) == getattr(outcomes, field)
    np.testing.assert_array_equal(again.correct, outcomes.correct)
