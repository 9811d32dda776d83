"""Tests of runtime/conformance.py: the rerun passes on an untouched bundle, and reports or refuses a changed one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arllm.runtime.conformance import BETAS, rerun
from arllm.runtime.errors import BundleSchemaError
from arllm.runtime.router import Router

Change = Callable[[dict[str, Any]], object]
VARIANT = "cpu-fp32"


def tampered(bundle_copy: Any, change: Change, line: int = 4) -> Router:
    """A router of a bundle whose conformance.jsonl was changed in one line, hashes made to fit."""
    lines = (bundle_copy.path / "conformance.jsonl").read_text(encoding="utf-8").split("\n")
    row = json.loads(lines[line - 1])
    change(row)
    lines[line - 1] = json.dumps(row)
    bundle_copy.rewrite("conformance.jsonl", "\n".join(lines).encode())
    return Router.load(bundle_copy.path, variant=VARIANT)


def worst_choice(row: dict[str, Any]) -> None:
    """Expect at beta 0 the candidate that is worst there."""
    expected = row["expected"][VARIANT]
    expected["choice"]["0"] = min(expected["quality"], key=expected["quality"].get)


@pytest.mark.parametrize("variant", ["cpu-fp32", "cpu-int8"])
def test_an_untouched_bundle_conforms(tiny_bundle: Path, variant: str) -> None:
    result = rerun(Router.load(tiny_bundle, variant=variant))
    lines = (tiny_bundle / "conformance.jsonl").read_text(encoding="utf-8").strip().split("\n")
    assert result.problems == ()
    assert result.texts == len(lines) > 10
    assert result.query_vector_difference < 1e-5  # this host wrote the file, rounded to 6 digits
    assert result.quality_difference < 1e-5


def test_the_file_covers_what_a_port_needs(tiny_bundle: Path) -> None:
    for line in (tiny_bundle / "conformance.jsonl").read_text(encoding="utf-8").strip().split("\n"):
        row = json.loads(line)
        assert {"text", "ids", "expected"} <= set(row)
        for expected in row["expected"].values():
            assert [float(beta) for beta in expected["choice"]] == list(BETAS)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda row: row["ids"].append(3), "line 4: other token ids"),
        (lambda row: row.update(text="Another text"), "line 4: other token ids"),
        (
            lambda row: row["expected"][VARIANT]["query_vector"].__setitem__(0, 5.0),
            "line 4: the query vector differs",
        ),
        (
            lambda row: row["expected"][VARIANT]["query_vector"].__setitem__(0, float("nan")),
            "the query vector differs",
        ),
        (lambda row: row["expected"][VARIANT]["quality"].update({"sim-math": 2.0}), "line 4: quality differs by"),
        (
            lambda row: row["expected"][VARIANT]["quality"].update({"sim-math": float("nan")}),
            "quality differs by nan",
        ),
        (lambda row: row["expected"][VARIANT].update(familiarity=0.5), "line 4: familiarity is "),
        (lambda row: row["expected"][VARIANT].update(familiarity=float("nan")), "expected nan"),
        (
            lambda row: row["expected"][VARIANT]["choice"].update({"1": "sim-frontier"}),
            "line 4: beta 1: chose sim-tiny",
        ),
        (worst_choice, "line 4: beta 0: chose"),
    ],
)
def test_other_values_are_reported(bundle_copy: Any, change: Change, problem: str) -> None:
    result = rerun(tampered(bundle_copy, change))
    assert any(problem in found for found in result.problems), result.problems
    assert all("line 4" in found for found in result.problems)


@pytest.mark.parametrize(
    "change",
    [
        lambda row: row.clear(),
        lambda row: row.pop("ids"),
        lambda row: row["expected"].pop(VARIANT),
        lambda row: row["expected"].update({VARIANT: []}),
        lambda row: row["expected"][VARIANT].pop("quality"),
        lambda row: row["expected"][VARIANT].update(quality={}),
        lambda row: row["expected"][VARIANT].update(choice={}),
        lambda row: row["expected"][VARIANT]["choice"].update({"2": "sim-tiny"}),
        lambda row: row["expected"][VARIANT]["choice"].update({"0": "nobody"}),
        lambda row: row["expected"][VARIANT]["quality"].update(nobody=0.5),
        lambda row: row["expected"][VARIANT].update(query_vector=[0.5, 0.5]),
        lambda row: row["expected"][VARIANT].update(query_vector="abc"),
        lambda row: row["expected"][VARIANT].update(familiarity="much"),
        lambda row: row.update(text=5),
    ],
)
def test_a_malformed_row_is_a_schema_error_with_its_line(bundle_copy: Any, change: Change) -> None:
    router = tampered(bundle_copy, change)
    with pytest.raises(BundleSchemaError, match=r"conformance\.jsonl: line 4 is malformed"):
        rerun(router)


@pytest.mark.parametrize("content", [b"", b"\n", b"not json\n", b"[]\n", b"5\n", b"\xff\n", b"[" * 100_000])
def test_a_malformed_file_is_a_schema_error(bundle_copy: Any, content: bytes) -> None:
    bundle_copy.rewrite("conformance.jsonl", content)
    with pytest.raises(BundleSchemaError, match=r"conformance\.jsonl: line 1 is malformed"):
        rerun(Router.load(bundle_copy.path))


def test_a_bundle_without_the_file_is_a_schema_error(bundle_copy: Any) -> None:
    (bundle_copy.path / "conformance.jsonl").unlink()
    bundle_copy.edit(lambda data: data["files"].pop("conformance.jsonl"))
    with pytest.raises(BundleSchemaError, match=r"conformance\.jsonl: can't be read"):
        rerun(Router.load(bundle_copy.path))


def test_a_line_separator_inside_a_text_is_no_line_end(bundle_copy: Any) -> None:
    router = Router.load(bundle_copy.path, variant=VARIANT)
    text = "one\u2028two\x85three"
    some = router.route(text, 0.5)
    expected = {"query_vector": some.vector.tolist(), "quality": some.quality, "choice": {"0.5": some.model}}
    row = {"text": text, "ids": router.tokenize(text)[0].tolist(), "expected": {VARIANT: expected}}
    bundle_copy.rewrite("conformance.jsonl", (json.dumps(row, ensure_ascii=False) + "\n").encode())
    result = rerun(Router.load(bundle_copy.path, variant=VARIANT))
    assert (result.texts, result.problems) == (1, ())
