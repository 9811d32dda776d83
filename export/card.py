"""The model card of a bundle: data, splits, metrics, limits, licenses, generated from what the bundle holds."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arllm.export.trimming import told_losses
from arllm.runtime.errors import ExportError

if TYPE_CHECKING:
    from arllm.export.bundle import Content
    from arllm.export.variants import Written


def model_card(content: Content, written: Mapping[str, Written], summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown. A figure that was not measured is left out, never guessed."""
    source = content.source
    backbone = source.get("backbone", {})
    lines = [f"# {content.name}: a bundle of arllm", ""]
    if source.get("synthetic"):
        lines += ["**Trained on SYNTHETIC outcomes of simulated candidates. No quality claim rests on it.**", ""]
    if backbone:
        note = f" ({backbone['note']})" if backbone.get("note") else ""
        lines += [
            f"- Query encoder: `{backbone['name']}`{note}, revision {backbone['revision'] or 'not recorded'}, "
            f"license {backbone['license']}.",
        ]
        if "Gemma" in backbone["license"]:
            lines += [
                "- Gemma is provided under and subject to the Gemma Terms of Use found at "
                "ai.google.dev/gemma/terms. Who passes this bundle on passes those terms on.",
            ]
    else:
        lines += ["- No query encoder: the bundle routes given query vectors (`Router.route_vector`)."]
    if "vocabulary" in source:
        lines += [
            f"- Vocabulary: {source['vocabulary']['to']} of {source['vocabulary']['from']} pieces; "
            f"{told_losses(source['vocabulary']['losses'])}."
        ]
    if content.tokens is not None:
        lines += [
            f"- Reads up to {content.tokens.max_tokens} tokens of a query; of a longer one its head and its tail.",
        ]
    lines += [
        f"- Query vector: {len(content.domains)} domains, difficulty, embedding of {content.embedding_width}.",
        f"- Candidates: {len(content.pool)}, cost in {content.pool.unit}.",
        f"- Policies: {', '.join(content.policies)}; the first is the default.",
        "",
        "## Data and splits",
        "",
    ]
    for entry in source.get("outcomes", []):
        lines.append(f"- `{entry['path']}`, {entry['bytes']} bytes, sha256 `{entry['sha256']}`")
    if "checkpoint" in source:
        lines.append(f"- NIR checkpoint `{source['checkpoint']['path']}`, sha256 `{source['checkpoint']['sha256']}`")
    if "splits" in source:
        counts = ", ".join(f"{name} {count}" for name, count in sorted(source["splits"].items()))
        lines.append(f"- Queries by split: {counts}; trained on {source['training_queries']}, seed {source['seed']}.")
    if source.get("note"):
        lines.append(f"- {source['note']}")
    lines += ["", *_metrics(content.metrics), *_evaluation(content.evaluation), *_variants(written, summaries)]
    lines += [
        "## Limits",
        "",
        "- It knows the kinds of queries that it was trained on. On others (`familiarity` near 0) it goes by the "
        "candidates' overall accuracy.",
        "- Predicted quality is that of the training outcomes' protocol (prompts, scoring), not of any other use.",
        "- Costs are the pool file's, not a quotation; override them at load time where yours differ.",
        "",
    ]
    return "\n".join(lines)


