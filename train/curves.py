"""Cost-quality curves of routers and the measures on them, as pure functions of arrays. Free of torch.

Every choice is made by :mod:`arllm.runtime.decision`, so what is measured is what the gateway would do.
Candidates stand in the pool's order (cost, name). Choices are made on the flat costs that a pool declares; they
are judged by what they cost, which may differ from query to query.

**Outcomes that are missing.** A choice that nobody evaluated can't be judged. The candidates of a query are
therefore those evaluated on it: they are the decision rule's candidate mask. A *constant* choice has nothing to
fall back on; it is judged on the queries where it was evaluated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arllm.runtime import decision as rule
from arllm.runtime.errors import OutcomesError, PoolError

Floats = NDArray[np.floating[Any]]
Array = NDArray[np.float64]

GRID = 101


def beta_grid(points: int = GRID) -> Array:
    """0 … 1 in even steps, (points,) float64, ascending.

    A grid even in log(beta / (1 - beta)) resolves very unequal costs better, and moved gap closed by at most 0.3
    points on the real outcomes, up or down: that is noise of the choice on validation, so the plain grid stays.
    """
    return np.linspace(0.0, 1.0, points)


@dataclass(frozen=True, eq=False)
class Table:
    """Outcomes of the queries of one split with what the candidates cost. Made by :func:`outcome_table`."""

    correct: Array  # (N, M) in [0, 1]; NaN = not evaluated
    paid: Array  # (N, M): what each choice is judged to cost; NaN where correct is
    normalized: Array  # (M,): what the decision rule sees

    @property
    def evaluated(self) -> NDArray[np.bool_]:
        """(N, M) bool."""
        return ~np.isnan(self.correct)

    def rows(self, index: NDArray[Any]) -> Table:
        """The queries at the integer positions, or where the (N,) mask is true."""
        return Table(self.correct[index], self.paid[index], self.normalized)


def outcome_table(
    correct: Floats, costs: Floats, *, paid: Floats | None = None, bounds: tuple[float, float] | None = None
) -> Table:
    """Check and join outcomes and costs.

    Args:
        correct: (N, M) in [0, 1], NaN = not evaluated.
        costs: (M,) flat costs, ascending, as in the pool: decisions are made on these.
        paid: (N, M) cost per query and candidate, by which choices are judged; a pair with NaN counts as not
            evaluated. None: the flat costs.
        bounds: cheapest and dearest of the *bundle's* pool, so that beta means what it does at the gateway; None:
            those of ``costs``. They stretch beta and leave the curve where it is.

    Raises:
        PoolError: the costs don't ascend, or their shape is another.
        OutcomesError: a query on which no candidate was evaluated, or no query at all.
    """
    flat = np.asarray(costs, dtype=np.float64)
    values = np.array(correct, dtype=np.float64)  # a copy: blanks may be added below
    if flat.shape != (values.shape[1],) or np.any(np.diff(flat) < 0):
        raise PoolError(f"costs must be the pool's ({values.shape[1]},), ascending, not {flat.tolist()}")
    spent = np.broadcast_to(flat, values.shape) if paid is None else np.asarray(paid, dtype=np.float64)
    if spent.shape != values.shape:
        raise PoolError(f"costs per query have shape {spent.shape}, the outcomes {values.shape}")
    values[np.isnan(spent)] = np.nan
    seen = ~np.isnan(values)
    if not len(values) or not seen.any(axis=1).all():
        raise OutcomesError("every query needs an evaluated candidate, and there must be a query")
    low, high = bounds or (float(flat.min()), float(flat.max()))
    return Table(values, np.where(seen, spent, np.nan), rule.normalize_costs(flat, low, high))


@dataclass(frozen=True, eq=False)
class Played:
    """What a router's choices gave on each query, at each of its K settings; NaN where that was not evaluated."""

    accuracy: Array  # (N, K)
    cost: Array  # (N, K)

    def __getitem__(self, settings: Any) -> Played:
        return Played(self.accuracy[:, settings], self.cost[:, settings])

    def means(self, weights: Floats | None = None) -> tuple[Array, Array]:
        """Mean accuracy and cost over the queries: (K,) each, or (R, K) under the weights (R, N) of R resamples."""
        seen = ~np.isnan(self.accuracy)
        parts = (np.where(seen, self.accuracy, 0.0), np.where(seen, self.cost, 0.0))
        # A setting without a judged query has no mean: NaN, not an error.
        with np.errstate(invalid="ignore", divide="ignore"):
            if weights is None:
                accuracy, cost = (part.sum(axis=0) / seen.sum(axis=0) for part in parts)
            else:
                count = weights @ seen.astype(weights.dtype)
                accuracy, cost = (np.asarray(weights @ part / count, dtype=np.float64) for part in parts)
        return accuracy, cost


