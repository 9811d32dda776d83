"""The command `arllm bench`: what an exported bundle costs on this machine. A click command, nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from arllm.runtime import requests
from arllm.train.commands import progress

if TYPE_CHECKING:
    from arllm.train.latency.measure import Subject


@click.command()
@click.argument("bundles", nargs=-1, required=True, metavar="BUNDLE…")
@click.option("--variant", "variants", multiple=True, help="Of each bundle; repeatable.  [default: auto]")
@click.option("--threads", "threads", multiple=True, type=click.IntRange(min=1),
              help="Threads of one inference; repeatable.  [default: 1]")  # fmt: skip
@click.option("--callers", type=click.IntRange(min=1), help="Callers at once.  [default: the cores]")
@click.option("--tokens", help="Token counts, comma-separated.  [default: 8,16,32,64,128,256,512]")
@click.option("--queries", type=click.Path(exists=True, dir_okay=False), metavar="FILE",
              help="The mix: .jsonl or .csv with query (or text), .txt; also .gz.  [default: generated]")  # fmt: skip
@click.option("--seconds", type=click.FloatRange(min=0, min_open=True), help="For everything.  [default: 20]")
@click.option("--rounds", type=click.IntRange(min=1), help="So many rounds of each part, in place of --seconds.")
@click.option("--plot", "plot_to", type=click.Path(dir_okay=False), metavar="FILE.png", help="Also draw the curves.")
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON.")
def bench(
    bundles: tuple[str, ...],
    variants: tuple[str, ...],
    threads: tuple[int, ...],
    callers: int | None,
    tokens: str | None,
    queries: str | None,
    seconds: float | None,
    rounds: int | None,
    plot_to: str | None,
    as_json: bool,
) -> None:
    """Measure what each BUNDLE costs on this machine: latency, throughput, cold start, memory.

    With several bundles, variants or thread counts, all are measured interleaved, round by round, and compared as
    ratios to the first, so that a busy machine slows all alike. Cold starts run in fresh processes.

    \b
    Examples:
      arllm bench nano
      arllm bench nano bundles/mine --queries prompts.jsonl --seconds 60 --plot out/latency.png
      arllm bench bundles/mine --variant cpu-fp32 --variant cpu-int8 --json
    """
    if seconds is not None and rounds is not None:
        raise click.UsageError("--seconds and --rounds exclude each other")
    from arllm.train.latency.measure import Plan, measure
    from arllm.train.latency.plot import need_matplotlib, plot
    from arllm.train.latency.show import text_report
    from arllm.train.latency.texts import read_queries

    plan = Plan(seconds=seconds or Plan.seconds, rounds=rounds, callers=callers,
                tokens=Plan.tokens if tokens is None else _counts(tokens))  # fmt: skip
    if plot_to is not None:  # what would fail after the measuring, fails before it
        need_matplotlib()
        if not Path(plot_to).resolve().parent.is_dir():
            raise click.UsageError(f"--plot: {Path(plot_to).resolve().parent} is no folder")
    mix = None if queries is None else read_queries(queries)
    subjects = _subjects(bundles, variants or ("auto",), threads or (1,))
    report = measure(subjects, plan, queries=mix, queries_from=queries, progress=progress)
    if plot_to is not None:
        Path(plot_to).write_bytes(plot(report))
        progress(f"wrote {plot_to}")
    click.echo(json.dumps(report.to_json()) if as_json else text_report(report))


def _counts(text: str) -> tuple[int, ...]:
    try:
        found = sorted({int(item) for item in requests.names_of(text)})
    except ValueError:
        found = []
    if not found or found[0] < 1:
        raise click.UsageError(f"--tokens takes whole numbers of at least 1, comma-separated, not {text!r}")
    return tuple(found)


def _subjects(bundles: Sequence[str], variants: Sequence[str], threads: Sequence[int]) -> list[Subject]:
    """Every bundle in every variant with every number of threads, each once, named by what tells them apart."""
    from arllm.runtime.router import Router
    from arllm.train.latency.measure import Subject

    loaded = [
        (bundle, Router.load(bundle, variant=variant, threads=count), count)
        for bundle in dict.fromkeys(bundles)
        for variant in dict.fromkeys(variants)
        for count in dict.fromkeys(threads)
    ]
    names = {bundle: router.bundle.manifest.name for bundle, router, _ in loaded}
    if len(set(names.values())) < len(names):
        names = {bundle: Path(bundle).name for bundle in names}
    if len(set(names.values())) < len(names):
        names = {bundle: bundle for bundle in names}
    found: dict[str, Subject] = {}
    for bundle, router, count in loaded:
        label = f"{names[bundle]} {router.variant}{f' {count} threads' if len(set(threads)) > 1 else ''}"
        found.setdefault(label, Subject(label, router, count))  # `auto` may be a variant that was named too
    return list(found.values())
