"""The command `arllm calibrate`: from a preference in the user's words to a beta. A click command, nothing else."""

from __future__ import annotations

import json
from typing import Any

import click

from arllm.runtime import requests, tables
from arllm.runtime.errors import InputError
from arllm.train.commands import progress

LEAST_SHARE = 0.005  # of a candidate that the table of other betas shows


@click.command()
@click.argument("bundle")
@click.argument("traffic", type=click.Path(exists=True))
@click.option(
    "--budget", type=float, help="Mean cost of a query, in the pool's unit: the smallest beta that keeps it."
)
@click.option(
    "--share", metavar="NAME=P%", help="The beta at which this candidate answers this share of the queries."
)
@click.option("--match-best", is_flag=True, help="The largest saving that is as accurate as the best single model.")
@click.option("--policy", help="nir, hdp or hdp-paper.  [default: the bundle's]")
@click.option("--variant", default="auto", show_default=True)
@click.option("--pool", type=click.Path(exists=True), help="A pool.json with other costs, as in `arllm route`.")
@click.option("--candidates", help="Choose among these names only, comma-separated.")
@click.option("--split", "splits", multiple=True, type=click.Choice(["train", "val", "test", "ood"]),
              help="Only queries of this split; repeatable.  [default: all but train]")  # fmt: skip
@click.option("--resamples", default=1000, show_default=True, type=click.IntRange(min=1), help="Of the bootstrap.")
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON.")
def calibrate(
    bundle: str,
    traffic: str,
    budget: float | None,
    share: str | None,
    match_best: bool,
    policy: str | None,
    variant: str,
    pool: str | None,
    candidates: str | None,
    splits: tuple[str, ...],
    resamples: int,
    as_json: bool,
) -> None:
    """Find the beta that fulfils one wish on TRAFFIC, and say what to expect at it.

    TRAFFIC holds your queries: a .jsonl with "query", a .csv or .parquet with a column query, or outcomes, as in
    `arllm train`; then accuracy is measured too. Queries of a split train are left out: the router has seen them.

    \b
    Examples:
      arllm calibrate nano queries.jsonl --budget 0.40
      arllm calibrate nano queries.jsonl --share Qwen/Qwen2.5-72B-Instruct=20%
      arllm calibrate nano outcomes/ --match-best --split val
    """
    if sum((budget is not None, share is not None, match_best)) != 1:
        raise click.UsageError("give exactly one of --budget, --share and --match-best")
    wanted = None if share is None else _share(share)
    from arllm.runtime.decision import candidate_mask
    from arllm.runtime.router import Router
    from arllm.train import preferences
    from arllm.train.traffic import HELD_OUT, held_out, predict_traffic, read_traffic

    router = Router.load(bundle, variant=variant, pool=pool)
    chosen = policy or router.bundle.manifest.default_policy
    allowed = None if candidates is None else requests.names_of(candidates)
    if wanted is not None:
        candidate_mask(router.pool.names, [wanted[0]])  # a wrong name need not wait for the predictions
    found = read_traffic(traffic)
    queries = held_out(found, splits or HELD_OUT)
    progress(f"predicting {len(queries)} of {len(found)} queries with {chosen}, {router.variant}")
    sample, notes = predict_traffic(router, queries, chosen, allowed)
    path = preferences.sweep(sample)
    wish: dict[str, Any]
    if budget is not None:
        k, wish = preferences.for_budget(sample, path, budget), {"budget": budget}
    elif wanted is not None:
        k, wish = preferences.for_share(sample, path, *wanted), {"share": {wanted[0]: wanted[1]}}
    else:
        if queries.candidates and sample.correct is None:
            raise InputError(f"{traffic}: {notes[0]}; or give the queries alone, to go by predicted accuracy")
        k, wish = preferences.for_best(sample, path), {"match_best": True}
    beta = path.beta(k)
    every = preferences.expect(sample, preferences.neighbours(beta), resamples)
    best = preferences.best_single(sample)
    result = {
        "bundle": router.bundle.manifest.name,
        "variant": router.variant,
        "policy": chosen,
        "wish": wish,
        "queries": len(queries),
        "beta": beta,
        "same_choices": [float(path.low[k]), float(path.high[k])],
        "unit": sample.unit,
        "attainable_cost": [every[-1]["cost"]["value"], every[0]["cost"]["value"]],
        "best_single": {"name": sample.names[best], **preferences.of_single(sample, best)},
        "expect": next(entry for entry in every if entry["beta"] == beta),
        "beside": [entry for entry in every if entry["beta"] != beta],
        "notes": [*_caveats(chosen, sample.correct is not None, match_best), *notes],
    }
    click.echo(json.dumps(result) if as_json else _text(result))


