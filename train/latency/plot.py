"""A latency report as one PNG: latency against tokens, candidates, batch size. The one file that needs matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from arllm.runtime.errors import needs_extra
from arllm.train.latency.report import Report

COLOURS = ("#c2410c", "#0f766e", "#6d28d9", "#be185d", "#4c8bd0", "#8a6d3b")
MARKERS = ("o", "s", "^", "D", "v", "P")


def need_matplotlib() -> None:
    """Raises MissingExtraError: matplotlib is not installed. To be known before the measuring, not after."""
    with needs_extra("eval", "--plot"):
        import matplotlib.figure  # noqa: F401


def plot(report: Report) -> bytes:
    """A PNG: log-log panels, a line per subject; solid the median, dashed p99.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    need_matplotlib()
    from matplotlib.figure import Figure  # not pyplot, which keeps state and asks for a screen
    from matplotlib.lines import Line2D

    alone = [row for row in report.tokens if row.callers == 1]
    panels: list[tuple[str, str, Sequence[Any]]] = [
        ("Tokens of the query", "route(), ms", [(r.subject, r.tokens, r.latency.p50, r.latency.p99) for r in alone]),
        ("Candidates in the pool", "NIR and decision alone, ms",
         [(r.subject, r.candidates, r.latency.p50, r.latency.p99) for r in report.candidates]),
        ("Queries in the batch", "route_batch(), ms for all of them",
         [(r.subject, r.size, r.size * r.per_query_ms, None) for r in report.batches]),
    ]  # fmt: skip
    panels = [panel for panel in panels if panel[2]]
    figure = Figure(figsize=(4.6 * max(1, len(panels)), 4.2), layout="constrained")
    axes = figure.subplots(1, max(1, len(panels)), squeeze=False)[0]
    labels = [subject.label for subject in report.subjects]
    for axis, (across, up, points) in zip(axes, panels, strict=False):
        _panel(axis, across, up, points, labels)
    lines, names = axes[0].get_legend_handles_labels()
    tail = Line2D([], [], color="#555", linestyle="--", linewidth=1)
    figure.legend([*lines, tail], [*names, "p99"], loc="outside lower center", ncols=4, fontsize=8)
    about = report.machine
    figure.suptitle(f"{about['cores']} cores of {about['cpu']}, onnxruntime {about['versions']['onnxruntime']}",
                    fontsize=10)  # fmt: skip
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=140)
    return stream.getvalue()


def _panel(axis: Any, across: str, up: str, points: Sequence[Any], labels: Sequence[str]) -> None:
    """Points are (subject, size, ms, ms at p99 or None)."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    tails = any(tail is not None for *_, tail in points)
    for i, label in enumerate(labels):
        mine = [point for point in points if point[0] == label]
        style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 4}
        sizes = [size for _, size, _, _ in mine]
        axis.plot(sizes, [middle for _, _, middle, _ in mine], label=f"{label}, median", **style)
        if tails:
            axis.plot(sizes, [tail for *_, tail in mine], "--", color=style["color"], linewidth=1)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks(sorted({size for _, size, _, _ in points}))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    low, high = axis.get_ylim()
    few = high / low < 100  # then powers of ten alone would leave the axis bare
    axis.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: f"{y:g}" if few and f"{y:e}"[0] in "25" else ""))
    axis.tick_params(which="minor", labelsize=8)
    axis.set_xlabel(across)
    axis.set_ylabel(up)
    axis.grid(True, which="both", linewidth=0.4, alpha=0.5)
