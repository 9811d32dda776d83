"""The HTML report: one file with its images inside, no script, nothing from elsewhere. Formatting, nothing else."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from arllm.runtime.tables import number, small
from arllm.train.report import (
    HEADER,
    TITLES,
    Result,
    bound_rows,
    dataset_differences,
    dataset_titles,
    difference_cells,
    excludes_zero,
    order,
    percent,
    router_row,
)

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1e293b; background: #fff; max-width: 1180px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { margin-top: 2.6rem; border-bottom: 2px solid #e2e8f0; }
h3 { margin: 1.8rem 0 .4rem; font-size: 1.05rem; }
p.sub, figcaption, .small { color: #64748b; font-size: .87rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .84rem; margin: .5rem 0; }
th, td { padding: .25rem .5rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e2e8f0; }
th { color: #475569; border-bottom: 2px solid #cbd5e1;
  white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
tr.ours td { background: #fff7ed; font-weight: 600; } tr.bound td { color: #64748b; }
td.sure { font-weight: 600; } tr.chosen td { background: #f0fdfa; font-weight: 600; }
td.right { color: #15803d; } td.wrong { color: #b91c1c; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; }
details { border: 1px solid #e2e8f0; border-radius: 6px; padding: .5rem .9rem; margin: .7rem 0; }
summary { cursor: pointer; } blockquote { margin: .6rem 0; padding: .4rem .8rem; background: #f8fafc;
  border-left: 3px solid #cbd5e1; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .86rem; }
"""

DEFINITIONS = (
    ("gap closed", "(AIQ − AIQ of the zero router) / (AIQ of the oracle − AIQ of the zero router)."),
    ("AIQ", "area under accuracy against mean cost over the span of candidate costs, divided by the span "
     "(RouterBench, Hu et al. 2024). Operating points are chosen on validation; the curve is held flat to the "
     "dearest candidate's cost."),
    ("zero router", "mixes single models on their hull without looking at the query."),
    ("oracle", "knows every outcome, and takes the cheapest candidate that is right."),
    ("match", "cost at which the accuracy of the best single model (chosen on training) is reached, as a multiple of "
     "that model's cost."),
    ("AUC, pooled", "mean of the candidates' areas under the ROC curve; of all pairs together."),
    ("ECE", "mean of the candidates' debiased calibration errors (Kumar et al. 2019, 15 bins of equal mass)."),
    ("APGR, CPT50, CPT80", "RouteLLM's (Ong et al. 2024) average performance gap recovered between a strong and a "
     "weak candidate, and the share of queries sent to the strong one at which 50% and 80% of it are recovered."),
    ("intervals", "95%, paired bootstrap over queries: every figure is recomputed on the same resampled queries."),
)  # fmt: skip

CURVES = (
    "Piecewise-linear between operating points, which are chosen on validation. AIQ averages over a linear scale."
)
MAX_QUERY = 700  # characters of an example that are shown


def html_report(result: Result, images: Mapping[str, bytes], examples: Sequence[Mapping[str, Any]] = ()) -> str:
    """The whole page.

    Args:
        images: PNG files of :func:`arllm.train.report.plots`; any that is missing is left out.
        examples: of :func:`arllm.train.examples.example_decisions`.
    """
    parts = [_head(result)]
    for split, entry in result["results"].items():
        parts.append(_split(result, split, entry, images))
    if examples:
        parts += ["<h2>Routed queries</h2>", *(_example(e, shown=i == 0) for i, e in enumerate(examples))]
    parts.append(_foot(result))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>arllm evaluation</title><style>{STYLE}</style></head><body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _head(result: Result) -> str:
    counts = ", ".join(f"{n:,} {split}" for split, n in result["queries"].items() if n)
    return (
        "<h1>Routing evaluation</h1>"
        f'<p class="sub">{len(result["candidates"])} candidates, costs in {escape(result["unit"])} '
        f"({escape(result['cost'])}). Queries: {counts}. Best single model on training: "
        f"<b>{escape(result['best_single'])}</b>. Ours: <b>{escape(', '.join(result['ours']) or 'none')}</b>.</p>"
    )


def _split(result: Result, split: str, entry: Mapping[str, Any], images: Mapping[str, bytes]) -> str:
    ours = set(result["ours"])
    rows = [("ours" if name in ours else "", router_row(name, entry["routers"][name])) for name in order(result)]
    rows += [("bound", row) for row in bound_rows(entry)]
    title = TITLES[split]
    parts = [
        f"<h2>{title[0].upper()}{title[1:]}</h2>",
        _note_of(split),
        _image(images, f"curves_{split}", CURVES),
        _table(HEADER, rows),
    ]
    pair = next((e["pairs"][0] for e in entry["routers"].values() if e["pairs"]), None)
    if pair is not None:
        strong, weak = escape(pair["strong"]), escape(pair["weak"])
        parts.append(f'<p class="small">APGR and CPT: strong {strong}, weak {weak}.</p>')
    for name, others in entry["differences"].items():
        parts += [f"<h3>{escape(name)} minus each other router, in points</h3>", _differences(others)]
    if len(entry["by_dataset"]) > 1:
        parts += ["<h3>By dataset: gap closed (accuracy at beta 0)</h3>", _datasets(result, entry)]
        for name in entry["differences"]:
            parts.append(f"<h3>By dataset: {escape(name)} minus each other router, gap closed in points (95%)</h3>")
            parts.append(_dataset_differences(entry, name))
    for kind, caption in (
        ("reliability", "On the diagonal, predicted quality means what it says."),
        ("shares", "Candidates by cost, the cheapest below; on each query among those that were evaluated on it."),
    ):
        parts.append(_image(images, f"{kind}_{split}", caption))
    parts += [f"<h3>Candidates, {title}</h3>", _candidates(result, entry)]
    return "\n".join(parts)


