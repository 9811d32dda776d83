"""Tests of the ext_proc server: Envoy's messages in, answers out, through real gRPC; and what breaks."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arllm.runtime.errors import InputError
from arllm.runtime.gateways.gate import Gateway

grpc = pytest.importorskip("grpc", reason="the extra envoy is not installed")
pytest.importorskip("envoy.service.ext_proc.v3", reason="the extra envoy (xds-protos) is not installed")

from envoy.extensions.filters.http.ext_proc.v3.processing_mode_pb2 import ProcessingMode  # noqa: E402
from envoy.service.ext_proc.v3 import external_processor_pb2 as wire  # noqa: E402
from ext_proc import (  # noqa: E402
    BUFFERED,
    JSON,
    STREAMED,
    ExternalProcessorStub,
    body,
    described,
    exchange,
    headers,
    reads,
    refusal,
    serving,
    set_by,
    talk,
    trailers,
)

from arllm.runtime.gateways.envoy import CHUNK, EnvoyConfig, Processor, companion, parse_address  # noqa: E402

MakeGateway = Callable[..., Gateway]


def test_a_buffered_request_gets_its_model_and_its_route(gateway: Gateway, ask: Any) -> None:
    raw = json.dumps(ask("the large one", temperature=0.5)).encode()
    first, second = talk(gateway, headers(), body(raw))
    assert first == wire.ProcessingResponse(request_headers=wire.HeadersResponse())
    common = second.request_body.response
    assert json.loads(common.body_mutation.body) == ask("the large one", "large", temperature=0.5)
    assert set_by(common) == {
        "x-arllm-model": "large",
        "content-length": str(len(common.body_mutation.body)),
    }
    assert common.clear_route_cache
    found = described(second)
    assert float(found.pop("routing-ms")) > 0
    assert found == {"selected-model": "large", "decision-reason": "routed", "bundle": "stub@" + "ab" * 6}


def test_a_concrete_model_keeps_its_bytes(gateway: Gateway, ask: Any) -> None:
    _, second = talk(gateway, headers(), body(json.dumps(ask("the large one", "gpt-x")).encode()))
    common = second.request_body.response
    assert not common.HasField("body_mutation")
    assert set_by(common) == {"x-arllm-model": "gpt-x"}
    assert described(second)["decision-reason"] == "pinned"


def test_a_body_without_a_model_goes_the_default_route(gateway: Gateway) -> None:
    _, second = talk(gateway, headers(), body(b'{"input": "x"}'))
    assert not second.request_body.response.HasField("body_mutation")
    assert set_by(second.request_body.response) == {}


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("plain", "x-arllm-model"),
        ("semantic-router", "x-selected-model"),
        ("gateway-api", "x-gateway-model-name"),
        ("X-Gateway-Model-Name", "x-gateway-model-name"),
        ("x-mine", "x-mine"),
    ],
)
def test_the_route_header_is_the_operators(gateway: Gateway, ask: Any, given: str, name: str) -> None:
    sent = {**JSON, name: "large"}
    first, second = talk(gateway, headers(sent), body(json.dumps(ask("medium")).encode()), route_header=given)
    assert list(first.request_headers.response.header_mutation.remove_headers) == [name]
    assert set_by(second.request_body.response)[name] == "medium"


def test_bad_settings_are_refused() -> None:
    for name in ("", ":authority", "two words", "x\r\ny", "Host", "content-length", "x-é"):
        with pytest.raises(InputError, match="route header: expected plain, semantic-router, gateway-api or"):
            EnvoyConfig(route_header=name)
    for text in ("nano", "localhost:", "a:b", ":70000", "9002x"):
        with pytest.raises(InputError, match="expected HOST:PORT"):
            parse_address(text)
    assert parse_address("9002") == parse_address(":9002") == ("127.0.0.1", 9002)
    assert parse_address("[::1]:1") == ("::1", 1)
    assert parse_address("0.0.0.0:50051") == ("0.0.0.0", 50051)


def test_a_taken_port_is_named(gateway: Gateway) -> None:
    async def run() -> None:
        async with companion(EnvoyConfig(port=0))(gateway) as port:
            with pytest.raises(InputError, match=f"can't listen on 127.0.0.1:{port}: "):
                companion(EnvoyConfig(port=port))

    asyncio.run(run())


def test_decision_headers_of_a_client_are_heard_within_bounds_and_removed(
    make_gateway: MakeGateway, stub: Any, ask: Any
) -> None:
    gateway = make_gateway(beta_bounds=(0.0, 0.3))
    sent = [*JSON.items(), ("X-ARLLM-Beta", "0.9"), ("x-arllm-selected-model", "large"), ("x-arllm-model", "large")]
    for mode in (BUFFERED, STREAMED):
        answers = talk(gateway, headers(sent, mode), body(json.dumps(ask("hello")).encode()))
        assert stub.calls[-1][1] == 0.3
        common = answers[0].request_headers.response
        removed = set(common.header_mutation.remove_headers)
        assert common.clear_route_cache
        assert removed | set(set_by(common)) == {"x-arllm-beta", "x-arllm-selected-model", "x-arllm-model"}
        assert set_by(common).get("x-arllm-model") != "large"


def test_a_repeated_header_counts_once_with_all_its_values(make_gateway: MakeGateway, stub: Any, ask: Any) -> None:
    gateway = make_gateway(client_candidates=("*",))
    sent = [*JSON.items(), ("x-arllm-candidates", "medium"), ("x-arllm-candidates", "large")]
    talk(gateway, headers(sent), body(json.dumps(ask("hello")).encode()))
    assert sorted(stub.calls[-1][3]) == ["large", "medium"]


def test_a_streamed_request_waits_for_its_end(gateway: Gateway, ask: Any) -> None:
    raw = json.dumps(ask("the large one", pad="x" * 3 * CHUNK)).encode()

    async def run() -> None:
        async with serving(gateway) as stub:
            call = stub.Process()
            await call.write(headers(mode=STREAMED))
            await call.write(body(raw[:10], end=False))
            reading = asyncio.ensure_future(call.read())
            await asyncio.sleep(0.05)
            assert not reading.done()
            await call.write(body(raw[10:]))
            first = await reading
            await call.done_writing()
            rest = [answer async for answer in reads(call)]
        parts = [answer.request_body.response.body_mutation.streamed_response for answer in rest]
        assert set_by(first.request_headers.response) == {"x-arllm-model": "large"}
        assert first.request_headers.response.clear_route_cache
        assert described(first)["selected-model"] == "large"
        assert json.loads(b"".join(part.body for part in parts)) == {**json.loads(raw), "model": "large"}
        assert [part.end_of_stream for part in parts] == [False] * (len(parts) - 1) + [True]
        assert len(parts) == 4
        assert max(len(part.body) for part in parts) <= CHUNK

    asyncio.run(run())


def test_trailers_end_a_streamed_body_too(gateway: Gateway, ask: Any) -> None:
    raw = json.dumps(ask("the large one")).encode()
    answers = talk(gateway, headers(mode=STREAMED), body(raw, end=False), trailers())
    kinds = [answer.WhichOneof("response") for answer in answers]
    assert kinds == ["request_headers", "request_body", "request_trailers"]
    streamed = answers[1].request_body.response.body_mutation.streamed_response
    assert json.loads(streamed.body)["model"] == "large"
    assert not streamed.end_of_stream
    kinds = [a.WhichOneof("response") for a in talk(gateway, headers(), body(raw, end=False), trailers())]
    assert kinds == ["request_headers", "request_body", "request_trailers"]


@pytest.mark.parametrize("fields", [{"content-type": "audio/wav"}, {**JSON, "content-encoding": "gzip"}])
def test_what_is_not_json_passes(gateway: Gateway, stub: Any, fields: dict[str, str]) -> None:
    data = b"\xff\x00{"
    first, second = talk(gateway, headers(fields), body(data))
    assert first == wire.ProcessingResponse(request_headers=wire.HeadersResponse())
    assert second == wire.ProcessingResponse(request_body=wire.BodyResponse())
    first, *parts = talk(gateway, headers(fields, STREAMED), body(data, end=False), body(b"z"))
    assert first == wire.ProcessingResponse(request_headers=wire.HeadersResponse())
    streamed = [part.request_body.response.body_mutation.streamed_response for part in parts]
    assert [(part.body, part.end_of_stream) for part in streamed] == [(data, False), (b"z", True)]
    assert stub.calls == []


def test_a_request_without_a_body_passes(gateway: Gateway, stub: Any) -> None:
    for mode in (BUFFERED, STREAMED, ProcessingMode.NONE, None):
        (answer,) = talk(gateway, headers({":method": "GET", "x-arllm-model": "large"}, mode, end=True))
        assert list(answer.request_headers.response.header_mutation.remove_headers) == ["x-arllm-model"]
    assert stub.calls == []


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not valid JSON"),
        (b'{"model": ', "not valid JSON"),
        (b'["auto"]', "expected an object"),
        (b'{"model": "auto", "x": "\xff"}', "not UTF-8: byte 24"),
        (b'{"model": "auto", "model": "large"}', 'names "model" twice'),
        (b'{"model": "auto", "x": ' + b"[" * 200_000, "nested too deeply"),
    ],
)
def test_a_bad_body_is_refused_with_the_cause(gateway: Gateway, stub: Any, raw: bytes, message: str) -> None:
    for mode in (BUFFERED, STREAMED):
        status, said = refusal(talk(gateway, headers(mode=mode), body(raw))[-1])
        assert status == 400
        assert message in said
    assert stub.calls == []


def test_a_model_name_can_not_inject_headers(gateway: Gateway, ask: Any) -> None:
    _, second = talk(gateway, headers(), body(json.dumps(ask("x", "m\r\nx-evil: é")).encode()))
    assert set_by(second.request_body.response) == {"x-arllm-model": "m%0D%0Ax-evil: %C3%A9"}
    assert described(second)["selected-model"] == "m%0D%0Ax-evil: %C3%A9"


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200) | st.text(max_size=100).map(lambda text: json.dumps({"model": text}).encode()))
def test_every_body_has_one_answer(gateway: Gateway, raw: bytes) -> None:
    async def messages() -> AsyncIterator[wire.ProcessingRequest]:
        yield headers()
        yield body(raw)

    async def run() -> list[wire.ProcessingResponse]:
        return [answer async for answer in Processor(gateway, EnvoyConfig()).Process(messages(), None)]

    _, answer = asyncio.run(run())
    if answer.WhichOneof("response") == "immediate_response":
        assert refusal(answer)[0] == 400
    else:
        sent = set_by(answer.request_body.response)
        assert all(value.isprintable() and value.isascii() for value in sent.values())


def test_the_response_says_what_was_decided(gateway: Gateway, ask: Any) -> None:
    response = wire.ProcessingRequest(response_headers=wire.HttpHeaders())
    raw = json.dumps(ask("the large one")).encode()
    *_, answer = talk(gateway, headers(), body(raw), response)
    found = set_by(answer.response_headers.response)
    assert found["x-arllm-selected-model"] == "large"
    assert found["x-arllm-decision-reason"] == "routed"
    *_, answer = talk(gateway, headers(end=True), response)
    assert set_by(answer.response_headers.response) == {}


def test_messages_that_were_not_asked_for_are_answered_in_kind(gateway: Gateway) -> None:
    answers = talk(
        gateway,
        wire.ProcessingRequest(response_body=wire.HttpBody(body=b"x")),
        wire.ProcessingRequest(response_trailers=wire.HttpTrailers()),
    )
    assert answers == [
        wire.ProcessingResponse(response_body=wire.BodyResponse()),
        wire.ProcessingResponse(response_trailers=wire.TrailersResponse()),
    ]


def test_shadow_mode_routes_as_without_arllm(make_gateway: MakeGateway, ask: Any) -> None:
    gateway = make_gateway(shadow=True)
    _, second = talk(gateway, headers(), body(json.dumps(ask("the large one")).encode()))
    assert set_by(second.request_body.response)["x-arllm-model"] == "small"
    found = described(second)
    assert (found["shadow-model"], found["decision-reason"]) == ("large", "shadow")


def test_conversations_of_different_keys_are_never_one(make_gateway: MakeGateway, ask: Any) -> None:
    gateway = make_gateway(sticky_margin=10.0)
    chosen = []
    for key, text in (("a", "large"), ("a", "medium"), ("b", "medium")):
        sent = {**JSON, "authorization": f"Bearer {key}", "x-arllm-session": "1"}
        _, second = talk(gateway, headers(sent), body(json.dumps(ask(text)).encode()))
        chosen.append(set_by(second.request_body.response)["x-arllm-model"])
    assert chosen == ["large", "large", "medium"]


@pytest.mark.parametrize("mode", [ProcessingMode.STREAMED, ProcessingMode.BUFFERED_PARTIAL])
def test_a_body_mode_that_leaves_no_time_to_route_is_named(gateway: Gateway, mode: int) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="set BUFFERED or FULL_DUPLEX_STREAMED") as raised:
        talk(gateway, headers(mode=mode))
    assert raised.value.code() == grpc.StatusCode.FAILED_PRECONDITION


def test_an_older_envoy_that_does_not_name_its_mode_buffers(gateway: Gateway, ask: Any) -> None:
    _, second = talk(gateway, headers(mode=None), body(json.dumps(ask("the large one")).encode()))
    assert set_by(second.request_body.response)["x-arllm-model"] == "large"


def test_a_router_that_fails_or_hangs_means_the_default_model(make_gateway: MakeGateway, stub: Any, ask: Any) -> None:
    def fail() -> None:
        raise RuntimeError("broken")

    raw = json.dumps(ask("the large one")).encode()
    for behave, reason in ((fail, "error"), (lambda: time.sleep(2), "deadline")):
        stub.behave = behave
        gateway = make_gateway(inline=0, deadline_ms=500.0)
        _, second = talk(gateway, headers(), body(raw))
        assert set_by(second.request_body.response)["x-arllm-model"] == "small"
        assert json.loads(second.request_body.response.body_mutation.body)["model"] == "small"
        assert described(second)["decision-reason"] == reason


def test_stopping_finishes_what_was_accepted(gateway: Gateway, ask: Any) -> None:
    async def run() -> None:
        server = companion(EnvoyConfig(port=0))(gateway)
        port = await server.__aenter__()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = ExternalProcessorStub(channel)
            call = stub.Process()
            await call.write(headers())
            await call.read()
            stopping: asyncio.Future[Any] = asyncio.ensure_future(_coroutine(server.__aexit__(None, None, None)))
            await asyncio.sleep(0.05)
            assert not stopping.done()
            await call.write(body(json.dumps(ask("the large one")).encode()))
            assert set_by((await call.read()).request_body.response)["x-arllm-model"] == "large"
            await call.done_writing()
            assert await call.code() == grpc.StatusCode.OK
            await asyncio.wait_for(stopping, 10)

    asyncio.run(run())


async def _coroutine(awaitable: Any) -> Any:
    return await awaitable


def test_many_requests_at_once_keep_apart(make_gateway: MakeGateway, ask: Any) -> None:
    gateway = make_gateway(max_queue=100, deadline_ms=60_000.0)
    names = ["small", "medium", "large"] * 20

    async def run() -> list[list[wire.ProcessingResponse]]:
        async with serving(gateway) as stub:
            calls: list[Coroutine[Any, Any, list[wire.ProcessingResponse]]] = [
                exchange(stub, headers(), body(json.dumps(ask(name)).encode())) for name in names
            ]
            return list(await asyncio.gather(*calls))

    found = [set_by(answers[1].request_body.response)["x-arllm-model"] for answers in asyncio.run(run())]
    assert found == names
