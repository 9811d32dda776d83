"""Tests of train/report.py, report_html.py and examples.py: the figures are there, and nothing from outside."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arllm.runtime.errors import MissingExtraError
from arllm.runtime.pool import Candidate, Pool
from arllm.train import report
from arllm.train.bench import Bench, prepare, router_qualities
from arllm.train.evaluate import evaluate
from arllm.train.examples import KINDS, example_decisions, explain_choice
from arllm.train.metrics import mean_per_subset
from arllm.train.outcomes import Outcomes, read_outcomes
from arllm.train.report_html import html_report

SPITEFUL = '<script>alert("x")</script>'


@pytest.fixture(scope="module")
def bench(outcomes_folder: Path) -> Bench:
    from arllm.runtime.pool import read_pool_json

    return prepare(read_outcomes(outcomes_folder), read_pool_json(outcomes_folder / "pool.json"), coverage=0.8)


def renamed(bench: Bench) -> Bench:
    """A candidate and a dataset whose names are HTML."""
    first = bench.pool.names[0]
    names = {first: SPITEFUL}
    pool = Pool(tuple(Candidate(names.get(c.name, c.name), c.cost) for c in bench.pool.candidates), "<b>units</b>")
    outcomes = replace(bench.outcomes, candidates=pool.names, datasets=(SPITEFUL, *bench.outcomes.datasets[1:]))
    return Bench(outcomes, pool, {"gone": SPITEFUL})


@pytest.fixture(scope="module")
def result(bench: Bench) -> dict[str, Any]:
    subset = mean_per_subset(bench.outcomes.split("train"), bench.outcomes)
    return evaluate(bench, {"ours": subset, "two": 1 - subset}, baselines=("random",), resamples=50)


def test_the_text_holds_every_router_and_the_bounds(result: dict[str, Any]) -> None:
    text = report.text_report(result)
    for name in ("ours", "two", "random", "zero router", "oracle", f"always {result['best_single']}"):
        assert name in text
    entry = result["results"]["test"]["routers"]["ours"]
    assert report.percent(entry["gap_closed"]) in text
    assert "ours minus" in text
    assert all(dataset in text for dataset in result["results"]["test"]["by_dataset"])


def test_differences_by_dataset_are_shown(result: dict[str, Any]) -> None:
    entry = result["results"]["test"]
    text, page = report.text_report(result), html_report(result, {})
    for dataset, part in entry["by_dataset"].items():
        measures = part["differences"]["ours"]["two"]
        points, interval, *_ = report.difference_cells(measures)
        cell = f"{points} ({interval})"
        assert cell in text, dataset
        bold = " class=sure" if report.excludes_zero(measures["gap_closed"]["interval"]) else ""
        assert f"<td{bold}>{cell}</td>" in page, dataset
    cells = [cells for other, cells in report.dataset_differences(entry, "ours") if other == "two"]
    assert [len(row) for row in cells] == [len(entry["by_dataset"])]


def test_an_interval_excludes_zero_on_either_side() -> None:
    assert report.excludes_zero([0.1, 0.2])
    assert report.excludes_zero([-0.2, -0.1])
    assert not report.excludes_zero([-0.1, 0.1])
    assert not report.excludes_zero([1e-17, 0.1])  # zero but for rounding
    assert not report.excludes_zero(None)


def test_cells() -> None:
    assert report.percent(0.0634) == "6.3%"
    assert report.percent(-0.0001) == "0.0%"  # no minus before a zero
    assert report.percent(None) == report.between(None) == report.between([None, 1.0]) == "–"
    assert report.between([-0.0001, 0.25]) == "0.0 … 25.0"
    assert report.times(None) == "never"
    assert report.times(0.8071) == "0.81x"


def test_plots_are_png(result: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib")
    images = report.plots(result)
    assert set(images) == {f"{kind}_{s}" for kind in ("curves", "reliability", "shares") for s in ("val", "test")}
    assert all(image.startswith(b"\x89PNG") for image in images.values())


def test_without_matplotlib_nothing_is_written(
    result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match="matplotlib"):
        report.write_report(result, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_page_is_whole_and_alone(bench: Bench, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    odd = renamed(bench)
    quality = np.nan_to_num(odd.outcomes.correct.astype(np.float64))
    found = evaluate(odd, {SPITEFUL: quality}, baselines=(), resamples=10, splits=("test",))
    example = {
        "dataset": SPITEFUL, "kind": "wrong", "query": f"{SPITEFUL} " * 100, "beta": 0.2, "policy": "nir",
        "model": SPITEFUL, "best_single": SPITEFUL, "reason": SPITEFUL, "familiarity": 0.5, "difficulty": 0.25,
        "domains": {SPITEFUL: 1.0},
        "candidates": [{"name": SPITEFUL, "quality": 0.5, "cost": 1.0, "utility": 0.25, "correct": 0.0}],
    }  # fmt: skip
    written = report.write_report(found, tmp_path / "new" / "out", [example])
    assert {path.name for path in written} >= {"report.html", "report.txt", "report.json", "curves_test.png"}
    page = (tmp_path / "new" / "out" / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 3
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?://|@import|url\(", page)
    for tag in ("table", "tr", "td", "th", "details", "figure", "blockquote", "div"):
        assert page.count(f"<{tag}>") + page.count(f"<{tag} ") == page.count(f"</{tag}>"), tag
    stored = json.loads((tmp_path / "new" / "out" / "report.json").read_text(encoding="utf-8"))
    assert stored["examples"][0]["difficulty"] == 0.25


def test_a_page_without_images_or_examples(result: dict[str, Any]) -> None:
    page = html_report(result, {})
    assert "<img" not in page
    assert "Routed queries" not in page
    assert "zero router" in page


# --- examples -----------------------------------------------------------------------------------------------


def test_examples_are_the_gateways_decisions(tiny_bundle: Path, bench: Bench) -> None:
    from arllm.runtime import Router

    router = Router.load(tiny_bundle)
    examples = example_decisions(router, bench, policy="hdp", beta=0.3)
    assert examples
    assert json.loads(json.dumps(examples, allow_nan=False)) == examples
    row = {text: i for i, text in enumerate(bench.outcomes.queries)}
    for example in examples:
        assert example["kind"] in KINDS
        at = row[example["query"]]
        assert bench.outcomes.splits[at] == "test"
        names = [c["name"] for c in example["candidates"]]
        assert router.route(example["query"], 0.3, "hdp", names).model == example["model"] == names[0]
        for c in example["candidates"]:
            column = bench.pool.names.index(c["name"])
            assert c["correct"] == pytest.approx(float(bench.outcomes.correct[at, column]))
        right = {c["name"]: c["correct"] > 0.5 for c in example["candidates"]}
        assert right[example["model"]] == (example["kind"] != "wrong")
    per_dataset = [e["dataset"] for e in examples]
    assert max(per_dataset.count(d) for d in per_dataset) <= 3


def test_examples_find_their_own_beta(tiny_bundle: Path, bench: Bench) -> None:
    from arllm.runtime import Router

    router = Router.load(tiny_bundle)
    betas = {e["beta"] for e in example_decisions(router, bench, per_dataset=1, queries=40)}
    assert len(betas) == 1
    assert not example_decisions(router, bench, split="ood")


def test_the_reason_weighs_gain_and_cost(tiny_bundle: Path, bench: Bench) -> None:
    from arllm.runtime import Router

    router = Router.load(tiny_bundle)
    few: Outcomes = bench.outcomes.rows(range(6))
    assert set(router_qualities(router, few, ["hdp"], splits=("train", "val", "test"))) == {"hdp"}
    for text in few.queries:
        for beta in (0.0, 0.1, 0.5, 0.9):
            decision = router.route(text, beta, "hdp")
            reason = explain_choice(decision)
            best = max(decision.quality, key=decision.quality.__getitem__)
            if decision.model == best:
                assert reason.startswith("highest predicted quality")
            else:
                gain, price = (float(x) for x in re.findall(r"weighted \w+ of (-?[\d.]+\d)", reason))
                assert best in reason
                assert gain <= price + 1e-3