def _note_of(split: str) -> str:
    if split != "val":
        return ""
    return '<p class="small">Operating points are chosen on these very queries: for comparing while choosing.</p>'


def _image(images: Mapping[str, bytes], name: str, caption: str) -> str:
    if name not in images:
        return ""
    data = base64.b64encode(images[name]).decode()
    alt = name.replace("_", ", ")
    width = (
        int.from_bytes(images[name][16:20], "big") * 10 // 16
    )  # of the PNG's header: 150 dots an inch, shown at 94
    return (
        f'<figure><img alt="{escape(alt)}" width="{width}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _table(header: Iterable[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(
        f'<tr class="{kind}">' + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for kind, row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _differences(others: Mapping[str, Any]) -> str:
    rows = []
    for name, measures in others.items():
        sure = [excludes_zero(measures[key]["interval"]) for key in ("gap_closed", "accuracy") for _ in range(2)]
        rows.append((name, [*zip(difference_cells(measures), sure, strict=True)]))
    return _bold_table(("minus", "gap closed", "95%", "at beta 0", "95%"), rows)


def _dataset_differences(entry: Mapping[str, Any], name: str) -> str:
    return _bold_table(("minus", *dataset_titles(entry)), dataset_differences(entry, name))


def _bold_table(header: Iterable[str], rows: Iterable[tuple[str, Sequence[tuple[str, bool]]]]) -> str:
    """Rows of a name and cells, each with whether it is bold."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(
        f"<tr><td>{escape(name)}</td>"
        + "".join(f"<td{' class=sure' if sure else ''}>{escape(cell)}</td>" for cell, sure in cells)
        + "</tr>"
        for name, cells in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        '<p class="small">Bold: the interval excludes 0.</p>'
    )


def _datasets(result: Result, entry: Mapping[str, Any]) -> str:
    parts = entry["by_dataset"]
    rows = []
    for name in order(result):
        figures = [part["routers"][name] for part in parts.values()]
        cells = [f"{percent(f['gap_closed'])} ({number(f['accuracy'])})" for f in figures]
        rows.append(("ours" if name in result["ours"] else "", (name, *cells)))
    return _table(("router", *dataset_titles(entry)), rows)


def _candidates(result: Result, entry: Mapping[str, Any]) -> str:
    ours = result["ours"]
    header = ["candidate", "cost", "accuracy", *(f"{name}: {m}" for name in ours for m in ("AUC", "ECE"))]
    rows = []
    for candidate in result["candidates"]:
        name = candidate["name"]
        single = entry["singles"][name]
        cells = [name if candidate["seen"] else f"{name} (unseen)", small(single["cost"]), number(single["accuracy"])]
        for router in ours:
            figures = entry["routers"][router]["candidates"].get(name, {})
            cells += [number(figures.get("auc")), number(figures.get("ece_debiased"))]
        rows.append(("chosen" if name == result["best_single"] else "", cells))
    return _table(header, rows)


def _example(example: Mapping[str, Any], *, shown: bool) -> str:
    query = example["query"]
    text = query if len(query) <= MAX_QUERY else query[:MAX_QUERY] + " …"
    facts = [f"difficulty {example['difficulty']:.2f}"]
    facts += [f"{name} {probability:.2f}" for name, probability in example["domains"].items()]
    if example["familiarity"] is not None:
        facts.append(f"familiarity {example['familiarity']:.2f}")
    rows = []
    for c in example["candidates"]:
        truth = c["correct"]
        mark = "right" if truth > 0.5 else "wrong"
        word = mark if truth in (0.0, 1.0) else f"{truth:.2f}"
        kind = ' class="chosen"' if c["name"] == example["model"] else ""
        rows.append(
            f"<tr{kind}><td>{escape(c['name'])}</td><td>{c['quality']:.3f}</td><td>{c['cost']:g}</td>"
            f'<td>{c["utility"]:+.3f}</td><td class="{mark}">{word}</td></tr>'
        )
    head = "".join(f"<th>{cell}</th>" for cell in ("candidate", "predicted", "cost", "utility", "answer"))
    return (
        f"<details{' open' if shown else ''}><summary><b>{escape(example['dataset'])}</b>, "
        f"{escape(example['kind'])}: {escape(example['model'])}</summary><blockquote>{escape(text)}</blockquote>"
        f'<p><b>Why:</b> {escape(example["reason"])}.</p><p class="small">beta {example["beta"]:g}, '
        f"{escape(example['policy'])}; {escape(', '.join(facts))}</p>"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        "</details>"
    )


def _foot(result: Result) -> str:
    terms = "".join(f"<li><b>{escape(term)}</b>: {escape(text)}</li>" for term, text in DEFINITIONS)
    notes = "".join(f"<li>{escape(note)}</li>" for note in result["notes"])
    left_out = "".join(f"<li>{escape(name)}: {escape(why)}</li>" for name, why in result["left_out"].items())
    parts = [f'<h2>What the figures mean</h2><ul class="small">{terms}</ul>']
    if notes:
        parts.append(f'<h3>Notes</h3><ul class="small">{notes}</ul>')
    if left_out:
        parts.append(f'<h3>Candidates left out</h3><ul class="small">{left_out}</ul>')
    return "\n".join(parts)
