"""The command line of arllm: click commands, nothing else. The heavy halves are imported inside the commands.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 failed, 2 usage.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import click

from arllm.export import commands as export_commands
from arllm.runtime import requests, tables
from arllm.runtime.errors import ArllmError, InputError, needs_extra
from arllm.runtime.gateways import commands as gateway_commands
from arllm.train import commands, pool_commands, preference_commands
from arllm.train.latency import commands as latency_commands


class _Group(click.Group):
    """Turns arllm's errors into one line on stderr and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ArllmError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(2 if isinstance(error, InputError) else 1)
        except BrokenPipeError:  # the reader of stdout went away: click's own handling
            raise
        except OSError as error:  # a path that can't be written, a full disk
            click.echo(f"Error: {error.filename or 'output'}: {error.strerror or error}", err=True)
            ctx.exit(1)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="arllm", prog_name="arllm")
def main() -> None:
    """Learn which model answers which query, and route in milliseconds.

    \b
    arllm train OUTCOMES --pool POOL --out RUN    learn from a table of outcomes
    arllm export RUN --out BUNDLE                 verify against PyTorch, pack for the runtime
    arllm route BUNDLE "a query"                  decide
    """


@main.command()
@click.argument("outcomes", type=click.Path(exists=True))
@click.option(
    "--labels", type=click.Path(exists=True), help="The wide labels file, where OUTCOMES is a queries file."
)
@click.option("--pool", required=True, type=click.Path(exists=True), help="pool.json, a CSV, or models_info.json.")
@click.option("--pool-where", multiple=True, metavar="COLUMN=VALUE", help="Use only these rows of a pool CSV.")
@click.option("--cost-column", help="The cost column of a pool CSV, if it isn't `cost`.")
@click.option("--unit", help="The unit of the costs.")
@click.option("--out", required=True, type=click.Path(), help="The run folder to make.")
@click.option("--resume", is_flag=True, help="Continue an interrupted run, with the same options.")
@click.option("--ignore-unknown", is_flag=True, help="Leave out outcomes of models that the pool doesn't hold.")
@click.option("--backbone", default="nano", show_default=True, help="nano, gemma3-270m, a local folder or a hub id.")
@click.option("--layers", type=int, help="Keep the first N layers of the backbone.  [default: all; nano: 0]")
@click.option("--domains", help="auto, dataset, subset, or a mapping file.  [default: auto]")
@click.option("--nir", type=click.Choice(["interaction", "ncf"]), help="NIR's shape.  [default: interaction]")
@click.option("--embedding-width", type=int, help="Learned part of the query vector; 0 = none.  [default: 32]")
@click.option("--vocab-size", type=int, help="Of nano's own tokenizer.  [default: 16000]")
@click.option("--max-tokens", type=int, help="Tokens read of a query.")
@click.option("--head-epochs", type=int, help="Epochs with the backbone at rest.  [default: 15]")
@click.option("--head-lr", type=float)
@click.option("--epochs", type=int, help="Epochs of everything; 0 = the backbone stays.  [default: nano 0, others 1]")
@click.option("--batch-size", type=int)
@click.option("--lr", type=float, help="Of the heads and NIR, in those epochs.")
@click.option("--backbone-lr", type=float, help="Of the layers.  [default: a tenth of --lr]")
@click.option("--contrast-weight", type=float, help="Of telling candidates apart.  [default: 2]")
@click.option("--teacher-folds", type=int, help="Of the cross-fitted teachers; 0 = no teachers.  [default: 4]")
@click.option("--outcome-weight", type=float, help="Of the outcomes themselves beside the teachers.  [default: 0.3]")
@click.option("--dropout", type=float)
@click.option("--token-dropout", type=float)
@click.option("--evaluations-per-epoch", type=int)
@click.option("--patience", type=int, help="Evaluations without improvement before stopping.")
@click.option("--checkpoint-steps", type=int, help="Steps between checkpoints.")
@click.option("--max-queries", type=int, help="Train on N queries only.")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]))
@click.option("--threads", type=int, help="PyTorch's threads.")
@click.option("--seed", type=int)
@click.option("--json", "as_json", is_flag=True, help="Print the metrics as JSON.")
def train(
    outcomes: str,
    labels: str | None,
    pool: str,
    pool_where: tuple[str, ...],
    cost_column: str | None,
    unit: str | None,
    out: str,
    resume: bool,
    ignore_unknown: bool,
    backbone: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Train a query encoder and NIR on OUTCOMES, fit HDP, and write a run folder.

    OUTCOMES is a folder with queries.jsonl[.gz] and labels.csv[.gz], or a long .jsonl, .csv or .parquet file
    with the columns query, model, dataset, correct.

    \b
    Examples:
      arllm train outcomes/ --pool pool.json --out runs/first
      arllm train long.jsonl --pool prices.csv --cost-column usd --backbone gemma3-270m --layers 6 --out runs/g6
      arllm train outcomes/ --pool pool.json --out runs/first --resume
    """
    with needs_extra("train", "arllm train"):
        from arllm.train.options import TrainOptions
        from arllm.train.outcomes import read_outcomes
        from arllm.train.pipeline import train as run_training
        from arllm.train.pools import read_pool
    conditions = dict(_pair(item) for item in pool_where)
    candidates = read_pool(pool, cost_column=cost_column, where=conditions or None, unit=unit)
    table = read_outcomes(outcomes, labels, candidates=candidates.names, ignore_unknown=ignore_unknown)
    chosen = TrainOptions.for_backbone(backbone).with_changes(**options)
    try:
        run = run_training(table, candidates, chosen, out, resume=resume, progress=commands.progress)
    except KeyboardInterrupt:
        commands.progress(f"interrupted; {out}.partial keeps the last checkpoint, if any: repeat with --resume")
        raise
    commands.progress(f"wrote {out}; next: arllm export {out} --out BUNDLE")
    if as_json:
        click.echo(json.dumps(run.metrics))
        return
    click.echo(f"Validation AUC of P(correct), {run.metrics['queries']} queries:")
    base = run.metrics["auc_mean_per_subset"]
    rows = [(name, tables.number(area), tables.number(base[name])) for name, area in run.metrics["auc"].items()]
    rows.append(
        ("mean", tables.number(run.metrics["auc_mean"]), tables.number(run.metrics["auc_mean_per_subset_mean"]))
    )
    click.echo(tables.table(("candidate", "NIR", "mean per true subset"), rows))


@main.command()
@click.argument("bundle")
@click.argument("texts", nargs=-1, metavar="[TEXT…|-]")
@click.option(
    "--beta", "betas", multiple=True, type=float, help="0 = quality alone, 1 = cost alone; repeatable. [0.5]"
)
@click.option("--policy", help="nir, hdp or hdp-paper.  [default: the bundle's]")
@click.option("--candidates", help="Choose among these names only, comma-separated.")
@click.option("--variant", default="auto", show_default=True)
@click.option("--threads", type=int, help="Threads of one inference.  [default: 1]")
@click.option("--pool", type=click.Path(exists=True), help="A pool.json with other costs.")
@click.option("--jsonl", is_flag=True, help="stdin holds JSON objects: query, optionally beta, policy, candidates.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a decision.")
@click.option("--explain", is_flag=True, help="A table of all candidates for each decision.")
@click.option("--table", is_flag=True, help="One table: queries down, betas across.")
def route(
    bundle: str,
    texts: tuple[str, ...],
    betas: tuple[float, ...],
    policy: str | None,
    candidates: str | None,
    variant: str,
    threads: int | None,
    pool: str | None,
    jsonl: bool,
    as_json: bool,
    explain: bool,
    table: bool,
) -> None:
    """Route each TEXT, or each line of stdin, with BUNDLE (a folder, or a bundle that ships: nano).

    Prints the chosen model, one line a query; with several betas, the beta before it.

    \b
    Examples:
      arllm route nano "What is 17 * 23?"
      arllm route nano --beta 0 --beta 0.3 --table "easy" "hard"
      arllm route nano --explain "What is 17 * 23?"
      cat queries.txt | arllm route nano - --json
      cat requests.jsonl | arllm route nano - --jsonl --json
    """
    from arllm.runtime.decision import check_beta
    from arllm.runtime.router import Router

    if sum((as_json, explain, table)) > 1:
        raise click.UsageError("--json, --explain and --table exclude each other")
    for beta in betas:
        check_beta(beta)
    allowed = None if candidates is None else requests.names_of(candidates)
    router = Router.load(bundle, variant=variant, threads=threads, pool=pool)
    grid: dict[str, list[str]] = {}
    for request in _requests(texts, jsonl):
        if table and "beta" in request:
            raise InputError(f"{request['where']}: a request with a beta of its own has no column in --table")
        wanted = [request["beta"]] if "beta" in request else list(betas or (0.5,))
        for beta in wanted:
            try:
                decision = router.route(
                    request["query"], beta, request.get("policy", policy), request.get("candidates", allowed)
                )
            except InputError as error:
                raise type(error)(f"{request['where']}: {error}") from None
            if table:
                grid.setdefault(request["query"], []).append(decision.model)
            elif as_json:
                passed_on = {"id": request["id"]} if "id" in request else {}
                click.echo(json.dumps({**passed_on, "query": request["query"], **decision.to_dict()}))
            elif explain:
                click.echo(tables.explain(request["query"], decision))
            else:
                click.echo(f"{beta:g}\t{decision.model}" if len(wanted) > 1 else decision.model)
    if table:
        header = ("query", *(f"beta {beta:g}" for beta in betas or (0.5,)))
        click.echo(tables.table(header, [(tables.short(query), *models) for query, models in grid.items()]))


@main.command()
@click.argument("bundle")
@click.option("--json", "as_json", is_flag=True, help="The manifest as JSON.")
def inspect(bundle: str, as_json: bool) -> None:
    """Verify BUNDLE's files and show what it holds.

    \b
    Examples:
      arllm inspect nano
      arllm inspect bundles/first --json
    """
    from arllm.runtime.bundle import open_bundle

    opened = open_bundle(bundle)
    manifest = opened.manifest
    if as_json:
        click.echo(json.dumps({**manifest.raw, "path": str(opened.path), "digest": opened.digest}))
        return
    backbone = manifest.source.get("backbone", {})
    tokens = manifest.tokens
    facts = [
        ("bundle", f"{manifest.name}, sha256 {opened.digest[:16]}…, every file verified"),
        ("path", str(opened.path)),
        (
            "backbone",
            f"{backbone['name']}, {backbone['license']}" if backbone else "none: routes given query vectors",
        ),
        ("queries", "–" if tokens is None else f"up to {tokens.max_tokens} tokens, head and tail of longer ones"),
        ("query vector", f"{len(manifest.domains)} domains, difficulty, embedding of {manifest.embedding_width}"),
        ("policies", ", ".join(manifest.policies)),
        ("candidates", f"{len(opened.pool)}, cost in {opened.pool.unit}"),
        ("made with", ", ".join(f"{name} {version}" for name, version in manifest.producer.items())),
    ]
    if "vocabulary" in manifest.source:
        trimmed = manifest.source["vocabulary"]
        agreement = tables.number(trimmed["losses"]["agreement"])
        kept = f"{trimmed['to']} of {trimmed['from']} pieces"
        facts.append(("vocabulary", f"{kept}; ids agree on this share of held-out queries: {agreement}"))
    if manifest.source.get("synthetic"):
        facts.insert(1, ("data", "SYNTHETIC: no quality claim rests on it"))
    for name, value in facts:
        click.echo(f"{name:<13} {value}")
    click.echo()
    click.echo(tables.variants(manifest))
    click.echo()
    click.echo(tables.table(("candidate", "cost"), [(c.name, f"{c.cost:g}") for c in opened.pool.candidates]))


@main.command()
@click.argument("bundle", required=False)
@click.option("--json", "as_json", is_flag=True)
def doctor(bundle: str | None, as_json: bool) -> None:
    """Report on this host, and prove that BUNDLE decides here as it did where it was exported.

    \b
    Examples:
      arllm doctor
      arllm doctor nano
    """
    from arllm.runtime.doctor import examine

    report, healthy = examine(bundle)
    if as_json:
        click.echo(json.dumps({**report, "healthy": healthy}))
    else:
        for name, value in report.items():
            if name != "variants":
                click.echo(f"{name:<16} {value}")
        for name, verdict in report.get("variants", {}).items():
            click.echo(f"{name:<16} {verdict['verdict']}")
            for problem in verdict.get("problems", [])[:10]:
                click.echo(f"{'':<16} {problem}")
    if not healthy:
        raise click.exceptions.Exit(1)


main.add_command(export_commands.export)
main.add_command(commands.evaluate)
main.add_command(commands.data)
main.add_command(gateway_commands.serve)
main.add_command(preference_commands.calibrate)
main.add_command(pool_commands.pool)
main.add_command(latency_commands.bench)


def _requests(texts: tuple[str, ...], jsonl: bool) -> Iterator[requests.Request]:
    """Queries from the arguments, or from stdin where there are none or only ``-``."""
    if texts and texts != ("-",):
        if jsonl:
            raise click.UsageError("--jsonl reads stdin: give - in place of texts")
        if "-" in texts:
            raise click.UsageError("- reads stdin: give it alone, or texts alone")
        return requests.from_arguments(texts)
    if not texts and sys.stdin.isatty():
        raise click.UsageError("give a TEXT, or - to read one query a line from stdin")
    return requests.from_lines(sys.stdin.buffer, jsonl=jsonl, where="stdin")


def _pair(item: str) -> tuple[str, str]:
    name, found, value = item.partition("=")
    if not found:
        raise click.UsageError(f"--pool-where takes COLUMN=VALUE, not {item!r}")
    return name, value
