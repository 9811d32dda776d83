"""Routed queries to look at: which decisions show what a router does, with the reason in words. Free of torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from arllm.train import curves
from arllm.train.bench import Bench, router_qualities

if TYPE_CHECKING:
    from arllm.runtime.answer import Decision
    from arllm.runtime.router import Router

KINDS = ("cheaper and right", "dear and needed", "wrong")


def example_decisions(
    router: Router,
    bench: Bench,
    *,
    split: str = "test",
    policy: str | None = None,
    beta: float | None = None,
    per_dataset: int = 3,
    queries: int = 300,
) -> list[dict[str, Any]]:
    """Decisions on queries of a split, in plain JSON types, up to ``per_dataset`` of each dataset.

    One each, where there is one, of: a candidate that is cheaper than the best single model and was right; one that
    isn't, and was right where the cheapest was wrong; a choice that was wrong where another would have been right.
    Of several the first in the outcomes' order is taken, not the best looking.

    Args:
        beta: None: about where the router spends 60% of what the best single model costs, on validation.
        queries: how many of the split to look through, evenly spaced.

    Raises:
        OutcomesError, PolicyError, QueryError: as :func:`arllm.train.bench.router_qualities`.
    """
    outcomes, pool = bench.outcomes, bench.pool
    name = router.bundle.manifest.default_policy if policy is None else policy
    manifest = router.bundle.manifest
    bounds = (manifest.cost_minimum, manifest.cost_maximum)
    train = outcomes.split("train")
    best = curves.best_single(train.correct if len(train) else outcomes.split("val").correct)
    if beta is None:
        val = _thin(np.flatnonzero([s == "val" for s in outcomes.splits]), queries)
        beta = _spending(
            router_qualities(router, outcomes.rows(val), [name])[name],
            curves.outcome_table(outcomes.correct[val], pool.costs, bounds=bounds),
            0.6 * float(pool.costs[best]),
        )
    rows = _thin(np.flatnonzero([s == split for s in outcomes.splits]), queries)
    if not len(rows):
        return []
    here = outcomes.rows(rows)
    table = curves.outcome_table(here.correct, pool.costs, bounds=bounds)
    chosen = curves.choices(router_qualities(router, here, [name])[name], table, [beta])[:, 0]
    found = []
    for dataset in sorted(set(here.datasets)):
        taken: dict[str, int] = {}
        for i, (where, choice) in enumerate(zip(here.datasets, chosen, strict=True)):
            kind = _kind(table.correct[i], int(choice), best, pool.costs) if where == dataset else None
            if kind is not None:
                taken.setdefault(kind, i)
        for kind in [kind for kind in KINDS if kind in taken][:per_dataset]:
            i = taken[kind]
            evaluated = [n for n, ok in zip(pool.names, table.evaluated[i], strict=True) if ok]
            decision = router.route(here.queries[i], beta, name, evaluated)
            truth = dict(zip(pool.names, table.correct[i].tolist(), strict=True))
            found.append(_example(decision, here.queries[i], dataset, kind, truth, pool.names[best]))
    return found


def explain_choice(decision: Decision) -> str:
    """Why this candidate, in a sentence: what the better one would have gained, and what it would have cost."""
    quality, utility = decision.quality, decision.utility
    beta, chosen = decision.beta, decision.model
    best = max(decision.candidates, key=lambda name: quality[name])  # of equals the first, which is the cheapest
    if best == chosen:
        cheaper = [n for n in decision.candidates if decision.cost[n] < decision.cost[chosen]]
        if not cheaper:
            return f"highest predicted quality ({quality[chosen]:.2f}), and none is cheaper"
        if beta == 0:
            return f"highest predicted quality ({quality[chosen]:.2f}); beta 0 looks at nothing else"
        rival = max(cheaper, key=lambda name: utility[name])
        gain = (1 - beta) * (quality[chosen] - quality[rival])
        price = gain - (utility[chosen] - utility[rival])
        return (
            f"highest predicted quality ({quality[chosen]:.2f}); {rival} is cheaper ({quality[rival]:.2f}), but the "
            f"weighted gain of {gain:.3f} is worth the weighted cost of {price:.3f}"
        )
    gain = (1 - beta) * (quality[best] - quality[chosen])
    price = gain + utility[chosen] - utility[best]
    return (
        f"{best} is predicted to be better ({quality[best]:.2f} against {quality[chosen]:.2f}), but at beta {beta:g} "
        f"the weighted gain of {gain:.3f} doesn't pay the weighted cost of {price:.3f}"
    )


def _thin(rows: NDArray[np.intp], count: int) -> NDArray[np.intp]:
    """At most ``count`` of the rows, evenly spaced."""
    if len(rows) <= count:
        return rows
    return rows[np.linspace(0, len(rows) - 1, count).astype(np.intp)]


def _spending(quality: NDArray[np.float64], table: curves.Table, budget: float) -> float:
    grid = curves.beta_grid()
    _, cost = curves.play(quality, table, grid).means()
    return float(grid[int(np.argmin(np.abs(cost - budget)))])


def _kind(correct: NDArray[np.float64], choice: int, best: int, costs: NDArray[np.float64]) -> str | None:
    right = correct[choice] > 0.5
    if not right:
        return "wrong" if np.nanmax(correct) > 0.5 else None
    if costs[choice] < costs[best]:
        return "cheaper and right"
    return "dear and needed" if correct[0] <= 0.5 else None  # the cheapest candidate was wrong; NaN is no


def _example(
    decision: Decision, query: str, dataset: str, kind: str, truth: dict[str, float], best: str
) -> dict[str, Any]:
    told: dict[str, Any] = decision.to_dict()
    vector = decision.query_vector
    domains = sorted(vector.domains.items(), key=lambda item: -item[1])[:3]
    ranked: Sequence[str] = sorted(decision.candidates, key=lambda name: -decision.utility[name])
    return {
        "dataset": dataset,
        "kind": kind,
        "query": query,
        "beta": decision.beta,
        "policy": decision.policy,
        "model": decision.model,
        "best_single": best,
        "reason": str(told.get("reason") or explain_choice(decision)),
        "familiarity": told.get("familiarity"),
        "difficulty": vector.difficulty,
        "domains": {name: p for name, p in domains if p >= 0.005},
        "candidates": [
            {
                "name": name,
                "quality": decision.quality[name],
                "cost": decision.cost[name],
                "utility": decision.utility[name],
                "correct": truth[name],
            }
            for name in ranked
        ],
    }