def _share(item: str) -> tuple[str, float]:
    name, _, amount = item.rpartition("=")
    try:
        percent = float(amount.removesuffix("%")) if amount.endswith("%") else -1.0
    except ValueError:
        percent = -1.0
    if not name or not 0.0 <= percent <= 100.0:
        raise click.UsageError(f"--share takes NAME=P%, with P between 0 and 100, not {item!r}")
    return name, percent / 100.0


def _caveats(policy: str, measured: bool, match_best: bool) -> list[str]:
    notes = [
        "predicted accuracy holds for traffic like the router's training queries; intervals are of the sample alone"
    ]
    if policy == "hdp-paper":
        notes.append("the quality of hdp-paper is no probability: its predicted accuracy means nothing")
    if measured and match_best:
        notes.append("beta was picked by the accuracy measured on these very queries, which flatters it a little")
    return notes


_ROWS = (
    ("accuracy, predicted", "accuracy_predicted"),
    ("accuracy, measured", "accuracy_measured"),
    ("points above the best single, predicted", "lead_predicted"),
    ("points above the best single, measured", "lead_measured"),
    ("mean cost of a query", "cost"),
    ("saved of the best single's cost", "saving"),
)


def _text(result: dict[str, Any]) -> str:
    low, high = result["same_choices"]
    best, expected = result["best_single"], result["expect"]
    everywhere = sorted([expected, *result["beside"]], key=lambda entry: float(entry["beta"]))
    rows = [(title, *_cells(key, expected[key])) for title, key in _ROWS if expected[key]]
    shares = sorted(expected["shares"].items(), key=lambda item: -item[1]["value"])
    rows += [(f"share of {name}", *_cells("share", figure)) for name, figure in shares if figure["value"] > 0]
    around = [(title, *(_cells(key, e[key])[0] for e in everywhere)) for title, key in _ROWS if expected[key]]
    for name in expected["shares"]:
        given = [entry["shares"][name] for entry in everywhere]
        if any(figure["value"] >= LEAST_SHARE for figure in given):
            around.append((f"share of {name}", *(_cells("share", figure)[0] for figure in given)))
    measured = "" if best["accuracy_measured"] is None else f", measured {best['accuracy_measured']:.3f}"
    betas = [f"[{e['beta']:g}]" if e is expected else f"{e['beta']:g}" for e in everywhere]
    lines = [
        f"beta {result['beta']:g}   ({low:.6g} to {high:.6g} choose the same on these {result['queries']:,} queries)",
        "",
        tables.table((f"at beta {result['beta']:g}", "expect", "95%"), rows),
        "",
        tables.table(("at other betas", *betas), around),
        "",
        f"best single model: {best['name']}, accuracy predicted {best['accuracy_predicted']:.3f}{measured}, cost "
        f"{best['cost']:.4g}; costs in {result['unit']}",
        *(f"note: {note}" for note in result["notes"]),
    ]
    return "\n".join(lines)


def _cells(key: str, figure: dict[str, Any] | None) -> tuple[str, str]:
    """A figure and its interval."""
    if figure is None:
        return "–", "–"

    def text(value: float, suffix: str = "") -> str:
        if key == "cost":
            return f"{value:.4g}"
        if key.startswith("accuracy"):
            return f"{value:.3f}"
        return f"{round(100 * value, 1) + 0.0:{'+' if key.startswith('lead') else ''}.1f}{suffix}"

    interval = figure["interval"]
    ends = "–" if interval is None else f"{text(interval[0])} … {text(interval[1])}"
    return text(figure["value"], "" if key.startswith("lead") else "%"), ends
