"""Whether predicted quality means what it says: reliability in equal-mass bins, ECE, AUC and Brier. Free of torch.

Arrays of any shape are taken as a bag of (outcome, prediction) pairs; pairs with a NaN outcome are left out.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arllm.runtime.errors import OutcomesError
from arllm.train.metrics import brier, candidate_auc

Floats = NDArray[np.floating[Any]]
Array = NDArray[np.float64]

BINS = 15


@dataclass(frozen=True, eq=False)
class Reliability:
    """Bins of about equal mass by ascending prediction; B of them, fewer than asked where predictions repeat."""

    predicted: Array  # (B,) mean prediction
    observed: Array  # (B,) mean outcome
    count: NDArray[np.int64]  # (B,) pairs
    noise: Array  # (B,) estimated variance of observed - predicted; NaN for a bin of one pair

    @property
    def share(self) -> Array:
        share: Array = self.count / self.count.sum()
        return share


def reliability(correct: Floats, predicted: Floats, bins: int = BINS) -> Reliability:
    """Sort pairs into at most ``bins`` bins of about equal mass; equal predictions share a bin.

    They must: a predictor of few values would otherwise be cut by the order of the file, which says something of
    the outcomes.

    Args:
        correct: outcomes in [0, 1], NaN = not evaluated.
        predicted: of the same shape, in [0, 1].

    Raises:
        OutcomesError: nothing was evaluated, or the shapes differ.
    """
    if correct.shape != predicted.shape:
        raise OutcomesError(f"outcomes of shape {correct.shape}, predictions of shape {predicted.shape}")
    seen = ~np.isnan(correct)
    if not seen.any():
        raise OutcomesError("reliability needs an evaluated outcome")
    truth, guess = correct[seen].astype(np.float64), predicted[seen].astype(np.float64)
    ordered = np.sort(guess)
    first = ordered[(np.arange(1, bins) * len(guess)) // bins]  # the least prediction of each bin but the lowest
    member = np.searchsorted(np.unique(first), guess, side="right")
    _, member = np.unique(member, return_inverse=True)  # empty bins drop out
    count = np.bincount(member)
    total_truth, total_guess = np.bincount(member, truth), np.bincount(member, guess)
    residual = truth - guess
    mean = np.bincount(member, residual) / count
    squares = np.bincount(member, (residual - mean[member]) ** 2)
    noise = np.divide(squares, count * (count - 1.0), out=np.full(len(count), np.nan), where=count > 1)
    return Reliability(total_guess / count, total_truth / count, count.astype(np.int64), noise)


def ece(bins: Reliability) -> float:
    """Expected calibration error, ``sum_b share_b * |observed_b - predicted_b|``. Biased upward by the bins' noise.

    Source: Guo et al. 2017, with bins of equal mass (Nguyen and O'Connor 2015).
    """
    return float(np.sum(bins.share * np.abs(bins.observed - bins.predicted)))


def debiased_ece(bins: Reliability) -> float:
    """Root of the debiased squared calibration error, 0 where that is negative.

    ``sum_b share_b * ((observed_b - predicted_b)^2 - variance_b)``, the variance of the bin's mean residual estimated
    in the bin: s^2 / n. For outcomes of 0 and 1 and one prediction in the bin that is the published
    ``observed (1 - observed) / (n - 1)``. The square is unbiased: a perfectly calibrated predictor gives 0 on
    average. It is the l2 error: never below the l1 error that ECE estimates, so it doesn't flatter.
    Source: Kumar, Liang and Ma 2019 (Verified uncertainty calibration), definition 4.1.
    """
    variance = np.where(
        np.isnan(bins.noise), (bins.observed - bins.predicted) ** 2, bins.noise
    )  # of one pair: no say
    square = float(np.sum(bins.share * ((bins.observed - bins.predicted) ** 2 - variance)))
    return float(np.sqrt(max(square, 0.0)))


def perfect_ece(correct: Floats, predicted: Floats, draws: int = 100, seed: int = 0) -> tuple[float, float]:
    """Mean and 95th percentile of :func:`ece` where the same predictions are true: what noise alone gives.

    Outcomes are drawn as Bernoulli(predicted), ``draws`` times.
    """
    rng = np.random.default_rng(seed)
    guess = predicted[~np.isnan(correct)].astype(np.float64)
    values = [ece(reliability((rng.random(guess.shape) < guess).astype(np.float64), guess)) for _ in range(draws)]
    return float(np.mean(values)), float(np.quantile(values, 0.95))


def prediction_figures(
    correct: Floats, quality: Floats, names: Sequence[str], unseen: Collection[str] = (), perfect_draws: int = 0
) -> dict[str, Any]:
    """What predictions are worth by themselves, in plain JSON types: per candidate, the means of those, and pooled.

    AUC is of the qualities as they are; Brier and ECE of the qualities clipped to [0, 1], which a regression may
    leave. None where one class alone occurs, or nothing was evaluated.

    Args:
        correct, quality: (N, M); NaN in ``correct`` = not evaluated.
        names: the M candidates.
        unseen: those the router was not trained on.
        perfect_draws: of :func:`perfect_ece`; 0: leave it out.
    """
    areas = candidate_auc(correct, quality)
    probability = np.clip(quality, 0.0, 1.0)
    rows: dict[str, dict[str, float | None]] = {}
    for m, name in enumerate(names):
        truth, guess = correct[:, m], probability[:, m]
        if np.isnan(truth).all():
            continue
        bins = reliability(truth, guess)
        rows[name] = {
            "auc": None if np.isnan(areas[m]) else float(areas[m]),
            "brier": brier(truth, guess),
            "ece": ece(bins),
            "ece_debiased": debiased_ece(bins),
        }
        if perfect_draws:
            rows[name]["ece_of_a_perfect_predictor"] = perfect_ece(truth, guess, perfect_draws)[0]

    def mean(key: str, of: Collection[str] = names) -> float | None:
        values = [value for name in of if name in rows and (value := rows[name].get(key)) is not None]
        return float(np.mean(values)) if values else None

    pooled = candidate_auc(correct.reshape(-1, 1), quality.reshape(-1, 1))[0]
    return {
        "auc": mean("auc"),
        "auc_pooled": None if np.isnan(pooled) else float(pooled),
        "auc_seen": mean("auc", [name for name in names if name not in unseen]),
        "auc_unseen": mean("auc", unseen),
        "brier": brier(correct, probability),
        "ece": mean("ece"),
        "ece_debiased": mean("ece_debiased"),
        "ece_of_a_perfect_predictor": mean("ece_of_a_perfect_predictor"),
        "ece_debiased_pooled": debiased_ece(reliability(correct, probability)),
        "candidates": rows,
    }
