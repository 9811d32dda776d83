"""Tests of the importers (train/import_*.py, train/importers.py) on small files of each published layout."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from arllm.runtime.errors import MissingExtraError, OutcomesError
from arllm.train.import_harness import import_harness, query_of
from arllm.train.import_leaderboard import import_leaderboard
from arllm.train.import_wide import import_wide_csv
from arllm.train.importers import write_outcomes
from arllm.train.outcomes import Outcomes, read_outcomes

STAMP = "2024-06-16T22-09-58.078705"
LATER = "2024-07-01T00-00-00.000001"
DOCS = [{"question": f"What is {i} + {i}?", "answer": str(2 * i), "level": f"L{i % 2}"} for i in range(4)]
NAN = float("nan")


def sample(doc_id: int, correct: Any, doc: Mapping[str, Any] | None = None, **more: Any) -> dict[str, Any]:
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


def write_samples(
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


def correct_of(outcomes: Outcomes) -> dict[str, dict[str, float]]:
    """{query: {model: correct}} without the blanks, so that order plays no part."""
    return {
        query: {m: v for m, v in zip(outcomes.candidates, row, strict=True) if v == v}
        for query, row in zip(outcomes.queries, outcomes.correct.tolist(), strict=True)
    }


def assert_round_trip(outcomes: Outcomes, folder: Path) -> None:
    write_outcomes(outcomes, folder)
    again = read_outcomes(folder)
    for field in ("query_ids", "queries", "datasets", "subsets", "splits", "candidates"):
        assert getattr(again, field) == getattr(outcomes, field)
    np.testing.assert_array_equal(again.correct, outcomes.correct)


def fails(match: str) -> Any:
    return pytest.raises(OutcomesError, match=match)


# --- lm-evaluation-harness -----------------------------------------------------------------------------------


def test_harness_joins_shuffled_rows_by_document(tmp_path: Path) -> None:
    write_samples(tmp_path / "runs", "org/a", [sample(i, float(i < 2)) for i in (0, 1, 2, 3)])
    write_samples(tmp_path / "runs", "org/b", [sample(i, i == 3) for i in (3, 1, 0, 2)])  # booleans, interleaved
    outcomes = import_harness(tmp_path / "runs")

    assert outcomes.candidates == ("org/a", "org/b")
    assert outcomes.query_ids == ("sums/0", "sums/1", "sums/2", "sums/3")
    assert outcomes.queries == tuple(doc["question"] for doc in DOCS)  # not the few-shot context
    assert outcomes.datasets == outcomes.subsets == ("sums",) * 4
    assert outcomes.correct.tolist() == [[1, 0], [1, 0], [0, 0], [0, 1]]
    assert_round_trip(outcomes, tmp_path / "out")


def test_a_document_that_a_model_lacks_is_blank(tmp_path: Path) -> None:
    write_samples(tmp_path, "a", [sample(i, 1.0) for i in (0, 2)])
    write_samples(tmp_path, "b", [sample(i, 0.0) for i in (2, 1)])
    outcomes = import_harness(tmp_path)
    assert outcomes.query_ids == ("sums/0", "sums/2", "sums/1")
    np.testing.assert_array_equal(outcomes.correct, [[1, NAN], [1, 0], [NAN, 0]])
    assert_round_trip(outcomes, tmp_path / "out")


def test_subtasks_datasets_and_subsets(tmp_path: Path) -> None:
    for model in ("a", "b"):
        for task in ("mmlu_law", "mmlu_pro_art", "gsm8k"):
            write_samples(tmp_path, model, [sample(0, 1.0), sample(1, 0.0)], task)
    plain = import_harness(tmp_path)
    assert len(plain) == 6
    assert set(plain.query_ids) == {f"{t}/{i}" for t in ("mmlu_law", "mmlu_pro_art", "gsm8k") for i in (0, 1)}
    assert plain.datasets == plain.subsets

    named = import_harness(tmp_path, dataset={"mmlu": "mmlu", "mmlu_pro": "pro"}, subset_from="level")
    by_id = dict(zip(named.query_ids, zip(named.datasets, named.subsets, strict=True), strict=True))
    assert by_id["mmlu_law/0"] == ("mmlu", "L0")
    assert by_id["mmlu_pro_art/1"] == ("pro", "L1")  # the longest prefix
    assert by_id["gsm8k/0"] == ("gsm8k", "L0")
    assert set(import_harness(tmp_path, dataset="all").datasets) == {"all"}
    with fails("no file has 'levle'"):
        import_harness(tmp_path, subset_from="levle")


def test_model_comes_from_the_results_or_the_folder_or_the_caller(tmp_path: Path) -> None:
    path = write_samples(tmp_path, "org/a", [sample(0, 1.0)], results=False)
    assert import_harness(path).candidates == ("org/a",)
    assert import_harness(path, model="named").candidates == ("named",)
    (path.parent / "results_2023-01-01T00-00-00.0.json").write_text(json.dumps({"model_name": "hub/other"}))
    assert import_harness(path).candidates == ("hub/other",)
    (path.parent / f"results_{STAMP}.json").write_text(json.dumps({"model_name": "hub/a"}))
    assert import_harness(path).candidates == ("hub/a",)  # that of the same run
    path = path.rename(path.with_name(f"samples_sums_{LATER}.jsonl"))
    with fails(r"name the models hub/a, hub/other; put each.*--model"):
        import_harness(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".json.gz"])
def test_packed_files_and_json_arrays(tmp_path: Path, suffix: str) -> None:
    write_samples(tmp_path, "a", [sample(0, 1.0), sample(1, 0.0)], suffix=suffix)
    assert import_harness(tmp_path).correct.tolist() == [[1], [0]]


def test_conflicting_texts_name_both_places(tmp_path: Path) -> None:
    a = write_samples(tmp_path, "a", [sample(0, 1.0), sample(1, 1.0)])
    b = write_samples(tmp_path, "b", [sample(1, 1.0), sample(0, 1.0, DOCS[3])])
    message = f"{b}:2: document 'sums/0' has another text than at {a}:1; "
    with fails(f"^{re.escape(message)}.*join by text"):
        import_harness(tmp_path)
    assert correct_of(import_harness(tmp_path, join_by="text"))[DOCS[3]["question"]] == {"b": 1.0}


def test_conflicting_hashes_name_both_places(tmp_path: Path) -> None:
    a = write_samples(tmp_path, "a", [sample(0, 1.0)])
    b = write_samples(tmp_path, "b", [sample(0, 0.0, {**DOCS[0], "answer": "5"})])
    with fails(f"^{re.escape(f'{b}:1')}: .* another doc_hash than at {re.escape(f'{a}:1')}; .*join by text"):
        import_harness(tmp_path)
    assert correct_of(import_harness(tmp_path, join_by="text")) == {DOCS[0]["question"]: {"a": 1.0, "b": 0.0}}


def test_ids_that_do_not_overlap_are_seen_by_their_texts(tmp_path: Path) -> None:
    a = write_samples(tmp_path, "a", [sample(0, 1.0), sample(1, 1.0)])
    b = write_samples(tmp_path, "b", [sample(7, 0.0, DOCS[1])])
    with fails(f"^{re.escape(f'{b}:1')}: the text of document '7' is that of document '1' at {re.escape(f'{a}:2')}"):
        import_harness(tmp_path)


def test_equal_questions_of_one_file_stay_apart_by_id_and_are_averaged_by_text(tmp_path: Path) -> None:
    write_samples(tmp_path, "a", [sample(0, 1.0), sample(1, 0.0, DOCS[0])])
    write_samples(tmp_path, "b", [sample(1, 1.0, DOCS[0]), sample(0, 1.0)])
    assert import_harness(tmp_path).correct.tolist() == [[1, 1], [0, 1]]
    outcomes = import_harness(tmp_path, join_by="text")
    assert outcomes.correct.tolist() == [[0.5, 1.0]]
    assert_round_trip(outcomes, tmp_path / "out")


def test_a_document_twice_in_one_file_is_an_error(tmp_path: Path) -> None:
    path = write_samples(tmp_path, "a", [sample(0, 1.0), sample(0, 1.0)])
    with fails(f"^{re.escape(str(path))}:2: 'a' has document 'sums/0' already at {re.escape(str(path))}:1"):
        import_harness(tmp_path)


def test_several_metrics_are_never_guessed(tmp_path: Path) -> None:
    both = {"metrics": ["acc", "acc_norm"], "acc_norm": 0.0}
    path = write_samples(tmp_path, "a", [sample(0, 1.0, **both)])
    with fails(f"^{re.escape(str(path))}: several metrics: acc, acc_norm; .*--metric NAME"):
        import_harness(tmp_path)
    assert import_harness(tmp_path, metric="acc").correct.tolist() == [[1]]
    assert import_harness(tmp_path, metric=("acc_norm", "acc")).correct.tolist() == [[0]]


def test_metrics_in_order_of_preference_over_tasks(tmp_path: Path) -> None:
    both = {"metrics": ["acc", "acc_norm"], "acc_norm": 0.0}
    write_samples(tmp_path, "a", [sample(0, 1.0, **both)], "arc")
    write_samples(tmp_path, "a", [sample(1, 1.0)], "sums")  # acc alone
    assert import_harness(tmp_path, metric="acc_norm").correct.tolist() == [[0], [1]]
    with fails("no file has 'acc_nrom', which was asked for"):
        import_harness(tmp_path, metric=("acc_norm", "acc_nrom"))


def test_models_must_have_the_same_metric_of_a_task(tmp_path: Path) -> None:
    write_samples(tmp_path, "a", [sample(0, 1.0)])
    write_samples(tmp_path, "b", [sample(0, 1.0, metrics=["exact_match"], exact_match=1.0)])
    with fails("'sums' has the metric 'exact_match' here and 'acc' in .*: not comparable"):
        import_harness(tmp_path)


def test_older_rows_do_not_list_their_metrics_and_lists_are_no_metric(tmp_path: Path) -> None:
    row = sample(0, 1.0, inst_level_strict_acc=[True, False], word_perplexity=[-3.1, 4])
    del row["metrics"], row["filter"]
    write_samples(tmp_path, "a", [row])
    assert import_harness(tmp_path).correct.tolist() == [[1]]


def test_filters_are_never_guessed(tmp_path: Path) -> None:
    rows = [
        sample(0, None, filter=name, metrics=["exact_match"], exact_match=value)
        for name, value in (("strict-match", 0.0), ("flexible-extract", 1.0))
    ]
    write_samples(tmp_path, "a", rows)
    with fails("several filters: strict-match, flexible-extract; .*--filter NAME"):
        import_harness(tmp_path)
    assert import_harness(tmp_path, filter_name="flexible-extract").correct.tolist() == [[1]]


@pytest.mark.parametrize("value", [1.5, -0.1, "1", None, NAN, [True]])
def test_a_value_that_is_no_score_names_its_line(tmp_path: Path, value: Any) -> None:
    path = write_samples(tmp_path, "a", [sample(0, 1.0), sample(1, value)])
    with fails(f'^{re.escape(str(path))}:2: "acc" is .*, not true, false or a number in \\[0, 1\\]; .*--metric'):
        import_harness(tmp_path)


def test_predictions_without_scores_are_refused(tmp_path: Path) -> None:
    write_samples(tmp_path, "a", [sample(0, None, metrics=["bypass"], bypass=999)])
    with fails("no metric in .0, 1.; it has: bypass"):
        import_harness(tmp_path)


def test_two_runs_of_a_task_are_an_error_or_the_last_one(tmp_path: Path) -> None:
    later = write_samples(tmp_path, "a", [sample(0, 1.0)], stamp=LATER)
    earlier = write_samples(tmp_path, "a", [sample(0, 0.0)], stamp=STAMP)
    with fails("'a' has the task 'sums' in .* too; .*--latest"):
        import_harness(tmp_path)
    for order in ([later, earlier], [earlier, later]):
        assert import_harness(order, latest=True).correct.tolist() == [[1]]


@pytest.mark.parametrize(
    ("doc", "query"),
    [
        ({"question": "Q?", "choices": ["x", "y"], "subject": "s", "answer": 0}, "Q?\n\nA. x\nB. y"),  # MMLU
        ({"question": "Q?", "options": ["x", "y"], "category": "law"}, "Q?\n\nA. x\nB. y"),  # MMLU-Pro
        ({"id": "1", "question": "Q?", "choices": {"text": ["x"], "label": ["A"]}}, "Q?\n\nA. x"),  # ARC
        ({"narrative": "N.", "question": "Q?", "choices": "['x', 'y']"}, "N.\n\nQ?\n\nA. x\nB. y"),  # MuSR
        ({"input": "not True is", "target": "False"}, "not True is"),  # BBH
        ({"key": 1, "prompt": "Write.", "instruction_id_list": ["a"], "kwargs": []}, "Write."),  # IFEval
        ({"problem": "P", "level": "Level 5", "solution": "S"}, "P"),  # MATH
        ({"passage": "P.", "question": "q", "label": 1}, "P.\n\nq"),  # BoolQ
    ],
)
def test_the_query_of_known_documents(doc: dict[str, Any], query: str) -> None:
    assert query_of("f:1", doc) == query


def test_query_field_names_the_fields(tmp_path: Path) -> None:
    doc = {"premise": "It rains.", "hypothesis": "It is wet.", "label": 0, "ways": ["yes", "no"]}
    path = write_samples(tmp_path, "a", [sample(0, 1.0, doc)])
    with fails(f"^{re.escape(str(path))}:1: no question in doc; its fields are premise, .*ways: .*--query-field"):
        import_harness(tmp_path)
    fields = ("premise", "hypothesis", "ways")
    assert import_harness(tmp_path, query_field=fields).queries == ("It rains.\n\nIt is wet.\n\nA. yes\nB. no",)
    with fails('"label" of doc is no text and no list of texts; its fields are premise'):
        import_harness(tmp_path, query_field="label")


def test_files_that_are_no_samples(tmp_path: Path) -> None:
    with fails("no samples files in the folder; run the evaluation with --log_samples"):
        import_harness(tmp_path)
    with fails("absent.jsonl: no such file"):
        import_harness(tmp_path / "absent.jsonl", model="a")
    (tmp_path / "x.jsonl").write_text('{"query": "q"}\n')
    with fails('x.jsonl:1: no "doc" object'):
        import_harness(tmp_path / "x.jsonl")
    (tmp_path / "x.jsonl").write_text("")
    with fails("x.jsonl: no rows"):
        import_harness(tmp_path / "x.jsonl")
    write_samples(tmp_path, "a", [sample(0, 1.0, {"question": " "})])
    with fails("samples_sums.*:1: no question in doc"):
        import_harness(tmp_path / "a")


# --- Open LLM Leaderboard ------------------------------------------------------------------------------------


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


def test_leaderboard_second_generation(tmp_path: Path) -> None:
    write_samples(tmp_path, "org/a", [sample(0, 1.0), sample(1, 0.0)], "leaderboard_bbh_navigate", suffix=".json")
    write_samples(tmp_path, "org/b", [sample(1, 1.0), sample(0, 0.0)], "leaderboard_bbh_navigate")
    write_samples(tmp_path, "org/a", [sample(2, 1.0)], "leaderboard_math_algebra_hard")
    outcomes = import_leaderboard(tmp_path)
    assert set(zip(outcomes.datasets, outcomes.subsets, strict=True)) == {
        ("bbh", "leaderboard_bbh_navigate"),
        ("math_hard", "leaderboard_math_algebra_hard"),
    }
    assert correct_of(outcomes)[DOCS[0]["question"]] == {"org/a": 1.0, "org/b": 0.0}
    assert_round_trip(outcomes, tmp_path / "out")
    assert len(import_leaderboard([tmp_path], tasks="leaderboard_math")) == 1
    with fails("no task begins with leaderboard_gpqa"):
        import_leaderboard(tmp_path, tasks="leaderboard_gpqa")


@pytest.mark.parametrize("nested", [True, False])
def test_leaderboard_first_generation_is_joined_by_text(tmp_path: Path, nested: bool) -> None:
    write_old(tmp_path, "org/a", "hendrycksTest-law", old_rows([0, 1, 2], nested=nested))
    write_old(tmp_path, "org/b", "hendrycksTest-law", old_rows([2, 0, 1, 1], nested=nested))
    with fails("several metrics: acc, acc_norm"):
        import_leaderboard(tmp_path)
    outcomes = import_leaderboard(tmp_path, metric="acc")
    assert correct_of(outcomes) == {f"Question {i}": {"org/a": i % 2, "org/b": i % 2} for i in range(3)}
    assert set(zip(outcomes.datasets, outcomes.subsets, strict=True)) == {("mmlu", "hendrycksTest_law")}
    assert_round_trip(outcomes, tmp_path / "out")


def test_leaderboard_parquet_of_the_second_generation(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = tmp_path / "org__a-details"
    folder.mkdir()
    path = folder / f"samples_leaderboard_mmlu_pro_{STAMP}.parquet"
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


def test_leaderboard_from_the_hub(hub: Callable[..., FakeHub]) -> None:
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


def test_first_generation_from_the_hub(hub: Callable[..., FakeHub]) -> None:
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


# --- wide tables ---------------------------------------------------------------------------------------------


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
def test_routellm_mmlu(tmp_path: Path, name: str) -> None:
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


def test_several_files_join_by_text_within_a_subset(tmp_path: Path) -> None:
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
def test_routerbench(tmp_path: Path, form: str) -> None:
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


# --- writing -------------------------------------------------------------------------------------------------


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


def test_writing_round_trips_and_is_byte_equal(tmp_path: Path) -> None:
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
