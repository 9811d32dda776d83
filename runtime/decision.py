"""The decision rule, as pure functions of arrays: normalized cost, utility, candidate mask, choice.

No I/O and no state; training's evaluation and the gateway both call exactly this.
Candidates stand in tie-break order (cost, name), as :class:`arllm.runtime.pool.Pool` keeps them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arllm.runtime.errors import BetaError, CandidateError

Floats = NDArray[np.floating[Any]]

NUMERIC_TIE = 2e-4  # two utilities this close are a tie when two runtimes are compared, never when deciding


def check_beta(beta: object) -> float:
    """``beta`` as a float.

    Raises:
        BetaError: not a number in [0, 1]; NaN and booleans included.
    """
    if isinstance(beta, (bool, np.bool_)) or not isinstance(beta, (int, float, np.integer, np.floating)):
        raise BetaError(f"beta must be a number in [0, 1], not {beta!r}")
    try:
        value = float(beta)
    except OverflowError:  # a whole number beyond any float
        value = math.inf
    if not 0.0 <= value <= 1.0:  # false for NaN as well
        raise BetaError(f"beta must lie in [0, 1] (0 = quality alone, 1 = cost alone), not {value}")
    return value


def normalize_costs(costs: Floats, minimum: float, maximum: float) -> NDArray[np.float64]:
    """(cost - minimum) / (maximum - minimum), (M,) float64; all 0 where the span is 0.

    The bounds are those of the bundle's whole pool, so that beta keeps its meaning when a request narrows the
    candidates. A cost outside the bounds (an overridden price) extrapolates.
    """
    span = maximum - minimum
    values = np.asarray(costs, dtype=np.float64)
    if span <= 0 or not math.isfinite(span):
        return np.zeros_like(values)
    scaled: NDArray[np.float64] = (values - minimum) / span
    return scaled


def utility(quality: Floats, normalized_cost: Floats, beta: float) -> NDArray[np.float64]:
    """``(1 - beta) * quality - beta * normalized_cost``: quality (…, M), normalized_cost (M,) → (…, M) float64."""
    gain: NDArray[np.float64] = np.multiply(quality, 1.0 - beta, dtype=np.float64)
    gain -= beta * normalized_cost
    return gain


def candidate_rows(positions: Mapping[str, int], allowed: Collection[str] | None) -> NDArray[np.intp] | None:
    """Positions of the allowed candidates, (K,) ascending, or None where every candidate is allowed.

    ``positions`` are those of the names in the pool.

    Raises:
        CandidateError: an unknown name, or no name at all.
    """
    if allowed is None:
        return None
    if isinstance(allowed, str):
        raise CandidateError(f"candidates must be a collection of names, not the string {allowed!r}")
    try:
        wanted = set(allowed)
    except TypeError:
        raise CandidateError(f"candidates must be a collection of names, not {allowed!r}") from None
    if not wanted:
        raise CandidateError("the candidate set is empty: name at least one candidate, or pass None for all")
    unknown = sorted(wanted - positions.keys(), key=str)
    if unknown:
        raise CandidateError(f"unknown candidate {unknown[0]!r}: the pool has {', '.join(positions)}")
    return np.array(sorted(positions[name] for name in wanted), dtype=np.intp)


def candidate_mask(names: Sequence[str], allowed: Collection[str] | None) -> NDArray[np.bool_] | None:
    """:func:`candidate_rows` as (M,) bool."""
    rows = candidate_rows({name: i for i, name in enumerate(names)}, allowed)
    if rows is None:
        return None
    mask = np.zeros(len(names), dtype=np.bool_)
    mask[rows] = True
    return mask


def choose(utilities: Floats, mask: NDArray[np.bool_] | None = None) -> NDArray[np.intp]:
    """Index of the highest utility in each row, (…, M) → (…,). The first maximum wins: lower cost, then name."""
    if mask is not None:
        utilities = np.where(mask, utilities, -np.inf)
    index: NDArray[np.intp] = np.argmax(utilities, axis=-1)
    return index
