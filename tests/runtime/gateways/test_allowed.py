"""Tests of which candidates gate.py lets a request choose among: capabilities, cooldowns, unavailable ones."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from arllm.runtime.gateways import query
from arllm.runtime.gateways.gate import Gateway
from arllm.runtime.gateways.verdict import Verdict
from arllm.runtime.pool import Pool


def decide(gateway: Gateway, body: dict[str, Any], *args: Any, **kwargs: Any) -> Verdict:
    return asyncio.run(gateway.handle(body, *args, **kwargs))


@pytest.mark.parametrize(
    ("fields", "allowed"),
    [
        ({}, None),
        ({"max_tokens": 5000}, ["medium", "large"]),
        ({"max_tokens": 50_000}, ["large"]),
        ({"tools": [{"type": "function"}]}, ["medium", "large"]),
        ({"response_format": {"type": "json_object"}}, ["medium", "large"]),
    ],
)
def test_candidates_that_cannot_serve_are_not_scored(
    gateway: Gateway, stub: Any, ask: Any, fields: dict[str, Any], allowed: list[str] | None
) -> None:
    assert decide(gateway, ask("small", **fields)).reason == "routed"
    assert stub.calls[0][3] == allowed


def test_needs_are_read_only_where_the_pool_declares_capabilities(
    make_gateway: Callable[..., Gateway], stub: Any, ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[object] = []
    monkeypatch.setattr(query, "_needs", lambda body: read.append(body) or query.NO_NEEDS)
    decide(make_gateway(), ask("small"))
    assert len(read) == 1
    bare = tuple(dataclasses.replace(candidate, metadata={"note": "text"}) for candidate in stub.pool.candidates)
    stub.pool = Pool(bare, stub.pool.unit)
    gateway = make_gateway(names={"large": "team/large"})
    assert decide(gateway, ask("large", max_tokens=10**7, tools=[{"type": "function"}])).model == "team/large"
    assert len(read) == 1
    # Who is out, or not asked for, is left out all the same.
    assert decide(gateway, ask("large"), unavailable=["team/large"]).candidate == "medium"
    assert stub.calls[-1][3] == ["small", "medium"]
    gateway.cool_down("small", 60)
    decide(gateway, ask("large"))
    assert stub.calls[-1][3] == ["medium", "large"]


def test_nobody_left_is_the_default_model(gateway: Gateway, stub: Any, ask: Any) -> None:
    verdict = decide(gateway, ask("large", max_tokens=10**7))
    assert (verdict.model, verdict.reason, verdict.decision) == ("small", "no-candidates", None)
    image = {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url"}]}]}
    assert decide(gateway, {"model": "auto", **image}, unavailable=["large"]).reason == "no-candidates"
    assert stub.calls == []
