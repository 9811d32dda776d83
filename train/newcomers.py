"""Candidates that were never trained on: a model vector from a few scored queries, and which queries to score.

Pure functions of arrays. Knows nothing about bundles, files or graphs; needs numpy alone.

A newcomer is taken for one more draw from the population of the pool's candidates: on the logit scale its model
vector has the mean and the (shrunk) covariance of theirs. Its outcomes have the likelihood of HDP's ability,
P(correct) = sum_d p_d * a_d, so that one answer also speaks for every domain that goes along with this one.
Source: Laplace's approximation around the posterior mode, MacKay 1992; shrinkage of a covariance toward a structured
target, Ledoit & Wolf 2004 (their idea; the weight here is fixed).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arllm.runtime.calibration import logit
from arllm.runtime.quality import sigmoid

Array = NDArray[np.float64]
Floats = NDArray[np.floating[Any]]

SHRINK = 0.2  # weight of the structured target in the covariance
# Variances in squared logits, for pools that can't show their own: of what all domains share, and of the rest.
# A pool of one candidate gets those of `nano`'s pool (15 candidates, 38 domains: .44 and .23).
ALONE = (0.45, 0.25)
LEAST = (0.05, 0.02)  # of a pool of near-equal candidates: else no outcomes could tell a newcomer apart
STEPS = 50
HELD = 1e-3  # how far P(correct) is held from 0 and 1 in a weight 1 / (p * (1 - p))


@dataclass(frozen=True, eq=False)
class Newcomer:
    """What is known of a candidate after a few scored queries.

    ``vector`` (D,) in (0, 1) is its model vector, ``accuracy`` the mean of it by the domains' shares, ``interval``
    the accuracy's 95% credible interval. ``nearest`` holds the pool's rows, the most similar first, ``differences``
    how far each is: the root mean square over the domains, by their shares, in accuracy.
    """

    vector: Array
    accuracy: float
    interval: tuple[float, float]
    nearest: tuple[int, ...]
    differences: tuple[float, ...]


def population(pool_vectors: Floats) -> tuple[Array, Array]:
    """Mean (D,) and covariance (D, D), on the logit scale, of the candidates whose model vectors (M, D) are known.

    The covariance is the sample's, with a share of ``SHRINK`` replaced by a level that all domains have in common
    plus equal, independent rests, of the sample's own variances.
    """
    logits = logit(pool_vectors)
    m, d = logits.shape
    mean: Array = logits.mean(axis=0)
    shared = np.full((d, d), 1.0 / d)
    if m < 2:
        return mean, ALONE[0] * d * shared + ALONE[1] * (np.eye(d) - shared)
    apart = logits - mean
    sample = apart.T @ apart / (m - 1)
    level = float(sample.sum()) / d  # variance along (1, …, 1) / sqrt(d)
    rest = (float(np.trace(sample)) - level) / max(1, d - 1)
    target = level * shared + rest * (np.eye(d) - shared)
    covariance = (1.0 - SHRINK) * sample + SHRINK * target
    missing = (max(0.0, LEAST[0] * d - level), max(0.0, LEAST[1] - rest))
    covariance += missing[0] * shared + missing[1] * (np.eye(d) - shared)
    return mean, covariance


def estimate(
    query_vectors: Floats, correct: Floats, pool_vectors: Floats, domain_shares: Sequence[float] | None = None
) -> Newcomer:
    """The posterior mode of a newcomer's model vector, given its outcomes.

    Args:
        query_vectors: (n, Q), the domain probabilities first; n >= 1.
        correct: (n,) in [0, 1]; a fraction counts as that share of a right and of a wrong answer.
        pool_vectors: (M, D) model vectors of the pool.
        domain_shares: (D,) weights of the overall accuracy; None = every domain alike.
    """
    pool = np.asarray(pool_vectors, dtype=np.float64)
    d = pool.shape[1]
    domains = _domains(query_vectors, d)
    outcomes = np.asarray(correct, dtype=np.float64)
    mean, covariance = population(pool)
    mode, spread = _mode(domains, outcomes, mean, covariance)
    vector = sigmoid(mode)
    shares = np.full(d, 1.0 / d) if domain_shares is None else np.asarray(domain_shares, dtype=np.float64)
    shares = shares / shares.sum()
    accuracy = float(shares @ vector)
    slope = shares * vector * (1.0 - vector)
    # The delta method on the logit scale, so that the interval stays inside (0, 1).
    deviation = float(np.sqrt(slope @ spread @ slope)) / (accuracy * (1.0 - accuracy))
    ends = sigmoid(np.log(accuracy / (1.0 - accuracy)) + np.array([-1.96, 1.96]) * deviation)
    differences = np.sqrt((pool - vector) ** 2 @ shares)
    order = np.argsort(differences, kind="stable")
    return Newcomer(
        vector,
        accuracy,
        (float(ends[0]), float(ends[1])),
        tuple(order.tolist()),
        tuple(differences[order].tolist()),
    )


def probe(
    query_vectors: Floats, pool_vectors: Floats, n: int, texts: Sequence[str] | None = None
) -> NDArray[np.int64]:
    """The queries (N, Q) from which most is learned of a newcomer: up to ``n`` indices, the most telling first.

    Each step takes the query that shrinks the determinant of the posterior covariance most (D-optimal design,
    greedily), with the likelihood linearised at the population's mean. Of queries with equal ``texts`` only one is
    taken.
    """
    vectors = np.asarray(pool_vectors, dtype=np.float64)
    domains = _domains(query_vectors, vectors.shape[1])
    groups = np.arange(len(domains))
    if texts is not None:
        groups = np.unique(np.array(texts, dtype=object).astype(str), return_inverse=True)[1].reshape(-1)
    mean, covariance = population(vectors)
    accuracy = sigmoid(mean)
    p = np.clip(domains @ accuracy, HELD, 1.0 - HELD)
    rows = domains * (accuracy * (1.0 - accuracy)) / np.sqrt(p * (1.0 - p))[:, None]  # (N, D), of unit noise
    gain = np.einsum("nd,nd->n", rows @ covariance, rows)  # the determinant falls by 1 + gain
    chosen: list[int] = []
    while len(chosen) < n and np.isfinite(gain).any():
        best = int(np.argmax(gain))
        chosen.append(best)
        along = covariance @ rows[best]
        scale = 1.0 + float(rows[best] @ along)
        covariance = covariance - np.outer(along, along) / scale
        gain = gain - (rows @ along) ** 2 / scale
        gain[groups == groups[best]] = -np.inf
    return np.array(chosen, dtype=np.int64)


def _mode(domains: Array, correct: Array, mean: Array, covariance: Array) -> tuple[Array, Array]:
    """Posterior mode (D,) on the logit scale and the covariance (D, D) there, by Fisher scoring with halved steps.

    It works on u, where logits = mean + root @ u and u is a priori of unit variance.
    """
    root: Array = np.linalg.cholesky(covariance).astype(np.float64)
    u = np.zeros(len(mean))
    p = domains @ sigmoid(mean)
    loss = _loss(p, correct, u)
    for _ in range(STEPS):
        slopes, information = _linearised(domains, p, mean + root @ u, root)
        held = np.clip(p, HELD, 1.0 - HELD)
        gradient = slopes.T @ ((correct - p) / (held * (1.0 - held))) - u
        step = np.linalg.solve(information, gradient)
        before = loss
        for halving in range(12):
            trial = u + step / 2.0**halving
            trial_p = domains @ sigmoid(mean + root @ trial)
            trial_loss = _loss(trial_p, correct, trial)
            if trial_loss < loss:
                u, p, loss = trial, trial_p, trial_loss
                break
        if before - loss < 1e-6:
            break
    information = _linearised(domains, p, mean + root @ u, root)[1]
    return mean + root @ u, root @ np.linalg.solve(information, root.T)


def _linearised(domains: Array, p: Array, logits: Array, root: Array) -> tuple[Array, Array]:
    """d p / d u (n, D), and the Fisher information of u with its prior (D, D)."""
    accuracy = sigmoid(logits)
    slopes = (domains * (accuracy * (1.0 - accuracy))) @ root
    held = np.clip(p, HELD, 1.0 - HELD)
    information: Array = slopes.T @ (slopes / (held * (1.0 - held))[:, None]) + np.eye(len(logits))
    return slopes, information


def _loss(p: Array, correct: Array, u: Array) -> float:
    held = np.clip(p, 1e-4, 1.0 - 1e-4)
    likelihood = correct * np.log(held) + (1.0 - correct) * np.log(1.0 - held)
    return float(0.5 * u @ u - likelihood.sum())


def _domains(query_vectors: Floats, d: int) -> Array:
    """The domain probabilities (n, D) of query vectors (n, Q): not negative, sum at most 1."""
    found = np.maximum(np.asarray(query_vectors, dtype=np.float64)[:, :d], 0.0)
    domains: Array = found / np.maximum(found.sum(axis=1, keepdims=True), 1.0)
    return domains
