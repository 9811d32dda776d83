"""Routing requests as text: command-line arguments, lines, JSON Lines. Knows nothing about routers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from arllm.runtime.errors import InputError

Request = dict[str, Any]  # query, where, and of a JSON request what else it gives
FIELDS = ("id", "query", "beta", "policy", "candidates")


def names_of(text: str) -> list[str]:
    """The names of a comma-separated option."""
    return [name.strip() for name in text.split(",") if name.strip()]


def from_arguments(texts: Iterable[str]) -> Iterator[Request]:
    """A request a text. An argument that isn't UTF-8 arrives with lone surrogates: they become U+FFFD."""
    for i, text in enumerate(texts, 1):
        yield {"query": text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), "where": f"text {i}"}


def from_lines(lines: Iterable[bytes], *, jsonl: bool, where: str) -> Iterator[Request]:
    """A request a line: the query itself, or with ``jsonl`` an object of :data:`FIELDS` (blank lines are skipped).

    Raises:
        InputError: names the line that is no such object.
    """
    for number, raw in enumerate(lines, 1):
        line, place = raw.decode("utf-8", errors="replace"), f"{where}:{number}"
        if not jsonl:
            yield {"query": line.rstrip("\r\n"), "where": place}
        elif line.strip():
            yield {**_object(line, place), "where": place}


def _object(line: str, place: str) -> Request:
    try:
        request = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: not valid JSON: {error}") from None
    if not isinstance(request, dict) or not isinstance(request.get("query"), str):
        raise InputError(f'{place}: expected an object with a string "query"')
    unknown = sorted(set(request) - set(FIELDS))
    if unknown:
        raise InputError(f"{place}: unknown field {unknown[0]!r}: {', '.join(FIELDS)} are known")
    return request
