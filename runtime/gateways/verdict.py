"""What a gateway is told about a request: the model, the reason, and the record of it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from arllm.runtime.answer import Decision
from arllm.runtime.gateways import asks
from arllm.runtime.gateways.asks import header_value
from arllm.runtime.gateways.query import digest

# Reasons. The request goes where the router says:
ROUTED = "routed"
STICKY = "sticky"  # the conversation's model, since no other is worth the margin
# The request is left as it is:
PINNED = "pinned"  # it names a concrete model
SHADOW = "shadow"  # shadow mode
# The default model answers:
DEADLINE = "deadline"  # no decision in time
ERROR = "error"  # the router failed
OVERLOAD = "overload"  # too many decisions wait
BREAKER = "breaker"  # the router failed too often: nobody waits for it
NO_CANDIDATES = "no-candidates"  # none can answer: capabilities, cooldowns, the client's candidates
NO_QUERY = "no-query"  # no human text in the request
FALLBACKS = frozenset({DEADLINE, ERROR, OVERLOAD, BREAKER, NO_CANDIDATES, NO_QUERY})
REASONS = FALLBACKS | {ROUTED, STICKY, PINNED, SHADOW}  # all there are: a label and a header of few values


@dataclass(frozen=True)
class Verdict:
    """Where a request goes, and why.

    Attributes:
        model: what the request must name when it goes upstream.
        changed: whether that differs from what it names now.
        reason: one of this file's constants.
        candidate: the pool's name of ``selected``; None where it is no candidate.
        selected: what routing chose. It is ``model``, but in shadow mode.
        cause: in shadow mode, the reason without it; else ``reason``.
        decision: the router's, where it made one.
        bundle: name@digest of the bundle that served.
        routing_ms: all that routing added; queue_ms: of it, waiting for a thread.
        ignored: request headers that were not heard.
    """

    model: str
    changed: bool
    reason: str
    candidate: str | None
    selected: str
    cause: str
    decision: Decision | None
    bundle: str
    routing_ms: float
    queue_ms: float = 0.0
    ignored: tuple[str, ...] = ()

    @property
    def fallback(self) -> bool:
        return self.cause in FALLBACKS

    def headers(self) -> dict[str, str]:
        """The response headers that say what was decided. Safe values, names in lower case."""
        found = {
            asks.REASON: self.reason,
            asks.ROUTING_MS: f"{self.routing_ms:.3f}",
            asks.BUNDLE: header_value(self.bundle),
        }
        found[asks.SHADOW_MODEL if self.reason == SHADOW else asks.SELECTED_MODEL] = header_value(self.selected)
        if self.ignored:
            found[asks.IGNORED] = ", ".join(self.ignored)
        return found

    def record(self, query: str | None, *, with_text: bool) -> dict[str, Any]:
        """The decision as a line of the log.

        ``query_id`` is what outcomes of the same text get, so that `arllm eval` can join them. A record covers the
        chosen model alone: what the others would have answered, nobody knows. ``reason`` says what became of the
        request, ``because`` why the router preferred its candidate; each is one of a few texts.
        """
        line: dict[str, Any] = {
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "query_id": None if query is None else digest(query),
            "model": self.candidate,
            "selected_model": self.selected,
            "sent_model": self.model,
            "reason": self.reason,
            "cause": self.cause,
            "bundle": self.bundle,
            "routing_ms": round(self.routing_ms, 3),
        }
        decision = self.decision
        if decision is not None:
            line |= {
                "beta": decision.beta,
                "policy": decision.policy,
                "variant": decision.variant,
                "pool_overridden": decision.pool_overridden,
                "quality": decision.quality,
                "utility": decision.utility,
                "familiarity": round(decision.familiarity, 4),
                "because": decision.reason,
            }
        if with_text:
            line["query"] = query
        return line
