"""Tests of train/import_harness.py on small files as lm-evaluation-harness writes them with --log_samples."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arllm.runtime.errors import OutcomesError
from arllm.train.import_harness import import_harness, query_of

STAMP = "2024-06-16T22-09-58.078705"  # write_samples' own
LATER = "2024-07-01T00-00-00.000001"
NAN = float("nan")
Helper = Callable[..., Any]
Docs = list[dict[str, str]]


def fails(match: str) -> Any:
    return pytest.raises(OutcomesError, match=match)


def test_harness_joins_shuffled_rows_by_document(
    tmp_path: Path, sample: Helper, write_samples: Helper, assert_round_trip: Helper, docs: Docs
) -> None:
    write_samples(tmp_path / "runs", "org/a", [sample(i, float(i < 2)) for i in (0, 1, 2, 3)])
    write_samples(tmp_path / "runs", "org/b", [sample(i, i == 3) for i in (3, 1, 0, 2)])  # booleans, interleaved
    outcomes = import_harness(tmp_path / "runs")

    assert outcomes.candidates == ("org/a", "org/b")
    assert outcomes.query_ids == ("sums/0", "sums/1", "sums/2", "sums/3")
    assert outcomes.queries == tuple(doc["question"] for doc in docs)  # not the few-shot context
    assert outcomes.datasets == outcomes.subsets == ("sums",) * 4
    assert outcomes.correct.tolist() == [[1, 0], [1, 0], [0, 0], [0, 1]]
    assert_round_trip(outcomes, tmp_path / "out")


def test_a_document_that_a_model_lacks_is_blank(
    tmp_path: Path, sample: Helper, write_samples: Helper, assert_round_trip: Helper
) -> None:
    write_samples(tmp_path, "a", [sample(i, 1.0) for i in (0, 2)])
    write_samples(tmp_path, "b", [sample(i, 0.0) for i in (2, 1)])
    outcomes = import_harness(tmp_path)
    assert outcomes.query_ids == ("sums/0", "sums/2", "sums/1")
    np.testing.assert_array_equal(outcomes.correct, [[1, NAN], [1, 0], [NAN, 0]])
    assert_round_trip(outcomes, tmp_path / "out")


def test_subtasks_datasets_and_subsets(tmp_path: Path, sample: Helper, write_samples: Helper) -> None:
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


def test_model_comes_from_the_results_or_the_folder_or_the_caller(
    tmp_path: Path, sample: Helper, write_samples: Helper
) -> None:
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
def test_packed_files_and_json_arrays(tmp_path: Path, suffix: str, sample: Helper, write_samples: Helper) -> None:
    write_samples(tmp_path, "a", [sample(0, 1.0), sample(1, 0.0)], suffix=suffix)
    assert import_harness(tmp_path).correct.tolist() == [[1], [0]]


def test_conflicting_texts_name_both_places(
    tmp_path: Path, sample: Helper, write_samples: Helper, correct_of: Helper, docs: Docs
) -> None:
    a = write_samples(tmp_path, "a", [sample(0, 1.0), sample(1, 1.0)])
    b = write_samples(tmp_path, "b", [sample(1, 1.0), sample(0, 1.0, docs[3])])
    message = f"{b}:2: document 'sums/0' has another text than at {a}:1; "
    with fails(f"^{re.escape(message)}.*join by text"):
        import_harness(tmp_path)
    assert correct_of(import_harness(tmp_path, join_by="text"))[docs[3]["question"]] == {"b": 1.0}


def test_conflicting_hashes_name_both_places(
    tmp_path: Path, sample: Helper, write_samples: Helper, correct_of: Helper, docs: Docs
) -> None:
    a = write_samples(tmp_path, "a", [sample(0, 1.0)])
    b = write_samples(tmp_path, "b", [sample(0, 0.0, {**docs[0], "answer": "5"})])
    with fails(f"^{re.escape(f'{b}:1')}: .* another doc_hash than at {re.escape(f'{a}:1')}; .*join by text"):
        import_harness(tmp_path)
    assert correct_of(import_harness(tmp_path, join_by="text")) == {docs[0]["question"]: {"a": 1.0, "b": 0.0}}


def test_ids_that_do_not_overlap_are_seen_by_their_texts(
    tmp_path: Path, sample: Helper, write_samples: Helper, docs: Docs
) -> None:
    a = write_samples(tmp_path, "a", [sample(0, 1.0), sample(1, 1.0)])
    b = write_samples(tmp_path, "b", [sample(7, 0.0, docs[1])])
    with fails(f"^{re.escape(f'{b}:1')}: the text of document '7' is that of document '1' at {re.escape(f'{a}:2')}"):
        import_harness(tmp_path)


def test_equal_questions_of_one_file_stay_apart_by_id_and_are_averaged_by_text(
    tmp_path: Path, sample: Helper, write_samples: Helper, assert_round_trip: Helper, docs: Docs
) -> None:
    write_samples(tmp_path, "a", [sample(0, 1.0), sample(1, 0.0, docs[0])])
    write_samples(tmp_path, "b", [sample(1, 1.0, docs[0]), sample(0, 1.0)])
    assert import_harness(tmp_path).correct.tolist() == [[1, 1], [0, 1]]
    outcomes = import_harness(tmp_path, join_by="text")
    assert outcomes.correct.tolist() == [[0.5, 1.0]]
    assert_round_trip(outcomes, tmp_path / "out")


def test_a_document_twice_in_one_file_is_an_error(tmp_path: Path, sample: Helper, write_samples: Helper) -> None:
    path = write_samples(tmp_path, "a", [sample(0, 1.0), sample(0, 1.0)])
    with fails(f"^{re.escape(str(path))}:2: 'a' has document 'sums/0' already at {re.escape(str(path))}:1"):
        import_harness(tmp_path)


def test_several_metrics_are_never_guessed(tmp_path: Path, sample: Helper, write_samples: Helper) -> None:
    both = {"metrics": ["acc", "acc_norm"], "acc_norm": 0.0}
    path = write_samples(tmp_path, "a", [sample(0, 1.0, **both)])
    with fails(f"^{re.escape(str(path))}: several metrics: acc, acc_norm; .*--metric NAME"):
        import_harness(tmp_path)
    assert import_harness(tmp_path, metric="acc").correct.tolist() == [[1]]
    assert import_harness(tmp_path, metric=("acc_norm", "acc")).correct.tolist() == [[0]]


def test_metrics_in_order_of_preference_over_tasks(tmp_path: Path, sample: Helper, write_samples: Helper) -> None:
    both = {"metrics": ["acc", "acc_norm"], "acc_norm": 0.0}
    write_samples(tmp_path, "a", [sample(0, 1.0, **both)], "arc")
    write_samples(tmp_path, "a", [sample(1, 1.0)], "sums")  # acc alone
    assert import_harness(tmp_path, metric="acc_norm").correct.tolist() == [[0], [1]]
    with fails("no file has 'acc_nrom', which was asked for"):
        import_harness(tmp_path, metric=("acc_norm", "acc_nrom"))


def test_models_must_have_the_same_metric_of_a_task(tmp_path: Path, sample: Helper, write_samples: Helper) -> None:
    write_samples(tmp_path, "a", [sample(0, 1.0)])
    write_samples(tmp_path, "b", [sample(0, 1.0, metrics=["exact_match"], exact_match=1.0)])
    with fails("'sums' has the metric 'exact_match' here and 'acc' in .*: not comparable"):
        import_harness(tmp_path)


def test_older_rows_do_not_list_their_metrics_and_lists_are_no_metric(
    tmp_path: Path, sample: Helper, write_samples: Helper
) -> None:
    row = sample(0, 1.0, inst_level_strict_acc=[True, False], word_perplexity=[-3.1, 4])
    del row["metrics"], row["filter"]
    write_samples(tmp_path, "a", [row])
    assert import_harness(tmp_path).correct.tolist() == [[1]]


def test_filters_are_never_guessed(tmp_path: Path, sample: Helper, write_samples: Helper) -> None:
    rows = [
        sample(0, None, filter=name, metrics=["exact_match"], exact_match=value)
        for name, value in (("strict-match", 0.0), ("flexible-extract", 1.0))
    ]
    write_samples(tmp_path, "a", rows)
    with fails("several filters: strict-match, flexible-extract; .*--filter NAME"):
        import_harness(tmp_path)
    assert import_harness(tmp_path, filter_name="flexible-extract").correct.tolist() == [[1]]


@pytest.mark.parametrize("value", [1.5, -0.1, "1", None, NAN, [True]])
def test_a_value_that_is_no_score_names_its_line(
    tmp_path: Path, value: Any, sample: Helper, write_samples: Helper
) -> None:
    path = write_samples(tmp_path, "a", [sample(0, 1.0), sample(1, value)])
    with fails(f'^{re.escape(str(path))}:2: "acc" is .*, not true, false or a number in \\[0, 1\\]; .*--metric'):
        import_harness(tmp_path)


def test_predictions_without_scores_are_refused(tmp_path: Path, sample: Helper, write_samples: Helper) -> None:
    write_samples(tmp_path, "a", [sample(0, None, metrics=["bypass"], bypass=999)])
    with fails("no metric in .0, 1.; it has: bypass"):
        import_harness(tmp_path)


def test_two_runs_of_a_task_are_an_error_or_the_last_one(
    tmp_path: Path, sample: Helper, write_samples: Helper
) -> None:
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


def test_query_field_names_the_fields(tmp_path: Path, sample: Helper, write_samples: Helper) -> None:
    doc = {"premise": "It rains.", "hypothesis": "It is wet.", "label": 0, "ways": ["yes", "no"]}
    path = write_samples(tmp_path, "a", [sample(0, 1.0, doc)])
    with fails(f"^{re.escape(str(path))}:1: no question in doc; its fields are premise, .*ways: .*--query-field"):
        import_harness(tmp_path)
    fields = ("premise", "hypothesis", "ways")
    assert import_harness(tmp_path, query_field=fields).queries == ("It rains.\n\nIt is wet.\n\nA. yes\nB. no",)
    with fails('"label" of doc is no text and no list of texts; its fields are premise'):
        import_harness(tmp_path, query_field="label")


def test_files_that_are_no_samples(tmp_path: Path, sample: Helper, write_samples: Helper) -> None:
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
