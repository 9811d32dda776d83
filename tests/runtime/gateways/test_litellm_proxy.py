"""The real LiteLLM proxy on loopback, fake providers behind it, the openai client before it: what reaches whom."""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import importlib.util
import json
import re
import shutil
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from arllm.runtime.router import Router

if any(importlib.util.find_spec(name) is None for name in ("litellm", "apscheduler", "prometheus_client")):
    pytest.skip("the extra litellm is not installed", allow_module_level=True)
openai: Any = pytest.importorskip("openai", reason="the OpenAI client, of the extra dev, is not installed")

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))  # what the load run uses too
import litellm_world as world  # noqa: E402
import load  # noqa: E402
from idle import idle, more_files  # noqa: E402

TEXTS = (
    "What is 17 * 23?",
    "If 12 eggs cost 3.60, what do 30 eggs cost?",
    "Write a haiku about autumn",
    "Fix this function: def add(a, b): return a - b",
    "hello",
    "Wie heißt die Hauptstadt von Österreich?",
)
BETAS = (0.0, 0.3, 0.8, 1.0)
EXAMPLES = Path(__file__).resolve().parents[3] / "runtime" / "gateways" / "examples"


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the small bundle that a test may replace."""
    path = tmp_path_factory.mktemp("bundle") / "tiny"
    shutil.copytree(tiny_bundle, path)
    return path


@pytest.fixture(scope="module")
def proxy(providers: Any, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    settings = world.settings_of(
        providers.models(),
        world.HOOK,
        bundle=str(bundle),
        default_model="sim-small",
        names=providers.names(),
        beta_bounds=[0.0, 1.0],
        deadline_ms=10_000,
        reload_seconds=0.2,
        log="decisions.jsonl",
    )
    settings["general_settings"]["forward_client_headers_to_llm_api"] = True
    more_files(1000)  # LiteLLM's own limit
    made = world.Proxy(tmp_path_factory.mktemp("proxy"), settings)
    try:
        made.wait()
        yield made
    finally:
        made.close()


def test_every_query_reaches_the_upstream_that_the_router_names(proxy: Any, providers: Any, router: Router) -> None:
    client, before = proxy.client(), proxy.metrics()
    providers.forget()
    chosen: Counter[str] = Counter()
    for number, (text, beta) in enumerate((text, beta) for text in TEXTS for beta in BETAS):
        policy = ("", "nir", "hdp")[number % 3]
        wanted = router.route(text, beta, policy or None).model
        providers.forget()
        answer, headers = world.ask(
            client,
            text,
            model=f"auto/{policy}" if policy else "auto",
            stream=number % 2 == 1,
            extra_headers={"x-arllm-beta": str(beta)},
        )
        ((provider, seen),) = providers.seen()
        assert provider == providers.of[wanted].name, text
        assert answer == f"{provider} answers"
        assert seen.body["model"] == wanted
        assert bool(seen.body.get("stream")) == (number % 2 == 1)
        assert headers["x-arllm-selected-model"] == f"at-{wanted}"
        assert headers["x-arllm-decision-reason"] == "routed"
        assert headers["x-arllm-bundle"] == f"{router.bundle.manifest.name}@{router.bundle.digest[:12]}"
        assert float(headers["x-arllm-routing-ms"]) > 0
        chosen[wanted] += 1
    assert len({providers.of[name].name for name in chosen}) == 3  # else the test would show little
    after = proxy.metrics()
    for name, count in chosen.items():
        line = f'arllm_routing_decisions_total{{reason="routed",selected_model="at-{name}"}}'
        assert after[line] - before.get(line, 0) == count
    total = 'arllm_routing_latency_seconds_count{stage="total"}'
    assert after[total] - before.get(total, 0) == chosen.total()
    bundle_info = [line for line in after if line.startswith("arllm_bundle_info{")]
    assert [router.bundle.digest in line for line in bundle_info] == [True]


def test_the_other_shapes_are_routed_by_their_last_human_turn(proxy: Any, providers: Any, router: Router) -> None:
    text = TEXTS[0]
    wanted = router.route(text, 0.3).model
    assert wanted != router.route(TEXTS[2], 0.3).model  # else it would not matter which turn is read
    turns = [
        {"role": "user", "content": TEXTS[2]},
        {"role": "assistant", "content": "…"},
        {"role": "user", "content": [{"type": "text", "text": text}]},
    ]
    requests = {
        "/v1/chat/completions": {"model": "auto", "messages": [{"role": "system", "content": TEXTS[2]}, *turns]},
        "/v1/messages": {"model": "auto", "max_tokens": 10, "system": TEXTS[2], "messages": turns},
        "/v1/responses": {"model": "auto", "instructions": TEXTS[2], "input": text},
    }
    keys = {"authorization": f"Bearer {world.MASTER}", "x-arllm-beta": "0.3"}
    for path, body in requests.items():
        providers.forget()
        answer = proxy.http.post(path, json=body, headers=keys)
        assert answer.status_code == 200, path
        assert f"{providers.of[wanted].name} answers" in answer.text
        assert answer.headers["x-arllm-selected-model"] == f"at-{wanted}", path
        assert {(name, seen.body["model"]) for name, seen in providers.seen()} == {
            (providers.of[wanted].name, wanted)
        }


def test_a_concrete_model_passes_untouched(proxy: Any, providers: Any) -> None:
    client = proxy.client()
    before = proxy.metrics()
    for name in providers.of:
        providers.forget()
        answer, headers = world.ask(client, TEXTS[0], model=f"at-{name}", temperature=0.25)
        ((provider, seen),) = providers.seen()
        assert (provider, answer) == (providers.of[name].name, f"{provider} answers")
        assert seen.body == {
            "model": name,
            "messages": [{"role": "user", "content": TEXTS[0]}],
            "temperature": 0.25,
        }
        assert headers["x-arllm-decision-reason"] == "pinned"
        assert headers["x-arllm-selected-model"] == f"at-{name}"
    line = 'arllm_routing_latency_seconds_count{stage="encode"}'
    assert proxy.metrics().get(line) == before.get(line)  # nothing was encoded for them


def test_what_is_no_policy_is_no_alias(proxy: Any, providers: Any) -> None:
    providers.forget()
    with pytest.raises(openai.BadRequestError):
        world.ask(proxy.client(), TEXTS[0], model="auto/nothing")
    assert providers.seen() == []


def test_routing_headers_of_clients_end_at_the_proxy(proxy: Any, providers: Any) -> None:
    providers.forget()
    forged = {
        "x-arllm-selected-model": "at-sim-frontier",
        "x-arllm-decision-reason": "routed",
        "x-arllm-beta": "1.0",
        "x-other": "kept",
    }
    _, headers = world.ask(proxy.client(), TEXTS[0], extra_headers=forged)
    ((_, seen),) = providers.seen()
    assert seen.body["model"] == "sim-tiny"  # beta 1 alone was heard
    assert headers["x-arllm-selected-model"] == "at-sim-tiny"
    assert seen.headers["x-other"] == "kept"
    assert not [name for name in seen.headers if name.startswith("x-arllm")]


def test_the_decision_log_holds_hashes_of_the_routed_queries(proxy: Any) -> None:
    log = proxy.folder / "decisions.jsonl"
    before = len(log.read_text().splitlines())
    text = "A text that nobody else asks: zebrafinch"
    world.ask(proxy.client(), text)
    until = time.monotonic() + 30
    while len(lines := log.read_text().splitlines()) <= before and time.monotonic() < until:
        time.sleep(0.05)
    record = json.loads(lines[-1])
    assert record["reason"] == "routed"
    assert record["sent_model"] == record["selected_model"] == f"at-{record['model']}"
    assert re.fullmatch(r"[0-9a-f]{16}", record["query_id"])
    assert "zebrafinch" not in log.read_text()
    assert "zebrafinch" not in proxy.log.read_text(encoding="utf-8", errors="replace")


def post(proxy: Any, content: bytes, **headers: str) -> Any:
    fixed = {"authorization": f"Bearer {world.MASTER}", "content-type": "application/json"}
    return proxy.http.post("/v1/chat/completions", content=content, headers={**fixed, **headers})


@pytest.mark.parametrize(
    "raw",
    [
        b'{"model": "auto", "messages": ',
        b'{"model": "auto", "x": "\xff\xfe"}',
        b'[{"model": "auto"}]',
        b'{"model": 5}',
    ],
    ids=["malformed", "not UTF-8", "no object", "no name"],
)
def test_a_bad_body_is_refused_and_reaches_nobody(proxy: Any, providers: Any, raw: bytes) -> None:
    """LiteLLM parses it before any hook (and answers 500 to what is no object); what it lets pass, arllm survives."""
    providers.forget()
    assert post(proxy, raw).status_code >= 400
    assert providers.seen() == []
    assert world.ask(proxy.client(), TEXTS[0])[1]["x-arllm-decision-reason"] == "routed"


def test_a_body_of_20_mb_arrives_whole(proxy: Any, providers: Any, router: Router) -> None:
    providers.forget()
    pad = "x" * 20_000_000
    turns = [{"role": "assistant", "content": pad}, {"role": "user", "content": TEXTS[0]}]
    answer = post(proxy, json.dumps({"model": "auto", "messages": turns}).encode())
    assert answer.status_code == 200
    ((_, seen),) = providers.seen()
    assert seen.body["messages"] == turns
    assert answer.headers["x-arllm-selected-model"] == f"at-{seen.body['model']}"
    assert answer.headers["x-arllm-decision-reason"] == "routed"


@pytest.mark.parametrize(
    "model", ["auto\r\nx-evil: 1", "at-sim-tiny\r\nx-evil: 1", "auto/\r\nx-evil: 1", "auto\u2028"]
)
def test_a_model_name_can_not_inject_headers(proxy: Any, providers: Any, model: str) -> None:
    providers.forget()
    answer = post(proxy, json.dumps({"model": model, "messages": [{"role": "user", "content": "x"}]}).encode())
    assert 400 <= answer.status_code < 500
    assert "x-evil" not in answer.headers
    assert "\n" not in answer.headers.get("x-arllm-selected-model", "")
    assert providers.seen() == []


def test_a_slow_client_is_waited_for_and_keeps_nobody_out(proxy: Any, providers: Any) -> None:
    providers.forget()
    raw = json.dumps({"model": "auto", "messages": [{"role": "user", "content": TEXTS[0]}]}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {world.MASTER}\r\n"
    head += f"content-type: application/json\r\nconnection: close\r\ncontent-length: {len(raw)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=60) as connection:
        connection.sendall(head.encode() + raw[:20])
        assert world.ask(proxy.client(), TEXTS[2])[1]["x-arllm-decision-reason"] == "routed"
        assert len(providers.seen()) == 1
        connection.sendall(raw[20:])
        answer = b""
        while chunk := connection.recv(65_536):
            answer += chunk
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"x-arllm-decision-reason: routed" in answer.lower()


def test_1000_idle_connections_keep_nobody_out(proxy: Any) -> None:
    with idle(proxy.port):
        assert world.ask(proxy.client(), TEXTS[0])[1]["x-arllm-decision-reason"] == "routed"


def test_no_request_is_lost_while_bundles_are_replaced(
    proxy: Any, providers: Any, bundle: Path, tiny_bundle: Path
) -> None:
    """Under load, first a corrupt bundle (refused), then another good one (swapped)."""
    target = load.Target(
        proxy.port,
        "/v1/chat/completions",
        [json.dumps({"model": "auto", "messages": [{"role": "user", "content": text}]}).encode() for text in TEXTS],
        {"authorization": f"Bearer {world.MASTER}"},
        ("x-arllm-bundle", "x-arllm-decision-reason"),
    )
    providers.forget()
    old = Router.load(tiny_bundle).bundle.digest[:12]
    samples = load.Samples()

    def until(line: str) -> None:
        end = time.monotonic() + 120
        while proxy.metrics().get(line, 0) < 1:
            assert time.monotonic() < end, line
            samples.add(asyncio.run(load.drive(target, 4, 0.3)))
        samples.add(asyncio.run(load.drive(target, 4, 0.3)))

    graph = next(bundle.glob("*/encoder.onnx"))
    good = graph.read_bytes()
    graph.write_bytes(b"not a graph")
    until('arllm_reloads_total{result="refused"}')
    assert {label.split("@")[1] for label in samples.watched["x-arllm-bundle"]} == {old}

    graph.write_bytes(good)
    card, manifest = bundle / "README.md", bundle / "manifest.json"
    card.write_text("another card", encoding="utf-8")
    data = json.loads(manifest.read_bytes())
    content = card.read_bytes()
    data["files"]["README.md"] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    manifest.write_text(json.dumps(data), encoding="utf-8")
    until('arllm_reloads_total{result="swapped"}')
    new = Router.load(bundle).bundle.digest[:12]
    labels = [label.split("@")[1] for label in samples.watched["x-arllm-bundle"]]
    assert new != old
    assert set(labels) == {old, new}
    assert labels[-1] == new
    assert samples.failures == {}
    assert set(samples.watched["x-arllm-decision-reason"]) == {"routed"}
    assert providers.counts().total() == len(samples.ms)  # each once: none lost, none repeated


def test_a_proxy_with_wrong_settings_does_not_start(tmp_path: Path, providers: Any, tiny_bundle: Path) -> None:
    settings = world.settings_of(
        providers.models(), world.HOOK, bundle=str(tiny_bundle), default_model="sim-small", policy="nothing"
    )
    proxy = world.Proxy(tmp_path, settings)
    try:
        assert proxy.process.wait(world.PATIENCE) != 0
        assert "no policy 'nothing'" in proxy.text()
    finally:
        proxy.close()


def test_the_example_runs_as_it_ships(tmp_path: Path, nano: Router) -> None:
    for name in ("litellm.yaml", "arllm.json"):
        shutil.copy(EXAMPLES / name, tmp_path / name)
    shipped = (tmp_path / "litellm.yaml").read_text(encoding="utf-8")
    settings = json.loads((tmp_path / "arllm.json").read_bytes())
    yaml = pytest.importorskip("yaml", reason="the extra litellm brings PyYAML")
    proxy = world.Proxy(tmp_path, yaml.safe_load(shipped), LITELLM_MASTER_KEY=world.MASTER)
    try:
        proxy.wait()
        client = proxy.client()
        for text in TEXTS:
            wanted = nano.route(text, settings["beta"], candidates=list(settings["names"])).model
            answer, headers = world.ask(client, text)
            assert answer == f"{settings['names'][wanted]} answers"
            assert headers["x-arllm-selected-model"] == settings["names"][wanted]
    finally:
        proxy.close()
