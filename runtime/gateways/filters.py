"""Which candidates can answer a request at all: capabilities from the pool's metadata, and cooldowns.

Knows nothing about quality or cost.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from arllm.runtime.errors import PoolError
from arllm.runtime.gateways.query import Needs
from arllm.runtime.pool import Candidate

# A pool's metadata may use these names; the later ones are those of LiteLLM's model table.
CONTEXT = ("context_length", "context_window", "max_input_tokens")
VISION = ("vision", "supports_vision")
TOOLS = ("tools", "supports_tools", "supports_function_calling")
JSON_MODE = ("json_mode", "supports_json_mode", "supports_response_schema")

_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True)
class Capabilities:
    """What a candidate can do, as the pool says; None = it doesn't say, and the candidate is not ruled out."""

    context: int | None = None
    vision: bool | None = None
    tools: bool | None = None
    json_mode: bool | None = None

    def meet(self, needs: Needs) -> bool:
        return (
            (self.context is None or needs.tokens <= self.context)
            and not (needs.vision and self.vision is False)
            and not (needs.tools and self.tools is False)
            and not (needs.json_mode and self.json_mode is False)
        )


def capabilities(candidate: Candidate) -> Capabilities:
    """Read a candidate's metadata.

    Raises:
        PoolError: a capability that is neither a number (context) nor true or false.
    """
    return Capabilities(
        context=_context(candidate),
        vision=_flag(candidate, VISION),
        tools=_flag(candidate, TOOLS),
        json_mode=_flag(candidate, JSON_MODE),
    )


class Cooldowns:
    """Candidates that are not asked for a while. Monotonic time; thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until: dict[str, float] = {}
        self._lock = threading.Lock()

    def start(self, name: str, seconds: float) -> None:
        with self._lock:
            self._until[name] = self._clock() + seconds

    def end(self, name: str) -> None:
        with self._lock:
            self._until.pop(name, None)

    def current(self) -> frozenset[str]:
        if not self._until:
            return frozenset()
        with self._lock:
            now = self._clock()
            self._until = {name: until for name, until in self._until.items() if until > now}
            return frozenset(self._until)


def _first(metadata: Mapping[str, Any], keys: tuple[str, ...]) -> tuple[str, Any]:
    return next(((key, metadata[key]) for key in keys if metadata.get(key) not in (None, "")), ("", None))


def _context(candidate: Candidate) -> int | None:
    key, value = _first(candidate.metadata, CONTEXT)
    if value is None:
        return None
    try:  # metadata from a CSV is text
        number = -1 if isinstance(value, bool) else int(float(value))
    except (TypeError, ValueError, OverflowError):
        number = -1
    if number < 1:
        raise PoolError(f"candidate {candidate.name!r}: metadata {key} must be a number of tokens, not {value!r}")
    return number


def _flag(candidate: Candidate, keys: tuple[str, ...]) -> bool | None:
    key, value = _first(candidate.metadata, keys)
    if value is None or isinstance(value, bool):
        return value
    word = _WORDS.get(str(value).strip().lower())
    if word is None:
        raise PoolError(f"candidate {candidate.name!r}: metadata {key} must be true or false, not {value!r}")
    return word
