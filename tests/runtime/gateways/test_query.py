"""Tests of gateways/query.py: what the human asked, in every chat shape, and what a request needs."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arllm.runtime.gateways.query import IMAGE_TOKENS, QUERY_FROM, Needs, digest, read_request

CHAT = {
    "model": "auto",
    "messages": [
        {"role": "system", "content": "You are a poet."},
        {"role": "user", "content": "first question"},
        {"role": "assistant", "content": "an answer"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f"}}]},
        {"role": "tool", "tool_call_id": "1", "content": "tool noise"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "last question,"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 100_000}},
                {"type": "text", "text": "two parts"},
            ],
        },
        {"role": "assistant", "content": "thinking aloud"},
        {"role": "tool", "tool_call_id": "2", "content": "more tool noise"},
    ],
}
ANTHROPIC = {
    "model": "auto",
    "system": [{"type": "text", "text": "You are a poet."}],
    "messages": [
        {"role": "user", "content": "first question"},
        {"role": "assistant", "content": [{"type": "text", "text": "an answer"}, {"type": "tool_use", "id": "1"}]},
        {
            "role": "user",
            "content": [{"type": "text", "text": "last question,"}, {"type": "text", "text": "two parts"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "thinking aloud"}]},
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "content": [{"type": "text", "text": "tool noise"}, {"type": "image"}]}
            ],
        },
    ],
}
RESPONSES = {
    "model": "auto",
    "instructions": "You are a poet.",
    "input": [
        {"role": "developer", "content": "more rules"},
        {"role": "user", "content": "first question"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "an answer"}]},
        {"type": "function_call", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "output": "tool noise"},
        {
            "type": "message",
            "role": "user",
            "content": [
                {"type": "input_text", "text": "last question,"},
                {"type": "input_image", "image_url": "data:…"},
                {"type": "input_text", "text": "two parts"},
            ],
        },
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "thinking aloud"}]},
    ],
}


@pytest.mark.parametrize("body", [CHAT, ANTHROPIC, RESPONSES], ids=["chat", "anthropic", "responses"])
def test_the_query_is_what_the_human_asked(body: dict[str, Any]) -> None:
    assert read_request(body).query == "last question,\ntwo parts"
    assert read_request(body, "first-user").query == "first question"
    conversation = read_request(body, "conversation").query
    assert conversation == "first question\n\nan answer\n\nlast question,\ntwo parts\n\nthinking aloud"
    assert read_request(body).opening == "first question"


@pytest.mark.parametrize(
    ("body", "query"),
    [
        ({"input": "a string"}, "a string"),
        ({"prompt": "once upon"}, "once upon"),
        ({"prompt": ["one", "two", 3]}, "two"),
        ({"messages": [{"role": "user", "content": ["bare", {"type": "text", "text": "part"}]}]}, "bare\npart"),
        ({"messages": [{"role": "user", "content": "  \n"}]}, None),
        ({"messages": [{"role": "system", "content": "rules"}]}, None),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None),
        (
            {"messages": [{"role": "user", "content": "words"}, {"role": "user", "content": [{"type": "image"}]}]},
            "words",
        ),
        ({"messages": []}, None),
        ({"messages": "no list"}, None),
        ({"messages": [None, 3, {"role": 5}, {"role": "user"}, {"role": "user", "content": 7}]}, None),
        ({"input": [{"type": {"odd": 1}, "role": "user", "content": "x"}]}, None),
        ({}, None),
    ],
)
def test_odd_shapes(body: dict[str, Any], query: str | None) -> None:
    assert read_request(body).query == query


def test_needs_of_a_plain_request() -> None:
    assert read_request({"messages": [{"role": "user", "content": "x" * 400}]}).needs == Needs(
        tokens=105
    )  # 100, the role, the table


def test_tokens_count_history_system_tools_and_the_output_asked_for() -> None:
    base = read_request(CHAT).needs.tokens
    assert IMAGE_TOKENS < base < IMAGE_TOKENS + 200  # the image's base64 is not text
    longer = {**CHAT, "tools": [{"type": "function", "function": {"description": "d" * 4000}}], "max_tokens": 500}
    assert 1500 <= read_request(longer).needs.tokens - base < 1550
    assert read_request({**ANTHROPIC, "system": "s" * 4000}).needs.tokens > read_request(ANTHROPIC).needs.tokens + 900
    assert read_request({"prompt": "日" * 1000}).needs.tokens >= 1000


def test_vision_tools_and_json_mode() -> None:
    assert read_request(CHAT).needs.vision
    assert read_request(ANTHROPIC).needs.vision  # an image in a tool's result has to be looked at, too
    assert read_request(RESPONSES).needs.vision
    for tools in ({"tools": [{}]}, {"functions": [{}]}):
        assert read_request({**CHAT, **tools}).needs.tools
    assert not read_request({**CHAT, "tools": []}).needs.tools
    for wanted in (
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {}}},
        {"text": {"format": {"type": "json_schema"}}},
    ):
        assert read_request({**CHAT, **wanted}).needs.json_mode
    for other in ({"response_format": {"type": "text"}}, {"response_format": "json"}, {"text": "json"}):
        assert not read_request({**CHAT, **other}).needs.json_mode


def test_the_digest_is_the_query_id_of_outcomes() -> None:
    assert digest("What is 17 * 23?") == hashlib.sha256(b"What is 17 * 23?").hexdigest()[:16]
    assert digest("\ud800") != digest("?")


def test_depth_is_no_danger() -> None:
    value: Any = "deep"
    for _ in range(100_000):
        value = [value]
    assert read_request({"messages": value, "tools": value}).query is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=15,
)
KINDS = st.sampled_from(["text", "input_text", "image_url", "tool_result", "file", "message", "function_call"])
PART = st.fixed_dictionaries({}, optional={"type": KINDS | JSON, "text": JSON, "content": JSON})
CONTENT = st.lists(PART, max_size=4) | JSON
ROLES = st.sampled_from(["user", "assistant", "tool"]) | JSON
MESSAGE = st.fixed_dictionaries({}, optional={"role": ROLES, "content": CONTENT, "type": KINDS})
MESSAGES = st.lists(MESSAGE | JSON, max_size=5)
BODIES = st.dictionaries(st.text(max_size=5), JSON, max_size=3).flatmap(
    lambda rest: st.fixed_dictionaries(
        {},
        optional={
            "model": JSON,
            "messages": MESSAGES | JSON,
            "input": MESSAGES | JSON,
            "prompt": JSON,
            "tools": JSON,
            "max_tokens": JSON,
            "response_format": JSON,
            "text": JSON,
            "system": JSON,
        },
    ).map(lambda known: {**rest, **known})
)


@given(BODIES, st.sampled_from(QUERY_FROM))
def test_any_object_has_an_answer(body: dict[str, Any], query_from: str) -> None:
    asked = read_request(body, query_from)
    assert asked.query is None or asked.query.strip()
    assert (asked.query is None) == (asked.opening == "")
    assert asked.needs.tokens >= 0
    assert asked.model is None or asked.model == body["model"]


@given(st.text(min_size=1).filter(str.strip), st.lists(st.text(max_size=20), max_size=3))
def test_chatter_never_decides(text: str, noise: list[str]) -> None:
    chatter = [
        {"role": role, "content": [{"type": kind, "text": word, "content": word}]}
        for word in noise
        for role, kind in (("system", "text"), ("tool", "text"), ("user", "tool_result"), ("developer", "text"))
    ]
    body = {"messages": [*chatter, {"role": "user", "content": text}, *chatter]}
    assert {read_request(body, query_from).query for query_from in QUERY_FROM} == {text}
