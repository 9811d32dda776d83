"""The evaluation: routers and baselines on outcomes, by split and dataset, as one JSON-able table. Free of torch.

Settings are chosen on validation and judged on each split; the best single model is chosen on training. Choices are
made by :mod:`arllm.runtime.decision` on the qualities of :class:`arllm.runtime.router.Router`: what is judged is what
the gateway would do. Outcomes, pool and qualities are put together by :mod:`arllm.train.bench`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arllm.runtime.errors import OutcomesError
from arllm.train import curves
from arllm.train.baselines import BASELINES, fit_baselines
from arllm.train.bench import SPLITS, Bench
from arllm.train.metrics import candidate_auc
from arllm.train.outcomes import Outcomes
from arllm.train.reliability import Reliability, debiased_ece, prediction_figures, reliability

Array = NDArray[np.float64]
Floats = NDArray[np.floating[Any]]

SHARE_BETAS = np.linspace(0.0, 1.0, 21)
LEVELS = (0.5, 0.8)  # of RouteLLM's CPT


def evaluate(
    bench: Bench,
    ours: Mapping[str, Floats],
    *,
    extra: Mapping[str, Floats] | None = None,
    baselines: Collection[str] = BASELINES,
    splits: Sequence[str] = SPLITS,
    bounds: tuple[float, float] | None = None,
    unseen: Collection[str] = (),
    pairs: Sequence[tuple[str, str]] | None = None,
    resamples: int = 1000,
    seed: int = 0,
    progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """The whole table, in plain JSON types; what can't be measured is None.

    Args:
        ours: name → (N, M) quality over the rows and columns of ``bench.outcomes``; rows of splits that aren't
            judged may be NaN, except that those of val are always needed. Every difference is taken from these.
        extra: further baselines in the same shape, e.g. the published NIR recipe, which needs torch.
        baselines: which of :data:`arllm.train.baselines.BASELINES`; left out where there is no training query.
        splits: which to judge. While choosing, pass ``("val",)``.
        bounds: cheapest and dearest of the bundle's whole pool: the scale of its beta.
        unseen: candidates that the router was not trained on.
        pairs: (strong, weak) for RouteLLM's measures; None: the best single model and the cheapest candidate.
        resamples: of the paired bootstrap over queries.

    Raises:
        OutcomesError: a matrix has another shape, or an unknown candidate is named.
    """
    outcomes, pool = bench.outcomes, bench.pool
    unknown = sorted({*unseen, *(name for pair in pairs or () for name in pair)} - set(pool.names))
    if unknown:
        raise OutcomesError(f"candidate {unknown[0]!r} is not among those compared: {', '.join(pool.names)}")
    train = outcomes.split("train")
    notes = []
    qualities: dict[str, Floats] = {**ours, **(extra or {})}
    if len(train):
        held_out = np.array([split in ("val", *splits) for split in outcomes.splits])
        for name, predict in fit_baselines(train, baselines).items():
            progress(f"baseline: {name}")
            qualities.setdefault(name, np.full(outcomes.correct.shape, np.nan))[held_out] = predict(
                outcomes.rows(held_out)
            )
    else:
        notes.append("no training queries: no baseline was fitted, and the best single model is validation's")
    for name, quality in qualities.items():
        if quality.shape != outcomes.correct.shape:
            raise OutcomesError(f"quality of {name!r} has shape {quality.shape}, not {outcomes.correct.shape}")
    chooser = train if len(train) else outcomes.split("val")
    best = curves.best_single(chooser.correct)
    setting = _Setting(
        outcomes=outcomes,
        names=pool.names,
        costs=pool.costs,
        paid=bench.paid,
        bounds=bounds,
        best=best,
        qualities=qualities,
        ours=tuple(ours),
        unseen=tuple(name for name in pool.names if name in unseen),
        pairs=[(pool.names[best], pool.names[0])] if pairs is None else list(pairs),
        resamples=resamples,
        seed=seed,
    )
    results = {}
    for split in splits:
        if split in outcomes.splits:
            progress(f"judging {split}")
            results[split] = _judge(setting, split)
    return {
        "unit": bench.unit or pool.unit,
        "candidates": [
            {"name": c.name, "cost": c.cost, "seen": c.name not in unseen, "training_accuracy": _plain(accuracy)}
            for c, accuracy in zip(pool.candidates, _means(train.correct), strict=True)
        ],
        "left_out": dict(bench.left_out),
        "queries": {split: outcomes.splits.count(split) for split in ("train", *SPLITS)},
        "best_single": pool.names[best],
        "cost": "flat" if bench.paid is None else "per query",
        "ours": list(ours),
        "routers": list(qualities),
        "resamples": resamples,
        "notes": notes,
        "results": results,
    }


@dataclass(frozen=True, eq=False)
class _Setting:
    outcomes: Outcomes
    names: tuple[str, ...]
    costs: Array
    paid: Floats | None
    bounds: tuple[float, float] | None
    best: int
    qualities: Mapping[str, Floats]
    ours: tuple[str, ...]
    unseen: tuple[str, ...]
    pairs: Sequence[tuple[str, str]]
    resamples: int
    seed: int

    def where(self, split: str) -> NDArray[np.bool_]:
        return np.array([s == split for s in self.outcomes.splits], dtype=np.bool_)

    def table(self, rows: NDArray[np.bool_]) -> curves.Table:
        paid = None if self.paid is None else self.paid[rows]
        return curves.outcome_table(self.outcomes.correct[rows], self.costs, paid=paid, bounds=self.bounds)


@dataclass(frozen=True, eq=False)
class _Group:
    """Some queries of a split, with what their routers are measured between and their bootstrap resamples."""

    here: NDArray[np.bool_]  # (N,) of the split
    table: curves.Table
    frame: curves.Frame
    weights: Array  # (R, queries)

    def measure(self, quality: Array, betas: Array) -> tuple[dict[str, Any], curves.Measures, curves.Played]:
        """The figures of a router, the same under every resample, and its curve: quality (N, M) of the split."""
        own = quality[self.here]
        played, top = curves.play(own, self.table, betas), curves.play(own, self.table, [0.0])
        drawn = curves.measure(played, top, self.frame, self.weights)
        return _figures(curves.measure(played, top, self.frame), drawn), drawn, played


def _judge(setting: _Setting, split: str) -> dict[str, Any]:
    chosen_on, rows = setting.where("val"), setting.where(split)
    validation, table = setting.table(chosen_on), setting.table(rows)
    datasets = np.array(setting.outcomes.datasets)[rows]

    def group(here: NDArray[np.bool_]) -> _Group:
        part = table.rows(here)
        frame = curves.frame(validation, part, setting.best)
        return _Group(here, part, frame, curves.resamples(int(here.sum()), setting.resamples, setting.seed))

    whole = group(np.ones(len(datasets), dtype=np.bool_))
    parts = {dataset: group(datasets == dataset) for dataset in sorted(set(datasets))}
    routers: dict[str, Any] = {}
    resampled: dict[str, curves.Measures] = {}
    by_dataset: dict[str, dict[str, Any]] = {dataset: {} for dataset in parts}
    resampled_by_dataset: dict[str, dict[str, curves.Measures]] = {dataset: {} for dataset in parts}
    for name, everywhere in setting.qualities.items():
        quality = np.asarray(everywhere[rows], dtype=np.float64)
        betas = curves.hull_betas(everywhere[chosen_on], validation)
        entry, resampled[name], played = whole.measure(quality, betas)
        accuracy, cost = played.means()
        entry |= prediction_figures(
            table.correct, quality, setting.names, setting.unseen, perfect_draws=20 if name in setting.ours else 0
        )
        entry["curve"] = _points(betas, cost, accuracy)
        entry["pairs"] = [_pair(setting, quality, table.correct, *pair) for pair in setting.pairs]
        if setting.unseen:
            entry["without_unseen"] = _without_unseen(
                setting, everywhere, validation, table, whole.frame, rows, chosen_on
            )
        if name in setting.ours:
            entry["shares"] = _shares(quality, table)
            entry["reliability"] = _bins(reliability(table.correct, np.clip(quality, 0.0, 1.0)))
        routers[name] = entry
        for dataset, part in parts.items():
            own, truth = quality[part.here], part.table.correct
            figures, resampled_by_dataset[dataset][name], _ = part.measure(quality, betas)
            by_dataset[dataset][name] = {
                **figures,
                "auc": _mean_auc(truth, own),
                "ece_debiased_pooled": debiased_ece(reliability(truth, np.clip(own, 0.0, 1.0))),
            }
    return {
        "queries": len(datasets),
        **_bounds(setting, whole.frame),
        "routers": routers,
        "differences": _differences(setting.ours, resampled, routers),
        "by_dataset": {
            dataset: {
                "queries": int(part.here.sum()),
                "routers": by_dataset[dataset],
                "differences": _differences(setting.ours, resampled_by_dataset[dataset], by_dataset[dataset]),
            }
            for dataset, part in parts.items()
        },
    }


_COMPARED = ("gap_closed", "aiq", "accuracy")


def _figures(point: curves.Measures, drawn: curves.Measures) -> dict[str, Any]:
    ratio = np.where(np.isnan(drawn.cost_to_match), np.inf, drawn.cost_to_match)  # never is dearer than anything
    return {
        "aiq": _plain(point.aiq),
        "gap_closed": _plain(point.gap_closed),
        "gap_closed_interval": _interval(drawn.gap_closed),
        "cost_to_match": _plain(point.cost_to_match),
        "cost_to_match_interval": [_plain(v) for v in np.quantile(ratio, [0.025, 0.975], method="nearest")],
        "accuracy": _plain(point.accuracy),
        "accuracy_interval": _interval(drawn.accuracy),
    }


def _differences(
    ours: Sequence[str], drawn: Mapping[str, curves.Measures], point: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Each of ours minus every other router: one → other → measure → difference, with its paired interval."""

    def difference(one: str, other: str, measure: str) -> dict[str, Any]:
        a, b = point[one][measure], point[other][measure]
        with np.errstate(invalid="ignore"):  # a resample without a gap to close has no difference: NaN
            pairs = getattr(drawn[one], measure) - getattr(drawn[other], measure)
        return {"difference": None if a is None or b is None else a - b, "interval": _interval(pairs)}

    return {
        one: {
            other: {measure: difference(one, other, measure) for measure in _COMPARED}
            for other in point
            if other != one
        }
        for one in ours
    }


