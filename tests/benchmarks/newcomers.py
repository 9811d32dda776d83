"""Candidates that were never trained on: what a few scored queries recover of a retraining. Prints a table.

    # A pool.csv without the newcomers; their columns are left out of the same outcomes.
    arllm train OUTCOMES --pool without.csv --ignore-unknown --out runs/without   # and --cost-column … as usual
    arllm export runs/without --out bundles/without --variant cpu-int8
    python tests/benchmarks/newcomers.py bundles/without bundles/with OUTCOMES --split val --draws 10

The newcomers are the candidates that WITH's pool holds and WITHOUT's does not. Each draw takes n training queries,
at random for each newcomer or the ones that the probe chooses from a random 1,000, estimates every newcomer's model
vector, and judges the router of WITHOUT with all of them in its pool. Ratio: (with - without) / (retrained - without)
in gap closed, all measured between the zero router and the oracle of the whole pool. AUC: mean over the newcomers.
"exact" rows are no estimator: they say what limits one (`exact level`: the mean right, the rest as in a prior;
`full vector`: as training would have had it).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arllm.runtime.pool import Candidate, Pool
from arllm.runtime.router import Router
from arllm.train import curves, newcomers
from arllm.train.bench import Bench, prepare
from arllm.train.domains import model_vectors
from arllm.train.metrics import candidate_auc
from arllm.train.outcomes import assign_splits, normalise_query, read_outcomes

Array = NDArray[np.float64]
POOL = 1000  # queries that a probe chooses from


@dataclass(frozen=True, eq=False)
class Encoded:
    """Queries as one router sees them: (N, Q) vectors and (N,) familiarity."""

    vectors: NDArray[np.float32]
    familiarity: Array


@dataclass(frozen=True, eq=False)
class Arena:
    """What every row of the table shares."""

    bench: Bench
    without: str
    policy: str | None
    new: tuple[str, ...]
    train: Encoded
    judged: dict[str, Encoded]  # split → queries, by WITHOUT's encoder
    base: Router
    floor: float  # gap closed of WITHOUT
    ceiling: float  # of WITH, retrained
    split: str

    def rows(self, split: str) -> NDArray[np.bool_]:
        return np.array([s == split for s in self.bench.outcomes.splits])

    @property
    def columns(self) -> list[int]:
        return [self.bench.pool.names.index(name) for name in self.new]

    def correct(self, split: str) -> Array:
        return self.bench.outcomes.correct[self.rows(split)].astype(np.float64)


def encode(router: Router, queries: Sequence[str]) -> Encoded:
    found = [router.encode(query) for query in queries]
    return Encoded(np.stack([one.vector for one in found]), np.array([one.familiarity for one in found]))


def qualities(router: Router, names: Sequence[str], policy: str | None, judged: Encoded) -> Array:
    """(N, M) over the named candidates; one that the router doesn't know has 0."""
    predicted = np.asarray(router.predict(judged.vectors, policy, judged.familiarity), dtype=np.float64)
    at = {name: m for m, name in enumerate(router.pool.names)}
    columns = [predicted[:, at[name]] if name in at else np.zeros(len(predicted)) for name in names]
    return np.stack(columns, axis=1)


def gap_closed(bench: Bench, quality: dict[str, Array], split: str, hidden: Sequence[int] = ()) -> float:
    """Gap closed on ``split`` between the bounds of the whole pool; ``hidden`` columns can't be chosen."""
    outcomes, costs = bench.outcomes, bench.pool.costs
    splits = np.array(outcomes.splits)

    def table(name: str) -> curves.Table:
        return curves.outcome_table(outcomes.correct[splits == name], costs)

    def narrowed(full: curves.Table) -> curves.Table:
        correct, paid = full.correct.copy(), full.paid.copy()
        correct[:, hidden] = paid[:, hidden] = np.nan
        return curves.Table(correct, paid, full.normalized)

    validation, judged = table("val"), table(split)
    frame = curves.frame(validation, judged, curves.best_single(outcomes.split("train").correct))
    betas = curves.hull_betas(quality["val"], narrowed(validation))
    played, top = (curves.play(quality[split], narrowed(judged), b) for b in (betas, [0.0]))
    return float(curves.measure(played, top, frame).gap_closed)


def judge(arena: Arena, vectors: Sequence[Array]) -> tuple[float, float]:
    """(ratio, the newcomers' mean AUC) of WITHOUT with the newcomers' model vectors in its pool."""
    costs = dict(zip(arena.bench.pool.names, arena.bench.pool.costs.tolist(), strict=True))
    added = [Candidate(name, costs[name], tuple(v.tolist())) for name, v in zip(arena.new, vectors, strict=True)]
    pool = Pool((*arena.base.pool.candidates, *added), arena.base.pool.unit)
    router = Router.load(arena.without, verify=False, pool=pool)
    names = arena.bench.pool.names
    quality = {split: qualities(router, names, arena.policy, queries) for split, queries in arena.judged.items()}
    gap = gap_closed(arena.bench, quality, arena.split)
    areas = candidate_auc(arena.correct(arena.split), quality[arena.split])[arena.columns]
    return (gap - arena.floor) / (arena.ceiling - arena.floor), float(np.mean(areas))