def choices(quality: Floats, table: Table, betas: Sequence[float] | Array) -> NDArray[np.intp]:
    """The decision rule's choice among the evaluated candidates: quality (N, M), betas (K,) → (N, K) int.

    Raises:
        OutcomesError: the shape of ``quality`` is another than the outcomes', or a value is not finite.
        BetaError: a beta outside [0, 1].
    """
    if quality.shape != table.correct.shape or not np.isfinite(quality[table.evaluated]).all():
        shape = table.correct.shape
        raise OutcomesError(f"predicted quality must be finite and of shape {shape}, found {quality.shape}")
    mask = table.evaluated
    columns = [
        rule.choose(rule.utility(quality, table.normalized, rule.check_beta(float(beta))), mask) for beta in betas
    ]
    return np.stack(columns, axis=1)


def play(quality: Floats, table: Table, betas: Sequence[float] | Array) -> Played:
    """Judge the choices of :func:`choices`: quality (N, M), betas (K,) → (N, K)."""
    chosen = choices(quality, table, betas)
    return Played(
        np.take_along_axis(table.correct, chosen, axis=1),
        np.take_along_axis(table.paid, chosen, axis=1),
    )


def constants(table: Table) -> Played:
    """Every candidate chosen always: setting m is candidate m."""
    return Played(table.correct, table.paid)


def shares(chosen: NDArray[np.intp], candidates: int) -> Array:
    """How often each candidate was chosen: (N, K) → (K, M), rows sum to 1."""
    return np.stack([np.bincount(column, minlength=candidates) for column in chosen.T]) / len(chosen)


def upper_hull(cost: Floats, accuracy: Floats) -> NDArray[np.intp]:
    """Indices of the non-decreasing upper convex hull of (cost, accuracy), (G,) each, by ascending cost.

    Of equal points the first is taken: on a beta grid the smallest beta, which puts quality first. From the
    cheapest point to the most accurate one; NaN points are left out.
    Source: Hu et al. 2024 (RouterBench), "non-decreasing convex hull"; the chain is Andrew's.
    """
    order = [int(i) for i in np.lexsort((-accuracy, cost)) if not math.isnan(accuracy[i])]
    hull: list[int] = []
    for i in order:
        if hull and (accuracy[i] <= accuracy[hull[-1]] or cost[i] <= cost[hull[-1]]):
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (accuracy[b] - accuracy[a]) * (cost[i] - cost[a]) > (accuracy[i] - accuracy[a]) * (cost[b] - cost[a]):
                break
            hull.pop()
        hull.append(i)
    return np.array(hull, dtype=np.intp)


def hull_betas(quality: Floats, validation: Table, betas: Array | None = None) -> Array:
    """The router's operating points: 1, then the betas of the hull on validation, cheapest first; (K,) float64.

    1 is always among them: on other queries the hull's cheapest beta may still pick a dear candidate now and then,
    and cost alone is a preference that every user has.
    """
    grid = beta_grid() if betas is None else betas
    accuracy, cost = play(quality, validation, grid).means()
    kept = grid[upper_hull(cost, accuracy)]
    return np.concatenate([[1.0], kept[kept < 1.0]])


def zero_router(validation: Table) -> NDArray[np.intp]:
    """The candidates on the hull of constant choices on validation, (K,): the router that doesn't look.

    Source: Hu et al. 2024 (RouterBench): mixtures of two neighbours on the hull reach every cost between.
    """
    accuracy, cost = constants(validation).means()
    return upper_hull(cost, accuracy)


def oracle_quality(table: Table) -> Array:
    """The true outcomes as predictions; a candidate that was not evaluated is never chosen, so 0 stands for it."""
    return np.where(table.evaluated, table.correct, 0.0)


