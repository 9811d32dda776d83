"""Fitting a calibration on validation: what is stored and computed is :class:`arllm.runtime.calibration.Calibration`.

Free of torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from arllm.runtime.calibration import Calibration, calibrated, logit, mixed
from arllm.runtime.errors import RunError
from arllm.runtime.pool import Pool
from arllm.runtime.quality import ability, sigmoid
from arllm.train import curves

Floats = NDArray[np.floating[Any]]

SHARES = (0.3, 0.65, 1.0)  # of the candidates' differences, taken from the ability; see tests/benchmarks/QUALITY.md
PRIOR = (300.0, 10_000.0)  # pseudo-outcomes that hold the offset of a domain, and of a domain for one candidate, at 0


def choose_calibration(
    prediction: Floats,
    query_vectors: NDArray[np.float32],
    model_vectors: NDArray[np.float32],
    correct: Floats,
    pool: Pool,
) -> Calibration:
    """:func:`fit_calibration` with the share of :data:`SHARES` whose routes close most of the gap on these queries.

    The fewer the training queries, the more of what a network says of candidates is noise; the means per domain stay
    good. Columns are the pool's candidates.
    """
    table = curves.outcome_table(correct, pool.costs)
    frame = curves.frame(table, table, curves.best_single(correct))
    found, gaps = [], []
    for share in SHARES:
        calibration = fit_calibration(prediction, query_vectors, model_vectors, correct, pool.names, share)
        quality = calibrated(calibration, calibration.table(pool.names), prediction, query_vectors, model_vectors)
        played = curves.play(quality, table, curves.hull_betas(quality, table))
        found.append(calibration)
        gaps.append(float(curves.measure(played, curves.play(quality, table, [0.0]), frame).gap_closed))
    return found[int(np.argmax(np.nan_to_num(gaps, nan=-np.inf)))]


def fit_calibration(
    prediction: Floats,
    query_vectors: NDArray[np.float32],
    model_vectors: NDArray[np.float32],
    correct: Floats,
    names: Sequence[str],
    share: float,
) -> Calibration:
    """The calibration of a policy, on queries that the networks were not trained on.

    Scale and offsets of domains: penalized maximum likelihood. The offsets of the candidates themselves: so that
    they differ in mean quality as their model vectors say that they do on these queries. Training knows that from
    several times as many outcomes, and offsets that follow validation's throws cost routes.

    Args:
        prediction: (N, M) in [0, 1], of the policy.
        query_vectors: (N, Q) float32.
        model_vectors: (M, D) float32.
        correct: (N, M) in [0, 1], NaN = not evaluated.
        names: the M candidates.
        share: of how candidates differ, taken from the ability.

    Raises:
        RunError: no outcome is observed.
    """
    if np.isnan(correct).all():
        raise RunError("the calibration can't be fitted: the validation split has no outcomes")
    domains = query_vectors[:, : model_vectors.shape[1]].astype(np.float64)
    able = ability(query_vectors, model_vectors)
    level = float(np.nanmean(correct - able))  # how much harder these queries are than training's
    base = logit(mixed(prediction, query_vectors, model_vectors, share))
    scale, by_domain = _domains(base, domains, correct)
    score = scale * base + domains @ by_domain.T
    own = _matching(score, np.clip(able.mean(axis=0) + level, 0.01, 0.99))
    rows = np.concatenate([own[:, None], by_domain], axis=1).round(6)
    return Calibration(
        ability=share,
        scale=scale,
        default=tuple(rows.mean(axis=0).tolist()),
        offsets={name: tuple(row) for name, row in zip(names, rows.tolist(), strict=True)},
    )


def _domains(
    score: NDArray[np.float64], domains: NDArray[np.float64], correct: Floats
) -> tuple[float, NDArray[np.float64]]:
    """The scale of a score (N, M), and each candidate's offsets of the domains, (M, D)."""
    seen = ~np.isnan(correct)
    count = seen.sum()
    target = np.where(seen, correct, 0.0).astype(np.float64)
    m, d = correct.shape[1], domains.shape[1]
    # A prior worth w outcomes: each bends the mean loss by at most a quarter. Scale and bias are free.
    spring = np.concatenate([[0.0, 0.0], np.repeat(PRIOR, (d, m * d)) * 0.25 / count])

    def loss(x: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        offsets = x[2 : 2 + d] + x[2 + d :].reshape(m, d)
        z = x[0] * score + x[1] + domains @ offsets.T
        value = np.where(seen, np.logaddexp(0.0, z) - target * z, 0.0).sum() / count
        slope = np.where(seen, sigmoid(z) - target, 0.0) / count  # (N, M)
        pairs = slope.T @ domains  # (M, D)
        gradient = np.concatenate([[(slope * score).sum(), slope.sum()], pairs.sum(axis=0), pairs.ravel()])
        return float(value + 0.5 * (spring * x * x).sum()), gradient + spring * x

    start = np.zeros(len(spring))
    start[0] = 1.0
    bounds = [(1e-3, None)] + [(None, None)] * (len(spring) - 1)
    found = minimize(loss, start, jac=True, bounds=bounds, method="L-BFGS-B", options={"maxiter": 300}).x
    return float(found[0]), found[2 : 2 + d] + found[2 + d :].reshape(m, d)


def _matching(score: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """Offsets (M,) with which the queries' mean of sigmoid(score + offset) is the target, by Newton's rule."""
    offsets = np.zeros(score.shape[1])
    for _ in range(50):
        quality = sigmoid(score + offsets)
        step = (quality.mean(axis=0) - target) / np.maximum((quality * (1.0 - quality)).mean(axis=0), 1e-3)
        offsets -= np.clip(step, -1.0, 1.0)
        if np.abs(step).max() < 1e-9:
            break
    return offsets
