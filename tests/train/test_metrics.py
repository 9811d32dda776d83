"""Tests of train/metrics.py: AUC, the mean-per-subset baseline and Brier, against values worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from arllm.train.metrics import brier, candidate_auc, mean_per_subset
from arllm.train.outcomes import Outcomes

NAN = float("nan")


def outcomes(keys: Sequence[tuple[str, str]], correct: Sequence[Sequence[float]]) -> Outcomes:
    n = len(keys)
    return Outcomes(
        query_ids=tuple(str(i) for i in range(n)),
        queries=tuple(f"query {i}" for i in range(n)),
        datasets=tuple(dataset for dataset, _ in keys),
        subsets=tuple(subset for _, subset in keys),
        splits=("train",) * n,
        candidates=tuple("abc"[: len(correct[0])]),
        correct=np.array(correct, dtype=np.float32),
    )


def column(*values: float) -> np.ndarray:
    return np.array(values)[:, None]


def test_auc_by_hand() -> None:
    truth, score = column(1, 0, 1, 0), column(0.9, 0.8, 0.3, 0.1)
    assert candidate_auc(truth, score) == pytest.approx([3 / 4])  # of 4 pairs, 0.3 < 0.8 alone is in the wrong order
    assert candidate_auc(truth, 1 - score) == pytest.approx([1 / 4])
    assert candidate_auc(truth, column(0.5, 0.5, 0.9, 0.1)) == pytest.approx([(0.5 + 1 + 1 + 1) / 4])  # a tie is half


def test_auc_takes_shares_above_a_half_as_correct() -> None:
    assert candidate_auc(column(0.6, 0.5, 0.2), column(0.9, 0.4, 0.1)) == pytest.approx([1.0])


def test_auc_leaves_missing_outcomes_out() -> None:
    truth = np.array([[1, 1], [NAN, 0], [0, NAN], [NAN, 1]])
    score = np.array([[0.6, 0.2], [0.9, 0.5], [0.4, 0.9], [0.0, 0.7]])
    assert candidate_auc(truth, score) == pytest.approx([1.0, 0.5])


def test_auc_is_nan_where_one_class_occurs() -> None:
    truth = np.array([[1, 0, NAN, 1], [1, 0, NAN, 0]])
    areas = candidate_auc(truth, np.array([[0.1, 0.1, 0.1, 0.9], [0.2, 0.2, 0.2, 0.1]]))
    assert np.isnan(areas[:3]).all()
    assert areas[3] == 1.0


def test_mean_per_subset_by_hand() -> None:
    train = outcomes(
        [("x", "1"), ("x", "1"), ("x", "2"), ("y", "1")],
        [[1.0, 0.0, NAN], [0.0, NAN, NAN], [1.0, 1.0, NAN], [0.0, 0.0, 1.0]],
    )
    other = outcomes(
        [("x", "1"), ("x", "2"), ("y", "1"), ("x", "9"), ("z", "1")],
        [[0.0, 0.0, 0.0]] * 5,
    )
    expected = [
        [1 / 2, 0.0, 1.0],  # c has no outcome in x/1 nor in x: its overall accuracy
        [1.0, 1.0, 1.0],
        [0.0, 0.0, 1.0],  # y/1 is not x/1
        [2 / 3, 1 / 2, 1.0],  # an unknown subset: the dataset's accuracy
        [1 / 2, 1 / 3, 1.0],  # an unknown dataset: the overall one
    ]
    np.testing.assert_allclose(mean_per_subset(train, other), expected, rtol=1e-6)


def test_mean_per_subset_never_reads_the_other_outcomes() -> None:
    train = outcomes([("x", "1"), ("x", "2")], [[1.0], [0.0]])
    keys = [("x", "1"), ("x", "2")]
    first, second = (mean_per_subset(train, outcomes(keys, c)) for c in ([[0.0], [0.0]], [[1.0], [NAN]]))
    np.testing.assert_array_equal(first, second)


def test_a_candidate_without_training_outcomes_has_no_baseline() -> None:
    baseline = mean_per_subset(outcomes([("x", "1")], [[1.0, NAN]]), outcomes([("x", "1")], [[0.0, 0.0]]))
    np.testing.assert_array_equal(baseline, [[1.0, NAN]])


def test_brier_by_hand() -> None:
    correct = np.array([[1.0, NAN], [0.0, 0.5]])
    predicted = np.array([[0.75, 0.0], [0.5, 1.0]])
    assert brier(correct, predicted) == pytest.approx((0.25**2 + 0.5**2 + 0.5**2) / 3)