def drawn(arena: Arena, n: int, seed: int, chosen_by_probe: bool) -> list[Array]:
    """Every newcomer's model vector from n training queries."""
    rng = np.random.default_rng(seed)
    correct, known = arena.correct("train"), arena.base.pool.vectors()
    shares = arena.base.bundle.manifest.domain_shares
    probes = rng.permutation(len(correct))[:POOL]
    if chosen_by_probe:
        queries = arena.bench.outcomes.split("train").queries
        texts = [normalise_query(queries[i]) for i in probes]
        probes = probes[newcomers.probe(arena.train.vectors[probes], known, n, texts)]
    vectors = []
    for column in arena.columns:
        index = probes if chosen_by_probe else rng.permutation(len(correct))[:n]
        seen = index[~np.isnan(correct[index, column])]
        vectors.append(newcomers.estimate(arena.train.vectors[seen], correct[seen, column], known, shares).vector)
    return vectors


def exact(arena: Arena, level_alone: bool) -> list[Array]:
    """What training would have had; with ``level_alone`` its mean alone, the rest as the known candidates have it."""
    correct = arena.correct("train")[:, arena.columns]
    d = len(arena.base.bundle.manifest.domains)
    domains = np.argmax(arena.train.vectors[:, :d], axis=1)
    vectors = model_vectors(correct, domains, d).astype(np.float64)
    if not level_alone:
        return list(vectors)
    shares = np.bincount(domains, minlength=d) / len(domains)
    mean, covariance = newcomers.population(arena.base.pool.vectors())
    along = covariance.sum(axis=1) / np.sqrt(covariance.sum())
    steps = np.linspace(-5.0, 5.0, 2001)
    curve = 1.0 / (1.0 + np.exp(-(mean + steps[:, None] * along)))  # (steps, D)
    return [curve[np.argmin(np.abs((curve - v) @ shares))] for v in vectors]


def run(arguments: argparse.Namespace, progress: Callable[[str], None]) -> dict[str, Any]:
    base, retrained = Router.load(arguments.without), Router.load(arguments.retrained)
    bench = prepare(assign_splits(read_outcomes(arguments.outcomes)), retrained.pool)
    new = tuple(name for name in bench.pool.names if name not in base.pool.names)
    if not new:
        sys.exit("WITH's pool holds no candidate that WITHOUT's lacks")
    progress(f"newcomers: {', '.join(new)}")
    policy, split = arguments.policy, arguments.split
    wanted = {"train", "val", split}
    progress("encoding")
    seen = {s: encode(base, bench.outcomes.split(s).queries) for s in sorted(wanted)}
    again = {s: encode(retrained, bench.outcomes.split(s).queries) for s in sorted(wanted - {"train"})}
    train = seen.pop("train")
    names = bench.pool.names
    hidden = [names.index(name) for name in new]
    full = {s: qualities(retrained, names, policy, queries) for s, queries in again.items()}
    floor = gap_closed(bench, {s: qualities(base, names, policy, q) for s, q in seen.items()}, split, hidden)
    ceiling = gap_closed(bench, full, split)
    arena = Arena(bench, arguments.without, policy, new, train, seen, base, floor, ceiling, split)
    areas = candidate_auc(arena.correct(split), full[split])[hidden]
    rows = []

    def row(name: str, n: int | None, results: list[tuple[float, float]]) -> None:
        ratios, aucs = zip(*results, strict=True)
        rows.append({"how": name, "n": n, "draws": len(results), "ratio": float(np.mean(ratios)),
                     "deviation": float(np.std(ratios)), "auc": float(np.mean(aucs))})  # fmt: skip
        progress(f"{name} {n}: {rows[-1]['ratio']:.2f}")

    for n in arguments.queries:
        for name, by_probe in (("at random", False), ("probe", True)):
            if not by_probe or n <= POOL // 5:
                row(name, n, [judge(arena, drawn(arena, n, seed, by_probe)) for seed in range(arguments.draws)])
    row("at random", len(train.vectors), [judge(arena, drawn(arena, len(train.vectors), 0, False))])
    row("exact level", None, [judge(arena, exact(arena, True))])
    row("full vector", None, [judge(arena, exact(arena, False))])
    return {
        "newcomers": list(new),
        "split": split,
        "policy": policy or base.bundle.manifest.default_policy,
        "gap_closed_without": floor,
        "gap_closed_retrained": ceiling,
        "auc_retrained": float(np.mean(areas)),
        "rows": rows,
    }


def text(result: dict[str, Any]) -> str:
    lines = [
        f"Newcomers: {', '.join(result['newcomers'])}. Gap closed on {result['split']}, policy {result['policy']}: "
        f"{100 * result['gap_closed_without']:.1f}% without them, {100 * result['gap_closed_retrained']:.1f}% "
        f"retrained; their AUC retrained {result['auc_retrained']:.3f}.",
        "",
        "| queries | chosen | ratio | over draws | AUC |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        n = "–" if row["n"] is None else f"{row['n']:,}"
        spread = f"± {row['deviation']:.2f} ({row['draws']})" if row["draws"] > 1 else ""
        lines.append(f"| {n} | {row['how']} | {row['ratio']:.2f} | {spread} | {row['auc']:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("without", help="a bundle that was trained without the newcomers")
    parser.add_argument("retrained", metavar="with", help="one trained with them, alike in all else")
    parser.add_argument("outcomes", help="the outcomes of both")
    parser.add_argument("--split", default="val", choices=("val", "test", "ood"), help="val while choosing")
    parser.add_argument("--policy", help="[default: the bundle's]")
    parser.add_argument("--queries", type=int, nargs="+", default=[10, 30, 100, 300, 1000])
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    result = run(arguments, lambda message: print(message, file=sys.stderr))
    print(json.dumps(result) if arguments.json else text(result))


if __name__ == "__main__":
    main()
