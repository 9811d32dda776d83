"""Tests of train/import_leaderboard.py on small files of both generations, and a stand-in for the hub."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from arllm.runtime.errors import MissingExtraError, OutcomesError
from arllm.train.import_leaderboard import import_leaderboard

NAN = float("nan")
Helper = Callable[..., Any]
Docs = list[dict[str, str]]


def fails(match: str) -> Any:
    return pytest.raises(OutcomesError, match=match)


def old_rows(order: Sequence[int], *, nested: bool) -> list[dict[str, Any]]:
    """Rows of the first generation: no ids; metrics in a struct, or, in the oldest, as columns."""
    rows = []
    for i in order:
        metrics = {"acc": float(i % 2), "acc_norm": 1.0}
        shared = {"full_prompt": "FEW-SHOT", "predictions": [0.1, 0.2], "gold": 0, "choices": ["x", "y"]}
        text = f"Question {i}"
        rows.append(
            {**shared, "example": text, "metrics": metrics} if nested else {**shared, "query": text, **metrics}
        )
    return rows


def write_old(root: Path, model: str, task: str, rows: list[dict[str, Any]]) -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = root / f"details_{model.replace('/', '__')}" / "2023-08-21T20:09:03.352670"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"details_harness|{task}|5_2023-08-21T20:09:03.352670.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_leaderboard_second_generation(
    tmp_path: Path, sample: Helper, write_samples: Helper, correct_of: Helper, assert_round_trip: Helper, docs: Docs
) -> None:
    write_samples(tmp_path, "org/a", [sample(0, 1.0), sample(1, 0.0)], "leaderboard_bbh_navigate", suffix=".json")
    write_samples(tmp_path, "org/b", [sample(1, 1.0), sample(0, 0.0)], "leaderboard_bbh_navigate")
    write_samples(tmp_path, "org/a", [sample(2, 1.0)], "leaderboard_math_algebra_hard")
    outcomes = import_leaderboard(tmp_path)
    assert set(zip(outcomes.datasets, outcomes.subsets, strict=True)) == {
        ("bbh", "leaderboard_bbh_navigate"),
        ("math_hard", "leaderboard_math_algebra_hard"),
    }
    assert correct_of(outcomes)[docs[0]["question"]] == {"org/a": 1.0, "org/b": 0.0}
    assert_round_trip(outcomes, tmp_path / "out")
    assert len(import_leaderboard([tmp_path], tasks="leaderboard_math")) == 1
    with fails("no task begins with leaderboard_gpqa"):
        import_leaderboard(tmp_path, tasks="leaderboard_gpqa")


@pytest.mark.parametrize("nested", [True, False])
def test_leaderboard_first_generation_is_joined_by_text(
    tmp_path: Path, nested: bool, correct_of: Helper, assert_round_trip: Helper
) -> None:
    write_old(tmp_path, "org/a", "hendrycksTest-law", old_rows([0, 1, 2], nested=nested))
    write_old(tmp_path, "org/b", "hendrycksTest-law", old_rows([2, 0, 1, 1], nested=nested))
    with fails("several metrics: acc, acc_norm"):
        import_leaderboard(tmp_path)
    outcomes = import_leaderboard(tmp_path, metric="acc")
    assert correct_of(outcomes) == {f"Question {i}": {"org/a": i % 2, "org/b": i % 2} for i in range(3)}
    assert set(zip(outcomes.datasets, outcomes.subsets, strict=True)) == {("mmlu", "hendrycksTest_law")}
    assert_round_trip(outcomes, tmp_path / "out")


def test_leaderboard_parquet_of_the_second_generation(tmp_path: Path, sample: Helper) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = tmp_path / "org__a-details"
    folder.mkdir()
    path = folder / "samples_leaderboard_mmlu_pro_2024-06-16T22-09-58.078705.parquet"
    pq.write_table(pa.Table.from_pylist([sample(1, 0.0), sample(0, 2.0)]), path)
    with fails(f'^{re.escape(str(path))}:row 2: "acc" is 2.0'):
        import_leaderboard(path, model="org/a")
    pq.write_table(pa.Table.from_pylist([sample(1, 0.0), sample(0, 1.0)]), path)
    outcomes = import_leaderboard(path, model="org/a")
    assert (outcomes.candidates, outcomes.query_ids) == (
        ("org/a",),
        ("leaderboard_mmlu_pro/1", "leaderboard_mmlu_pro/0"),
    )


class FakeHub(ModuleType):
    """Stands in for ``datasets``: configs of a repository, and the rows of each."""

    def __init__(self, repos: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
        super().__init__("datasets")
        self.repos, self.loaded = repos, list[tuple[str, str]]()

    def get_dataset_config_names(self, repo: str) -> list[str]:
        return list(self.repos[repo])

    def load_dataset(self, repo: str, config: str, *, split: str) -> list[dict[str, Any]]:
        assert split == "latest"
        self.loaded.append((repo, config))
        return self.repos[repo][config]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeHub]:
    def install(repos: dict[str, dict[str, list[dict[str, Any]]]]) -> FakeHub:
        fake = FakeHub(repos)
        monkeypatch.setitem(sys.modules, "datasets", fake)
        return fake

    return install


def test_leaderboard_from_the_hub(hub: Callable[..., FakeHub], sample: Helper) -> None:
    fake = hub(
        {
            "open-llm-leaderboard/org__a-details": {
                "org__a__leaderboard": [],
                "org__a__leaderboard_bbh": [],
                "org__a__leaderboard_bbh_navigate": [sample(0, 1.0), sample(1, 0.0)],
                "org__a__leaderboard_mmlu_pro": [sample(2, 1.0)],
            },
            "open-llm-leaderboard/org__b-details": {
                "org__b__leaderboard_bbh_navigate": [sample(1, 1.0), sample(0, 0.0)],
            },
        }
    )
    outcomes = import_leaderboard(["org/a", "open-llm-leaderboard/org__b-details"])
    assert outcomes.candidates == ("org/a", "org/b")
    assert outcomes.datasets == ("bbh", "bbh", "mmlu_pro")
    np.testing.assert_array_equal(outcomes.correct, [[1, 0], [0, 1], [1, NAN]])
    assert all(config.rpartition("__")[2] not in ("leaderboard", "leaderboard_bbh") for _, config in fake.loaded)

    fake.loaded.clear()
    import_leaderboard("org/a", tasks="leaderboard_bbh")
    assert [config for _, config in fake.loaded] == ["org__a__leaderboard_bbh_navigate"]
    with fails("open-llm-leaderboard/org__c-details: not readable from the hub .KeyError"):
        import_leaderboard("org/c")


def test_first_generation_from_the_hub(hub: Callable[..., FakeHub], correct_of: Helper) -> None:
    repo = "open-llm-leaderboard-old/details_org__a"
    fake = hub(
        {
            repo: {
                "harness_hendrycksTest_5": [],
                "harness_hendrycksTest_law_5": old_rows([1, 0], nested=True),
                "harness_arc_challenge_0": [],
                "harness_arc_challenge_25": old_rows([2], nested=False),
                "results": [],
            }
        }
    )
    outcomes = import_leaderboard(repo, metric="acc")
    assert sorted(config for _, config in fake.loaded) == ["harness_arc_challenge_25", "harness_hendrycksTest_law_5"]
    assert correct_of(outcomes) == {f"Question {i}": {"org/a": i % 2} for i in range(3)}
    assert set(outcomes.datasets) == {"mmlu", "arc_challenge"}


def test_the_hub_needs_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match="org/a: no such file; reading it from the hub needs"):
        import_leaderboard("org/a")
