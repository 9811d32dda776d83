"""Tests of gateways/gate.py: every reason, the operator's bounds, sticky conversations, shadow mode, the records."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arllm.runtime.errors import InputError, PolicyError
from arllm.runtime.gateways import asks
from arllm.runtime.gateways.gate import Gateway
from arllm.runtime.gateways.verdict import FALLBACKS, REASONS, Verdict

FIELDS = ["model", "messages", "input", "prompt", "role", "content", "user", "text", "type", "tools", "max_tokens"]
SECRET = "the secret words large"


def decide(gateway: Gateway, body: dict[str, Any], *args: Any, **kwargs: Any) -> Verdict:
    return asyncio.run(gateway.handle(body, *args, **kwargs))


def sample(gateway: Gateway, name: str, **labels: str) -> float:
    assert gateway.metrics is not None
    return gateway.metrics.registry.get_sample_value(name, labels) or 0.0


def test_the_alias_is_routed(gateway: Gateway, stub: Any, ask: Any) -> None:
    verdict = decide(gateway, ask("a medium question"))
    assert (verdict.model, verdict.changed, verdict.reason, verdict.candidate) == ("medium", True, "routed", "medium")
    assert verdict.decision is not None
    assert verdict.decision.model == "medium"
    assert stub.calls == [("a medium question", 0.0, None, None)]
    assert decide(gateway, ask("large", "auto/hdp")).decision.policy == "hdp"  # type: ignore[union-attr]


@pytest.mark.parametrize("model", ["medium", "gpt-5", "auto/nothing", "", None, 5])
def test_a_concrete_model_passes_untouched(gateway: Gateway, stub: Any, ask: Any, model: Any) -> None:
    verdict = decide(gateway, ask("large", model))
    assert (verdict.changed, verdict.reason) == (False, "pinned")
    assert verdict.model == (model if isinstance(model, str) else "")
    assert verdict.candidate == ("medium" if model == "medium" else None)
    assert stub.calls == []


def test_the_gateways_names(make_gateway: Callable[..., Gateway], ask: Any) -> None:
    gateway = make_gateway(names={"large": "team/large", "small": "team/small"})
    verdict = decide(gateway, ask("large"))
    assert (verdict.model, verdict.candidate) == ("team/large", "large")
    assert decide(gateway, ask("x", "team/large")).candidate == "large"
    verdict = decide(gateway, ask(""))
    assert (verdict.model, verdict.candidate, verdict.reason) == ("team/small", "small", "no-query")


def test_a_default_model_outside_the_pool(make_gateway: Callable[..., Gateway], ask: Any) -> None:
    verdict = decide(make_gateway(default_model="gpt-5"), ask(" "))
    assert (verdict.model, verdict.candidate, verdict.reason) == ("gpt-5", None, "no-query")


def test_cooldowns_mask(make_gateway: Callable[..., Gateway], stub: Any, ask: Any) -> None:
    gateway = make_gateway(names={"large": "team/large"})
    gateway.cool_down("team/large", 3600)
    gateway.cool_down("nobody", 3600)
    assert decide(gateway, ask("large")).candidate == "medium"
    assert decide(gateway, ask("large"), unavailable={"medium"}).candidate == "small"
    gateway.recovered("large")
    assert decide(gateway, ask("large")).candidate == "large"


def test_clients_wishes(make_gateway: Callable[..., Gateway], stub: Any, ask: Any) -> None:
    headers = {asks.BETA: "0", asks.CANDIDATES: "large,medium"}
    closed = decide(make_gateway(beta=0.9), ask("large"), headers)
    assert (closed.model, closed.ignored) == ("small", (asks.BETA, asks.CANDIDATES))
    assert closed.headers()[asks.IGNORED] == "x-arllm-beta, x-arllm-candidates"
    opened = make_gateway(beta=0.9, beta_bounds=(0.25, 1.0), client_candidates=("small", "medium"))
    assert decide(opened, ask("large"), headers).model == "medium"
    assert stub.calls[-1][1:] == (0.25, None, ["medium"])


def test_a_conversation_keeps_its_model_within_the_margin(make_gateway: Callable[..., Gateway], ask: Any) -> None:
    gateway = make_gateway(sticky_margin=0.5)
    first = ask("large question")

    def turn(text: str, **kwargs: Any) -> Verdict:
        body = {**first, "messages": [*first["messages"], {"role": "user", "content": text}]}
        return decide(gateway, body, **kwargs)

    assert decide(gateway, first).model == "large"
    assert (turn("so so").model, turn("so so").reason) == ("large", "routed")
    kept = turn("large and medium alike, medium")
    assert (kept.model, kept.reason) == ("large", "sticky")
    assert turn("medium").reason == "routed"  # worth 0.91 more
    assert turn("plain").model == "medium"
    assert turn("plain", unavailable=["medium"]).model == "large"  # what is masked keeps nobody
    assert turn("medium", client="another").model == "medium"
    assert decide(gateway, ask("large", "auto"), {"x-arllm-session": "s1"}).model == "large"
    assert decide(gateway, ask("medium, large"), {"x-arllm-session": "s1"}).reason == "sticky"
    assert decide(gateway, ask("medium, large"), {"x-arllm-session": "s2"}).model == "medium"


def test_conversations_are_forgotten(make_gateway: Callable[..., Gateway]) -> None:
    from arllm.runtime.gateways.sticky import Conversations

    now = [0.0]
    conversations = Conversations(2, 10.0, lambda: now[0])
    for key in "abc":
        conversations.put(key, f"model {key}")
    assert [conversations.get(key) for key in "abc"] == [None, "model b", "model c"]
    assert len(conversations) == 2
    now[0] = 10.0
    assert conversations.get("b") is None


def test_shadow_mode_changes_nothing_and_records(
    make_gateway: Callable[..., Gateway], ask: Any, tmp_path: Path
) -> None:
    gateway = make_gateway(shadow=True, log=str(tmp_path / "log.jsonl"))
    verdict = decide(gateway, ask("large", "gpt-5"))
    assert (verdict.model, verdict.changed, verdict.reason, verdict.cause) == ("gpt-5", False, "shadow", "routed")
    assert verdict.selected == "large"
    assert verdict.headers()[asks.SHADOW_MODEL] == "large"
    assert asks.SELECTED_MODEL not in verdict.headers()
    alias = decide(gateway, ask("large"))
    assert (alias.model, alias.changed, alias.selected) == ("small", True, "large")  # nobody upstream knows `auto`
    assert sample(gateway, "arllm_routing_decisions_total", selected_model="large", reason="shadow") == 2
    gateway.close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(line["sent_model"], line["selected_model"]) for line in lines] == [
        ("gpt-5", "large"),
        ("small", "large"),
    ]


@pytest.mark.parametrize("inline", [0, 10_000])
def test_a_router_that_fails_is_a_reason(
    make_gateway: Callable[..., Gateway], stub: Any, ask: Any, inline: int, caplog: pytest.LogCaptureFixture
) -> None:
    gateway = make_gateway(inline=inline, breaker_failures=2)
    stub.behave = lambda: 1 / 0
    verdicts = [decide(gateway, ask(SECRET)) for _ in range(3)]
    assert [(v.model, v.reason, v.fallback) for v in verdicts] == [
        ("small", "error", True),
        ("small", "error", True),
        ("small", "breaker", True),
    ]
    assert gateway.breaker_open
    assert sample(gateway, "arllm_routing_breaker_open") == 1
    assert sample(gateway, "arllm_routing_fallbacks_total", reason="error") == 2
    assert "secret" not in caplog.text


def test_a_stalled_router_is_a_reason(make_gateway: Callable[..., Gateway], stub: Any, ask: Any) -> None:
    gate = threading.Event()
    stub.behave = gate.wait
    gateway = make_gateway(inline=0, deadline_ms=300)
    verdict = decide(gateway, ask("large"))
    assert (verdict.model, verdict.reason) == ("small", "deadline")
    assert verdict.routing_ms >= 300
    gate.set()


def test_a_bug_of_ours_is_a_reason_too(gateway: Gateway, ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "_allowed", lambda *args: 1 / 0)
    assert decide(gateway, ask("large")).reason == "error"


def test_a_jump_of_the_wall_clock_moves_nothing(
    make_gateway: Callable[..., Gateway], stub: Any, ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = make_gateway(inline=0, sticky_margin=1.0, sticky_seconds=60.0)
    wall = time.time
    jumps = iter([0.0, 86_400.0, -86_400.0, 1e9, -1e9])
    assert decide(gateway, ask("large")).reason == "routed"
    for jump in jumps:
        stub.behave = lambda jump=jump: monkeypatch.setattr(time, "time", lambda: wall() + jump)
        verdict = decide(gateway, ask("large"))
        assert (verdict.model, verdict.reason) == ("large", "routed")
        assert 0 <= verdict.routing_ms < 1000.0
    assert decide(gateway, ask("large")).reason == "routed"


@pytest.mark.parametrize("jump", [86_400.0, -86_400.0])
def test_a_jump_of_the_wall_clock_ends_no_wait_early_or_late(
    make_gateway: Callable[..., Gateway], stub: Any, ask: Any, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    """In the middle of a call: the deadline, the breaker, a cooldown and a conversation go by a monotonic clock."""
    wall, gate = time.time, threading.Event()
    gateway = make_gateway(
        inline=0, deadline_ms=700, breaker_failures=1, breaker_seconds=3600, sticky_margin=1.0, sticky_seconds=60.0
    )
    assert decide(gateway, ask("large")).reason == "routed"
    gateway.cool_down("medium", 3600)

    def hang() -> None:
        monkeypatch.setattr(time, "time", lambda: wall() + jump)
        gate.wait(20)

    stub.behave = hang
    assert decide(gateway, ask("large")).reason == "deadline"
    assert [decide(gateway, ask("large")).reason for _ in range(2)] == ["breaker", "breaker"]
    gate.set()
    stub.behave = lambda: None
    gateway.try_reload()  # closes the breaker
    verdict = decide(gateway, ask("large"))
    assert (verdict.reason, verdict.model) == ("routed", "large")
    assert stub.calls[-1][3] == ["small", "large"]  # medium still cools down
    assert (
        decide(gateway, {**ask("large"), "messages": [*ask("large")["messages"], *ask("small")["messages"]]}).reason
        == "sticky"
    )


def test_headers_metrics_and_log_agree_and_hold_no_text(
    make_gateway: Callable[..., Gateway], ask: Any, tmp_path: Path
) -> None:
    gateway = make_gateway(log=str(tmp_path / "log.jsonl"))
    verdict = decide(gateway, ask(SECRET))
    decide(gateway, ask(" "))
    decide(gateway, ask(SECRET, "x\r\ny: secret model"))
    headers = verdict.headers()
    assert headers[asks.SELECTED_MODEL] == "large"
    assert headers[asks.REASON] == "routed"
    assert headers[asks.BUNDLE] == f"stub@{'ab' * 6}"
    assert float(headers[asks.ROUTING_MS]) == pytest.approx(verdict.routing_ms, abs=1e-3)
    assert sample(gateway, "arllm_routing_decisions_total", selected_model="large", reason="routed") == 1
    assert sample(gateway, "arllm_routing_decisions_total", selected_model="small", reason="no-query") == 1
    assert sample(gateway, "arllm_routing_decisions_total", selected_model="other", reason="pinned") == 1
    assert sample(gateway, "arllm_routing_fallbacks_total", reason="no-query") == 1
    assert sample(gateway, "arllm_routing_latency_seconds_count", stage="total") == 3
    for stage in ("queue", "tokenize", "encode", "score"):
        assert sample(gateway, "arllm_routing_latency_seconds_count", stage=stage) == 1
    assert sample(gateway, "arllm_bundle_info", bundle="stub", digest="ab" * 32, variant="stub") == 1
    text, kind = gateway.metrics.exposition()  # type: ignore[union-attr]
    assert kind.startswith("text/plain")
    gateway.close()
    written = (tmp_path / "log.jsonl").read_text(encoding="utf-8")
    assert "secret" not in written
    assert b"secret" not in text
    first, second = (json.loads(line) for line in written.splitlines())
    assert first["model"] == first["selected_model"] == "large"
    assert set(first["quality"]) == {"small", "medium", "large"}
    assert verdict.decision is not None
    assert first["familiarity"] == pytest.approx(verdict.decision.familiarity, abs=1e-4)
    assert first["because"] == verdict.decision.reason
    assert sample(gateway, "arllm_query_familiarity_count") == 1
    assert sample(gateway, "arllm_query_familiarity_sum") == verdict.decision.familiarity
    assert (second["reason"], second["query_id"]) == ("no-query", None)


def test_the_log_holds_the_text_where_asked(make_gateway: Callable[..., Gateway], ask: Any, tmp_path: Path) -> None:
    gateway = make_gateway(log=str(tmp_path / "log.jsonl"), log_text=True)
    decide(gateway, ask(SECRET))
    gateway.close()
    assert json.loads((tmp_path / "log.jsonl").read_text(encoding="utf-8"))["query"] == SECRET


def test_the_span(gateway: Gateway, ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.sdk", reason="the OpenTelemetry SDK is not installed")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from arllm.runtime.gateways import spans

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(spans, "_TRACER", provider.get_tracer("arllm"))
    decide(gateway, ask(SECRET))
    decide(gateway, ask("x", "pinned"))
    (span,) = exporter.get_finished_spans()
    assert span.name == "arllm.route"
    assert span.attributes is not None
    assert span.attributes["gen_ai.request.model"] == "large"
    assert span.attributes["arllm.reason"] == "routed"
    assert 0 <= span.attributes["arllm.familiarity"] <= 1
    assert "quality" in span.attributes["arllm.because"]
    assert "secret" not in span.to_json()


def test_without_prometheus_or_opentelemetry_it_decides_the_same(
    make_gateway: Callable[..., Gateway], ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    from arllm.runtime.gateways import spans

    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.setattr(spans, "_TRACER", None)
    gateway = make_gateway()
    assert gateway.metrics is None
    assert decide(gateway, ask("large")).model == "large"
    assert gateway.try_reload()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"names": {"huge": "x"}}, "names: no candidate 'huge': the pool has small, medium, large"),
        ({"client_candidates": ("huge",)}, "client_candidates: no candidate 'huge'"),
        ({"policy": "best"}, "policy: no policy 'best': the bundle has nir, hdp"),
    ],
)
def test_settings_are_checked_against_the_bundle(
    make_gateway: Callable[..., Gateway], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises((InputError, PolicyError), match=message):
        make_gateway(**settings)


def test_many_at_once_all_get_their_own_answer(make_gateway: Callable[..., Gateway], ask: Any) -> None:
    gateway = make_gateway(inline=12, max_queue=500, deadline_ms=30_000)
    texts = [f"{name}{' and more words' * (i % 2)}" for i in range(60) for name in ("small", "medium", "large")]

    async def main() -> list[Verdict]:
        return await asyncio.gather(*(gateway.handle(ask(text)) for text in texts))

    for text, verdict in zip(texts, asyncio.run(main()), strict=True):
        assert (verdict.reason, verdict.model) == ("routed", text.split(" ")[0])


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS) | st.text(), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(st.lists(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4), max_size=5), st.text(max_size=30))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_asked_headers_are_safe_and_labels_few(
    gateway: Gateway, bodies: list[dict[str, Any]], model: str
) -> None:
    for body in ({"model": model}, *bodies, *({**body, "model": "auto"} for body in bodies)):
        found = decide(gateway, body, {"x-arllm-beta": model, "x-arllm-session": model})
        assert found.reason in REASONS
        assert found.headers()[asks.REASON] == found.reason
        assert all(value.isascii() and value.isprintable() for value in found.headers().values())
    assert gateway.metrics is not None
    labels = [
        sample.labels
        for metric in gateway.metrics.registry.collect()
        for sample in metric.samples
        if sample.name == "arllm_routing_decisions_total"
    ]
    assert {label["reason"] for label in labels} <= REASONS
    assert {label["selected_model"] for label in labels} <= {"small", "medium", "large", "other"}


def test_every_fallback_is_a_fallback() -> None:
    assert {"deadline", "error", "overload", "breaker", "no-candidates", "no-query"} == FALLBACKS
