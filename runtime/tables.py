"""Plain-text tables for the terminal: how the command line shows figures and decisions. Formatting, nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from arllm.runtime.answer import Decision
    from arllm.runtime.bundle import Manifest, Variant


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Aligned columns, two spaces between."""
    lines = [tuple(header), *(tuple(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in padded)


def explain(query: str, decision: Decision) -> str:
    """A decision with the query vector's main parts and every candidate, best first."""
    vector = decision.query_vector
    top = sorted(vector.domains.items(), key=lambda item: -item[1])[:3]
    domains = ", ".join(f"{name} {probability:.2f}" for name, probability in top)
    lines = [f"query      {short(query)}", f"domains    {domains}; difficulty {vector.difficulty:.2f}"]
    cut = decision.truncation
    if cut is not None and cut.truncated:
        lines.append(f"truncated  {cut.bytes_dropped} bytes and {cut.tokens_dropped} tokens dropped from the middle")
    lines.append(f"choice     {decision.model} (beta {decision.beta:g}, {decision.policy}, {decision.variant})")
    quality, utility, cost = decision.quality, decision.utility, decision.cost
    ranked = sorted(decision.candidates, key=lambda name: -utility[name])
    rows = [(name, f"{quality[name]:.3f}", f"{cost[name]:g}", f"{utility[name]:+.3f}") for name in ranked]
    return "\n".join([*lines, table(("candidate", "quality", "cost", "utility"), rows), ""])


def variants(manifest: Manifest) -> str:
    """A bundle's variants side by side, in order of preference; then where they were timed, and their graphs."""
    timed = [v.parity["latency"] for v in manifest.variants.values() if "latency" in v.parity]
    lengths = list(dict.fromkeys(tokens for latency in timed for tokens in latency["ms"]))
    header = ("variant", "provider", "precision", "graph", "runs on", "MB", "regret", "agreement", "centred cosine")
    rows = []
    for variant in manifest.variants.values():
        size = sum(n for path, (_, n) in manifest.files.items() if path.startswith(f"{variant.name}/"))
        figures = variant.parity
        times = figures.get("latency", {}).get("ms", {})
        rows.append(
            (
                variant.name,
                variant.provider.removesuffix("ExecutionProvider"),
                variant.precision,
                variant.graph,
                _runs_on(variant),
                f"{size / 1e6:.1f}",
                small(figures.get("mean_regret")),
                small(figures.get("agreement")),
                number(figures.get("pooled_centred_cosine", {}).get("mean")),
                *(small(times.get(tokens)) for tokens in lengths),
            )
        )
    lines = [table((*header, *(f"ms at {tokens}" for tokens in lengths)), rows)]
    lines += [
        f"ms: median of the encoder alone by tokens, on {machine}, {threads} thread"
        for machine, threads in sorted({(latency["machine"], latency["threads"]) for latency in timed})
    ]
    for variant in manifest.variants.values():
        lines.append(f"graphs of {variant.name}: {', '.join(graph.kind for graph in variant.graphs)}")
    return "\n".join(lines)


def _runs_on(variant: Variant) -> str:
    if variant.verified_on is None:
        return variant.instruction_set
    return ", ".join(variant.verified_on) or "verified on no card"


def short(text: str, width: int = 60) -> str:
    """One line of at most ``width`` characters."""
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 1] + "…"


def number(value: float | None) -> str:
    """Three decimals; a dash where nothing was measured."""
    return "–" if value is None else f"{value:.3f}"


def small(value: float | None) -> str:
    """Three significant digits; a dash where nothing was measured."""
    return "–" if value is None else f"{value:.3g}"
