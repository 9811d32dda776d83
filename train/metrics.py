"""Measures of predictions on held-out outcomes, and the mean-per-subset baseline beside them. Free of torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from arllm.train.outcomes import Outcomes

Floats = NDArray[np.floating[Any]]


def candidate_auc(correct: Floats, predicted: Floats) -> NDArray[np.float64]:
    """Area under the ROC curve of each candidate, (N, M) × (N, M) → (M,); NaN where only one class occurs.

    An outcome counts as correct above 0.5; NaN outcomes are left out.
    """
    areas = np.full(correct.shape[1], np.nan)
    for m in range(correct.shape[1]):
        observed = ~np.isnan(correct[:, m])
        truth = correct[observed, m] > 0.5
        if truth.any() and not truth.all():
            areas[m] = roc_auc_score(truth, predicted[observed, m])
    return areas


def mean_per_subset(train: Outcomes, other: Outcomes) -> NDArray[np.float64]:
    """The baseline: each candidate's training accuracy on the query's *true* subset, (N of other, M).

    A subset that training doesn't have takes the dataset's accuracy, then the candidate's overall one.
    """
    tables: list[dict[tuple[str, ...], NDArray[np.float64]]] = []
    for keys in (_keys(train, 2), _keys(train, 1), _keys(train, 0)):
        rows: dict[tuple[str, ...], list[int]] = {}
        for i, key in enumerate(keys):
            rows.setdefault(key, []).append(i)
        tables.append({key: _mean(train.correct[index]) for key, index in rows.items()})
    out = np.full(other.correct.shape, np.nan)
    for level, table in enumerate(tables):
        for i, key in enumerate(_keys(other, 2 - level)):
            if key in table:
                out[i] = np.where(np.isnan(out[i]), table[key], out[i])
    return out


def _keys(outcomes: Outcomes, depth: int) -> list[tuple[str, ...]]:
    pairs: Sequence[tuple[str, ...]] = list(zip(outcomes.datasets, outcomes.subsets, strict=True))
    return [pair[:depth] for pair in pairs]


def _mean(correct: Floats) -> NDArray[np.float64]:
    """Mean over the observed rows of each column; NaN where none is."""
    seen = ~np.isnan(correct)
    total = np.where(seen, correct, 0.0).sum(axis=0, dtype=np.float64)
    count = seen.sum(axis=0)
    means: NDArray[np.float64] = np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)
    return means


def brier(correct: Floats, predicted: Floats) -> float:
    """Mean squared difference over the observed outcomes."""
    observed = ~np.isnan(correct)
    return float(np.mean((predicted[observed] - correct[observed]) ** 2))
