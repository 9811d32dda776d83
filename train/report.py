"""What an evaluation looks like: the text table, PNG plots, and the files that `arllm eval` writes. Free of torch.

Takes the result of :func:`arllm.train.evaluate.evaluate`; nothing is measured here. The page is in
:mod:`arllm.train.report_html`. matplotlib is imported only where something is drawn.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arllm.runtime.errors import MissingExtraError
from arllm.runtime.tables import number, small, table

Result = Mapping[str, Any]

TITLES = {"val": "validation", "test": "test", "ood": "out of distribution"}
OURS = ("#c2410c", "#0f766e", "#6d28d9", "#be185d")  # told apart by lightness too
PLAIN = ("#94a3b8", "#4c8bd0", "#8a6d3b", "#59a14f", "#b07aa1", "#3b5b92", "#a3a36b", "#77797c", "#7fb7be")
DASHES = ("--", "-.", (0, (5, 1)), (0, (3, 1, 1, 1)))
LARGEST_SHARES = 12  # candidates told apart in a plot of shares


def percent(value: float | None) -> str:
    """One decimal; a dash where nothing was measured."""
    return "–" if value is None else f"{_rounded(value)}%"


def between(interval: Sequence[float | None] | None) -> str:
    """An interval of shares, in percent."""
    if interval is None or None in interval:
        return "–"
    return " … ".join(_rounded(float(end or 0.0)) for end in interval)


def _rounded(share: float) -> str:
    return f"{round(100 * share, 1) + 0.0:.1f}"  # + 0.0: no minus before a zero


def times(value: float | None) -> str:
    """A multiple of the best single model's cost."""
    return "never" if value is None else f"{value:.2f}x"


def order(result: Result) -> list[str]:
    """Routers as they are shown: ours, then the others as they were given."""
    return [*result["ours"], *(name for name in result["routers"] if name not in result["ours"])]


HEADER = ("router", "gap closed", "95%", "AIQ", "at beta 0", "match", "AUC", "pooled", "Brier", "ECE", "APGR",
          "CPT50", "CPT80")  # fmt: skip


def router_row(name: str, entry: Mapping[str, Any]) -> tuple[str, ...]:
    """A router's cells under :data:`HEADER`. RouteLLM's figures are those of the first pair."""
    pair = entry["pairs"][0] if entry["pairs"] else {}
    return (
        name,
        percent(entry["gap_closed"]),
        between(entry["gap_closed_interval"]),
        f"{entry['aiq']:.4f}" if entry["aiq"] is not None else "–",
        number(entry["accuracy"]),
        times(entry["cost_to_match"]),
        number(entry["auc"]),
        number(entry["auc_pooled"]),
        number(entry["brier"]),
        number(entry["ece_debiased"]),
        number(pair.get("apgr")),
        percent(pair.get("cpt50")),
        percent(pair.get("cpt80")),
    )


