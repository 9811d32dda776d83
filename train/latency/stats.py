"""The arithmetic of a latency benchmark: percentiles, ratios, log-log slopes and their words. Knows no clock.

Pure functions of numbers; free of torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

FLAT = 0.1  # exponents below it, in amount, are called "hardly changes"


@dataclass(frozen=True)
class Spread:
    """Nearest-rank percentiles of ``n`` durations, in milliseconds. Below 100 durations p99 is the maximum."""

    n: int
    p50: float
    p95: float
    p99: float
    max: float


@dataclass(frozen=True)
class Ratio:
    """A ratio measured once a round: the median over the rounds, and the quartiles between which half of them lie."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Growth:
    """``y ~ x ** exponent`` between two sizes of the work, both ends included."""

    start: float
    end: float
    exponent: float


def nearest_rank(ordered: Sequence[float], percent: int) -> float:
    """The smallest of the ascending values that at least ``percent`` % of them do not exceed."""
    return ordered[max(0, -(-percent * len(ordered) // 100) - 1)]


def spread(nanoseconds: Sequence[int]) -> Spread:
    """Raises ValueError: there is no duration."""
    if not nanoseconds:
        raise ValueError("no durations to summarise")
    ordered = [value / 1e6 for value in sorted(nanoseconds)]
    p50, p95, p99 = (nearest_rank(ordered, percent) for percent in (50, 95, 99))
    return Spread(len(ordered), p50, p95, p99, ordered[-1])


def ratio(rounds: Sequence[float]) -> Ratio:
    """Of one ratio a round. Raises ValueError: there is none."""
    if not rounds:
        raise ValueError("no rounds to compare")
    ordered = sorted(rounds)
    return Ratio(median(ordered), nearest_rank(ordered, 25), nearest_rank(ordered, 75))


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The least-squares slope of ``log(values)`` over ``log(sizes)``; both positive, at least two sizes differ."""
    xs, ys = [math.log(size) for size in sizes], [math.log(value) for value in values]
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    covariance = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True))
    return covariance / sum((x - x_mean) ** 2 for x in xs)


def growth(sizes: Sequence[float], values: Sequence[float]) -> list[Growth]:
    """How ``values`` grow along the ascending ``sizes``: one slope, from five sizes on one for each half.

    The halves share the middle size. A fixed cost shows as a smaller exponent in the first half. Fewer than two sizes
    have no slope.
    """
    last = len(sizes) - 1
    if last < 1:
        return []
    cuts = [0, last // 2, last] if len(sizes) >= 5 else [0, last]
    return [Growth(sizes[a], sizes[b], exponent(sizes[a : b + 1], values[a : b + 1])) for a, b in pairwise(cuts)]


def in_words(piece: Growth, what: str, of: str) -> str:
    """For example: from 64 to 512 tokens, route() grows as tokens^0.72 (twice the tokens, 1.65 times as long)."""
    span = f"from {piece.start:,.0f} to {piece.end:,.0f} {of}, {what}"
    if abs(piece.exponent) < FLAT:
        return f"{span} hardly changes ({of}^{piece.exponent:.2f})"
    verb = "grows" if piece.exponent > 0 else "falls"
    return f"{span} {verb} as {of}^{piece.exponent:.2f} (twice the {of}, {2**piece.exponent:.2f} times as long)"
