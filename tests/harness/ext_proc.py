"""A client of the ext_proc server through real gRPC: Envoy's messages, and reading the answers. Of the tests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
from envoy.config.core.v3.base_pb2 import HeaderMap, HeaderValue
from envoy.extensions.filters.http.ext_proc.v3.processing_mode_pb2 import ProcessingMode
from envoy.service.ext_proc.v3 import external_processor_pb2 as wire
from envoy.service.ext_proc.v3.external_processor_pb2_grpc import ExternalProcessorStub

from arllm.runtime.gateways.envoy import EnvoyConfig, companion
from arllm.runtime.gateways.gate import Gateway

BUFFERED, STREAMED = ProcessingMode.BUFFERED, ProcessingMode.FULL_DUPLEX_STREAMED
JSON = {":method": "POST", ":path": "/v1/chat/completions", "content-type": "application/json"}


def headers(
    fields: Mapping[str, str] | Sequence[tuple[str, str]] = JSON, mode: int | None = BUFFERED, *, end: bool = False
) -> wire.ProcessingRequest:
    pairs = fields.items() if isinstance(fields, Mapping) else fields
    values = [HeaderValue(key=name, raw_value=value.encode("latin-1")) for name, value in pairs]
    message = wire.ProcessingRequest(
        request_headers=wire.HttpHeaders(headers=HeaderMap(headers=values), end_of_stream=end)
    )
    if mode is not None:
        message.protocol_config.request_body_mode = mode
    return message


def body(data: bytes, *, end: bool = True) -> wire.ProcessingRequest:
    return wire.ProcessingRequest(request_body=wire.HttpBody(body=data, end_of_stream=end))


def trailers() -> wire.ProcessingRequest:
    return wire.ProcessingRequest(request_trailers=wire.HttpTrailers())


@asynccontextmanager
async def serving(gateway: Gateway, **options: Any) -> AsyncIterator[ExternalProcessorStub]:
    async with (
        companion(EnvoyConfig(port=0, **options))(gateway) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        yield ExternalProcessorStub(channel)


async def exchange(stub: ExternalProcessorStub, *messages: wire.ProcessingRequest) -> list[wire.ProcessingResponse]:
    call = stub.Process()
    for message in messages:
        await call.write(message)
    await call.done_writing()
    return [answer async for answer in call]


async def reads(call: Any) -> AsyncIterator[wire.ProcessingResponse]:
    """The answers still to come; a call that was read by hand takes no ``async for``."""
    while (answer := await call.read()) is not grpc.aio.EOF:
        yield answer


def talk(gateway: Gateway, *messages: wire.ProcessingRequest, **options: Any) -> list[wire.ProcessingResponse]:
    """All answers to one request's messages."""

    async def run() -> list[wire.ProcessingResponse]:
        async with serving(gateway, **options) as stub:
            return await exchange(stub, *messages)

    return asyncio.run(run())


def set_by(common: wire.CommonResponse) -> dict[str, str]:
    """Headers that an answer sets; each replaces what was there."""
    options = common.header_mutation.set_headers
    assert all(option.append_action == option.OVERWRITE_IF_EXISTS_OR_ADD for option in options)
    return {option.header.key: option.header.raw_value.decode() for option in options}


def described(answer: wire.ProcessingResponse) -> dict[str, str]:
    """The decision in an answer's metadata."""
    fields = answer.dynamic_metadata.fields["arllm"].struct_value.fields
    return {name: value.string_value for name, value in fields.items()}


def refusal(answer: wire.ProcessingResponse) -> tuple[int, str]:
    assert answer.WhichOneof("response") == "immediate_response"
    immediate = answer.immediate_response
    return immediate.status.code, json.loads(immediate.body)["error"]["message"]