def _by_cost(accuracy: Array, cost: Array) -> tuple[Array, Array]:
    """Both (…, K), sorted by cost; equal costs keep the hull's order."""
    order = np.argsort(cost, axis=-1, kind="stable")
    return np.take_along_axis(accuracy, order, axis=-1), np.take_along_axis(cost, order, axis=-1)


def aiq(accuracy: Array, cost: Array, low: Floats | float, high: Floats | float) -> Array:
    """Average accuracy over the span of costs: area under the piecewise-linear curve from low to high / span.

    The curve goes through the points by ascending cost and is held flat beyond the dearest one. Below the cheapest
    point it counts as 0: the router can't run on so little (with flat costs there is no such place, since beta 1
    chooses the cheapest candidate). Nothing is made convex or monotone here: that is done on validation.

    Source: Hu et al. 2024 (RouterBench), average improvement in quality, as narrowed down in architecture.md.

    Args:
        accuracy, cost: (…, K).
        low, high: cost of the cheapest and the dearest candidate, numbers or (…,).

    Returns:
        (…,) float64; NaN where the span is 0.
    """
    y, x = _by_cost(accuracy, cost)
    lower, upper = np.asarray(low, dtype=np.float64)[..., None], np.asarray(high, dtype=np.float64)[..., None]
    x0, x1, y0, y1 = x[..., :-1], x[..., 1:], y[..., :-1], y[..., 1:]
    width = x1 - x0
    slope = np.divide(y1 - y0, width, out=np.zeros_like(width), where=width > 0)
    a, b = np.clip(x0, lower, upper), np.clip(x1, lower, upper)
    middle = y0 + slope * ((a + b) / 2 - x0)  # the mean of a linear piece is its value in the middle
    area = ((b - a) * middle).sum(axis=-1)
    last = np.maximum(x[..., -1:], lower)
    area = area + (np.maximum(upper - last, 0.0) * y[..., -1:])[..., 0]
    span = (upper - lower)[..., 0]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(span > 0, area / span, np.nan))


def cost_to_match(accuracy: Array, cost: Array, target: Floats | float) -> Array:
    """The least cost at which the curve of :func:`aiq` reaches ``target``: (…, K), (…,) → (…,); NaN = never."""
    y, x = _by_cost(accuracy, cost)
    goal = np.asarray(target, dtype=np.float64)[..., None]
    reached = y >= goal
    first = np.argmax(reached, axis=-1)[..., None]
    before = np.maximum(first - 1, 0)

    def at(values: Array, index: NDArray[np.intp]) -> Array:
        return np.take_along_axis(values, index, axis=-1)

    x0, x1, y0, y1 = at(x, before), at(x, first), at(y, before), at(y, first)
    rise = y1 - y0
    share = np.divide(goal - y0, rise, out=np.ones_like(rise), where=rise > 0)
    return np.asarray(np.where(reached.any(axis=-1), (x0 + share * (x1 - x0))[..., 0], np.nan))


@dataclass(frozen=True, eq=False)
class Measures:
    """The figures of one router: each () at the point, (R,) under R resamples."""

    aiq: Array
    gap_closed: Array
    cost_to_match: Array  # as a multiple of the best single model's; NaN = never
    accuracy: Array  # at beta 0


@dataclass(frozen=True, eq=False)
class Frame:
    """What one split's routers are measured between: the constant choices, the zero router and the oracle.

    ``best`` is the best single model, chosen on training; zero's and the oracle's settings come from validation.
    """

    constants: Played
    zero: Played
    oracle: Played
    best: int


def frame(validation: Table, judged: Table, best: int) -> Frame:
    """The frame of ``judged``, with settings chosen on ``validation``."""
    betas = hull_betas(oracle_quality(validation), validation)
    always = constants(judged)
    return Frame(always, always[zero_router(validation)], play(oracle_quality(judged), judged, betas), best)


def best_single(correct: Floats) -> int:
    """The most accurate candidate of the training outcomes (N, M); of equals the cheapest. NaN is left out."""
    seen = ~np.isnan(correct)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.where(seen, correct, 0.0).sum(axis=0, dtype=np.float64) / seen.sum(axis=0)
    if np.isnan(means).all():
        raise OutcomesError("no candidate has a training outcome, so there is no best single model")
    return int(np.nanargmax(means))