def _pair(setting: _Setting, quality: Array, correct: Array, strong: str, weak: str) -> dict[str, Any]:
    found = curves.pair_measures(quality, correct, setting.names.index(strong), setting.names.index(weak), LEVELS)
    thresholds = {f"cpt{level * 100:.0f}": _plain(share) for level, share in found.cpt.items()}
    return {"strong": strong, "weak": weak, "apgr": _plain(found.apgr), **thresholds}


def _without_unseen(
    setting: _Setting,
    everywhere: Floats,
    validation: curves.Table,
    table: curves.Table,
    frame: curves.Frame,
    rows: NDArray[np.bool_],
    chosen_on: NDArray[np.bool_],
) -> dict[str, Any]:
    """The router if it could choose among the seen candidates alone, measured between the same zero and oracle."""
    hidden = np.array([name in setting.unseen for name in setting.names])

    def hide(full: curves.Table) -> curves.Table:
        return curves.Table(
            np.where(hidden, np.nan, full.correct), np.where(hidden, np.nan, full.paid), full.normalized
        )

    betas = curves.hull_betas(everywhere[chosen_on], hide(validation))
    played, top = (curves.play(everywhere[rows], hide(table), b) for b in (betas, [0.0]))
    point = curves.measure(played, top, frame)
    return {"aiq": _plain(point.aiq), "gap_closed": _plain(point.gap_closed), "accuracy": _plain(point.accuracy)}


