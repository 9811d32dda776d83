"""Tests of gateways/asks.py and filters.py: what clients may ask for, safe headers, capabilities, cooldowns."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arllm.runtime.errors import PoolError
from arllm.runtime.gateways import asks
from arllm.runtime.gateways.asks import Asks, client_asks, header_value, parse_alias, parse_beta, without_ours
from arllm.runtime.gateways.config import GatewayConfig
from arllm.runtime.gateways.filters import Capabilities, Cooldowns, capabilities
from arllm.runtime.gateways.query import Needs
from arllm.runtime.pool import Candidate

POOL = frozenset({"small", "medium", "large"})


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("auto", (True, None)),
        ("auto/hdp", (True, "hdp")),
        ("auto/nothing", (False, None)),
        ("auto/", (False, None)),
        ("automatic", (False, None)),
        ("gpt-5", (False, None)),
        ("", (False, None)),
        (None, (False, None)),
    ],
)
def test_the_alias(model: str | None, expected: tuple[bool, str | None]) -> None:
    assert parse_alias(model, "auto", ("nir", "hdp")) == expected


def config(**settings: Any) -> GatewayConfig:
    return GatewayConfig(default_model="small", beta=0.6, names={"medium": "team/medium"}, **settings)


def test_wishes_are_not_heard_unless_the_operator_turns_them_on() -> None:
    headers = {asks.BETA: "0", asks.CANDIDATES: "large"}
    assert client_asks(headers, config(), POOL) == Asks(0.6, None, (asks.BETA, asks.CANDIDATES))


@pytest.mark.parametrize(
    ("wish", "beta", "ignored"),
    [
        ("0.5", 0.5, ()),
        ("0", 0.3, ()),  # nobody buys the dearest model
        ("1", 0.8, ()),
        ("-1", 0.6, (asks.BETA,)),
        ("nan", 0.6, (asks.BETA,)),
        ("1e999", 0.6, (asks.BETA,)),
        ("cheap", 0.6, (asks.BETA,)),
        ("", 0.6, (asks.BETA,)),
    ],
)
def test_beta_stays_within_the_operators_bounds(wish: str, beta: float, ignored: tuple[str, ...]) -> None:
    assert client_asks({asks.BETA: wish}, config(beta_bounds=(0.3, 0.8)), POOL) == Asks(beta, None, ignored)


@pytest.mark.parametrize(
    ("offered", "wish", "picked"),
    [
        (("*",), "large, small", {"large", "small"}),
        (("*",), "team/medium", {"medium"}),
        (("small", "medium"), "large,medium", {"medium"}),
        (("small", "medium"), "large", None),
        (("small",), "", None),
        (("small",), "nobody\r\nx-evil: 1", None),
    ],
)
def test_candidates_stay_within_the_operators_list(
    offered: tuple[str, ...], wish: str, picked: set[str] | None
) -> None:
    found = client_asks({asks.CANDIDATES: wish}, config(client_candidates=offered), POOL)
    assert found.candidates == (None if picked is None else frozenset(picked))
    assert found.ignored == (() if picked else (asks.CANDIDATES,))


@given(st.text())
def test_any_beta_header_is_read_or_ignored(text: str) -> None:
    beta = parse_beta(text)
    assert beta is None or 0.0 <= beta <= 1.0


@given(st.text(max_size=400))
def test_header_values_are_safe(text: str) -> None:
    value = header_value(text)
    assert value.isascii()
    assert value.isprintable() or value == ""
    assert len(value) <= asks.MAX_VALUE
    assert value == value.strip()


def test_header_values_keep_what_is_safe() -> None:
    assert header_value("Qwen/Qwen2.5-72B") == "Qwen/Qwen2.5-72B"
    assert header_value("a\r\nx-evil: 1") == "a%0D%0Ax-evil: 1"
    assert header_value("é%") == "%C3%A9%25"


def test_decision_headers_of_clients_are_removed() -> None:
    headers = [("Host", "h"), ("X-Arllm-Selected-Model", "forged"), ("x-arllm-beta", "0"), ("x-other", "1")]
    assert without_ours(headers) == [("Host", "h"), ("x-other", "1")]


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, Capabilities()),
        ({"context_length": 8192, "vision": True, "tools": False}, Capabilities(8192, True, False, None)),
        ({"max_input_tokens": "128000", "supports_function_calling": "true"}, Capabilities(128000, None, True, None)),
        ({"context_window": 1e5, "supports_response_schema": "0"}, Capabilities(100000, None, None, False)),
        ({"context_length": "", "vision": None}, Capabilities()),
    ],
)
def test_capabilities_come_from_the_metadata(metadata: dict[str, Any], expected: Capabilities) -> None:
    assert capabilities(Candidate("m", 1.0, None, metadata)) == expected


@pytest.mark.parametrize(
    "metadata",
    [{"context_length": "long"}, {"context_length": 0}, {"context_length": True}, {"vision": "maybe"}, {"tools": 2}],
)
def test_a_bad_capability_is_named(metadata: dict[str, Any]) -> None:
    with pytest.raises(PoolError, match=f"candidate 'm': metadata {next(iter(metadata))} must be"):
        capabilities(Candidate("m", 1.0, None, metadata))


def test_what_meets_a_need() -> None:
    able = Capabilities(1000, True, True, True)
    assert able.meet(Needs(1000, True, True, True))
    assert not able.meet(Needs(1001))
    assert Capabilities().meet(Needs(10**9, True, True, True))  # the pool doesn't say: not ruled out
    for need in ("vision", "tools", "json_mode"):
        assert not Capabilities(None, False, False, False).meet(Needs(**{need: True}))
        assert Capabilities(None, False, False, False).meet(Needs())


def test_cooldowns_end() -> None:
    now = [0.0]
    cooldowns = Cooldowns(lambda: now[0])
    cooldowns.start("a", 5)
    cooldowns.start("b", 50)
    assert cooldowns.current() == {"a", "b"}
    now[0] = 5.0
    assert cooldowns.current() == {"b"}
    cooldowns.end("b")
    cooldowns.end("never there")
    assert cooldowns.current() == frozenset()
