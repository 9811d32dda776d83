"""Tests of gateways/body.py: parsing like json.loads, and changing the model and nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from arllm.runtime.errors import QueryError
from arllm.runtime.gateways.body import parse_body

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=10,
)
OBJECTS = st.dictionaries(st.text(max_size=6) | st.sampled_from(["model", "messages"]), VALUES, max_size=5)
LAYOUTS = st.sampled_from([{}, {"indent": 2}, {"separators": (",", ":")}, {"ensure_ascii": False}])


@given(OBJECTS, LAYOUTS, st.text(max_size=10))
@example({"model": "auto", "messages": [{"model": "not this one"}]}, {}, 'a"b\\\n')
@example({}, {}, "x")
@example({"a": "\ud800"}, {}, "x")
def test_only_the_model_changes(data: dict[str, Any], layout: dict[str, Any], model: str) -> None:
    text = json.dumps(data, **layout)
    try:
        raw = text.encode()
    except UnicodeEncodeError:
        return  # ensure_ascii=False and a lone surrogate: no bytes to parse
    body = parse_body(raw)
    assert body.data == data
    changed = body.with_model(model)
    assert json.loads(changed) == {**data, "model": model}
    if "model" in data:
        start, end = body.spans[0]
        assert changed == f"{text[:start]}{json.dumps(model)}{text[end:]}".encode()


def test_numbers_and_order_stay_as_they_were_written() -> None:
    raw = b' {"z": 1.10e2, "model" :"auto" , "big": 12345678901234567890, "a": "\\u00e9"}\n'
    assert parse_body(raw).with_model("m") == raw.replace(b'"auto"', b'"m"')


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not valid JSON"),
        (b"[1]", "expected an object"),
        (b'"model"', "expected an object"),
        (b"null", "expected an object"),
        (b"{", "not valid JSON"),
        (b'{"a"}', "not valid JSON"),
        (b'{"a":1,}', "not valid JSON"),
        (b'{"a":1 "b":2}', "not valid JSON"),
        (b'{"a":1}{}', "Extra data"),
        (b"{'a':1}", "double quotes"),
        (b'{"a":NaN}', "NaN is not JSON"),
        (b'{"a":-Infinity}', "Infinity is not JSON"),
        (b'{"a":"\n"}', "control character"),
        (b'{"a":"\xff"}', "not UTF-8: byte 6"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        (b'{"a":' + b"[" * 200_000, "nested too deeply"),
        (b'{"a":' + b"9" * 10_000 + b"}", "not valid JSON"),
        (b'{"model":"a","model":"b"}', 'names "model" twice'),
        (b'{"model":"a","m\\u006fdel":"b"}', 'names "model" twice'),
    ],
)
def test_what_is_refused(raw: bytes, message: str) -> None:
    with pytest.raises(QueryError, match=message):
        parse_body(raw)


@given(st.binary(max_size=60))
def test_any_bytes_are_parsed_or_refused(raw: bytes) -> None:
    try:
        body = parse_body(raw)
    except QueryError:
        return
    assert body.data == json.loads(raw)


@given(st.text(alphabet='{}[]":, \n\r\t\\ab01.-eEtruefalsn', max_size=40))
@example('\r\n\t{\r"a"\n:\t1 ,\r\n"b":\r2\t}\r\n')
@example('\u00a0{"a": 1}')
def test_it_accepts_what_json_accepts(text: str) -> None:
    def no_constant(name: str) -> None:
        raise ValueError(name)

    pairs: list[Any] = []
    try:
        wanted = json.loads(text, parse_constant=no_constant, object_pairs_hook=lambda p: pairs.append(p) or dict(p))
    except ValueError:
        wanted = None
    if not isinstance(wanted, dict):
        with pytest.raises(QueryError):
            parse_body(text.encode())
    else:
        assert parse_body(text.encode()).data == wanted
