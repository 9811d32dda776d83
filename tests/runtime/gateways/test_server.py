"""Tests of gateways/server.py on real sockets: the answers, the limits, and every fault that a client can bring."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from idle import idle

from arllm.runtime.bundle import find_bundle
from arllm.runtime.gateways.config import GatewayConfig
from arllm.runtime.gateways.gate import Gateway

pytest.importorskip("starlette", reason="the extra serve is not installed")

from arllm.runtime.gateways.server import HttpConfig, listen, make_app

MB = 1_000_000


@pytest.fixture
def client(http_server: Callable[..., httpx.Client], gateway: Gateway) -> httpx.Client:
    return http_server(gateway)


def raw(client: httpx.Client, data: bytes, *, pause: bytes = b"") -> bytes:
    """What the server answers to these bytes until it closes, or goes silent."""
    with socket.create_connection((client.base_url.host, client.base_url.port or 0), timeout=20) as connection:
        connection.sendall(data)
        if pause:
            time.sleep(0.05)
            connection.sendall(pause)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while chunk := connection.recv(65_536):
                answer += chunk
        return answer


def post(body: bytes, *headers: str, length: int | None = None) -> bytes:
    """A request by hand."""
    head = ["POST /v1/route HTTP/1.1", "host: x", f"content-length: {len(body) if length is None else length}"]
    return "\r\n".join([*head, "connection: close", *headers, "", ""]).encode() + body


def test_a_decision(client: httpx.Client, ask: Any) -> None:
    answer = client.post("/v1/route", json=ask("a large question"))
    assert answer.status_code == 200
    verdict = answer.json()
    assert (verdict["model"], verdict["candidate"], verdict["reason"], verdict["changed"]) == (
        "large",
        "large",
        "routed",
        True,
    )
    assert verdict["decision"]["quality"]["large"] == 1.0
    assert answer.headers["x-arllm-selected-model"] == "large"
    assert answer.headers["x-arllm-decision-reason"] == "routed"
    assert answer.headers["x-arllm-bundle"] == verdict["bundle"]
    assert client.post("/v1/route", json={"input": "a medium one"}).json()["model"] == "medium"
    assert client.post("/v1/route", json=ask("large", "gpt-5")).json()["reason"] == "pinned"
    metrics = client.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    assert 'arllm_routing_decisions_total{reason="routed",selected_model="large"} 1.0' in metrics.text


def test_models_health_and_readiness(client: httpx.Client) -> None:
    names = [model["id"] for model in client.get("/v1/models").json()["data"]]
    assert names == ["auto", "auto/nir", "auto/hdp", "small", "medium", "large"]
    assert client.get("/healthz").json() == {"status": "ok"}
    ready = client.get("/readyz").json()
    assert (ready["status"], ready["breaker"], ready["queue"]) == ("ready", "closed", 0)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"[]", "expected an object"),
        (b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}', "not UTF-8"),
        (b'{"a":' + b"[" * 100_000, "nested too deeply"),
        (b"{}", "give messages"),
        (b'{"messages": "x"}', "messages must be a list"),
        (b'{"messages": []}', "messages must be a list"),
        (b'{"messages": [1]}', "messages must be a list"),
        (b'{"messages": [{}]}', "needs a role"),
        (b'{"messages": [{"role": "user", "content": 5}]}', "content must be"),
        (b'{"input": 5}', "input must be a list"),
        (b'{"prompt": [5]}', "prompt must be"),
        (b'{"model": 5, "prompt": "x"}', "model must be a string"),
        (b'{"model": "auto", "model": "x", "prompt": "x"}', "twice"),
    ],
)
def test_a_bad_body_is_told_what_is_wrong(client: httpx.Client, body: bytes, message: str) -> None:
    answer = client.post("/v1/route", content=body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert client.get("/healthz").status_code == 200


def test_other_paths_and_methods(client: httpx.Client) -> None:
    assert client.post("/v1/chat/completions", json={}).status_code == 404
    wrong = client.get("/v1/route")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert wrong.json()["error"]["message"]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_20_mb(client: httpx.Client, chunked: bool) -> None:
    body = b'{"prompt": "' + b"x" * (20 * MB) + b'"}'
    answer = client.post("/v1/route", content=iter([body]) if chunked else body)
    assert answer.status_code == 413
    assert "larger than 8000000 bytes" in answer.json()["error"]["message"]
    assert client.post("/v1/route", content=body[: 5 * MB] + b'"}').status_code == 200


def test_a_body_that_never_ends(http_server: Callable[..., httpx.Client], gateway: Gateway) -> None:
    client = http_server(gateway, max_body=1000)

    def endless() -> Iterator[bytes]:
        while True:
            yield b"x" * 1000

    with contextlib.suppress(httpx.WriteError):  # the server stops listening
        assert client.post("/v1/route", content=endless()).status_code == 413
    assert b" 413 " in raw(client, post(b"", "expect: 100-continue", length=2000))
    assert b" 413 " in raw(client, post(b"", length=10**12))


def test_a_slow_client_is_let_go(http_server: Callable[..., httpx.Client], gateway: Gateway, ask: Any) -> None:
    client = http_server(gateway, body_seconds=0.3, idle_seconds=1.0)
    body = json.dumps(ask("large")).encode()
    answer = raw(client, post(body)[:-5])
    assert b" 408 " in answer
    assert b"did not arrive in time" in answer
    assert raw(client, b"POST /v1/route HTTP/1.1\r\nhost: x\r\n") == b""  # headers that never end
    assert b'"large"' in raw(client, post(body)[:-5], pause=body[-5:])


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/one\r\n\r\n",
        b"POST /v1/route HTTP/1.1\r\nhost: x\r\ncontent-length: many\r\n\r\n",
        b"POST /v1/route HTTP/1.1\r\nhost: x\r\nx: a\nb\x00: c\r\n\r\n",
        b"POST /v1/route HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 300_000,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20,
    ],
    ids=["nonsense", "version", "length", "control", "endless header", "tls"],
)
def test_malformed_http_is_refused_and_the_server_lives(client: httpx.Client, data: bytes) -> None:
    answer = raw(client, data)
    assert answer.startswith(b"HTTP/1.1 400")
    assert client.get("/healthz").status_code == 200


@pytest.mark.parametrize("where", ["a header", "the path"])
def test_long_headers_are_refused(client: httpx.Client, where: str) -> None:
    long = "y" * 20_000
    if where == "the path":
        answer = client.get(f"/healthz?{long}")
    else:
        answer = client.get("/healthz", headers={"x-long": long})
    assert answer.status_code in (400, 431)  # 400 where h11 saw a part of it first
    assert client.get("/healthz", headers={"x-long": "y" * 10_000}).status_code == 200


def test_header_injection_reaches_no_header(client: httpx.Client, ask: Any) -> None:
    answer = client.post("/v1/route", json=ask("large", "m\r\nx-evil: 1\r\n\r\nbody"))
    assert answer.status_code == 200
    assert answer.headers["x-arllm-selected-model"] == "m%0D%0Ax-evil: 1%0D%0A%0D%0Abody"
    assert "x-evil" not in answer.headers
    forged = {"x-arllm-selected-model": "forged", "x-arllm-beta": "1"}
    answer = client.post("/v1/route", json=ask("large"), headers=forged)
    assert answer.headers["x-arllm-selected-model"] == "large"
    assert answer.headers["x-arllm-ignored"] == "x-arllm-beta"


def test_client_headers_where_they_are_on(
    http_server: Callable[..., httpx.Client], make_gateway: Callable[..., Gateway], ask: Any
) -> None:
    client = http_server(make_gateway(beta=0.9, beta_bounds=(0.25, 1.0), client_candidates=("small", "medium")))
    headers = {"x-arllm-beta": "0", "x-arllm-candidates": "large,medium"}
    assert client.post("/v1/route", json=ask("large"), headers=headers).json()["model"] == "medium"
    bad = client.post("/v1/route", json=ask("large"), headers={"x-arllm-beta": "cheap"})
    assert (bad.status_code, "x-arllm-beta must be a number" in bad.text) == (400, True)


def test_the_token(http_server: Callable[..., httpx.Client], gateway: Gateway, ask: Any) -> None:
    client = http_server(gateway, token="correct horse")
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "correct horse"},
        {"authorization": "é"},
    ):
        encoded = {name: value.encode("latin-1") for name, value in headers.items()}
        assert client.post("/v1/route", json=ask("large"), headers=encoded).status_code == 401
        assert client.get("/metrics", headers=encoded).status_code == 401
        assert client.get("/v1/models", headers=encoded).status_code == 401
    right = {"authorization": "Bearer correct horse"}
    assert client.post("/v1/route", json=ask("large"), headers=right).status_code == 200
    assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200


def test_1000_idle_connections_keep_nobody_out(client: httpx.Client, ask: Any) -> None:
    with idle(client.base_url.port or 0):
        for _ in range(20):
            assert client.post("/v1/route", json=ask("large")).json()["model"] == "large"


def test_idle_connections_are_closed(http_server: Callable[..., httpx.Client], gateway: Gateway) -> None:
    client = http_server(gateway, idle_seconds=1.0)
    assert raw(client, b"") == b""  # returns: the server has closed
    first = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"
    assert raw(client, first).endswith(b'{"status":"ok"}')
    assert raw(client, first, pause=b"GET /healthz HT").endswith(b'{"status":"ok"}')


def test_too_many_requests_at_once(
    http_server: Callable[..., httpx.Client], make_gateway: Callable[..., Gateway], stub: Any, ask: Any
) -> None:
    gate = threading.Event()
    stub.behave = lambda: gate.wait(20)
    client = http_server(make_gateway(inline=0, deadline_ms=20_000), max_concurrency=2)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(client.post, "/v1/route", json=ask("large")) for _ in range(2)]
        while client.get("/readyz").json()["queue"] < 1 or not stub.calls:
            time.sleep(0.01)
        refused = client.post("/v1/route", json=ask("large"))
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert client.get("/healthz").status_code == 200
        gate.set()
        assert [request.result().status_code for request in waiting] == [200, 200]
    assert client.post("/v1/route", json=ask("large")).status_code == 200  # nothing leaked


@pytest.mark.parametrize("behave", [lambda: 1 / 0, lambda: time.sleep(0.2)], ids=["killed", "stalled"])
def test_a_router_that_dies_loses_no_request(
    http_server: Callable[..., httpx.Client],
    make_gateway: Callable[..., Gateway],
    stub: Any,
    ask: Any,
    behave: Callable[[], object],
) -> None:
    gateway = make_gateway(inline=0, deadline_ms=50, breaker_failures=3, breaker_seconds=1.0)
    client = http_server(gateway)
    with ThreadPoolExecutor(8) as pool:
        before = list(pool.map(lambda i: client.post("/v1/route", json=ask("large")), range(20)))
        stub.behave = behave
        during = list(pool.map(lambda i: client.post("/v1/route", json=ask("large")), range(40)))
    assert {answer.status_code for answer in [*before, *during]} == {200}
    verdicts = [answer.json() for answer in during]
    assert {v["model"] for v in verdicts if v["reason"] != "routed"} == {"small"}
    assert {"breaker"} <= {v["reason"] for v in verdicts} <= {"error", "deadline", "overload", "breaker", "routed"}
    stub.behave = lambda: None
    stop = time.monotonic() + 20
    while client.post("/v1/route", json=ask("large")).json()["reason"] != "routed":
        assert time.monotonic() < stop
        time.sleep(0.02)


def test_a_corrupt_bundle_under_requests_loses_none(
    http_server: Callable[..., httpx.Client], tmp_path: Path, ask: Any
) -> None:
    bundle = Path(shutil.copytree(find_bundle("nano"), tmp_path / "nano"))
    settings: dict[str, Any] = {"bundle": str(bundle), "deadline_ms": 20_000.0, "reload_seconds": 0.05}
    gateway = Gateway(GatewayConfig("google/gemma-2b-it", **settings))
    client = http_server(gateway)
    label = client.get("/readyz").json()["bundle"]
    answers: list[httpx.Response] = []

    def damage() -> None:
        (bundle / "cpu-int8" / "weights.bin").write_bytes(b"corrupt")
        while not gateway.last_reload:
            time.sleep(0.01)

    with ThreadPoolExecutor(1) as pool:
        damaged = pool.submit(damage)
        while not damaged.done() or len(answers) < 20:
            answers.append(client.post("/v1/route", json=ask("What is 17 * 23?")))
        damaged.result()
    assert {(a.status_code, a.json()["reason"], a.json()["bundle"]) for a in answers} == {(200, "routed", label)}
    assert client.get("/readyz").json()["last_reload"].startswith("refused: ")
    assert 'arllm_reloads_total{result="refused"} 1.0' in client.get("/metrics").text
    gateway.close()


def test_a_client_that_leaves_frees_its_place(
    http_server: Callable[..., httpx.Client], make_gateway: Callable[..., Gateway], ask: Any
) -> None:
    client = http_server(make_gateway(), max_concurrency=1)
    for _ in range(5):
        with socket.create_connection((client.base_url.host, client.base_url.port or 0)) as connection:
            connection.sendall(post(b"{", length=1000))
            time.sleep(0.02)
    stop = time.monotonic() + 20
    while client.post("/v1/route", json=ask("large")).status_code != 200:
        assert time.monotonic() < stop
        time.sleep(0.01)


def test_companions_live_as_long_as_the_server(gateway: Gateway) -> None:
    events = []

    @contextlib.asynccontextmanager
    async def companion(given: Gateway) -> Any:
        events.append(given is gateway)
        yield
        events.append("stopped")

    app = make_app(gateway, HttpConfig(), [companion])

    async def main() -> None:
        async with app.router.lifespan_context(app):
            assert events == [True]

    asyncio.run(main())
    assert events == [True, "stopped"]


def test_an_address_that_is_taken_is_named() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"can't listen on 127.0.0.1:{port}: Address already in use"):
            listen("127.0.0.1", port)
