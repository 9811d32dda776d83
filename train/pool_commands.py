"""The commands `arllm pool add` and `arllm pool probe`: candidates never trained on. Click, nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from arllm.runtime.errors import QueryError
from arllm.train.commands import progress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from arllm.runtime.router import Router

NEAREST = 3  # known candidates that are named beside a newcomer


@click.group()
def pool() -> None:
    """Candidates that a bundle was never trained on."""


@pool.command()
@click.argument("bundle")
@click.argument("name")
@click.option("--cost", required=True, type=float, help="Expected cost of a query, in the unit of the bundle's pool.")
@click.option("--outcomes", required=True, type=click.Path(exists=True, dir_okay=False), metavar="FILE",
              help="The scored queries: .csv or .jsonl with query and correct.")  # fmt: skip
@click.option("--out", required=True, type=click.Path(), help="The bundle folder to make.")
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON.")
def add(bundle: str, name: str, cost: float, outcomes: str, out: str, as_json: bool) -> None:
    """Make a new bundle: BUNDLE with the candidate NAME, of which a few dozen scored queries are known.

    Nothing is retrained and BUNDLE stays as it is. The newcomer's model vector is estimated from FILE and from what
    the known candidates are like. FILE holds `query` and `correct` (true, false, or a number in [0, 1]) and, where
    it holds several models, `model`. `arllm pool probe` says which queries to score.

    \b
    Examples:
      arllm pool add nano acme/new-7b --cost 0.2 --outcomes few.csv --out bundles/with-new
    """
    from arllm.runtime.bundle import open_bundle
    from arllm.runtime.pool import Candidate
    from arllm.runtime.router import Router
    from arllm.runtime.session import pick_variant
    from arllm.train.newcomers import estimate
    from arllm.train.rebundle import add_candidate, check_addition
    from arllm.train.scored import read_scored

    opened = open_bundle(bundle)
    check_addition(opened, Candidate(name, cost), out)  # a wrong name or cost need not wait for the encoder
    scored = read_scored(outcomes, name)
    router = Router.of(opened, pick_variant(opened.manifest.variants, "auto"))
    vectors = _query_vectors(router, scored.queries)
    found = estimate(vectors, scored.correct, opened.pool.vectors(), opened.manifest.domain_shares)
    low, high = found.interval
    note = (
        f"Its model vector is estimated from {len(scored)} scored queries and the known candidates: accuracy "
        f"{found.accuracy:.3f}, 95% interval {low:.3f} to {high:.3f}."
    )
    made = add_candidate(
        opened,
        Candidate(name, cost, tuple(float(v) for v in found.vector)),
        out,
        note,
        addition={"outcomes": scored.source, "queries": len(scored), "accuracy": found.accuracy,
                  "interval": [low, high]},
        progress=progress,
    )  # fmt: skip
    bounds = [[b.manifest.cost_minimum, b.manifest.cost_maximum] for b in (opened, made)]
    result = {
        "bundle": str(made.path),
        "digest": made.digest,
        "candidate": name,
        "cost": cost,
        "unit": made.pool.unit,
        "queries": len(scored),
        "observed": float(scored.correct.mean()),
        "accuracy": found.accuracy,
        "interval": [low, high],
        "nearest": [
            {"name": opened.pool.names[m], "difference": difference}
            for m, difference in list(zip(found.nearest, found.differences, strict=True))[:NEAREST]
        ],
        "cost_bounds": {"before": bounds[0], "now": bounds[1]},
    }
    click.echo(json.dumps(result) if as_json else _text(result))


@pool.command()
@click.argument("bundle")
@click.argument("queries", type=click.Path(exists=True))
@click.option("--n", default=30, show_default=True, type=click.IntRange(min=1), help="How many to choose.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object in place of a line a query.")
def probe(bundle: str, queries: str, n: int, as_json: bool) -> None:
    """Choose the QUERIES whose scores would tell most about a new candidate, the most telling first.

    QUERIES is a .jsonl with "query", a .csv or .parquet with a column query, or an outcomes folder. Prints JSON
    lines: add "correct" to each, and the file is ready for `arllm pool add`.

    \b
    Examples:
      arllm pool probe nano queries.jsonl --n 30 > few.jsonl
    """
    import numpy as np

    from arllm.runtime.router import Router
    from arllm.train import newcomers
    from arllm.train.outcomes import normalise_query
    from arllm.train.traffic import read_traffic

    router = Router.load(bundle)
    found = read_traffic(queries)
    progress(f"reading {len(found)} queries with {router.variant}")
    vectors = _query_vectors(router, found.queries)
    texts = [normalise_query(text) for text in found.queries]
    chosen = newcomers.probe(vectors, router.pool.vectors(), n, texts)
    if len(chosen) < n:
        progress(f"note: {queries} holds {len(chosen)} different queries, fewer than --n {n}")
    names = router.bundle.manifest.domains
    domains = [names[k] for k in np.argmax(vectors[:, : len(names)], axis=1).tolist()]
    rows = [{"query": found.queries[i], "domain": domains[i]} for i in chosen.tolist()]
    if as_json:
        bundle_name = router.bundle.manifest.name
        click.echo(json.dumps({"bundle": bundle_name, "considered": len(found), "queries": rows}))
        return
    for row in rows:
        click.echo(json.dumps(row, ensure_ascii=False))


def _query_vectors(router: Router, queries: Sequence[str]) -> NDArray[np.float32]:
    """(N, Q) float32."""
    import numpy as np

    if router.bundle.manifest.tokens is None:
        raise QueryError(f"{router.bundle.path}: holds no encoder (NIR alone), so it can't read the queries' texts")
    return np.stack([router.encode(query).vector for query in queries])


def _text(result: dict[str, Any]) -> str:
    low, high = result["interval"]
    near = ", ".join(f"{n['name']} ({100 * n['difference']:.0f} points a domain)" for n in result["nearest"])
    before, now = result["cost_bounds"]["before"], result["cost_bounds"]["now"]
    lines = [
        f"{result['candidate']}: estimated accuracy {result['accuracy']:.3f}, 95% interval {low:.3f} to {high:.3f}, "
        f"from {result['queries']} scored queries ({result['observed']:.3f} right)",
        f"nearest known candidates: {near}",
    ]
    if before != now:
        lines.append(
            f"cost bounds: {now[0]:g} to {now[1]:g} {result['unit']}, were {before[0]:g} to {before[1]:g}: the scale "
            "of beta has moved, so find your beta anew (arllm calibrate)"
        )
    else:
        lines.append(f"cost bounds: {now[0]:g} to {now[1]:g} {result['unit']}, as before: beta keeps its meaning")
    lines += [
        f"wrote {result['bundle']}",
        f'try it: arllm route {result["bundle"]} --explain "What is 17 * 23?"',
    ]
    return "\n".join(lines)