def _bounds(setting: _Setting, frame: curves.Frame) -> dict[str, Any]:
    """Zero router, oracle and every single model: what all routers are measured between."""
    found: dict[str, Any] = {}
    accuracy, cost = frame.constants.means()
    for name, curve, top in (
        ("zero", frame.zero, frame.zero[-1:]),
        ("oracle", frame.oracle, frame.oracle[-1:]),
    ):
        point = curves.measure(curve, top, frame)
        y, x = curve.means()
        found[name] = {"aiq": _plain(point.aiq), "accuracy": _plain(point.accuracy), "curve": _points(None, x, y)}
    singles = {}
    for m, name in enumerate(setting.names):
        # A single model's curve: the cheapest candidate, for who can't pay more, and this one.
        alone = curves.measure(frame.constants[[0, m]], frame.constants[[m]], frame)
        singles[name] = {
            "accuracy": _plain(accuracy[m]),
            "cost": _plain(cost[m]),
            "aiq": _plain(alone.aiq),
            "gap_closed": _plain(alone.gap_closed),
        }
    return {**found, "best_single": {"name": setting.names[setting.best], **singles[setting.names[setting.best]]},
            "singles": singles}  # fmt: skip


def _shares(quality: Array, table: curves.Table) -> list[dict[str, Any]]:
    chosen = curves.choices(quality, table, SHARE_BETAS)
    accuracy, cost = curves.play(quality, table, SHARE_BETAS).means()
    each = curves.shares(chosen, quality.shape[1])
    return [
        {"beta": float(b), "accuracy": float(y), "cost": float(x), "shares": row.tolist()}
        for b, y, x, row in zip(SHARE_BETAS, accuracy, cost, each, strict=True)
    ]


def _points(betas: Array | None, cost: Array, accuracy: Array) -> list[dict[str, Any]]:
    rows = [{"cost": _plain(x), "accuracy": _plain(y)} for x, y in zip(cost, accuracy, strict=True)]
    return rows if betas is None else [{"beta": float(b), **row} for b, row in zip(betas, rows, strict=True)]


def _bins(bins: Reliability) -> list[dict[str, Any]]:
    columns = (bins.predicted.tolist(), bins.observed.tolist(), bins.count.tolist())
    return [{"predicted": p, "observed": o, "count": n} for p, o, n in zip(*columns, strict=True)]


def _means(correct: Floats) -> Array:
    seen = ~np.isnan(correct)
    count = seen.sum(axis=0)
    return np.where(count > 0, np.where(seen, correct, 0.0).sum(axis=0) / np.maximum(count, 1), np.nan)


def _mean_auc(correct: Floats, quality: Floats) -> float | None:
    areas = candidate_auc(correct, quality)
    return None if np.isnan(areas).all() else float(np.nanmean(areas))


def _plain(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _interval(values: Array) -> list[float] | None:
    found = curves.interval(values)
    return None if found is None else list(found)
