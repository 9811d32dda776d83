"""Tests of train/import_wide.py on small tables of RouteLLM's and RouterBench's shape; no pickle is ever loaded."""

from __future__ import annotations

import csv
import gzip
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arllm.runtime.errors import OutcomesError
from arllm.train.import_harness import import_harness
from arllm.train.import_wide import import_wide_csv

NAN = float("nan")
Helper = Callable[..., Any]


def fails(match: str) -> Any:
    return pytest.raises(OutcomesError, match=match)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    text_path = path.with_suffix("") if path.suffix == ".gz" else path
    with text_path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    if path != text_path:
        path.write_bytes(gzip.compress(text_path.read_bytes()))
        text_path.unlink()
    return path


PROMPTS = ['A "dished" face, she said\nA. yes\r\nB. no\nAnswer:', "What is 2 + 2?", "Say, why?"]


@pytest.mark.parametrize("name", ["mmlu_law.csv", "mmlu_law.csv.gz"])
def test_routellm_mmlu(tmp_path: Path, name: str, assert_round_trip: Helper) -> None:
    rows = [{"prompt": p, "mixtral": i == 1, "gpt-4": True} for i, p in enumerate(PROMPTS)]
    path = write_csv(tmp_path / name, rows)
    outcomes = import_wide_csv(path, query_column="prompt", dataset={"mmlu_": "mmlu"})
    assert outcomes.queries == tuple(PROMPTS)  # line ends and quotes as they were
    assert outcomes.candidates == ("mixtral", "gpt-4")
    assert outcomes.correct.tolist() == [[0, 1], [1, 1], [0, 1]]
    assert (set(outcomes.datasets), set(outcomes.subsets)) == ({"mmlu"}, {"mmlu_law"})
    assert_round_trip(outcomes, tmp_path / "out")


def test_routellm_gsm8k_leaves_the_responses_out(tmp_path: Path) -> None:
    rows = [
        {"prompt": p, "mixtral": True, "gpt-4": False, "mixtral_response": "4,\n5", "gpt-4_response": ""}
        for p in PROMPTS
    ]
    outcomes = import_wide_csv(write_csv(tmp_path / "gsm8k_responses.csv", rows), query_column="prompt")
    assert outcomes.candidates == ("mixtral", "gpt-4")
    assert set(outcomes.datasets) == {"gsm8k_responses"}


def test_several_files_join_by_text_within_a_subset(tmp_path: Path, assert_round_trip: Helper) -> None:
    law = write_csv(tmp_path / "law.csv", [{"q": "Q", "a": 1}, {"q": "Q", "a": 0}, {"q": "R", "a": 1}])
    art = write_csv(tmp_path / "art.csv", [{"q": "Q", "a": 0}])
    outcomes = import_wide_csv([law, art], query_column="q")
    assert outcomes.queries == ("Q", "R", "Q")
    assert outcomes.subsets == ("law", "law", "art")
    assert outcomes.correct.tolist() == [[0.5], [1], [0]]
    assert_round_trip(outcomes, tmp_path / "out")


def routerbench_rows() -> list[dict[str, Any]]:
    rows = []
    for i, prompt in enumerate(PROMPTS):
        row: dict[str, Any] = {"sample_id": f"mmlu-law.val.{i}", "prompt": str([prompt]), "eval_name": "mmlu-law"}
        for model in ("org/yi", "gpt-4"):
            row |= {model: 0.25 * i, f"{model}|model_response": "['C']", f"{model}|total_cost": 7.5e-05}
        rows.append(row | {"oracle_model_to_route_to": "no_model_correct"})
    rows[2]["gpt-4"] = None
    return rows


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_routerbench(tmp_path: Path, form: str, assert_round_trip: Helper) -> None:
    path = tmp_path / f"routerbench.{form}"
    if form == "csv":
        write_csv(path, routerbench_rows())
    else:
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.Table.from_pylist(routerbench_rows()), path)
    outcomes = import_wide_csv(
        path, query_column="prompt", dataset={"mmlu": "mmlu"}, dataset_column="eval_name", id_column="sample_id"
    )
    assert outcomes.queries == tuple(PROMPTS)  # out of the literal list of turns
    assert outcomes.candidates == ("org/yi", "gpt-4")
    assert outcomes.query_ids[0] == "mmlu-law.val.0"
    assert (set(outcomes.datasets), set(outcomes.subsets)) == ({"mmlu"}, {"mmlu-law"})
    np.testing.assert_array_equal(outcomes.correct, [[0, 0], [0.25, 0.25], [0.5, NAN]])
    assert_round_trip(outcomes, tmp_path / "out")


def test_wide_files_of_different_models_join_by_id(tmp_path: Path) -> None:
    a = write_csv(tmp_path / "a.csv", [{"id": i, "q": f"Q{i}", "set": "s", "a": i} for i in (0, 1)])
    b = write_csv(tmp_path / "b.csv", [{"id": i, "q": f"Q{i}", "set": "s", "b": 1} for i in (1, 0)])
    columns = {"query_column": "q", "id_column": "id", "dataset_column": "set"}
    assert import_wide_csv([a, b], **columns).correct.tolist() == [[0, 1], [1, 1]]
    write_csv(b, [{"id": 0, "q": "Q1", "set": "s", "b": 1}])
    with fails(f"^{re.escape(f'{b}:2')}: document '0' has another text than at {re.escape(f'{a}:2')}"):
        import_wide_csv([a, b], **columns)


def test_wide_errors(tmp_path: Path) -> None:
    path = write_csv(
        tmp_path / "x.csv", [{"q": "one\ntwo", "a": 1, "topic": "t"}, {"q": "three", "a": 7, "topic": "t"}]
    )
    with fails(f"^{re.escape(f'{path}:2')}: \"topic\" is 't', not .*--models"):
        import_wide_csv(path, query_column="q")
    with fails(f'^{re.escape(f"{path}:4")}: "a" is 7.0, not true, false or a number'):
        import_wide_csv(path, query_column="q", models="a")
    with fails('no column "b"'):
        import_wide_csv(path, query_column="q", models=("a", "b"))
    with fails("no column is left for a model"):
        import_wide_csv(path, query_column="q", dataset_column="a", subset_column="topic")
    with fails("unknown form; give .csv"):
        import_wide_csv(tmp_path / "x.tsv", query_column="q")


@pytest.mark.parametrize("name", ["routerbench_0shot.pkl", "x.pickle", "x.pkl.gz"])
def test_pickles_are_never_loaded(tmp_path: Path, name: str) -> None:
    with fails("a pickle runs code when it is loaded, so arllm never loads one.*to_parquet"):
        import_wide_csv(tmp_path / name, query_column="prompt")
    with fails("a pickle"):
        import_harness(tmp_path / name)