def bound_rows(entry: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The zero router, the oracle and the best single model under the first columns of :data:`HEADER`."""
    best = entry["best_single"]
    given = (("zero router", entry["zero"]), ("oracle", entry["oracle"]), (f"always {best['name']}", best))
    rest = ("",) * (len(HEADER) - 5)
    return [
        (name, percent(e.get("gap_closed")) if name.startswith("always") else "", "", f"{e['aiq']:.4f}"
         if e["aiq"] is not None else "–", number(e["accuracy"]), *rest)
        for name, e in given
    ]  # fmt: skip


def text_report(result: Result) -> str:
    """The tables for a terminal: every split, differences with intervals, datasets, single models."""
    lines = []
    for split, entry in result["results"].items():
        pair = next((e["pairs"][0] for e in entry["routers"].values() if e["pairs"]), None)
        lines += [f"{TITLES[split]}: {entry['queries']:,} queries, {len(result['candidates'])} candidates", ""]
        rows = [router_row(name, entry["routers"][name]) for name in order(result)]
        lines += [table(HEADER, [*rows, *bound_rows(entry)]), ""]
        if pair is not None:
            lines += [f"APGR and CPT: strong {pair['strong']}, weak {pair['weak']}", ""]
        for ours, others in entry["differences"].items():
            differences = [(other, *difference_cells(d)) for other, d in others.items()]
            lines += [table((f"{ours} minus", "gap closed", "95%", "at beta 0", "95%"), differences), ""]
        if len(entry["by_dataset"]) > 1:
            lines += [dataset_table(result, entry), ""]
            for ours in entry["differences"]:
                header = (f"{ours} minus, gap closed (95%)", *dataset_titles(entry))
                rows = [(other, *(cell for cell, _ in cells)) for other, cells in dataset_differences(entry, ours)]
                lines += [table(header, rows), ""]
        singles = sorted(entry["singles"].items(), key=lambda item: -(item[1]["accuracy"] or 0.0))
        cells = [(name, number(e["accuracy"]), small(e["cost"])) for name, e in singles]
        lines += [table(("single model", "accuracy", f"cost ({result['unit']})"), cells), ""]
    lines += [f"left out: {name} ({why})" for name, why in result["left_out"].items()]
    lines += [f"note: {note}" for note in result["notes"]]
    return "\n".join(lines).rstrip() + "\n"


def difference_cells(measures: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Gap closed and accuracy at beta 0, in points, each with its paired interval."""
    cells: list[str] = []
    for key in ("gap_closed", "accuracy"):
        value = measures[key]["difference"]
        cells += ["–" if value is None else f"{round(100 * value, 1) + 0.0:+.1f}", between(measures[key]["interval"])]
    return cells[0], cells[1], cells[2], cells[3]


def dataset_table(result: Result, entry: Mapping[str, Any]) -> str:
    """Gap closed (accuracy at beta 0) of every router on every dataset."""
    parts = entry["by_dataset"]
    rows = []
    for name in order(result):
        figures = [part["routers"][name] for part in parts.values()]
        rows.append((name, *(f"{percent(f['gap_closed'])} ({number(f['accuracy'])})" for f in figures)))
    return table(("gap closed (at beta 0)", *dataset_titles(entry)), rows)


def dataset_titles(entry: Mapping[str, Any]) -> list[str]:
    """Each dataset with its number of queries."""
    return [f"{dataset}, {part['queries']:,}" for dataset, part in entry["by_dataset"].items()]


def dataset_differences(entry: Mapping[str, Any], ours: str) -> list[tuple[str, list[tuple[str, bool]]]]:
    """Per other router and dataset: how much more of the gap ``ours`` closes, and if the interval says so."""
    found = []
    for other in entry["differences"][ours]:
        cells = []
        for part in entry["by_dataset"].values():
            measures = part["differences"][ours][other]
            points, interval, *_ = difference_cells(measures)
            cells.append((f"{points} ({interval})", excludes_zero(measures["gap_closed"]["interval"])))
        found.append((other, cells))
    return found


def excludes_zero(interval: Sequence[float] | None) -> bool:
    """If a difference's interval lies on one side of 0, and not by rounding alone."""
    return interval is not None and (interval[0] > 1e-9 or interval[1] < -1e-9)


def plots(result: Result) -> dict[str, bytes]:
    """PNG images by name: ``curves_<split>``, ``reliability_<split>`` and ``shares_<split>``.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot, which keeps state and asks for a screen
    except ImportError:
        raise MissingExtraError("matplotlib", "eval", "plots") from None
    drawn: dict[str, bytes] = {}
    for split, entry in result["results"].items():
        drawn[f"curves_{split}"] = _png(_curves(Figure, result, split, entry))
        if result["ours"]:
            drawn[f"reliability_{split}"] = _png(_reliability(Figure, result, split, entry))
            drawn[f"shares_{split}"] = _png(_shares(Figure, result, split, entry))
    return drawn


def write_report(result: Result, folder: Path, examples: Sequence[Mapping[str, Any]] = ()) -> list[Path]:
    """Write ``report.html``, ``report.txt``, ``report.json`` and the plots into the folder; made if it is missing.

    Raises:
        MissingExtraError: matplotlib is not installed. Nothing is written then.
    """
    from arllm.train.report_html import html_report

    images = plots(result)
    data = json.dumps({**result, "examples": list(examples)}, indent=1, ensure_ascii=False, allow_nan=False)
    contents = {
        "report.html": html_report(result, images, examples).encode(),
        "report.txt": text_report(result).encode(),
        "report.json": (data + "\n").encode(),
        **{f"{name}.png": image for name, image in images.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in contents]


def _png(figure: Any) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150, bbox_inches="tight", metadata={"Software": None})
    return stream.getvalue()


def _axes(axes: Any) -> None:
    axes.grid(True, color="#e2e8f0", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _curves(figure_class: Any, result: Result, split: str, entry: Mapping[str, Any]) -> Any:
    """Accuracy against cost above; below as a difference to the zero router, where routers can be told apart."""
    figure = figure_class(figsize=(11.6, 8.4))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    costs = [single["cost"] for single in entry["singles"].values() if single["cost"] is not None]
    low, high = min(costs), max(costs)
    wide = low > 0 and high / low > 20  # the span that AIQ averages over is linear; the eye needs the cheap end too
    grid = np.geomspace(low, high, 400) if wide else np.linspace(low, high, 400)

    def heights(points: Sequence[Mapping[str, Any]]) -> Any:
        pairs = sorted((p["cost"], p["accuracy"]) for p in points if p["cost"] is not None)
        x, y = [a for a, _ in pairs], [b for _, b in pairs]
        return np.interp(grid, x, y, left=np.nan)  # drawn from its first point on

    zero = heights(entry["zero"]["curve"])
    upper.plot(grid, heights(entry["oracle"]["curve"]), color="black", linestyle=":", linewidth=1.4, label="oracle")
    upper.plot(grid, zero, color="black", linestyle="--", linewidth=1.6, label="zero router", zorder=4)
    lower.axhline(0, color="black", linestyle="--", linewidth=1.6, zorder=4)
    reach = [0.0]
    ours = list(result["ours"])
    for name in order(result):
        i = ours.index(name) if name in ours else order(result).index(name) - len(ours)
        style: dict[str, Any] = {
            "color": PLAIN[i % len(PLAIN)],
            "linestyle": DASHES[i % len(DASHES)],
            "linewidth": 1.3,
        }
        if name in ours:
            style = {"color": OURS[i % len(OURS)], "linewidth": 2.4, "zorder": 5}
        y = heights(entry["routers"][name]["curve"])
        upper.plot(grid, y, label=name, **style)
        lower.plot(grid, 100 * (y - zero), **style)
        if name != "random":  # far below everything: it would flatten the others
            reach += [float(v) for v in 100 * (y - zero)[~np.isnan(y)]]
    points = [(s["cost"], s["accuracy"]) for s in entry["singles"].values() if s["cost"] is not None]
    upper.scatter([x for x, _ in points], [y for _, y in points], s=22, facecolor="white", edgecolor="#334155",
                  linewidth=1.0, zorder=6, label="single models")  # fmt: skip
    best = entry["best_single"]
    upper.annotate(best["name"], (best["cost"], best["accuracy"]), xytext=(0, -17), textcoords="offset points",
                   bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}, zorder=7,
                   fontsize=8, ha="right" if best["cost"] > (low * high) ** 0.5 else "left")  # fmt: skip
    margin = 0.08 * (max(reach) - min(reach)) + 0.1
    lower.set_ylim(min(reach) - margin, max(reach) + margin)
    for axes in (upper, lower):
        _axes(axes)
        if wide:
            axes.set_xscale("log")
    lower.set_xlabel(f"mean cost of a query ({result['unit']}{', log scale' if wide else ''})")
    upper.set_ylabel("accuracy")
    lower.set_ylabel("points above the zero router")
    upper.set_title(f"Accuracy against cost, {TITLES[split]}", loc="left", fontsize=11)
    upper.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    figure.tight_layout()
    return figure


def _reliability(figure_class: Any, result: Result, split: str, entry: Mapping[str, Any]) -> Any:
    names = result["ours"]
    columns = min(len(names), 4)
    rows = -(-len(names) // columns)
    figure = figure_class(figsize=(3.4 * columns, 3.6 * rows))
    for i, name in enumerate(names):
        router = entry["routers"][name]
        axes = figure.add_subplot(rows, columns, i + 1)
        _axes(axes)
        axes.plot([0, 1], [0, 1], color="#94a3b8", linewidth=1, linestyle="--")
        x = [b["predicted"] for b in router["reliability"]]
        y = [b["observed"] for b in router["reliability"]]
        axes.plot(x, y, marker="o", markersize=4, color=OURS[i % len(OURS)], linewidth=1.4)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.set_aspect("equal")
        axes.set_xlabel("predicted quality")
        axes.set_ylabel("share correct" if i % columns == 0 else "")
        axes.set_title(f"{name}\ndebiased ECE {router['ece_debiased_pooled']:.3f}", fontsize=9, loc="left")
    figure.suptitle(f"Reliability, {TITLES[split]}, all candidates together", x=0.02, ha="left", fontsize=11)
    figure.tight_layout()
    return figure


def _shares(figure_class: Any, result: Result, split: str, entry: Mapping[str, Any]) -> Any:
    from matplotlib import colormaps

    names = result["ours"]
    figure = figure_class(figsize=(11.6, 3.0 * len(names) + 0.4))
    candidates = [c["name"] for c in result["candidates"]]
    every = [np.array([row["shares"] for row in entry["routers"][name]["shares"]]) for name in names]  # (K, M) each
    largest = np.max([s.max(axis=0) for s in every], axis=0)
    kept = np.sort(np.argsort(-largest, kind="stable")[: min(LARGEST_SHARES, int((largest >= 0.01).sum()))])
    colours = [colormaps["viridis_r"](v) for v in np.linspace(0.02, 0.98, len(kept))]
    for i, name in enumerate(names):
        axes = figure.add_subplot(len(names), 1, i + 1)
        rows = entry["routers"][name]["shares"]
        parts = every[i][:, kept]
        layers = [*zip(parts.T, (candidates[k] for k in kept), colours, strict=True)]
        if len(kept) < len(candidates):
            layers.append((1.0 - parts.sum(axis=1), "others", "#e5e7eb"))
        heights, labels, shades = zip(*layers, strict=True)
        axes.stackplot([row["beta"] for row in rows], heights, labels=labels, colors=shades)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.set_ylabel("share of queries")
        axes.set_title(f"{name}: who is chosen, {TITLES[split]}", loc="left", fontsize=11)
        if i == len(names) - 1:
            axes.set_xlabel("beta (0 = quality alone, 1 = cost alone)")
        if i == 0:
            handles, texts = axes.get_legend_handles_labels()
            axes.legend(handles[::-1], texts[::-1], fontsize=8, frameon=False, loc="upper left",
                        bbox_to_anchor=(1.01, 1.0), title="dearest above", title_fontsize=8)  # fmt: skip
    figure.tight_layout()
    return figure
