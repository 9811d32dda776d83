"""Tests of train/reliability.py: bins and errors by hand, and that a true predictor gives about 0."""

from __future__ import annotations

import numpy as np
import pytest

from arllm.runtime.errors import OutcomesError
from arllm.train.reliability import debiased_ece, ece, perfect_ece, reliability

NAN = float("nan")


def test_bins_by_hand() -> None:
    predicted = np.array([[0.1, 0.9], [0.8, 0.2], [0.5, NAN]])
    correct = np.array([[0.0, 1.0], [0.0, 1.0], [NAN, NAN]])
    bins = reliability(correct, predicted, bins=2)
    assert bins.predicted == pytest.approx([0.15, 0.85])
    assert bins.observed == pytest.approx([0.5, 0.5])
    assert bins.count.tolist() == [2, 2]
    assert ece(bins) == pytest.approx(0.35)
    # residuals -.1, .8 and .1, -.8: s^2 / n = .405 / 2 = .2025; .35^2 - .2025 < 0
    assert bins.noise == pytest.approx([0.2025, 0.2025])
    assert debiased_ece(bins) == 0.0


def test_debiased_by_hand() -> None:
    correct = np.repeat([1.0, 0.0], [75, 25])
    bins = reliability(correct, np.full(100, 0.5))
    assert bins.count.tolist() == [100]
    assert ece(bins) == pytest.approx(0.25)
    # Kumar, Liang and Ma's form for one value: y (1 - y) / (n - 1)
    assert debiased_ece(bins) == pytest.approx((0.0625 - 0.75 * 0.25 / 99) ** 0.5)


def test_equal_predictions_share_a_bin() -> None:
    predicted = np.repeat([0.2, 0.6], [30, 70])
    bins = reliability(np.linspace(0, 1, 100), predicted, bins=10)
    assert bins.count.tolist() == [30, 70]


def test_fewer_pairs_than_bins() -> None:
    bins = reliability(np.array([1.0, 0.0]), np.array([0.9, 0.1]), bins=15)
    assert bins.count.tolist() == [1, 1]
    assert debiased_ece(bins) == 0.0  # one pair can't tell noise from error


def test_a_true_predictor_has_no_debiased_error() -> None:
    rng = np.random.default_rng(0)
    raw, debiased = [], []
    for _ in range(40):
        predicted = rng.beta(2, 2, 1800)
        bins = reliability((rng.random(1800) < predicted).astype(float), predicted)
        raw.append(ece(bins))
        debiased.append(debiased_ece(bins))
    assert 0.025 < np.mean(raw) < 0.04  # the bias that architecture.md names
    assert np.mean(debiased) < 0.015
    assert np.quantile(debiased, 0.4) == 0.0  # about half of the squares are negative
    mean, high = perfect_ece(np.ones(1800), predicted)
    assert mean == pytest.approx(np.mean(raw), abs=0.004)
    assert high > mean


def test_a_false_predictor_keeps_its_error() -> None:
    rng = np.random.default_rng(0)
    predicted = rng.beta(2, 2, 20000)
    correct = (rng.random(20000) < np.clip(predicted + 0.08 * np.sign(predicted - 0.5), 0, 1)).astype(float)
    assert debiased_ece(reliability(correct, predicted)) == pytest.approx(0.078, abs=0.008)


def test_nothing_to_judge() -> None:
    with pytest.raises(OutcomesError, match="evaluated"):
        reliability(np.array([NAN]), np.array([0.5]))
    with pytest.raises(OutcomesError, match="shape"):
        reliability(np.zeros(2), np.zeros(3))
