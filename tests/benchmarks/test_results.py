"""Tests of tests/benchmarks/results.py: tables, ratios and verdicts from canned measurements."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from cells import table
from known_peers import ARLLM, PEERS
from results import render

LENGTHS = [16, 64, 256, 512]


def arms(**ms: float) -> dict[str, dict[str, list[float]]]:
    """Two rounds, the second twice as slow as the first; 10 ms grow with the tokens."""
    return {
        name.replace("_", " "): {str(n): [value * n / 16, 2 * value * n / 16] for n in LENGTHS}
        for name, value in ms.items()
    }


@pytest.fixture
def measured() -> dict[str, Any]:
    machine = {
        "cpu": "Testing CPU", "cores": 2, "flags": ["avx2"], "system": "Linux", "versions": {"python": "3.11"},
        "load_before": [0.1, 0.1, 0.1], "load_after": [1.0, 0.5, 0.1],
    }  # fmt: skip
    common = {"machine": machine, "date": "2026-01-02T03:04:05+00:00", "clock": "wall"}
    encoder = {
        "title": "EmbeddingGemma's shape (24 layers)", "threads": 2, "base": "ORT authored int8",
        "times": arms(PyTorch_fp32=80.0, ORT_traced_int8=11.0, ORT_authored_int8=10.0),
    }  # fmt: skip
    routes = [
        {
            "title": title, "threads": 2, "base": "arllm int8", "times": arms(PyTorch=20.0, arllm_int8=2.0),
            "stages": {name: {str(n): [0.5, 1.0, 0.5] for n in LENGTHS} for name in ("PyTorch", "arllm int8")},
        }
        for title in ("nano as it ships", "nano with 4 layers")
    ]  # fmt: skip
    profile = {str(n): {"MatMulIntegerToFloat": 0.8, "Softmax": 0.15, "Add": 0.05} for n in LENGTHS}
    steps = {"as published": "", "no padding": "padding", "int8": "runtime"}
    return {
        "engines": {
            **common, "rounds": 2, "lengths": LENGTHS, "texts": "texts of a test", "encoders": [encoder],
            "routes": routes, "profiles": {"traced-int8": profile, "authored-int8": profile},
        },
        "bundles": {
            **common,
            "bundles": [
                {
                    "title": title, "bytes": 158e6,
                    "bench": {
                        "cold": [{"processes": 9, "parts": {"import": 15.0}, "whole_ms": 900.0, "peak_mb": 140.0}],
                        "candidates": [{"candidates": n, "latency": {"p50": n / 1000}} for n in (1, 16, 1000)],
                        "tokens": [
                            {"tokens": 16, "callers": callers, "scaling": {"median": 0.79} if callers > 1 else None,
                             "latency": {"n": calls, "p50": 1.0, "p95": 1.5, "p99": p99}}
                            for callers in (1, 2)
                        ],
                    },
                }
                for title, p99, calls in (("nano", 2.1, 9), ("EmbeddingGemma's shape, int8", 2.1, 100))
            ],
        },
        "published": {
            **common, "rounds": 2, "lengths": LENGTHS, "layers": 24, "threads": 2, "steps": steps,
            "times": dict(zip(steps, arms(a=800.0, b=200.0, c=20.0).values(), strict=True)),
        },
        "peers": {
            **common, "queries": 2, "source": "texts of a test", "characters": [10, 20],
            "times": {ARLLM: [1.0, 3.0], "BERTRouter": [50.0, 90.0], "complexity router": [0.5, 0.6]},
            "failed": {"llmrouter-lib": "not installed: ERROR: no | matching distribution"},
        },
    }  # fmt: skip


def row(text: str, begins: str) -> list[str]:
    """The cells of the only row that begins so."""
    found = [line for line in text.splitlines() if line.startswith(f"| {begins}")]
    assert len(found) == 1, found
    return [cell.strip() for cell in found[0].replace("\\|", "/").split("|")[1:-1]]


def test_a_figure_is_judged_by_its_ratio(measured: dict[str, Any]) -> None:
    text = render(measured)
    traced = row(text, "EmbeddingGemma's shape, authored int8 vs traced int8")
    assert traced[2] == "**below** 1.10× [1.10–1.10] of 1.3×"
    pytorch = row(text, "EmbeddingGemma's shape, authored int8 vs PyTorch fp32")
    assert pytorch[2:] == [f"8.00× [8.00–8.00] of {goal}×" for goal in ("7", "5.5", "4", "4")]


def test_what_a_bundle_costs_is_held_to_its_figures(measured: dict[str, Any]) -> None:
    text = render(measured)
    nano, gemma = text.split("### EmbeddingGemma's shape, int8\n")[0].split("### nano\n")[1], text.split("int8\n")[-1]
    assert row(nano, "process start")[1] == "**past** 0.90 s"  # at most 0.5
    assert row(gemma, "process start")[1] == "0.90 s"  # at most 2
    assert [row(part, "peak memory")[1] for part in (nano, gemma)] == ["140 MB", "140 MB"]
    assert row(nano, "16 |") == ["16", "1.00", "1.50", "2.10", "9", "**past** 0.79"]  # 9 calls say nothing of p99
    assert row(gemma, "16 |")[3] == "**past** 2.10"
    assert "16: 0.02, 1,000: 1.00" in nano


def test_what_is_below_is_explained_by_the_profile(measured: dict[str, Any]) -> None:
    notes = [line for line in render(measured).splitlines() if line.startswith("- ")]
    assert len(notes) == 4  # the traced graph at every length, nothing else
    assert "80% are integer products" in notes[0]
    assert f"it would be {1.1 / 0.8:.2f}×" in notes[0]
    assert "Softmax 15%" in notes[0]


def test_steps_multiply_to_the_whole_factor(measured: dict[str, Any]) -> None:
    text = render(measured)
    assert row(text, "no padding")[1] == "300 (4.00×)"
    assert row(text, "int8 (− runtime)")[1] == "30.0 (10.0×)"
    assert row(text, "**all steps together**")[1] == "**40.0×**"


def test_peers_are_compared_query_by_query_and_failures_are_rows(measured: dict[str, Any]) -> None:
    text = render(measured)
    bert = row(text, "routellm: BERTRouter")
    assert bert[1] == "70.0"
    assert bert[3].startswith("40.0× [")  # the median of 50 / 1 and 90 / 3
    assert bert[4] == "35.0×"
    assert row(text, "litellm: complexity router")[4] == "0.28×"
    assert row(text, "llmrouter-lib: KNN")[1] == "not installed: ERROR: no / matching distribution"
    assert row(text, "scikit-learn: tf-idf")[1] == "not run"
    assert all(row(text, f"{peer.name} |")[5] == peer.lacks for peer in PEERS)


def test_a_missing_comparison_is_said(measured: dict[str, Any]) -> None:
    text = render({**measured, "published": None, "peers": None})
    assert "`published_path.py` left no result" in text
    assert "`peers.py` left no result" in text
    assert "Nothing was measured" in render({})


def test_a_busy_machine_and_processor_time_are_said(measured: dict[str, Any]) -> None:
    assert "was busy" not in render(measured)
    busy = copy.deepcopy(measured)
    busy["peers"]["machine"]["load_after"] = [9.5, 5.0, 1.0]
    assert "was busy" in render(busy)
    assert "at most 9.5" in render(busy)
    busy["engines"]["clock"] = "cpu"
    assert "Processor time of one thread" in render(busy)


def test_a_length_that_was_not_measured_is_no_verdict(measured: dict[str, Any]) -> None:
    for one in (*measured["engines"]["encoders"], *measured["engines"]["routes"]):
        for times in one["times"].values():
            del times["512"]
    measured["engines"]["lengths"] = LENGTHS[:3]
    assert row(render(measured), "EmbeddingGemma's shape, authored int8 vs traced")[5] == "not measured"


def test_cells_keep_the_table_whole() -> None:
    lines = table(["a", "b"], [["x | y", "1"]]).splitlines()
    assert lines == ["| a | b |", "| --- | ---: |", "| x \\| y | 1 |"]
