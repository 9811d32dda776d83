"""Tests of what is made of outcomes: selections, splits, difficulty, domains, model vectors."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arllm.runtime.errors import OutcomesError
from arllm.train.domains import assign_domains, difficulty, model_vectors
from arllm.train.outcomes import Outcomes, assign_splits, carve_validation, normalise_query

NAN = float("nan")


def make(
    queries: list[str],
    *,
    splits: list[str] | None = None,
    datasets: list[str] | None = None,
    subsets: list[str] | None = None,
) -> Outcomes:
    n = len(queries)
    datasets = datasets or ["d"] * n
    return Outcomes(
        query_ids=tuple(f"q{i}" for i in range(n)),
        queries=tuple(queries),
        datasets=tuple(datasets),
        subsets=tuple(subsets or datasets),
        splits=tuple(splits or [""] * n),
        candidates=("a", "b"),
        correct=np.zeros((n, 2), dtype=np.float32),
    )


# --- Outcomes -----------------------------------------------------------------------------------------------


def test_rows_columns_and_split() -> None:
    found = make(["x", "y", "z"], splits=["train", "test", "train"])
    found.correct[:] = [[0, 1], [2, 3], [4, 5]]
    mask = found.rows(np.array([True, False, True]))
    assert mask.queries == ("x", "z")
    np.testing.assert_array_equal(found.rows([2, 0]).correct, [[4, 5], [0, 1]])
    assert found.split("train").query_ids == mask.query_ids
    assert len(found.split("val")) == 0
    assert len(found.rows([])) == 0
    swapped = found.columns(["b", "a"])
    assert swapped.candidates == ("b", "a")
    np.testing.assert_array_equal(swapped.correct[:, 0], [1, 3, 5])
    with pytest.raises(OutcomesError, match="unknown split 'dev'"):
        found.split("dev")
    with pytest.raises(OutcomesError, match="no outcomes of candidate 'c'"):
        found.columns(["c"])
    with pytest.raises(OutcomesError, match="mask"):
        found.rows(np.array([True]))


def test_outcomes_of_unequal_lengths_are_refused() -> None:
    with pytest.raises(OutcomesError, match="lengths"):
        Outcomes(("q",), ("x", "y"), ("d",), ("d",), ("",), ("a",), np.zeros((1, 1), np.float32))
    with pytest.raises(OutcomesError, match="shape"):
        Outcomes(("q",), ("x",), ("d",), ("d",), ("",), ("a",), np.zeros((1, 2), np.float32))


# --- splits -------------------------------------------------------------------------------------------------


def test_normalise_query() -> None:
    assert normalise_query("  What\tIS\n ﬁne\u00a0Ａ? ") == "what is fine a?"
    assert normalise_query("STRASSE") == normalise_query("straße")


def test_split_ratios_and_independence_of_row_order() -> None:
    found = make([f"What is {i} plus {i * 7}?" for i in range(5000)])
    split = assign_splits(found)
    share = {name: count / 5000 for name, count in Counter(split.splits).items()}
    assert share == pytest.approx({"train": 0.7, "val": 0.1, "test": 0.2}, abs=0.02)
    order = np.random.default_rng(0).permutation(5000)
    assert assign_splits(found.rows(order)).splits == split.rows(order).splits
    assert assign_splits(found.rows(order[:10])).splits == split.rows(order[:10]).splits
    halves = Counter(assign_splits(found, ratios=(0.5, 0.5, 0.0)).splits)
    assert set(halves) == {"train", "val"}


def test_the_split_formula_is_as_documented() -> None:
    for text in ("one", "Two", "  three "):
        u = int(hashlib.sha256(normalise_query(text).encode()).hexdigest()[:16], 16) / 2**64
        expected = "train" if u < 0.7 else "val" if u < 0.8 else "test"
        assert assign_splits(make([text])).splits == (expected,)


def test_equal_questions_never_straddle() -> None:
    texts = [f"Question {i // 3}" for i in range(600)]
    texts = [t.upper() if i % 3 == 1 else f"  {t}\n" if i % 3 == 2 else t for i, t in enumerate(texts)]
    found = carve_validation(assign_splits(make(texts), ratios=(0.8, 0.0, 0.2)), 0.3)
    assert set(found.splits) == {"train", "val", "test"}
    for i in range(0, 600, 3):
        assert len(set(found.splits[i : i + 3])) == 1


def test_given_splits_stay_and_pull_equal_questions() -> None:
    texts = [f"q{i}" for i in range(50)]
    for given in ("train", "val", "test", "ood"):
        found = assign_splits(make(texts + [t.upper() for t in texts], splits=[given] * 50 + [""] * 50))
        assert set(found.splits) == {given}


def test_the_file_decides_between_given_splits_and_blanks_are_held_out() -> None:
    found = assign_splits(make(["x", "X", " x"], splits=["test", "train", ""]))
    assert found.splits == ("test", "train", "test")


@pytest.mark.parametrize("ratios", [(0.7, 0.1, 0.1), (1.2, -0.2, 0.0), (NAN, 0.5, 0.5)])
def test_bad_ratios(ratios: tuple[float, float, float]) -> None:
    with pytest.raises(OutcomesError, match="ratios"):
        assign_splits(make(["x"]), ratios=ratios)


def test_carve_validation() -> None:
    texts = [f"What is {i}?" for i in range(5000)]
    # Train is the lower 40% of the hash of assign_splits: a carve by that very hash would take 25% of it.
    found = assign_splits(make(texts), ratios=(0.4, 0.0, 0.6))
    carved = carve_validation(found, 0.1)
    counts = Counter(carved.splits)
    assert counts["test"] == Counter(found.splits)["test"]
    assert counts["val"] / (counts["val"] + counts["train"]) == pytest.approx(0.1, abs=0.02)
    assert carve_validation(carved, 0.5) is carved
    tiny = carve_validation(make(["x", "y", "z"], splits=["train", "train", "ood"]), 1e-9)
    assert sorted(tiny.splits) == ["ood", "train", "val"]
    with pytest.raises(OutcomesError, match="two different train queries"):
        carve_validation(make(["x", "X"], splits=["train", "train"]))
    with pytest.raises(OutcomesError, match="fraction"):
        carve_validation(carved, 1.0)


# --- difficulty, model vectors, domains ---------------------------------------------------------------------


def test_difficulty_is_the_share_of_wrong_answers_when_none_is_missing() -> None:
    correct = np.array([[1, 1, 1, 1], [1, 0, 0.5, 0], [0, 0, 0, 0]], dtype=np.float32)
    np.testing.assert_array_equal(difficulty(correct), [0, 0.625, 1])


def test_difficulty_is_adjusted_for_who_answered() -> None:
    # Candidates 0 and 1 get nearly all right, 2 and 3 nearly nothing.
    rng = np.random.default_rng(1)
    correct = (rng.random((400, 4)) < [0.95, 0.9, 0.1, 0.05]).astype(np.float32)
    strong, weak = correct[0:1].copy(), correct[1:2].copy()
    strong[:] = [1, 1, NAN, NAN]
    weak[:] = [NAN, NAN, 0, 0]
    found = difficulty(np.vstack([correct, strong, weak]))
    np.testing.assert_array_equal(found[:400], 1 - correct.astype(np.float64).mean(axis=1))
    # Unadjusted they would be 0 and 1; the pool gets about half of the queries right.
    assert 0.35 < found[400] < 0.5
    assert 0.5 < found[401] < 0.65


def test_difficulty_by_hand() -> None:
    # One query answered by both, one by the first alone. At the fixed point of
    #   ability = (mean over its queries of correct - ease), ease = sum(correct - ability) / (n + 1):
    # ability_0 = 1, ability_1 = 0, ease = 0 satisfies both, so the missing answer counts as 0.
    found = difficulty(np.array([[1, 0], [1, NAN]], dtype=np.float32))
    np.testing.assert_allclose(found, [0.5, 0.5], atol=1e-6)


def test_difficulty_without_answers() -> None:
    correct = np.array([[1, NAN, NAN], [0, 1, NAN], [NAN, NAN, NAN]], dtype=np.float32)
    found = difficulty(correct)
    assert np.isnan(found[2])
    assert found[1] == 0.5  # the candidate that never answered does not count
    assert np.isnan(difficulty(np.full((2, 2), NAN))).all()


def test_difficulty_orders_queries_as_the_full_matrix_does() -> None:
    rng = np.random.default_rng(2)
    ability, ease = np.linspace(-2, 2, 12), rng.normal(size=(300, 1)) * 1.5
    correct = (rng.random((300, 12)) < 1 / (1 + np.exp(-(ability + ease)))).astype(np.float64)
    truth = 1 - correct.mean(axis=1)
    masked = correct.copy()
    masked[:150, :6] = NAN  # strong candidates alone
    masked[150:, 6:] = NAN  # weak candidates alone
    masked[::10] = correct[::10]
    plain = 1 - np.nanmean(masked, axis=1)
    adjusted = difficulty(masked)
    assert np.abs(adjusted - truth).mean() < 0.6 * np.abs(plain - truth).mean()


def test_model_vectors_by_hand() -> None:
    correct = np.array([[1, 0], [1, NAN], [0, 1], [1, NAN]], dtype=np.float32)
    index = np.array([0, 0, 1, -1])
    # Candidate 0: overall 3/4; candidate 1: overall 1/2. Weight 2; domain 2 has no query.
    expected = [
        [(2 + 2 * 0.75) / 4, (0 + 2 * 0.75) / 3, 0.75],
        [(0 + 2 * 0.5) / 3, (1 + 2 * 0.5) / 3, 0.5],
    ]
    found = model_vectors(correct, index, 3, prior_weight=2)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    unshrunk = model_vectors(correct, index, 3, prior_weight=0)
    np.testing.assert_allclose(unshrunk, [[1, 0, 0.75], [0, 1, 0.5]])


def test_model_vectors_name_a_candidate_without_outcomes() -> None:
    correct = np.array([[1, NAN]], dtype=np.float32)
    with pytest.raises(OutcomesError, match="candidate 'b' has no outcome"):
        model_vectors(correct, np.array([0]), 1, names=("a", "b"))
    with pytest.raises(OutcomesError, match="column 1 has no outcome"):
        model_vectors(correct, np.array([0]), 1)


@pytest.fixture
def two_datasets() -> Outcomes:
    """Train: math/easy 3, math/hard 1, math/odd 1, text/easy 2, lone/x 1; the rest is held out."""
    rows = [
        *[("math", "easy", "train")] * 3, ("math", "hard", "train"), ("math", "odd", "train"),
        *[("text", "easy", "train")] * 2, ("lone", "x", "train"),
        *[("lone", "x", "test")] * 9, ("math", "hard", "test"), ("math", "new", "test"), ("ood", "o", "ood"),
    ]  # fmt: skip
    datasets, subsets, splits = (list(column) for column in zip(*rows, strict=True))
    return make([f"q{i}" for i in range(len(rows))], datasets=datasets, subsets=subsets, splits=splits)


def domain_of(outcomes: Outcomes, **options: Any) -> dict[str, str | None]:
    found = assign_domains(outcomes, **options)
    assert found.index.dtype == np.int64
    assert found.names == tuple(sorted(found.names)) or "names" in options
    named = (None if i < 0 else found.names[i] for i in found.index.tolist())
    return dict(
        zip([f"{d}/{s}" for d, s in zip(outcomes.datasets, outcomes.subsets, strict=True)], named, strict=True)
    )


def test_domains_by_scheme(two_datasets: Outcomes) -> None:
    assert domain_of(two_datasets, scheme="dataset") == {
        "math/easy": "math", "math/hard": "math", "math/odd": "math", "math/new": "math",
        "text/easy": "text", "lone/x": "lone", "ood/o": None,
    }  # fmt: skip
    # lone/x has ten queries, one of them in train: held-out queries don't make a domain.
    subset = {
        "math/easy": "math/easy", "math/hard": None, "math/odd": None, "math/new": None,
        "text/easy": "text/easy", "lone/x": None, "ood/o": None,
    }  # fmt: skip
    assert domain_of(two_datasets, scheme="subset", min_queries=2) == subset
    # math/hard and math/odd make two train queries together, and carry the held-out math/new with them.
    auto = {**subset, "math/hard": "math", "math/odd": "math", "math/new": "math"}
    assert domain_of(two_datasets, min_queries=2) == auto
    assert domain_of(two_datasets, min_queries=3) == dict.fromkeys(auto) | {"math/easy": "math/easy"}


def test_domains_of_an_earlier_training(two_datasets: Outcomes) -> None:
    names = assign_domains(two_datasets, min_queries=2).names
    again = assign_domains(two_datasets.split("test"), names=names, min_queries=2)
    assert again.names == names
    assert [None if i < 0 else names[i] for i in again.index] == [None] * 9 + ["math", "math"]
    found = assign_domains(two_datasets, names=("text/easy", "absent"))
    assert found.names == ("text/easy", "absent")
    assert set(found.index.tolist()) == {-1, 0}


@pytest.mark.parametrize("form", ["json", "csv", "given"])
def test_domains_by_mapping(two_datasets: Outcomes, tmp_path: Path, form: str) -> None:
    mapping = {"math": "numbers", "math/hard": "olympiad", "text": "words", "ood": "unseen"}
    path = tmp_path / f"map.{form}"
    options: dict[str, Any] = {"scheme": str(path)}
    if form == "json":
        path.write_text(json.dumps(mapping))
    elif form == "csv":
        path.write_text("".join(f"{key},{value}\n" for key, value in mapping.items()))
    else:
        options = {"mapping": mapping}
    assert domain_of(two_datasets, **options) == {
        "math/easy": "numbers", "math/hard": "olympiad", "math/odd": "numbers", "math/new": "numbers",
        "text/easy": "words", "lone/x": None, "ood/o": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("m.json", '{\n"a": ', r"m\.json:2: malformed JSON"),
        ("m.json", "[]", r"m\.json: expected a JSON object"),
        ("m.json", '{"a": 1}', r"m\.json: the domain of 'a'"),
        ("m.json", "{}", r"m\.json: the mapping is empty"),
        ("m.csv", "a,b\nc,d\na,e\n", r"m\.csv:3: 'a' is mapped twice"),
        ("m.csv", "a,b\nc,\n", r"m\.csv:2: expected two fields"),
        ("m.csv", "a,b,c\n", r"m\.csv:1: expected two fields"),
        ("m.csv", 'a,b\n"c,d\n', r"m\.csv:2: malformed CSV"),
    ],
)
def test_bad_mapping(two_datasets: Outcomes, tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(OutcomesError, match=says):
        assign_domains(two_datasets, str(tmp_path / name))


def test_no_domain_is_an_error(two_datasets: Outcomes) -> None:
    with pytest.raises(OutcomesError, match="30 train queries"):
        assign_domains(two_datasets)
    with pytest.raises(OutcomesError, match="no query is in the train split"):
        assign_domains(make(["x"]), "dataset")
    with pytest.raises(OutcomesError, match="no such domain mapping"):
        assign_domains(two_datasets, "datasets")
