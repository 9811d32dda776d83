"""Fitting the Heuristic Difficulty Penalty: three parameters on outcomes that the encoder was not trained on.

The formula itself is :class:`arllm.runtime.quality.Hdp`; nothing here needs torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from arllm.runtime.errors import RunError
from arllm.runtime.quality import Hdp, ability, sigmoid

MINIMUM_SLOPE = 1e-3  # positive, so that the ranking at beta 0 stays that of the abilities


def fit_hdp(
    query_vectors: NDArray[np.float32], model_vectors: NDArray[np.float32], correct: NDArray[np.floating[Any]]
) -> Hdp:
    """Maximum likelihood of ``sigmoid(slope * (ability - centre) - weight * difficulty + bias)``; slope, weight > 0.

    A logistic regression with two features and bounds. The query vectors must be those of queries on which the
    encoder was not trained (the validation split): its outputs on its own training queries are over-confident.

    Args:
        query_vectors: (N, Q) float32.
        model_vectors: (M, D) float32.
        correct: (N, M) in [0, 1], NaN = not evaluated.

    Raises:
        RunError: no outcome is observed.
    """
    observed = ~np.isnan(correct)
    if not observed.any():
        raise RunError("HDP can't be fitted: the validation split has no outcomes")
    target = correct[observed].astype(np.float64)
    centre = model_vectors.mean(axis=0, keepdims=True)
    able = (ability(query_vectors, model_vectors) - ability(query_vectors, centre))[observed]
    hard = np.broadcast_to(query_vectors[:, model_vectors.shape[1], None], correct.shape)[observed].astype(np.float64)
    features = np.stack([able, -hard, np.ones_like(able)], axis=1)  # (n, 3)

    def loss(parameters: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        logit = features @ parameters
        value = np.mean(np.logaddexp(0.0, logit) - target * logit)
        residual = sigmoid(logit) - target
        return float(value), features.T @ residual / len(target)

    bounds = [(MINIMUM_SLOPE, None), (MINIMUM_SLOPE, None), (None, None)]
    result = minimize(loss, np.array([4.0, 1.0, -1.0]), jac=True, bounds=bounds, method="L-BFGS-B")
    slope, weight, bias = (float(value) for value in result.x)
    return Hdp(slope, weight, bias, tuple(float(value) for value in centre[0]))
