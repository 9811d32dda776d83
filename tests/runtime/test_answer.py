"""Tests of runtime/answer.py: the reason of a decision in every case, and the decision as JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from arllm.runtime.answer import UNFAMILIAR, Decision, Timing
from arllm.runtime.tokens import Truncation

DOUBT = ", unfamiliar query: overall accuracy decides"


def decision(model: str, qualities: list[float], **changes: Any) -> Decision:
    """Of candidates a, b, c … in order of cost."""
    names = tuple("abcdef"[: len(qualities)])
    base = Decision(
        model=model,
        candidates=names,
        qualities=np.array(qualities),
        utilities=np.array(qualities) / 2,
        costs=np.arange(len(qualities), dtype=np.float64),
        vector=np.array([0.25, 0.75, 0.5, -1.0], dtype=np.float32),
        domain_names=("x", "y"),
        familiarity=1.0,
        beta=0.5,
        policy="nir",
        variant="cpu-fp32",
        pool_overridden=False,
        truncation=None,
        timing=Timing(1.0, 2.0, 4.0),
    )
    return dataclasses.replace(base, **changes)


@pytest.mark.parametrize(
    ("model", "qualities", "reason"),
    [
        ("a", [0.2], "the only candidate allowed"),
        ("c", [0.2, 0.4, 0.6], "highest predicted quality"),
        ("a", [0.6, 0.4, 0.6], "highest predicted quality"),  # a tie, which the cheapest wins
        ("a", [0.2, 0.4, 0.6], "cheapest; no other is predicted better by what it costs more"),
        ("b", [0.2, 0.4, 0.6], "best balance of predicted quality and cost"),
    ],
)
def test_the_reason_in_every_case(model: str, qualities: list[float], reason: str) -> None:
    known = decision(model, qualities)
    assert known.reason == reason
    assert known.to_dict()["reason"] == reason
    strange = dataclasses.replace(known, familiarity=0.0)
    assert strange.reason == (reason if len(qualities) == 1 else reason + DOUBT)


def test_doubt_begins_below_one_half() -> None:
    assert UNFAMILIAR == 0.5
    assert decision("b", [0.1, 0.2], familiarity=0.5).reason == "highest predicted quality"
    assert decision("b", [0.1, 0.2], familiarity=0.49).reason == f"highest predicted quality{DOUBT}"


def test_to_dict_holds_everything_as_json() -> None:
    some = decision("b", [0.25, 0.5], familiarity=0.75, truncation=Truncation(100, 7, 3))
    data = some.to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data == {
        "model": "b",
        "quality": {"a": 0.25, "b": 0.5},
        "utility": {"a": 0.125, "b": 0.25},
        "cost": {"a": 0.0, "b": 1.0},
        "beta": 0.5,
        "policy": "nir",
        "variant": "cpu-fp32",
        "pool_overridden": False,
        "cached": False,
        "domains": {"x": 0.25, "y": 0.75},
        "difficulty": 0.5,
        "embedding": [-1.0],
        "familiarity": 0.75,
        "reason": "highest predicted quality",
        "truncated": True,
        "bytes_dropped": 7,
        "tokens_dropped": 3,
        "timing_ms": {"tokenize": 1.0, "encode": 2.0, "score": 4.0, "lookup": 0.0, "total": 7.0},
    }


def test_a_recalled_decision_took_its_look_up_alone() -> None:
    first = decision("b", [0.25, 0.5])
    again = first.recalled(0.5)
    assert (again.cached, again.timing.total_ms, again.timing.lookup_ms) == (True, 0.5, 0.5)
    assert (first.cached, first.timing.total_ms) == (False, 7.0)
    assert {**again.to_dict(), "cached": False, "timing_ms": None} == {**first.to_dict(), "timing_ms": None}


def test_a_given_vector_was_not_truncated() -> None:
    data = decision("a", [0.1, 0.2]).to_dict()
    assert (data["truncated"], data["bytes_dropped"], data["tokens_dropped"]) == (False, 0, 0)
