"""From what a policy predicts to the quality that is mixed with cost: calibration, then doubt about strange queries.

Pure functions of arrays and the parameters that a bundle stores. Knows nothing about graphs, beta or text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arllm.runtime.errors import BundleSchemaError
from arllm.runtime.quality import ability

Array = NDArray[np.float32]
Floats = NDArray[np.floating[Any]]

EDGE = 0.01  # predictions are held this far from 0 and 1: a logit is infinite there


@dataclass(frozen=True, eq=False)
class Calibration:
    """``sigmoid(scale * logit(mixed) + offset_m + sum_d p_d * offset_{m,d})``.

    ``mixed = (1 - ability) * prediction + ability * sum_d p_d * a_{m,d}``: a prediction that was fitted to single
    outcomes overrates how candidates differ, and the means per domain are the steadier half of it.
    ``offsets`` has a row of 1 + D logits for each candidate whose outcomes were seen; any other candidate gets
    ``default``, the mean row. Fitted by :mod:`arllm.train.calibration` on validation.
    Source of the logistic form: Platt 1999.
    """

    ability: float  # in [0, 1]
    scale: float
    default: tuple[float, ...]
    offsets: Mapping[str, tuple[float, ...]]

    def table(self, names: Sequence[str]) -> NDArray[np.float64]:
        """The rows of the named candidates, (M, 1 + D) float64."""
        return np.array([self.offsets.get(name, self.default) for name in names], dtype=np.float64)

    def to_json(self) -> dict[str, Any]:
        return {
            "ability": self.ability,
            "scale": self.scale,
            "default": list(self.default),
            "offsets": {name: list(row) for name, row in self.offsets.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], domains: int) -> Calibration:
        """Parse what a manifest or a run stores.

        Raises:
            BundleSchemaError: a number is missing or not finite, or a row has another width than 1 + ``domains``.
        """
        try:
            rows = {str(name): tuple(float(v) for v in row) for name, row in data["offsets"].items()}
            default = tuple(float(v) for v in data["default"])
            found = cls(float(data["ability"]), float(data["scale"]), default, rows)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise BundleSchemaError(
                f"calibration: expected ability, scale, default and offsets ({error!r})"
            ) from None
        for name, row in (("default", default), *rows.items()):
            if len(row) != 1 + domains:
                raise BundleSchemaError(f"calibration: {name!r} has {len(row)} offsets, expected {1 + domains}")
        values = (found.ability, found.scale, *default, *(v for row in rows.values() for v in row))
        if not all(math.isfinite(value) for value in values):
            raise BundleSchemaError("calibration: a number is not finite")
        return found


def logit(probability: Floats) -> NDArray[np.float64]:
    """Log odds of probabilities held in [EDGE, 1 - EDGE]."""
    held = np.minimum(np.maximum(np.asarray(probability, dtype=np.float64), EDGE), 1.0 - EDGE)
    odds: NDArray[np.float64] = np.log(held / (1.0 - held))
    return odds


class PoolCalibration:
    """A :class:`Calibration` of one pool; both of its sums over domains are one matrix product.

    ``table`` (M, 1 + D) is :meth:`Calibration.table` of the candidates, ``model_vectors`` (M, D). It runs for every
    query, in a gateway whose own work has emptied the caches, where each array operation takes microseconds: so all
    are in place, and the logit has its sign turned, as the sigmoid needs it.
    """

    def __init__(self, calibration: Calibration, table: NDArray[np.float64], model_vectors: Array) -> None:
        self._count, self._domains = model_vectors.shape
        self._keep, self._scale, self._minus_base = 1.0 - calibration.ability, calibration.scale, -table[:, 0]
        shares = calibration.ability * model_vectors.T.astype(np.float64)
        self._products = np.concatenate([shares, -table[:, 1:].T], axis=1)  # (D, 2M)

    def __call__(self, prediction: Floats, query_vectors: Array) -> NDArray[np.float64]:
        """Predictions (B, M) of a policy, query vectors (B, Q) → calibrated P(correct), (B, M) float64 in (0, 1)."""
        sums = query_vectors[:, : self._domains].astype(np.float64) @ self._products
        held = np.multiply(prediction, self._keep, dtype=np.float64)
        held += sums[:, : self._count]
        np.maximum(held, EDGE, out=held)
        np.minimum(held, 1.0 - EDGE, out=held)
        np.reciprocal(held, out=held)
        held -= 1.0
        score: NDArray[np.float64] = np.log(held, out=held)  # minus the logit
        score *= self._scale
        score += self._minus_base
        score += sums[:, self._count :]
        np.exp(score, out=score)
        score += 1.0
        return np.reciprocal(score, out=score)


def calibrated(
    calibration: Calibration,
    table: NDArray[np.float64],
    prediction: Floats,
    query_vectors: Array,
    model_vectors: Array,
) -> NDArray[np.float64]:
    """:class:`PoolCalibration`, used once: (B, M) → (B, M)."""
    return PoolCalibration(calibration, table, model_vectors)(prediction, query_vectors)


def mixed(prediction: Floats, query_vectors: Array, model_vectors: Array, share: float) -> NDArray[np.float64]:
    """The prediction with ``share`` of the ability in it, (B, M) float64."""
    blend: NDArray[np.float64] = (1.0 - share) * np.asarray(prediction, dtype=np.float64)
    blend += share * ability(query_vectors, model_vectors)
    return blend


def standing(prior: NDArray[np.float64], mean_difficulty: float) -> NDArray[np.float64]:
    """``exp(logit(prior) - logit(1 - mean difficulty of training))``, (M,): how each candidate stands, as odds."""
    odds: NDArray[np.float64] = np.exp(logit(prior) - logit(np.array([1.0 - mean_difficulty])))
    return odds


def overall(standings: NDArray[np.float64], difficulty: Floats) -> NDArray[np.float64]:
    """What is known of a candidate on a query of which only the difficulty is: (M,), (B,) → (B, M) float64.

    ``sigmoid(log(standing) + logit(ease))``, ease being 1 - difficulty: the overall accuracy, moved as far as the
    query is harder or easier than the mean. Without logarithms: ``s * ease / (s * ease + 1 - ease)``. On queries that
    nobody or everybody answers candidates come closer, so that at one beta not all strange queries change sides at
    once. Source of the form: Rasch 1960.
    """
    ease = np.subtract(1.0, difficulty, dtype=np.float64)[:, None]
    np.maximum(ease, EDGE, out=ease)
    np.minimum(ease, 1.0 - EDGE, out=ease)
    odds: NDArray[np.float64] = standings * ease
    ease -= 1.0
    odds /= odds - ease
    return odds


def shrunk(quality: Floats, familiarity: Floats, known: NDArray[np.float64]) -> NDArray[np.float64]:
    """``known + familiarity * (quality - known)``: (B, M), (B,), (B, M) → (B, M) float64."""
    held = np.subtract(quality, known, dtype=np.float64)
    held *= np.asarray(familiarity)[:, None]
    held += known
    return held
