"""The command line of export: `arllm export`. The heavy halves are imported inside."""

from __future__ import annotations

import json

import click

from arllm.runtime import tables
from arllm.runtime.errors import needs_extra
from arllm.train.commands import progress


@click.command()
@click.argument("run", required=False, type=click.Path(exists=True))
@click.option("--out", required=True, type=click.Path(), help="The bundle folder to make.")
@click.option("--name", help="The bundle's name.  [default: that of the folder]")
@click.option(
    "--variant",
    "variants",
    multiple=True,
    help="cpu-int8, cpu-fp32, cuda-bf16 or cuda-fp32; repeatable.  [default: both of cpu]",
)
@click.option("--target", help="Make integers for avx512_vnni, avx2 or arm64.  [default: auto, right on every one]")
@click.option("--verify-queries", type=click.IntRange(min=1), help="Held-out queries to verify on.  [default: 2000]")
@click.option(
    "--trim-vocabulary",
    metavar="CORPUS|N",
    help="Keep N pieces of the vocabulary, or those that the queries of CORPUS use; what is lost is measured.",
)
@click.option("--note", help="A remark for the model card: where the outcomes come from, their license.")
@click.option(
    "--evaluation", type=click.Path(exists=True), help="What `arllm eval --json` printed, for the card's tables."
)
@click.option("--nir-checkpoint", type=click.Path(exists=True), help="A published NIR state dict, in place of RUN.")
@click.option("--domains", help="With --nir-checkpoint: its domains, comma-separated, in the order of its training.")
@click.option("--pool", type=click.Path(exists=True), help="With --nir-checkpoint: models_info.json or pool.json.")
@click.option("--json", "as_json", is_flag=True, help="Print the parity report as JSON.")
def export(
    run: str | None,
    out: str,
    name: str | None,
    variants: tuple[str, ...],
    target: str | None,
    verify_queries: int | None,
    trim_vocabulary: str | None,
    note: str | None,
    evaluation: str | None,
    nir_checkpoint: str | None,
    domains: str | None,
    pool: str | None,
    as_json: bool,
) -> None:
    """Export RUN as a bundle, verified against PyTorch; a variant past its bound is refused.

    \b
    Examples:
      arllm export runs/first --out bundles/first
      arllm export runs/first --out bundles/small --variant cpu-int8
      arllm export runs/first --out bundles/vnni --target avx512_vnni
      arllm export runs/gemma --out bundles/gemma --trim-vocabulary 64000
      arllm export --nir-checkpoint nir.pth --domains bbh,math,gpqa --pool models_info.json --out bundles/published
    """
    if (run is None) == (nir_checkpoint is None):
        raise click.UsageError("give either RUN or --nir-checkpoint")
    if nir_checkpoint is not None and not (domains and pool):
        raise click.UsageError("--nir-checkpoint needs --domains and --pool")
    if run is not None and (domains or pool):
        raise click.UsageError("--domains and --pool go with --nir-checkpoint; a run brings its own")
    of_a_run = {
        "--variant": variants,
        "--target": target,
        "--verify-queries": verify_queries,
        "--trim-vocabulary": trim_vocabulary,
        "--evaluation": evaluation,
    }
    given = [option for option, value in of_a_run.items() if value]
    if nir_checkpoint is not None and given:
        raise click.UsageError(f"{', '.join(given)} goes with RUN; a NIR checkpoint has one variant and no queries")
    with needs_extra("export", "arllm export"):
        from arllm.export.bundle import export_run
        from arllm.export.card import read_evaluation
        from arllm.export.published import export_checkpoint
        from arllm.export.variants import DEFAULT
        from arllm.train.pools import models_info_domains, read_pool
        from arllm.train.rundir import read_run
    if nir_checkpoint is not None and domains and pool:
        named = tuple(name.strip() for name in domains.split(","))
        vectors_of = models_info_domains(pool)
        report = export_checkpoint(
            nir_checkpoint,
            named,
            read_pool(pool),
            out,
            name=name,
            note=note,
            vector_domains=vectors_of,
            progress=progress,
        )
    else:
        report = export_run(
            read_run(str(run)),
            out,
            name=name,
            variants=variants or DEFAULT,
            target=target or "auto",
            verify_queries=verify_queries or 2000,
            trim_vocabulary=trim_vocabulary,
            note=note,
            evaluation=None if evaluation is None else read_evaluation(evaluation),
            progress=progress,
        )
    progress(f'wrote {out}; next: arllm route {out} "a query"')
    if as_json:
        click.echo(json.dumps(report))
        return
    rows = []
    for variant, figures in report.items():
        nir = figures["policies"]["nir"]
        cosine = figures.get("pooled_centred_cosine", {}).get("mean")
        rows.append(
            (
                variant,
                f"{nir['quality_max_difference']:.1e}",
                f"{nir['mean_regret']:.1e}",
                f"{nir['agreement']:.4f}",
                str(nir["distinct_choices"]),
                tables.number(cosine),
            )
        )
    click.echo(tables.table(("variant", "quality diff", "regret", "agreement", "distinct", "centred cosine"), rows))
