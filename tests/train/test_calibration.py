"""Tests of train/calibration.py: scale and domains from outcomes, candidates from training, the best share."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from arllm.runtime.calibration import Calibration, calibrated
from arllm.runtime.errors import RunError
from arllm.runtime.pool import Candidate, Pool
from arllm.runtime.quality import ability
from arllm.train import calibration as fitting
from arllm.train.calibration import SHARES, choose_calibration, fit_calibration
from arllm.train.reliability import debiased_ece, reliability

NAMES = ("a", "b", "c", "d")
VECTORS = np.array([[0.2, 0.5, 0.7], [0.5, 0.4, 0.3], [0.6, 0.7, 0.5], [0.9, 0.6, 0.8]], dtype=np.float32)
POOL = Pool(
    tuple(Candidate(n, c, tuple(v)) for n, c, v in zip(NAMES, (0.1, 0.2, 0.4, 1.0), VECTORS.tolist(), strict=True))
)


def queries_of(count: int, seed: int = 0) -> NDArray[np.float32]:
    """(N, 4): three domains, difficulty."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.dirichlet([0.4] * 3, count), rng.random((count, 1))], axis=1).astype(np.float32)


def drawn(truth: NDArray[np.float64], seed: int = 1) -> NDArray[np.float64]:
    return (np.random.default_rng(seed).random(truth.shape) < truth).astype(np.float64)


def applied(found: Calibration, prediction: Any, queries: Any) -> NDArray[np.float64]:
    return calibrated(found, found.table(NAMES), prediction, queries, VECTORS)


def world(count: int, scale: float, seed: int = 0) -> tuple[Any, Any, Any, Any]:
    """Queries, predictions, and outcomes drawn from the predictions with their logits scaled."""
    queries = queries_of(count, seed)
    rng = np.random.default_rng(seed + 7)
    prediction = np.clip(ability(queries, VECTORS) + rng.normal(0, 0.25, (count, 4)), 0.03, 0.97)
    odds = np.log(prediction / (1 - prediction))
    truth = 1 / (1 + np.exp(-scale * odds))
    return queries, prediction, drawn(truth, seed + 1), truth


def test_a_policy_too_sure_of_itself_is_scaled_down() -> None:
    queries, prediction, correct, _ = world(6000, 0.4)
    found = fit_calibration(prediction, queries, VECTORS, correct, NAMES, 0.0)
    assert found.scale == pytest.approx(0.4, abs=0.08)
    fresh = world(4000, 0.4, seed=5)
    before = debiased_ece(reliability(fresh[2], fresh[1]))
    after = debiased_ece(reliability(fresh[2], applied(found, fresh[1], fresh[0])))
    assert before > 0.08
    assert after < 0.5 * before


@pytest.mark.parametrize("shift", [-0.1, 0.0, 0.15])
def test_candidates_differ_in_the_mean_as_training_says_and_the_level_is_that_of_the_outcomes(shift: float) -> None:
    queries = queries_of(3000)
    able = ability(queries, VECTORS)
    prediction = np.clip(able + np.array([0.2, -0.1, 0.1, -0.2]), 0.02, 0.98)  # it has its favourites
    correct = drawn(np.clip(able + shift, 0, 1))
    found = applied(fit_calibration(prediction, queries, VECTORS, correct, NAMES, 0.3), prediction, queries)
    level = float(np.mean(correct - able))
    np.testing.assert_allclose(found.mean(axis=0), np.clip(able.mean(axis=0) + level, 0.01, 0.99), atol=1e-4)


def test_a_domain_that_is_harder_than_predicted_gets_an_offset() -> None:
    queries = queries_of(4000)
    able = ability(queries, VECTORS)
    truth = np.clip(able - 0.3 * queries[:, :1] + 0.05, 0.02, 0.98)
    found = fit_calibration(able, queries, VECTORS, drawn(truth), NAMES, 0.3)
    rows = found.table(NAMES)
    assert (rows[:, 1] < rows[:, 2] - 0.3).all()
    assert np.abs(applied(found, able, queries) - truth).mean() < 0.04


def test_strong_priors_leave_domains_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "PRIOR", (1e9, 1e9))
    queries, prediction, correct, _ = world(500, 0.5)
    found = fit_calibration(prediction, queries, VECTORS, correct, NAMES, 0.3)
    np.testing.assert_allclose(found.table(NAMES)[:, 1:], 0.0, atol=1e-4)
    assert found.default == pytest.approx(found.table(NAMES).mean(axis=0))


def test_the_gradient_is_that_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    caught: list[Any] = []

    def minimize(loss: Any, start: Any, **_: Any) -> SimpleNamespace:
        caught.append((loss, len(start)))
        return SimpleNamespace(x=start)

    monkeypatch.setattr(fitting, "minimize", minimize)
    queries, prediction, correct, _ = world(40, 0.6)
    rng = np.random.default_rng(5)
    correct[rng.random(correct.shape) < 0.3] = np.nan
    correct[:5] = 0.5
    fit_calibration(prediction, queries, VECTORS, correct, NAMES, 0.3)
    ((loss, size),) = caught
    assert size == 2 + 3 + 12
    point = rng.normal(0, 0.7, size)
    _, gradient = loss(point)
    steps = 1e-6 * np.eye(size)
    numeric = [(loss(point + step)[0] - loss(point - step)[0]) / 2e-6 for step in steps]
    np.testing.assert_allclose(gradient, numeric, rtol=1e-5, atol=1e-8)
    assert np.abs(gradient).min() > 1e-6  # every parameter has a say


def test_outcomes_that_are_missing_have_no_say_in_scale_and_domains() -> None:
    queries, prediction, correct, _ = world(2000, 0.5)
    correct[::2] = np.nan
    found = fit_calibration(prediction, queries, VECTORS, correct, NAMES, 0.0)
    half = fit_calibration(prediction[1::2], queries[1::2], VECTORS, correct[1::2], NAMES, 0.0)
    assert found.scale == pytest.approx(half.scale, rel=1e-3)
    np.testing.assert_allclose(found.table(NAMES)[:, 1:], half.table(NAMES)[:, 1:], atol=1e-3)


def test_the_share_is_that_which_routes_best() -> None:
    queries = queries_of(2500)
    able = ability(queries, VECTORS)
    rng = np.random.default_rng(3)
    own = np.clip(able + rng.normal(0, 0.3, able.shape), 0.03, 0.97)
    knows = choose_calibration(own, queries, VECTORS, drawn(own), POOL)  # outcomes follow the prediction
    assert knows.ability == min(SHARES)
    guesses = choose_calibration(own, queries, VECTORS, drawn(able), POOL)  # its differences are noise
    assert guesses.ability == max(SHARES)


def test_no_outcomes_are_refused() -> None:
    queries, prediction, correct, _ = world(10, 1.0)
    with pytest.raises(RunError, match="the validation split has no outcomes"):
        fit_calibration(prediction, queries, VECTORS, np.full_like(correct, np.nan), NAMES, 0.3)
