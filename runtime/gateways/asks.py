"""What a client may ask for, and the headers of routing: their names, reading them, writing them safely.

Everything here is the client's until the operator's bounds have been applied.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from arllm.runtime.gateways.config import ANY, GatewayConfig

PREFIX = "x-arllm-"  # every header of ours, of requests and responses
BETA = "x-arllm-beta"
CANDIDATES = "x-arllm-candidates"
SELECTED_MODEL = "x-arllm-selected-model"
REASON = "x-arllm-decision-reason"
ROUTING_MS = "x-arllm-routing-ms"
BUNDLE = "x-arllm-bundle"
SHADOW_MODEL = "x-arllm-shadow-model"
IGNORED = "x-arllm-ignored"

MAX_VALUE = 256  # characters of a header value of ours


@dataclass(frozen=True)
class Asks:
    """A client's wishes, within the operator's bounds. ``ignored`` names the headers that were not heard."""

    beta: float
    candidates: frozenset[str] | None  # None = no wish
    ignored: tuple[str, ...] = ()


def parse_alias(model: str | None, alias: str, policies: Collection[str]) -> tuple[bool, str | None]:
    """(whether ``model`` asks for a decision, the policy it names). ``auto/nothing`` is a model like any other."""
    if model == alias:
        return True, None
    if model is not None and model.startswith(f"{alias}/"):
        policy = model[len(alias) + 1 :]
        if policy in policies:
            return True, policy
    return False, None


def parse_beta(value: str) -> float | None:
    """A header's beta in [0, 1], or None where it is none."""
    try:
        beta = float(value)
    except ValueError:
        return None
    return beta if math.isfinite(beta) and 0.0 <= beta <= 1.0 else None


def client_asks(headers: Mapping[str, str], config: GatewayConfig, pool: Collection[str]) -> Asks:
    """The wishes in a request's headers (names in lower case): heard only where the operator turned them on.

    A beta beyond the operator's bounds becomes the nearest bound; candidates outside the operator's list are left
    out. What can't be read is ignored, and named in ``ignored``.
    """
    beta, candidates, ignored = config.beta, None, []
    wish = headers.get(BETA)
    if wish is not None:
        number = None if config.beta_bounds is None else parse_beta(wish)
        if number is None or config.beta_bounds is None:
            ignored.append(BETA)
        else:
            beta = min(max(number, config.beta_bounds[0]), config.beta_bounds[1])
    wish = headers.get(CANDIDATES)
    if wish is not None:
        offered = set(pool) if ANY in config.client_candidates else set(config.client_candidates) & set(pool)
        by_upstream = {config.upstream(name): name for name in offered}
        named = [name.strip() for name in wish.split(",")]
        picked = {by_upstream.get(name, name) for name in named} & offered
        if picked:
            candidates = frozenset(picked)
        else:
            ignored.append(CANDIDATES)
    return Asks(beta, candidates, tuple(ignored))


def is_ours(header: str) -> bool:
    """Whether a header is one of routing: removed from clients' requests before they go upstream."""
    return header.lower().startswith(PREFIX)


def without_ours(headers: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The headers that may go upstream."""
    return [(name, value) for name, value in headers if not is_ours(name)]


def header_value(text: str) -> str:
    """A text as a header value: printable ASCII; anything else (line ends first of all) percent-encoded."""
    if text.isascii() and text.isprintable() and len(text) <= MAX_VALUE and "%" not in text:
        return text.strip()
    encoded = "".join(
        c if c.isascii() and c.isprintable() and c != "%" else "".join(f"%{b:02X}" for b in _bytes(c)) for c in text
    )
    return encoded[:MAX_VALUE].strip()


def _bytes(character: str) -> bytes:
    return character.encode("utf-8", "surrogatepass")
