"""Fitting a calibration on validation: what is stored and computed is :class:`arllm.runtime.calibration.Calibration`.

Free of torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from arllm.runtime.calibration import Calibration, logit, mixed
from arllm.runtime.errors import RunError

Floats = NDArray[np.floating[Any]]

ABILITY = 0.4  # share of the candidates' differences that is taken from the ability; see tests/benchmarks/QUALITY.md
# Pseudo-outcomes that hold the offset of a candidate, a domain, and a pair of both at 0. Training knows the
# candidates from several times as many outcomes: offsets that follow validation's throws cost routes.
PRIOR = (500.0, 300.0, 10_000.0)


def fit_calibration(
    prediction: Floats,
    query_vectors: NDArray[np.float32],
    model_vectors: NDArray[np.float32],
    correct: Floats,
    names: Sequence[str],
) -> Calibration:
    """Penalized maximum likelihood of scale and offsets on queries that the networks were not trained on.

    Binary cross-entropy, with Gaussian priors that hold the offsets near 0.

    Args:
        prediction: (N, M) in [0, 1], of the policy.
        query_vectors: (N, Q) float32.
        model_vectors: (M, D) float32.
        correct: (N, M) in [0, 1], NaN = not evaluated.
        names: the M candidates.

    Raises:
        RunError: no outcome is observed.
    """
    if np.isnan(correct).all():
        raise RunError("the calibration can't be fitted: the validation split has no outcomes")
    domains = query_vectors[:, : model_vectors.shape[1]].astype(np.float64)
    score = logit(mixed(prediction, query_vectors, model_vectors, ABILITY))
    scale, rows = _offsets(score, domains, correct)
    rows = rows.round(6)
    return Calibration(
        ability=ABILITY,
        scale=scale,
        default=tuple(rows.mean(axis=0).tolist()),
        offsets={name: tuple(row) for name, row in zip(names, rows.tolist(), strict=True)},
    )


def _offsets(
    score: NDArray[np.float64], domains: NDArray[np.float64], correct: Floats
) -> tuple[float, NDArray[np.float64]]:
    """The scale of a score (N, M), and rows of offsets (M, 1 + D): of the candidate, of each domain."""
    seen = ~np.isnan(correct)
    target = np.where(seen, correct, 0.0).astype(np.float64)
    m, d = correct.shape[1], domains.shape[1]
    # A prior worth w outcomes: each bends the mean loss by at most a quarter.
    free, held = [0.0, 0.0], np.repeat(PRIOR, (m, d, m * d)) * 0.25 / seen.sum()
    spring = np.concatenate([free, held])

    def parts(x: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
        return x[2 : 2 + m], x[2 + m : 2 + m + d], x[2 + m + d :].reshape(m, d)

    def loss(x: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        by_candidate, by_domain, by_pair = parts(x)
        value, slope = _cross_entropy(
            x[0] * score + x[1] + by_candidate + domains @ (by_domain + by_pair).T, target, seen
        )
        pairs = slope.T @ domains  # (M, D)
        gradient = [[(slope * score).sum(), slope.sum()], slope.sum(axis=0), pairs.sum(axis=0), pairs.ravel()]
        return value + 0.5 * float((spring * x * x).sum()), np.concatenate(gradient) + spring * x

    start = np.zeros(len(spring))
    start[0] = 1.0
    bounds = [(1e-3, None)] + [(None, None)] * (len(spring) - 1)
    found = minimize(loss, start, jac=True, bounds=bounds, method="L-BFGS-B", options={"maxiter": 300}).x
    by_candidate, by_domain, by_pair = parts(found)
    return float(found[0]), np.concatenate([(found[1] + by_candidate)[:, None], by_domain + by_pair], axis=1)


def _cross_entropy(
    score: NDArray[np.float64], target: NDArray[np.float64], seen: NDArray[np.bool_]
) -> tuple[float, NDArray[np.float64]]:
    """Mean over the seen cells, and its slope by each score, (N, M)."""
    count = seen.sum()
    value = np.where(seen, np.logaddexp(0.0, score) - target * score, 0.0).sum() / count
    slope: NDArray[np.float64] = np.where(seen, 1.0 / (1.0 + np.exp(-score)) - target, 0.0) / count
    return float(value), slope
