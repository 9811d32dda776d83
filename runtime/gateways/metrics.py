"""Prometheus metrics of routing. Nothing else of the package imports ``prometheus_client``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from arllm.runtime.errors import needs_extra

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from arllm.runtime.gateways.engine import Engine
    from arllm.runtime.gateways.verdict import Verdict

# Seconds: most decisions take less than a millisecond.
BUCKETS = (
    *(0.00005, 0.0001, 0.00025, 0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075),
    *(0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5),
)
FAMILIARITY_BUCKETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
STAGES = ("queue", "tokenize", "encode", "score", "total")
OTHER = "other"  # a model that is no candidate: its name is the client's, and labels must stay few


class Metrics:
    """The metrics, in a registry: the process's own, a gateway's, or a fresh one.

    Raises:
        MissingExtraError: prometheus_client is not installed.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        with needs_extra("metrics", "Prometheus metrics"):
            import prometheus_client as prometheus
        self.registry = prometheus.CollectorRegistry() if registry is None else registry
        self._decisions = prometheus.Counter(
            "arllm_routing_decisions",
            "Decisions, by the model that the request goes to",
            ["selected_model", "reason"],
            registry=self.registry,
        )
        latency = prometheus.Histogram(
            "arllm_routing_latency_seconds",
            "Time of a decision, by stage; total = all that routing adds",
            ["stage"],
            buckets=BUCKETS,
            registry=self.registry,
        )
        self._stages = {stage: latency.labels(stage) for stage in STAGES}
        self._fallbacks = prometheus.Counter(
            "arllm_routing_fallbacks",
            "Requests that the default model answers, by reason",
            ["reason"],
            registry=self.registry,
        )
        self._familiarity = prometheus.Histogram(
            "arllm_query_familiarity",
            "How alike a routed query is to training's: the share of low ones grows where traffic drifts away",
            buckets=FAMILIARITY_BUCKETS,
            registry=self.registry,
        )
        self._bundle = prometheus.Gauge(
            "arllm_bundle_info", "The bundle that serves", ["bundle", "digest", "variant"], registry=self.registry
        )
        self._reloads = prometheus.Counter(
            "arllm_reloads", "Bundles loaded while serving: swapped, or refused", ["result"], registry=self.registry
        )
        self._queue = prometheus.Gauge(
            "arllm_routing_queue_length",
            "Decisions that wait: for a thread, or for a turn in an event loop",
            registry=self.registry,
        )
        self._breaker = prometheus.Gauge(
            "arllm_routing_breaker_open", "1 while the circuit breaker is open", registry=self.registry
        )
        self.dropped = prometheus.Counter(
            "arllm_decision_log_dropped", "Records that the decision log could not take", registry=self.registry
        )
        self._known: frozenset[str] = frozenset()
        # Children of the two counters by label, as few as the labels: finding one takes a lock and several calls.
        self._chosen: dict[tuple[str, str], Any] = {}
        self._fell: dict[str, Any] = {}
        for result in ("swapped", "refused"):
            self._reloads.labels(result)

    def watch(self, queue_length: Callable[[], int], breaker_open: Callable[[], bool]) -> None:
        """What the gauges read at every scrape."""
        self._queue.set_function(queue_length)
        self._breaker.set_function(breaker_open)

    def serving(self, engine: Engine, models: frozenset[str]) -> None:
        """A bundle serves from now on; ``models`` are the names that may stand in a label."""
        self._known = models
        self._bundle.clear()
        self._bundle.labels(engine.router.bundle.manifest.name, engine.digest, engine.router.variant).set(1)

    def reloaded(self, result: str) -> None:
        self._reloads.labels(result).inc()

    def decided(self, verdict: Verdict) -> None:
        model = verdict.selected if verdict.selected in self._known else OTHER
        chosen = self._chosen.get((model, verdict.reason))
        if chosen is None:
            chosen = self._chosen[model, verdict.reason] = self._decisions.labels(model, verdict.reason)
        chosen.inc()
        if verdict.fallback:
            fell = self._fell.get(verdict.cause)
            if fell is None:
                fell = self._fell[verdict.cause] = self._fallbacks.labels(verdict.cause)
            fell.inc()
        self._stages["total"].observe(verdict.routing_ms / 1e3)
        decision = verdict.decision
        if decision is not None:
            self._familiarity.observe(decision.familiarity)
            timing = decision.timing
            self._stages["queue"].observe(verdict.queue_ms / 1e3)
            self._stages["tokenize"].observe(timing.tokenize_ms / 1e3)
            self._stages["encode"].observe(timing.encode_ms / 1e3)
            self._stages["score"].observe(timing.score_ms / 1e3)

    def exposition(self) -> tuple[bytes, str]:
        """(text, content type) for a scrape."""
        from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self.registry), CONTENT_TYPE_LATEST
