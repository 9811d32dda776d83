"""Tests of export/card.py's evaluation: its table by hand; what is no evaluation is refused by its file's name."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arllm.export.bundle import Content
from arllm.export.card import model_card, read_evaluation
from arllm.export.variants import Written
from arllm.runtime.errors import ExportError
from arllm.runtime.pool import Candidate, Pool

FIGURES: dict[str, Any] = {
    "gap_closed": 0.2534,
    "gap_closed_interval": [0.2011, 0.3057],
    "auc": 0.7123,
    "cost_to_match": None,
    "accuracy": 0.6543,
    "ece_debiased": 0.0213,
    "brier": 0.2,  # and what else `arllm eval` measures
}
RANDOM: dict[str, Any] = {**FIGURES, "gap_closed": -0.1, "gap_closed_interval": None, "auc": None}
EVALUATION: dict[str, Any] = {
    "unit": "USD",
    "ours": ["nir"],
    "routers": ["nir", "random"],
    "results": {
        "test": {
            "queries": 1234,
            "best_single": {"name": "sim-large", "accuracy": 0.61234, "cost": 1.0},
            "zero": {"aiq": 0.5, "accuracy": 0.5},
            "oracle": {"aiq": 0.87654, "accuracy": 0.9},
            "routers": {"nir": FIGURES, "random": RANDOM},
        },
        "ood": {
            "queries": 7,
            "best_single": {"name": "sim-code", "accuracy": 0.5, "cost": 1.0},
            "zero": {"aiq": 0.4, "accuracy": 0.5},
            "oracle": {"aiq": 0.8, "accuracy": 0.9},
            "routers": {"random": {**FIGURES, "cost_to_match": 0.789}},
        },
    },
}


def content(evaluation: dict[str, Any] | None) -> Content:
    return Content(
        name="other",
        source={"backbone": {"name": "nano", "revision": "", "license": "Apache-2.0", "note": ""}},
        domains=("a",),
        embedding_width=0,
        domain_shares=None,
        mean_difficulty=None,
        tokens=None,
        policies={"nir": {}},
        pool=Pool((Candidate("m", 1.0, (0.5,)),), "USD"),
        metrics={},
        evaluation=evaluation,
    )


def test_every_router_on_every_split() -> None:
    card = model_card(content(EVALUATION), {}, {})
    assert card.count("## Evaluation") == 1
    section = card.split("## Evaluation")[1].split("## ")[0]
    assert (
        "**test**, 1234 queries; best single model `sim-large`: 0.6123; "
        "AIQ of the zero router 0.5000, of the oracle 0.8765."
    ) in section
    assert "**ood**, 7 queries; best single model `sim-code`: 0.5000" in section
    rows = [line for line in section.splitlines() if line.startswith("|") and "|---" not in line]
    header = "| router | gap closed | 95% interval | AUC | cost to match | accuracy at beta 0 | ECE, debiased |"
    assert rows == [
        header,
        "| **nir** | 25.3% | 20.1% … 30.6% | 0.712 | – | 0.654 | 0.021 |",  # ours are bold
        "| random | -10.0% | – … – | – | – | 0.654 | 0.021 |",
        header,
        "| random | 25.3% | 20.1% … 30.6% | 0.712 | 0.789 | 0.654 | 0.021 |",
    ]


def test_every_table_stands_apart() -> None:
    """A Markdown table needs a blank line before it, and ends at one."""
    lines = model_card(content(EVALUATION), {}, {}).splitlines()
    heads = [i for i, line in enumerate(lines) if line.startswith("| router |")]
    assert len(heads) == 2
    for head in heads:
        assert lines[head - 1] == ""
        assert lines[head + 1] == "|---|---|---|---|---|---|---|"
        end = next(i for i in range(head, len(lines)) if not lines[i].startswith("|"))
        assert lines[end] == ""


def test_a_bundle_without_an_evaluation_has_no_section() -> None:
    assert "Evaluation" not in model_card(content(None), {}, {})
    assert dataclasses.fields(Content)[-1].default is None  # it may be left out


def test_a_figure_of_an_evaluation_that_is_null_is_a_dash() -> None:
    data = copy.deepcopy(EVALUATION)
    for key, value in (("best_single", "accuracy"), ("zero", "aiq"), ("oracle", "aiq")):
        data["results"]["ood"][key][value] = None
    assert (
        "**ood**, 7 queries; best single model `sim-code`: –; AIQ of the zero router –, of the oracle –."
    ) in model_card(content(data), {}, {})


SUMMARY: dict[str, Any] = {
    "bytes": 5_640_000,
    "quality_max_difference": 0.0059,
    "mean_regret": 2e-7,
    "agreement": 0.99832,
    "distinct_choices": 11,
}


def test_variants_stand_side_by_side() -> None:
    written = {
        "cpu-int8": Written("authored", "because", "avx512_vnni"),
        "cpu-fp32": Written("traced", "its layers are strange"),
    }
    measured = {
        "pooled_centred_cosine": {"mean": 0.99, "min": 0.9},
        "latency": {"machine": "a processor", "threads": 1, "ms": {"16": 0.055, "64": 12.5}},
    }
    section = model_card(content(None), written, {"cpu-int8": {**SUMMARY, **measured}, "cpu-fp32": SUMMARY})
    section = section.split("## Variants")[1].split("## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| cpu")]
    assert rows == [
        "| cpu-int8 | authored | avx512_vnni | 5.6 | 5.9e-03 | 2.0e-07 | 0.9983 | 11 | 0.9900 / 0.9000 | "
        "16: 0.055, 64: 12.5 |",
        "| cpu-fp32 | traced | any | 5.6 | 5.9e-03 | 2.0e-07 | 0.9983 | 11 | – | – |",
    ]
    assert "- cpu-int8: authored, because." in section
    assert "- cpu-fp32: traced, its layers are strange." in section
    assert section.count("on a processor, 1 thread") == 1


def test_the_limits_speak_of_familiarity() -> None:
    limits = model_card(content(None), {}, {}).split("## Limits")[1]
    assert "`familiarity` near 0" in limits


def test_what_eval_printed_is_read(tmp_path: Path) -> None:
    path = tmp_path / "eval.json"
    path.write_text(json.dumps(EVALUATION), encoding="utf-8")
    assert read_evaluation(path) == read_evaluation(str(path)) == EVALUATION


def changed(change: Callable[[dict[str, Any]], object]) -> str:
    data = copy.deepcopy(EVALUATION)
    change(data)
    return json.dumps(data)


WRONG = {
    "nothing": "",
    "no JSON": "nir 0.25",
    "half of it": json.dumps(EVALUATION)[:200],
    "a list": "[]",
    "a number": "5",
    "an empty object": "{}",
    "outcomes": '{"query_id": "q1", "query": "What is 17 + 25?"}\n{"query_id": "q2"}',
    "a parity report": '{"betas": [0.0], "variants": {}}',
    "results that are a list": changed(lambda data: data.update(results=[1])),
    "no ours": changed(lambda data: data.pop("ours")),
    "no oracle": changed(lambda data: data["results"]["test"].pop("oracle")),
    "no routers": changed(lambda data: data["results"]["ood"].pop("routers")),
    "a router without a figure": changed(lambda data: data["results"]["test"]["routers"]["nir"].pop("accuracy")),
    "a figure in words": changed(lambda data: data["results"]["test"]["routers"]["nir"].update(auc="high")),
    "an interval of one": changed(
        lambda data: data["results"]["test"]["routers"]["nir"].update(gap_closed_interval=[0.1])
    ),
}


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG.keys())
def test_what_is_no_evaluation_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "eval.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ExportError) as caught:
        read_evaluation(path)
    assert str(caught.value).startswith(f"{path}: not an evaluation; make one with `arllm eval … --json > FILE`")


def test_a_file_that_can_not_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "absent", tmp_path, tmp_path / "bytes"):
        with pytest.raises(ExportError, match="not an evaluation"):
            read_evaluation(path)