def read_evaluation(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What ``arllm eval --json`` printed.

    Raises:
        ExportError: the file holds something else.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if not data["results"]:
            raise ValueError("no results")
        _evaluation(data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ExportError(
            f"{path}: not an evaluation; make one with `arllm eval … --json > FILE` ({error})"
        ) from None
    found: dict[str, Any] = data
    return found


def _metrics(metrics: Mapping[str, Any]) -> list[str]:
    if "auc" not in metrics:
        return []
    lines = [
        f"## Metrics ({metrics['split']} split, {metrics['queries']} queries)",
        "",
        "AUC of P(correct) per candidate, beside the mean of the query's true subset:",
        "",
        "| candidate | this router | mean per true subset |",
        "|---|---|---|",
    ]
    base = metrics["auc_mean_per_subset"]
    for name, area in metrics["auc"].items():
        lines.append(f"| {name} | {_figure(area)} | {_figure(base[name])} |")
    lines += [
        f"| **mean** | **{_figure(metrics['auc_mean'])}** | **{_figure(metrics['auc_mean_per_subset_mean'])}** |",
        "",
        f"Brier {_figure(metrics['brier'], 4)}; domain accuracy {_figure(metrics['domain_accuracy'])}.",
        "",
    ]
    return lines


def _evaluation(evaluation: Mapping[str, Any] | None) -> list[str]:
    """The tables of `arllm eval`: every router on every split that was judged."""
    if evaluation is None:
        return []
    lines = [
        "## Evaluation",
        "",
        "`arllm eval`: settings chosen on val. Gap closed: 0 = constant choices, 1 = the oracle; the interval "
        "is of a bootstrap over queries. Cost to match: of the best single model's, to be as right; – = never.",
        "",
    ]
    for split, result in evaluation["results"].items():
        best = result["best_single"]
        lines += [
            f"**{split}**, {result['queries']} queries; best single model `{best['name']}`: "
            f"{_figure(best['accuracy'], 4)}; AIQ of the zero router {_figure(result['zero']['aiq'], 4)}, "
            f"of the oracle {_figure(result['oracle']['aiq'], 4)}.",
            "",
            "| router | gap closed | 95% interval | AUC | cost to match | accuracy at beta 0 | ECE, debiased |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, figures in result["routers"].items():
            low, high = figures["gap_closed_interval"] or (None, None)
            ours = "**" if name in evaluation["ours"] else ""
            lines.append(
                f"| {ours}{name}{ours} | {_percent(figures['gap_closed'])} | {_percent(low)} … {_percent(high)} | "
                f"{_figure(figures['auc'])} | {_figure(figures['cost_to_match'])} | "
                f"{_figure(figures['accuracy'])} | {_figure(figures['ece_debiased'])} |"
            )
        lines.append("")
    return lines


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"


def _variants(written: Mapping[str, Written], summaries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = [
        "## Variants",
        "",
        "Measured against PyTorch. Agreement: share of equal choices over beta 0 … 1; regret: mean utility lost.",
        "",
        "| variant | graph | runs on | MB | quality difference | regret | agreement | distinct choices | "
        "centred cosine, mean / min | ms by tokens |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, figures in summaries.items():
        cosine = figures.get("pooled_centred_cosine")
        cosines = f"{cosine['mean']:.4f} / {cosine['min']:.4f}" if cosine else "–"
        times = figures.get("latency", {}).get("ms", {})
        lines.append(
            f"| {name} | {written[name].graph} | {written[name].instruction_set} | {figures['bytes'] / 1e6:.1f} | "
            f"{figures['quality_max_difference']:.1e} | {figures['mean_regret']:.1e} | {figures['agreement']:.4f} | "
            f"{figures['distinct_choices']} | {cosines} | "
            f"{', '.join(f'{tokens}: {ms:g}' for tokens, ms in times.items()) or '–'} |"
        )
    lines += ["", *(f"- {name}: {how.graph}, {how.reason}." for name, how in written.items())]
    for name, figures in summaries.items():
        if "verified_on" in figures:
            cards = ", ".join(figures["verified_on"])
            unseen = "no card: its figures are of the graph emulated on the CPU; verify it on yours with arllm doctor"
            lines.append(f"- {name}: verified on {cards or unseen}.")
    timed = next((figures["latency"] for figures in summaries.values() if "latency" in figures), None)
    if timed is not None:
        lines.append(
            f"- Milliseconds: median of the encoder alone on one query, on {timed['machine']}, {timed['threads']} "
            "thread, the variants interleaved; on a busy machine only their ratios count."
        )
    return [*lines, ""]


def _figure(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
