"""A request's bytes → its JSON object, and back with another model: every other byte stays as the client sent it.

Knows nothing about chat shapes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from arllm.runtime.errors import QueryError

_SPACE = " \t\n\r"


@dataclass(frozen=True)
class Body:
    """A parsed request. ``spans`` are where in ``text`` the values of ``"model"`` stand: one, or none."""

    data: dict[str, Any]
    text: str
    spans: Sequence[tuple[int, int]]

    def with_model(self, model: str) -> bytes:
        """The request asking for another model: only the value of ``"model"`` differs (it is added where missing)."""
        value = json.dumps(model)
        parts, at = [], 0
        for start, end in self.spans:
            parts += [self.text[at:start], value]
            at = end
        if not self.spans:
            at = self.text.index("{") + 1
            parts += [self.text[:at], f'"model": {value}', ", " if self.data else ""]
        return "".join([*parts, self.text[at:]]).encode()


def parse_body(raw: bytes) -> Body:
    """Parse a request body.

    Raises:
        QueryError: not UTF-8, not JSON, not an object, or ``"model"`` stands in it twice (two parsers could then
            see two models: the one that a client may use and the one that answers).
    """
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise QueryError(f"the request body is not UTF-8: byte {error.start}") from None
    try:
        data, spans = _object(text)
    except RecursionError:
        raise QueryError("the request body is nested too deeply") from None
    except ValueError as error:
        raise QueryError(f"the request body is not valid JSON: {error}") from None
    if len(spans) > 1:
        raise QueryError('the request body names "model" twice')
    return Body(data, text, spans)


def _object(text: str) -> tuple[dict[str, Any], list[tuple[int, int]]]:
    """The top-level object, and the spans of the values of "model" in it."""
    at = _skip(text, 0)
    if text[at : at + 1] != "{":
        json.loads(text)  # a malformed text has a better message
        raise ValueError(f"expected an object, not {text[at : at + 20]!r}")
    data: dict[str, Any] = {}
    spans: list[tuple[int, int]] = []
    at = _skip(text, at + 1)
    if text[at : at + 1] == "}":
        return _ended(text, at + 1, data, spans)
    while True:
        if text[at : at + 1] != '"':
            raise json.JSONDecodeError("Expecting property name enclosed in double quotes", text, at)
        key, at = _DECODER.raw_decode(text, at)
        at = _skip(text, at)
        if text[at : at + 1] != ":":
            raise json.JSONDecodeError("Expecting ':' delimiter", text, at)
        start = _skip(text, at + 1)
        value, at = _DECODER.raw_decode(text, start)
        data[key] = value
        if key == "model":
            spans.append((start, at))
        at = _skip(text, at)
        if text[at : at + 1] == "}":
            return _ended(text, at + 1, data, spans)
        if text[at : at + 1] != ",":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
        at = _skip(text, at + 1)


def _ended(
    text: str, at: int, data: dict[str, Any], spans: list[tuple[int, int]]
) -> tuple[dict[str, Any], list[tuple[int, int]]]:
    at = _skip(text, at)
    if at != len(text):
        raise json.JSONDecodeError("Extra data", text, at)
    return data, spans


def _skip(text: str, at: int) -> int:
    size = len(text)
    while at < size and text[at] in _SPACE:
        at += 1
    return at


def _not_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_not_json)
