"""Tests of what the ext_proc server bounds: bodies, what is held of them, streams and connections."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from arllm.runtime.gateways.gate import Gateway

grpc = pytest.importorskip("grpc", reason="the extra envoy is not installed")
pytest.importorskip("envoy.service.ext_proc.v3", reason="the extra envoy (xds-protos) is not installed")

from envoy.service.ext_proc.v3 import external_processor_pb2 as wire  # noqa: E402
from ext_proc import (  # noqa: E402
    STREAMED,
    ExternalProcessorStub,
    body,
    exchange,
    headers,
    refusal,
    serving,
    set_by,
    talk,
)
from idle import idle  # noqa: E402

from arllm.runtime.gateways.envoy import CHUNK, EnvoyConfig, companion  # noqa: E402


def test_a_streamed_body_that_is_too_large_is_refused_and_forgotten(gateway: Gateway, ask: Any) -> None:
    raw = json.dumps(ask("x", pad="x" * 1000)).encode()
    (answer,) = talk(gateway, headers(mode=STREAMED), body(raw), max_body=1000)
    assert refusal(answer) == (413, "the body is larger than 1000 bytes")
    assert len(talk(gateway, headers(mode=STREAMED), body(raw), max_body=len(raw))) == 2


def test_unfinished_bodies_are_bounded_together_and_forgotten(gateway: Gateway, ask: Any) -> None:
    raw = json.dumps(ask("the large one", pad="x" * 500)).encode()

    async def run() -> None:
        async with serving(gateway, max_held=1000) as stub:
            waiting = stub.Process()
            await waiting.write(headers(mode=STREAMED))
            await waiting.write(body(raw[:-1], end=False))
            while True:  # the other stream may be read first
                *_, answer = await exchange(stub, headers(mode=STREAMED), body(raw))
                if answer.WhichOneof("response") == "immediate_response":
                    break
            assert refusal(answer) == (503, "too many large requests at once")
            waiting.cancel()
            while answer.WhichOneof("response") != "request_body":
                *_, answer = await exchange(stub, headers(mode=STREAMED), body(raw))

    asyncio.run(asyncio.wait_for(run(), 30))


def test_a_buffered_message_beyond_the_limit_ends_the_stream(gateway: Gateway) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:  # Envoy then takes the default route
        talk(gateway, headers(), body(b" " * (2 * CHUNK)), max_body=1000)
    assert raised.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_streams_are_bounded(gateway: Gateway, ask: Any) -> None:
    async def run() -> None:
        async with serving(gateway, max_streams=1) as stub:
            first = stub.Process()
            await first.write(headers())
            await first.read()
            assert await stub.Process().code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            await first.write(body(json.dumps(ask("the large one")).encode()))
            assert set_by((await first.read()).request_body.response)["x-arllm-model"] == "large"
            await first.done_writing()
            assert await first.code() == grpc.StatusCode.OK

    asyncio.run(run())


def test_1000_idle_connections_keep_nobody_out(gateway: Gateway, ask: Any) -> None:
    async def run() -> list[wire.ProcessingResponse]:
        async with companion(EnvoyConfig(port=0))(gateway) as port:
            with idle(port):
                async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                    message = body(json.dumps(ask("the large one")).encode())
                    return await exchange(ExternalProcessorStub(channel), headers(), message)

    _, answer = asyncio.run(run())
    assert set_by(answer.request_body.response)["x-arllm-model"] == "large"
