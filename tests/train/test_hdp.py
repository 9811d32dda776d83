"""Tests of train/hdp.py: the three parameters are recovered from simulated outcomes, within their bounds."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from arllm.runtime.errors import RunError
from arllm.runtime.quality import Hdp
from arllm.train.hdp import MINIMUM_SLOPE, fit_hdp

Floats32 = NDArray[np.float32]
TRUE = Hdp(slope=6.0, weight=3.0, bias=1.5)


def simulated(n: int = 3000, m: int = 6, d: int = 4, seed: int = 0) -> tuple[Floats32, Floats32, Floats32]:
    """Query vectors with an embedding behind, model vectors, and the true probabilities of ``TRUE``, (n, m)."""
    rng = np.random.default_rng(seed)
    domains, hard = rng.dirichlet(np.full(d, 0.4), n), rng.random((n, 1))
    vectors = np.concatenate([domains, hard, rng.normal(size=(n, 3))], axis=1).astype(np.float32)
    models = rng.random((m, d)).astype(np.float32)
    relative = models.astype(np.float64) - models.mean(axis=0)
    logit = 6.0 * (domains @ relative.T) - 3.0 * hard + 1.5
    return vectors, models, (1.0 / (1.0 + np.exp(-logit))).astype(np.float32)


def parameters(hdp: Hdp) -> NDArray[np.float64]:
    return np.array([hdp.slope, hdp.weight, hdp.bias])


def test_soft_outcomes_give_the_parameters_back() -> None:
    vectors, models, truth = simulated()
    np.testing.assert_allclose(parameters(fit_hdp(vectors, models, truth)), parameters(TRUE), atol=0.01)


def test_the_centre_is_the_mean_candidate_of_the_training_pool() -> None:
    vectors, models, truth = simulated()
    assert fit_hdp(vectors, models, truth).centre == pytest.approx(models.mean(axis=0).tolist())


def test_coin_flips_give_them_back_roughly() -> None:
    vectors, models, truth = simulated()
    correct = (np.random.default_rng(1).random(truth.shape) < truth).astype(np.float32)
    fitted = fit_hdp(vectors, models, correct)
    np.testing.assert_allclose(parameters(fitted), parameters(TRUE), atol=0.5)
    np.testing.assert_allclose(fitted.predict(vectors, models), truth, atol=0.05)


def test_missing_outcomes_are_left_out() -> None:
    vectors, models, truth = simulated()
    hidden = np.random.default_rng(2).random(truth.shape) < 0.5
    masked = np.where(hidden, np.nan, truth).astype(np.float32)
    np.testing.assert_allclose(parameters(fit_hdp(vectors, models, masked)), parameters(TRUE), atol=0.01)
    wrong_there = np.where(hidden, 0.0, truth).astype(np.float32)  # counted as wrong, they would move the fit
    assert np.abs(parameters(fit_hdp(vectors, models, wrong_there)) - parameters(TRUE)).max() > 0.3


def test_slope_and_weight_stay_positive() -> None:
    vectors, models, truth = simulated()
    fitted = fit_hdp(vectors, models, 1.0 - truth)  # the abler, the worse; the harder, the better
    assert fitted.slope == pytest.approx(MINIMUM_SLOPE)
    assert fitted.weight == pytest.approx(MINIMUM_SLOPE)


@pytest.mark.parametrize("constant", [0.0, 1.0])
def test_one_class_alone_gives_finite_parameters(constant: float) -> None:
    vectors, models, truth = simulated(n=50)
    fitted = fit_hdp(vectors, models, np.full_like(truth, constant))
    assert np.isfinite(parameters(fitted)).all()
    np.testing.assert_allclose(fitted.predict(vectors, models), constant, atol=0.05)


def test_no_outcome_at_all_is_an_error() -> None:
    vectors, models, truth = simulated(n=5)
    with pytest.raises(RunError, match="no outcomes"):
        fit_hdp(vectors, models, np.full_like(truth, np.nan))
