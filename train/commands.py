"""The commands of the torch-free half of training, `arllm eval` and `arllm data …`: click commands, nothing else."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from arllm.runtime.errors import needs_extra

if TYPE_CHECKING:
    from arllm.runtime.router import Router


def progress(message: str) -> None:
    """One line on stderr."""
    click.echo(message, err=True)


@click.command("eval")
@click.argument("bundle")
@click.argument("outcomes", type=click.Path(exists=True))
@click.option("--labels", type=click.Path(exists=True), help="The labels file, where OUTCOMES is a queries file.")
@click.option("--variant", default="auto", show_default=True)
@click.option("--pool", type=click.Path(exists=True), help="A pool.json with other costs, as in `arllm route`.")
@click.option("--policy", "policies", multiple=True, help="nir, hdp or hdp-paper; repeatable.  [default: all]")
@click.option("--split", "splits", multiple=True, type=click.Choice(["val", "test", "ood"]), help="[default: all]")
@click.option("--baseline", "baselines", multiple=True, help="Only these baselines; repeatable.  [default: all]")
@click.option("--query-costs", type=click.Path(exists=True), help="Costs per query: like labels.csv, in characters.")
@click.option("--unseen", multiple=True, help="A candidate that training did not know; repeatable.")
@click.option("--published-recipe", is_flag=True, help="Also train the published NIR recipe (minutes; needs torch).")
@click.option("--resamples", default=1000, show_default=True, help="Of the paired bootstrap over queries.")
@click.option("--report", type=click.Path(), help="Also write report.html, plots and tables into this folder.")
@click.option("--json", "as_json", is_flag=True, help="The whole result as JSON.")
def evaluate(
    bundle: str,
    outcomes: str,
    labels: str | None,
    variant: str,
    pool: str | None,
    policies: tuple[str, ...],
    splits: tuple[str, ...],
    baselines: tuple[str, ...],
    query_costs: str | None,
    unseen: tuple[str, ...],
    published_recipe: bool,
    resamples: int,
    report: str | None,
    as_json: bool,
) -> None:
    """Judge what BUNDLE, or a RUN that is not exported yet, would decide on OUTCOMES, beside every plain baseline.

    Operating points are chosen on the val split and judged on test and ood; the baselines are fitted on train.
    With --published-recipe, NIR as published (domain probabilities and difficulty, without its leaks) is one of them.
    While you still choose between routers, look at `--split val` alone.

    \b
    Examples:
      arllm eval nano outcomes/ --split val
      arllm eval bundles/mine outcomes/ --report out/report
    """
    with needs_extra("eval", "arllm eval"):
        from arllm.train.baselines import BASELINES
        from arllm.train.bench import prepare, router_qualities
        from arllm.train.evaluate import evaluate as judge
        from arllm.train.examples import example_decisions
        from arllm.train.outcomes import assign_splits, read_outcomes
        from arllm.train.query_costs import read_query_costs
        from arllm.train.report import text_report, write_report

    unknown = sorted(set(baselines) - set(BASELINES))
    if unknown:
        raise click.UsageError(f"no baseline {unknown[0]!r}: there are {', '.join(BASELINES)}")
    router = _router(bundle, variant, pool)
    table = assign_splits(read_outcomes(outcomes, labels))
    paid = None if query_costs is None else read_query_costs(query_costs, table)
    bench = prepare(table, router.pool, paid=paid)
    wanted = splits or ("val", "test", "ood")
    progress(f"predicting with {router.bundle.manifest.name}, {router.variant}")
    chosen = policies or router.policies
    ours = router_qualities(router, bench.outcomes, chosen, splits={"val", *wanted})
    manifest = router.bundle.manifest
    extra = {}
    if published_recipe:
        with needs_extra("train", "--published-recipe"):
            from arllm.train.published_recipe import NAME, fit_published_recipe
        fitted = fit_published_recipe(bench.outcomes.split("train"), progress=progress)
        extra[NAME] = fitted(bench.outcomes)
    result = judge(
        bench,
        ours,
        extra=extra,
        baselines=baselines or BASELINES,
        splits=wanted,
        bounds=(manifest.cost_minimum, manifest.cost_maximum),
        unseen=unseen,
        resamples=resamples,
        progress=progress,
    )
    click.echo(json.dumps(result) if as_json else text_report(result))
    if report is not None:
        split = next(name for name in ("test", "val", "ood") if name in wanted)
        paths = write_report(result, Path(report), example_decisions(router, bench, split=split))
        progress(f"wrote {', '.join(str(path) for path in paths)}")


def _router(path: str, variant: str, pool: str | None) -> Router:
    """Of a bundle by the runtime, of a run by PyTorch."""
    if not (Path(path) / "run.json").is_file():
        from arllm.runtime.router import Router

        return Router.load(path, variant=variant, pool=pool)
    if variant != "auto" or pool is not None:
        raise click.UsageError("--variant and --pool go with a bundle; a run has PyTorch and its own pool")
    with needs_extra("train", "arllm eval RUN"):
        from arllm.train.run_router import run_router
        from arllm.train.rundir import read_run
    return run_router(read_run(path), path)


@click.group()
def data() -> None:
    """Make or convert outcomes."""


@data.command()
@click.argument("out", type=click.Path())
@click.option("--queries", default=2400, show_default=True)
@click.option("--seed", default=0, show_default=True)
def synthesize(out: str, queries: int, seed: int) -> None:
    """Write SYNTHETIC outcomes of simulated candidates into the folder OUT, for trying the pipeline.

    \b
    Example:
      arllm data synthesize out/outcomes --queries 2400
    """
    with needs_extra("eval", "arllm data"):
        from arllm.train.synthetic import write
    write(out, queries, seed)
    progress(f"wrote {queries} SYNTHETIC queries to {out}: no quality claim may rest on them")


@data.command("import")
@click.argument("sources", nargs=-1, required=True)
@click.option("--from", "layout", required=True, type=click.Choice(["harness", "leaderboard", "wide"]))
@click.option("--out", required=True, type=click.Path(), help="The outcomes folder to make.")
@click.option("--model", help="harness, leaderboard: the model, where the files don't say.")
@click.option("--metric", multiple=True, help="harness, leaderboard: which metric is correctness.")
@click.option("--filter", "filters", multiple=True, help="harness, leaderboard: which of the harness's filters.")
@click.option("--dataset", multiple=True, metavar="NAME|PREFIX=NAME", help="The dataset of all tasks, or by prefix.")
@click.option("--subset-from", default="task", show_default=True, help="harness, leaderboard: task or a doc field.")
@click.option("--query-field", multiple=True, help="harness, leaderboard: the field(s) of doc that are the query.")
@click.option("--join", type=click.Choice(["doc_id", "text"]), default="doc_id", show_default=True)
@click.option("--latest", is_flag=True, help="harness, leaderboard: of two runs of a task, take the newer.")
@click.option("--tasks", multiple=True, help="leaderboard: only tasks of this prefix.")
@click.option("--query-column", help="wide: the column with the query.")
@click.option("--models", multiple=True, help="wide: a model's column; repeatable.")
@click.option("--dataset-column", help="wide")
@click.option("--subset-column", help="wide")
@click.option("--id-column", help="wide")
def import_(sources: tuple[str, ...], layout: str, out: str, **options: Any) -> None:
    """Convert outcomes of other tools into a folder for `arllm train`.

    Models are joined by document id or by text, never by row number.

    \b
    Examples:
      arllm data import --from harness logs/*/samples_*.jsonl --metric exact_match --out outcomes
      arllm data import --from leaderboard org__model-a/ org__model-b/ --out outcomes
      arllm data import --from wide routerbench.csv --query-column prompt --dataset-column eval_name --out outcomes
    """
    with needs_extra("eval", "arllm data import"):
        from arllm.train.import_harness import import_harness
        from arllm.train.import_leaderboard import import_leaderboard
        from arllm.train.import_wide import import_wide_csv
        from arllm.train.importers import write_outcomes
    named = {key: value for key, value in options.items() if value not in ((), None, False)}
    names = named.pop("dataset", ())
    if names:
        pairs = [name.partition("=") for name in names]
        named["dataset"] = {p: n for p, _, n in pairs} if all(s for _, s, _ in pairs) else names[0]
        if len(names) > 1 and isinstance(named["dataset"], str):
            raise click.UsageError("--dataset is one NAME, or several PREFIX=NAME")
    renamed = {"filters": "filter_name", "join": "join_by"}
    arguments = {renamed.get(key, key): value for key, value in named.items()}
    for other in ("join_by", "subset_from") if layout == "wide" else ():  # they have defaults
        arguments.pop(other)
    misplaced = sorted(set(arguments) - _TAKES[layout])
    if misplaced:
        raise click.UsageError(f"--{misplaced[0].replace('_', '-')} does not go with --from {layout}")
    if layout == "wide":
        if "query_column" not in arguments:
            raise click.UsageError("--from wide needs --query-column")
        outcomes = import_wide_csv(list(sources), **arguments)
    else:
        outcomes = (import_harness if layout == "harness" else import_leaderboard)(list(sources), **arguments)
    write_outcomes(outcomes, out)
    filled = 100.0 * float((outcomes.correct == outcomes.correct).mean())
    print(
        f"wrote {len(outcomes)} queries × {len(outcomes.candidates)} candidates, {filled:.1f}% evaluated, to {out}: "
        f"{', '.join(outcomes.candidates)}",
        file=sys.stderr,
    )


_SAMPLES = {"model", "metric", "filter_name", "dataset", "subset_from", "query_field", "join_by", "latest"}
_TAKES = {
    "harness": _SAMPLES,
    "leaderboard": _SAMPLES | {"tasks"},
    "wide": {"query_column", "models", "dataset", "dataset_column", "subset_column", "id_column"},
}