def measure(curve: Played, top: Played, between: Frame, weights: Floats | None = None) -> Measures:
    """The figures of a router.

    ``gap closed = (AIQ - AIQ of zero) / (AIQ of oracle - AIQ of zero)``; everything in it, costs to match too, is
    recomputed on the same queries. Source: architecture.md.

    Args:
        curve: the router at the betas of :func:`hull_betas`, cheapest first.
        top: the router at beta 0, one setting.
        weights: (R, N) from :func:`resamples`; None: the queries as they are.
    """
    accuracy_of_each, cost_of_each = between.constants.means(weights)
    low, high = np.nanmin(cost_of_each, axis=-1), np.nanmax(cost_of_each, axis=-1)
    accuracy, cost = curve.means(weights)
    own = aiq(accuracy, cost, low, high)
    floor = aiq(*between.zero.means(weights), low, high)
    ceiling = aiq(*between.oracle.means(weights), low, high)
    with np.errstate(invalid="ignore", divide="ignore"):  # nothing to close: NaN
        gap = np.asarray((own - floor) / (ceiling - floor))
        matched = cost_to_match(accuracy, cost, accuracy_of_each[..., between.best])
        ratio = np.asarray(matched / cost_of_each[..., between.best])
    return Measures(own, gap, ratio, np.asarray(top.means(weights)[0][..., 0]))


def resamples(queries: int, count: int = 1000, seed: int = 0) -> Array:
    """(count, queries) float64: how often each query stands in each bootstrap resample (Efron 1979)."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, queries, size=(count, queries)) + queries * np.arange(count)[:, None]
    return np.bincount(drawn.ravel(), minlength=count * queries).reshape(count, queries).astype(np.float64)


def interval(values: Array, level: float = 0.95) -> tuple[float, float] | None:
    """Percentile interval of the finite ones of the resampled values (R,); None where half of them are not finite."""
    kept = values[np.isfinite(values)]
    if 2 * len(kept) <= len(values):
        return None
    low, high = np.quantile(kept, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class PairMeasures:
    """RouteLLM's figures for a strong and a weak candidate; NaN where strong is not the stronger."""

    apgr: float
    cpt: dict[float, float]  # share of the gap → least share of queries sent to the strong candidate


def pair_measures(
    quality: Floats, correct: Floats, strong: int, weak: int, levels: Sequence[float] = (0.5, 0.8)
) -> PairMeasures:
    """Average performance gap recovered, and call-performance thresholds, of a pair.

    With both alone, the decision rule sends a query to the strong one where ``quality[strong] - quality[weak]``
    exceeds a bound that beta sets. The bound runs over all differences, from no query to every query, as RouteLLM's
    does. ``PGR(share) = (accuracy - accuracy of weak) / (accuracy of strong - accuracy of weak)``; APGR is its mean
    over the share of strong calls (a coin gives 0.5), CPT(x) the least share with PGR >= x. Queries with equal
    differences are sent together: the curve is linear across them.
    Source: Ong et al. 2024 (RouteLLM), section 2.2; the integral is exact instead of RouteLLM's sum over ten shares.

    Args:
        quality, correct: (N, M); queries where either of the two has NaN are left out.
    """
    both = ~np.isnan(correct[:, [strong, weak]]).any(axis=1)
    gain = (correct[both, strong] - correct[both, weak]).astype(np.float64)
    ahead = quality[both, strong] - quality[both, weak]
    if gain.sum() <= 0:
        return PairMeasures(math.nan, dict.fromkeys(levels, math.nan))
    order = np.argsort(-ahead, kind="stable")
    last_of_equals = np.append(np.flatnonzero(np.diff(ahead[order])), len(gain) - 1)
    share = np.append(0.0, (last_of_equals + 1) / len(gain))
    recovered = np.append(0.0, np.cumsum(gain[order])[last_of_equals] / gain.sum())
    apgr = float(np.sum(np.diff(share) * (recovered[1:] + recovered[:-1]) / 2))
    return PairMeasures(apgr, {level: float(cost_to_match(recovered, share, level)) for level in levels})
