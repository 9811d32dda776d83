"""From a wish in the user's words to a beta, and what to expect at it: pure functions of arrays. Free of torch.

A query's choice changes at finitely many betas only, so mean cost, mean quality and shares are step functions of
beta: :func:`sweep` finds every step exactly, ``for_budget``, ``for_share`` and ``for_best`` pick one. What to expect
there is then counted on the choices of :mod:`arllm.runtime.decision`, as the gateway makes them. Knows no router and
no file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arllm.runtime import decision as rule
from arllm.runtime.errors import InputError, OutcomesError
from arllm.train import curves

Array = NDArray[np.float64]

MERGE = 1e-9  # steps closer than this are one: between them no float is safely on either side
HALF_POINT = 0.005  # how far from the wanted share a step may lie
BLOCK = 4_000_000  # numbers of the bootstrap in memory at a time
EXACT = 1e-9  # what rounding may move a mean


@dataclass(frozen=True, eq=False)
class Traffic:
    """Queries with what the router predicts on them. Candidates stand in the pool's order, lower cost first.

    ``quality`` is (N, M) in [0, 1]; ``costs`` (M,) in ``unit`` per query; ``normalized`` (M,) what the decision rule
    sees; ``correct`` (N, M) in [0, 1] with NaN = not evaluated, or None where nothing was measured.

    Raises:
        OutcomesError: no query, or a quality that is not finite.
    """

    names: tuple[str, ...]
    quality: Array
    costs: Array
    normalized: Array
    correct: Array | None = None
    unit: str = ""

    def __post_init__(self) -> None:
        if not len(self.quality) or not np.isfinite(self.quality).all():
            raise OutcomesError("calibrating a preference needs at least one query, each with finite qualities")

    def choices(self, beta: float) -> NDArray[np.intp]:
        """(N,): whom the gateway picks at this beta."""
        return rule.choose(rule.utility(self.quality, self.normalized, rule.check_beta(beta)))


@dataclass(frozen=True, eq=False)
class Sweep:
    """Every change of choice as beta goes from 0 to 1: K stretches of beta without one, E changes between them.

    Stretch k holds the betas between ``low[k]`` and ``high[k]``; the first begins at 0, the last ends at 1.
    """

    low: Array  # (K,)
    high: Array  # (K,)
    first: NDArray[np.intp]  # (N,) choice at beta 0
    query: NDArray[np.intp]  # (E,)
    before: NDArray[np.intp]  # (E,) candidate
    after: NDArray[np.intp]  # (E,) candidate
    stretch: NDArray[np.intp]  # (E,) the one that begins with the change, >= 1

    def mean(self, values: Array) -> Array:
        """Mean of ``values`` (N, M), or (M,) for all queries, at the chosen candidates: (K,) along the stretches."""
        table = np.broadcast_to(values, (len(self.first), values.shape[-1]))
        change = table[self.query, self.after] - table[self.query, self.before]
        steps = np.bincount(self.stretch, change, minlength=len(self.low))
        start = table[np.arange(len(self.first)), self.first].sum()
        running: Array = (start + np.cumsum(steps)) / len(self.first)
        return running

    def beta(self, k: int) -> float:
        """A beta of stretch ``k`` that is easily written: just above its lower end, on four decimals or more."""
        low, high = float(self.low[k]), float(self.high[k])
        if low in (0.0, 1.0):
            return low
        for digits in range(4, 16):
            value = (math.floor(low * 10.0**digits) + 1) / 10.0**digits
            if low < value < high:
                return value
        return (low + high) / 2


def sweep(traffic: Traffic) -> Sweep:
    """Walk the upper envelope of every query's utilities, all queries at once.

    Utility divided by ``1 - beta`` is ``quality - odds * cost`` with ``odds = beta / (1 - beta)``: a line for each
    candidate. From the current choice k the next one is the cheaper candidate j whose line meets k's first, at
    ``odds = (quality_k - quality_j) / (cost_k - cost_j)``; of several the cheapest, as in the decision rule. At most
    M - 1 rounds. At beta 1 cost alone decides, so candidates of equal cost fall to the first.
    """
    quality, cost = traffic.quality.astype(np.float64), traffic.normalized
    current = traffic.choices(0.0)
    first = current
    events: list[tuple[Array, NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]] = []
    rows = np.arange(len(quality))
    while len(rows):
        now = current[rows]
        saved = cost[now][:, None] - cost
        lost = quality[rows, now][:, None] - quality[rows]
        odds = np.divide(lost, saved, out=np.full(saved.shape, np.inf), where=saved > 0)
        after = np.argmin(odds, axis=1)
        least = np.maximum(odds[np.arange(len(rows)), after], 0.0)
        moves = np.isfinite(least)
        rows, now, after, least = rows[moves], now[moves], after[moves], least[moves]
        events.append((least / (1.0 + least), rows, now, after))
        current = current.copy()
        current[rows] = after
    last = traffic.choices(1.0)
    left = np.flatnonzero(last != current)
    events.append((np.ones(len(left)), left, current[left], last[left]))
    betas, query, before, after = (np.concatenate(column) for column in zip(*events, strict=True))
    order = np.argsort(betas, kind="stable")
    betas = betas[order]
    begins = np.diff(betas, prepend=-np.inf) > MERGE
    stretch = np.cumsum(begins).astype(np.intp)
    ends = np.append(begins[1:], True) if len(betas) else begins
    low, high = np.append(0.0, betas[ends]), np.append(betas[begins], 1.0)
    return Sweep(low, high, first, query[order], before[order], after[order], stretch)


def for_budget(traffic: Traffic, path: Sweep, budget: float) -> int:
    """The stretch of the smallest beta whose mean cost per query is at most ``budget``. Cost never rises with beta.

    Raises:
        InputError: even the cheapest choices cost more; gives the attainable range.
    """
    cost = path.mean(traffic.costs)
    enough = cost <= budget + EXACT * abs(budget)
    if not enough.any():
        raise InputError(
            f"a budget of {budget:g} can't be kept: on this traffic the mean cost of a query runs from "
            f"{cost[-1]:.4g} (beta 1) to {cost[0]:.4g} (beta 0), {traffic.unit}"
        )
    return int(np.argmax(enough))


def for_share(traffic: Traffic, path: Sweep, name: str, share: float) -> int:
    """The stretch where ``name`` gets the share in [0, 1] of the queries, to half a point or half a query.

    A candidate of middling cost can come to the same share twice, rising and falling: the smaller beta is taken,
    which puts quality first.

    Raises:
        InputError: ``name`` is no candidate, or never gets that share; gives the attainable range and the nearest.
    """
    if name not in traffic.names:
        raise InputError(f"no candidate {name!r} to give a share to: there are {', '.join(traffic.names)}")
    given = path.mean(np.array([float(candidate == name) for candidate in traffic.names]))
    away = np.abs(given - share)
    near = away <= max(HALF_POINT, 0.5 / len(traffic.quality)) + EXACT
    if not near.any():
        k = int(np.argmin(away))
        raise InputError(
            f"{name} can't get {100 * share:g}% of this traffic: between beta 0 and 1 it gets "
            f"{100 * given.min():.1f}% to {100 * given.max():.1f}%, the nearest being {100 * given[k]:.1f}% at beta "
            f"{path.beta(k):g}"
        )
    start = int(np.argmax(near))
    run = int(np.argmin(np.append(near[start:], False)))
    return start + int(np.argmin(away[start : start + run]))


def best_single(traffic: Traffic) -> int:
    """The candidate that is most accurate if it answers everything: as measured, else as predicted."""
    return int(np.argmax(_means(traffic.quality if traffic.correct is None else traffic.correct)))


def of_single(traffic: Traffic, candidate: int) -> dict[str, float | None]:
    """What a candidate gives that answers everything: ``accuracy_predicted``, ``accuracy_measured``, ``cost``."""
    measured = None if traffic.correct is None else float(_means(traffic.correct)[candidate])
    predicted, cost = float(traffic.quality[:, candidate].mean()), float(traffic.costs[candidate])
    return {"accuracy_predicted": predicted, "accuracy_measured": measured, "cost": cost}


def for_best(traffic: Traffic, path: Sweep) -> int:
    """The stretch of the largest beta, so the largest saving, that is as accurate as the best single model.

    Measured accuracy where there are outcomes, taken pairwise: on queries where both the chosen and the best single
    candidate were evaluated. Else predicted, which falls with beta and is matched at beta 0 at least.

    Raises:
        InputError: no beta is as accurate; gives the nearest.
    """
    best = best_single(traffic)
    truth = traffic.quality if traffic.correct is None else traffic.correct
    gain = truth - truth[:, [best]]
    both = ~np.isnan(gain)
    with np.errstate(invalid="ignore", divide="ignore"):  # no pair: NaN, which matches nothing
        lead = path.mean(np.where(both, gain, 0.0)) / path.mean(both.astype(np.float64))
    enough = np.flatnonzero(lead >= -EXACT)
    if not len(enough):
        k = int(np.nanargmax(lead))
        raise InputError(
            f"the best single model, {traffic.names[best]}, can't be matched on this traffic: the measured accuracy "
            f"of the choices stays {-100 * lead[k]:.2f} to {-100 * np.nanmin(lead):.2f} points below it, nearest at "
            f"beta {path.beta(k):g}"
        )
    return int(enough[-1])


def neighbours(beta: float) -> list[float]:
    """``beta`` among a few others, ascending: 0, half to double the odds ``beta / (1 - beta)``, and 1."""
    if beta in (0.0, 1.0):
        near = [abs(beta - step) for step in (0.01, 0.02, 0.05, 0.1)]
    else:
        odds = beta / (1.0 - beta)
        near = [float(f"{odds * factor / (1 + odds * factor):.3g}") for factor in (0.5, 0.7, 1.4, 2.0)]
    return sorted({0.0, *near, beta, 1.0})


def expect(traffic: Traffic, betas: Sequence[float], resamples: int = 1000, seed: int = 0) -> list[dict[str, Any]]:
    """What to expect at each beta, in plain JSON types, each figure a ``value`` with its 95% ``interval``.

    ``accuracy_predicted`` is the mean predicted quality of the chosen; ``accuracy_measured`` their mean outcome on
    the share ``measured_on`` of the queries where the chosen was evaluated, None without outcomes; ``cost`` the mean
    cost of a query; ``saving`` the share of the best single model's cost that is spared; ``lead_predicted`` and
    ``lead_measured`` the paired differences in accuracy to that model; ``shares`` by candidate. Intervals are
    percentiles of the bootstrap over queries (Efron 1979), all figures on the same resamples.

    Raises:
        BetaError: a beta outside [0, 1].
    """
    best = best_single(traffic)
    columns = [_columns(traffic, traffic.choices(beta), best) for beta in betas]
    parts = [np.mean(c, axis=0)[None] for c in columns]
    stacked = np.hstack(columns)  # (N, betas * S)
    drawn = _resampled(stacked, resamples, seed).reshape(resamples, len(betas), -1)
    price = float(traffic.costs[best])
    return [{"beta": float(beta), **_figures(traffic, parts[i], drawn[:, i], price)} for i, beta in enumerate(betas)]


def _columns(traffic: Traffic, chosen: NDArray[np.intp], best: int) -> Array:
    """(N, 7 + M): what :func:`_figures` takes the means of."""
    rows = np.arange(len(chosen))
    quality = traffic.quality[rows, chosen]
    truth = np.full(quality.shape, np.nan) if traffic.correct is None else traffic.correct[rows, chosen]
    gain = truth if traffic.correct is None else truth - traffic.correct[:, best]
    seen, both = ~np.isnan(truth), ~np.isnan(gain)
    plain = (quality, traffic.costs[chosen], quality - traffic.quality[:, best])
    measured = (np.where(seen, truth, 0.0), seen, np.where(both, gain, 0.0), both)
    return np.column_stack([*plain, *measured, chosen[:, None] == np.arange(len(traffic.names))]).astype(np.float64)


def _figures(traffic: Traffic, point: Array, drawn: Array, price: float) -> dict[str, Any]:
    """From the means (1, S) of all queries and (R, S) of the resamples."""

    def figure(column: int, count: int | None = None) -> dict[str, Any] | None:
        with np.errstate(invalid="ignore", divide="ignore"):
            values = [
                part[:, column] if count is None else part[:, column] / part[:, count] for part in (point, drawn)
            ]
        return _figure(float(values[0][0]), values[1])

    cost = figure(1)
    spent = [part[:, 1] for part in (point, drawn)]
    return {
        "accuracy_predicted": figure(0),
        "accuracy_measured": figure(3, 4),
        "measured_on": None if traffic.correct is None else float(point[0, 4]),
        "cost": cost,
        "saving": _figure(1.0 - float(spent[0][0]) / price, 1.0 - spent[1] / price) if price > 0 else None,
        "lead_predicted": figure(2),
        "lead_measured": figure(5, 6),
        "shares": {name: figure(7 + m) for m, name in enumerate(traffic.names)},
    }


def _figure(value: float, drawn: Array) -> dict[str, Any] | None:
    if not math.isfinite(value):
        return None
    interval = curves.interval(drawn)
    return {"value": value, "interval": None if interval is None else list(interval)}


def _resampled(values: Array, resamples: int, seed: int) -> Array:
    """Means of the columns of ``values`` (N, S) over bootstrap resamples of the rows: (R, S). A block at a time."""
    block = max(1, min(resamples, BLOCK // len(values)))
    weights = (
        curves.resamples(len(values), min(block, resamples - start), seed + start)
        for start in range(0, resamples, block)
    )
    return np.concatenate([w @ values for w in weights]) / len(values)


def _means(values: Array) -> Array:
    """(M,) mean of each column over what is not NaN; -inf where nothing is."""
    seen = ~np.isnan(values)
    count = seen.sum(axis=0)
    return np.where(count > 0, np.where(seen, values, 0.0).sum(axis=0) / np.maximum(count, 1), -np.inf)
