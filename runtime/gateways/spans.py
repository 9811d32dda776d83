"""The OpenTelemetry span ``arllm.route``, through the API alone: without it, or without an SDK, nothing happens."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from arllm.runtime.gateways.verdict import Verdict

try:
    from opentelemetry import trace
except ImportError:
    _TRACER = None
else:
    _TRACER = trace.get_tracer("arllm")


def start() -> Span | None:
    """A span of the current trace, not yet ended."""
    return None if _TRACER is None else _TRACER.start_span("arllm.route")


def finish(span: Span | None, verdict: Verdict) -> None:
    """End the span with what was decided: names and numbers, no text of the request."""
    if span is None:
        return
    if span.is_recording():
        span.set_attribute("gen_ai.request.model", verdict.selected)
        span.set_attribute("arllm.reason", verdict.reason)
        span.set_attribute("arllm.fallback", verdict.fallback)
        span.set_attribute("arllm.bundle", verdict.bundle)
        span.set_attribute("arllm.routing_ms", verdict.routing_ms)
        if verdict.decision is not None:
            span.set_attribute("arllm.beta", verdict.decision.beta)
            span.set_attribute("arllm.policy", verdict.decision.policy)
            span.set_attribute("arllm.variant", verdict.decision.variant)
            span.set_attribute("arllm.familiarity", verdict.decision.familiarity)
            span.set_attribute("arllm.because", verdict.decision.reason)
    span.end()
