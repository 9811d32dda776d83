"""Envoy: an ext_proc server that reads a request's body, rewrites its model and sets the header that picks the route.

Needs the extra ``envoy``. It knows Envoy's messages and nothing about deciding. Two body modes of Envoy work:
BUFFERED, and FULL_DUPLEX_STREAMED, where the headers wait here until the whole body has come and the route is known.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from types import MappingProxyType

import grpc
from envoy.config.core.v3.base_pb2 import HeaderValue, HeaderValueOption
from envoy.extensions.filters.http.ext_proc.v3.processing_mode_pb2 import ProcessingMode
from envoy.service.ext_proc.v3 import external_processor_pb2 as wire
from envoy.service.ext_proc.v3.external_processor_pb2_grpc import (
    ExternalProcessorServicer,
    add_ExternalProcessorServicer_to_server,
)
from envoy.type.v3.http_status_pb2 import HttpStatus

from arllm.runtime.errors import InputError, QueryError
from arllm.runtime.gateways.asks import PREFIX, header_value, is_ours
from arllm.runtime.gateways.body import Body, parse_body
from arllm.runtime.gateways.gate import Gateway
from arllm.runtime.gateways.sockets import bracketed, listen
from arllm.runtime.gateways.verdict import Verdict

_LOGGER = logging.getLogger("arllm.gateway")

ROUTE_HEADERS: Mapping[str, str] = MappingProxyType(
    {
        "plain": "x-arllm-model",
        "semantic-router": "x-selected-model",  # the vLLM Semantic Router's
        "gateway-api": "x-gateway-model-name",  # the Gateway API inference extension's body-based routing
    }
)
METADATA = "arllm"  # the namespace of what was decided, for Envoy's response headers and access log
CHUNK = 1 << 16  # bytes of a message that streams a body back

_MODES = (ProcessingMode.NONE, ProcessingMode.BUFFERED, ProcessingMode.FULL_DUPLEX_STREAMED)
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9_-]*[a-z0-9])?")
_OTHERS = frozenset({"host", "authorization", "connection", "content-length", "content-type", "transfer-encoding"})


@dataclass(frozen=True)
class EnvoyConfig:
    """The ext_proc server's own settings.

    Attributes:
        port: 0 = any free one.
        route_header: gets the model's name, and Envoy's routes match it: a key of ``ROUTE_HEADERS`` or any name.
        max_body: bytes of a request's body; beyond, 413 (streamed) or the default route (buffered).
        max_held: bytes of streamed bodies that wait for their end, of all requests together; beyond, 503.
        max_streams: requests at once; Envoy sends those beyond to the default route.
        grace_seconds: for accepted requests to finish when the server stops.

    Raises:
        InputError: the route header is no header's name, or one that means something else.
    """

    host: str = "127.0.0.1"
    port: int = 9002
    route_header: str = "plain"
    max_body: int = 8_000_000
    max_held: int = 512_000_000
    max_streams: int = 4096
    grace_seconds: float = 30.0

    def __post_init__(self) -> None:
        name = ROUTE_HEADERS.get(self.route_header, self.route_header).lower()
        if not _NAME.fullmatch(name) or name in _OTHERS:
            raise InputError(
                f"route header: expected {', '.join(ROUTE_HEADERS)} or a header's name, not {self.route_header!r}"
            )
        object.__setattr__(self, "route_header", name)


def parse_address(text: str) -> tuple[str, int]:
    """(host, port) of HOST:PORT, :PORT or PORT. Raises InputError: it is none."""
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or not port.isascii() or int(port) > 65_535:
        raise InputError(f"--envoy: expected HOST:PORT, not {text!r} (a bundle's name goes before the option)")
    return host.strip("[]") or EnvoyConfig.host, int(port)


def companion(config: EnvoyConfig) -> Callable[[Gateway], AbstractAsyncContextManager[int]]:
    """What :func:`arllm.runtime.gateways.server.serve` takes to serve Envoy too; entering it gives the port.

    Raises:
        InputError: the address is taken, or none of this machine.
    """
    listen(config.host, config.port).close()  # gRPC opens its own socket, and says too little where it can't

    @asynccontextmanager
    async def serve(gateway: Gateway) -> AsyncIterator[int]:
        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", config.max_body + CHUNK),
                ("grpc.so_reuseport", 0),
                ("grpc.http2.max_ping_strikes", 0),  # Envoy may ask often whether anybody is here
            ],
            maximum_concurrent_rpcs=config.max_streams,
        )
        add_ExternalProcessorServicer_to_server(Processor(gateway, config), server)
        host = bracketed(config.host)
        port: int = server.add_insecure_port(f"{host}:{config.port}")
        await server.start()
        _LOGGER.info("Envoy's ext_proc on %s:%d, route header %s", host, port, config.route_header)
        try:
            yield port
        finally:
            await server.stop(config.grace_seconds)

    return serve


class Processor(ExternalProcessorServicer):  # type: ignore[misc]
    """The gRPC service: a stream is a request."""

    def __init__(self, gateway: Gateway, config: EnvoyConfig) -> None:
        self.gateway, self.config = gateway, config
        self.held = 0  # bytes of streamed bodies that wait for their end

    async def Process(
        self, requests: AsyncIterator[wire.ProcessingRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[wire.ProcessingResponse]:
        exchange = _Exchange(self)
        try:
            async for message in requests:
                for answer in await exchange.answer(message):
                    yield answer
        except _ModeError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        finally:
            exchange.release()


class _ModeError(Exception):
    """Envoy sends bodies in a way that leaves no time to route."""


@dataclass(frozen=True)
class _Refusal:
    """A request that ends here, with a status and a message for the client."""

    status: int
    message: str

    def answer(self) -> wire.ProcessingResponse:
        error = {"message": self.message, "type": "invalid_request_error", "param": None, "code": None}
        return wire.ProcessingResponse(
            immediate_response=wire.ImmediateResponse(
                status=HttpStatus(code=self.status),
                headers=wire.HeaderMutation(set_headers=[_set("content-type", "application/json")]),
                body=json.dumps({"error": error}).encode(),
                details="arllm",
            )
        )


class _Exchange:
    """One request: Envoy's messages in, answers out, in order."""

    def __init__(self, processor: Processor) -> None:
        self._processor = processor
        self._gateway, self._config = processor.gateway, processor.config
        self._headers: dict[str, str] = {}
        self._mode = ProcessingMode.BUFFERED
        self._chunks: list[bytes] | None = None  # a streamed body that has begun; None = none is waited for
        self._size = 0
        self._verdict: Verdict | None = None

    def release(self) -> None:
        """Forget the body."""
        self._processor.held -= self._size
        self._chunks, self._size = None, 0

    async def answer(self, message: wire.ProcessingRequest) -> Sequence[wire.ProcessingResponse]:
        """The answers to a message; none while a streamed body is incomplete."""
        kind = message.WhichOneof("request")
        if kind == "request_headers":
            if message.HasField("protocol_config"):
                self._mode = message.protocol_config.request_body_mode
            if self._mode not in _MODES:  # the route would be taken before the whole body is here
                mode = ProcessingMode.BodySendMode.Name(self._mode)
                raise _ModeError(f"request_body_mode {mode}: set BUFFERED or FULL_DUPLEX_STREAMED")
            return self._request_headers(message.request_headers)
        if kind == "request_body":
            if self._mode == ProcessingMode.FULL_DUPLEX_STREAMED:
                return await self._streamed(message.request_body)
            return [await self._buffered(message.request_body.body)]
        if kind == "request_trailers":
            ended = [] if self._chunks is None else await self._decided(last=False)
            return [*ended, wire.ProcessingResponse(request_trailers=wire.TrailersResponse())]
        if kind == "response_headers":
            return [self._response_headers()]
        if kind == "response_body":
            return [wire.ProcessingResponse(response_body=wire.BodyResponse())]
        return [wire.ProcessingResponse(response_trailers=wire.TrailersResponse())]

    def _request_headers(self, headers: wire.HttpHeaders) -> Sequence[wire.ProcessingResponse]:
        for header in headers.headers.headers:
            name = header.key.lower()
            value = header.value or header.raw_value.decode("latin-1")
            self._headers[name] = f"{self._headers[name]}, {value}" if name in self._headers else value
        streamed = self._mode == ProcessingMode.FULL_DUPLEX_STREAMED
        if streamed and not headers.end_of_stream and self._readable():
            self._chunks = []
            return []
        return [self._stripped()]

    def _readable(self) -> bool:
        """Whether the body may be JSON; anything else (audio, files) passes."""
        kind = self._headers.get("content-type", "")
        return self._headers.get("content-encoding", "identity") == "identity" and (
            not kind or "json" in kind.lower()
        )

    def _stripped(self) -> wire.ProcessingResponse:
        """Let the headers pass, but for those of routing: a client must not say where its request goes."""
        answer = wire.ProcessingResponse(request_headers=wire.HeadersResponse())
        if removed := self._ours():
            answer.request_headers.response.header_mutation.remove_headers.extend(removed)
            answer.request_headers.response.clear_route_cache = True
        return answer

    def _ours(self) -> list[str]:
        return [name for name in self._headers if is_ours(name) or name == self._config.route_header]

    async def _buffered(self, raw: bytes) -> wire.ProcessingResponse:
        if not self._readable():
            return wire.ProcessingResponse(request_body=wire.BodyResponse())
        found = await self._decide(raw)
        if isinstance(found, _Refusal):
            return found.answer()
        body, verdict = found
        common = wire.CommonResponse(header_mutation=self._route(verdict), clear_route_cache=True)
        if verdict.changed:
            common.body_mutation.body = body.with_model(verdict.model)
            length = str(len(common.body_mutation.body))
            common.header_mutation.set_headers.append(_set("content-length", length))
        return _described(wire.ProcessingResponse(request_body=wire.BodyResponse(response=common)), verdict)

    async def _streamed(self, part: wire.HttpBody) -> Sequence[wire.ProcessingResponse]:
        if self._chunks is None:  # it passes through
            return [_body(part.body, part.end_of_stream)]
        self._size += len(part.body)
        self._processor.held += len(part.body)
        if self._size > self._config.max_body:
            self.release()
            return [_Refusal(413, f"the body is larger than {self._config.max_body} bytes").answer()]
        if self._processor.held > self._config.max_held:
            self.release()
            return [_Refusal(503, "too many large requests at once").answer()]
        self._chunks.append(part.body)
        return await self._decided(last=True) if part.end_of_stream else []

    async def _decided(self, *, last: bool) -> Sequence[wire.ProcessingResponse]:
        """The headers that waited, and the body. ``last``: no trailers follow."""
        assert self._chunks is not None
        raw = b"".join(self._chunks)
        self.release()
        found = await self._decide(raw)
        if isinstance(found, _Refusal):
            return [found.answer()]
        body, verdict = found
        if verdict.changed:
            raw = body.with_model(verdict.model)
        mutation = self._route(verdict)
        changed = {option.header.key for option in mutation.set_headers}
        mutation.remove_headers.extend(name for name in self._ours() if name not in changed)
        common = wire.CommonResponse(header_mutation=mutation, clear_route_cache=True)
        headers = wire.ProcessingResponse(request_headers=wire.HeadersResponse(response=common))
        starts = range(0, len(raw), CHUNK)
        return [
            _described(headers, verdict),
            *(_body(raw[at : at + CHUNK], last and at == starts[-1]) for at in starts),
        ]

    async def _decide(self, raw: bytes) -> tuple[Body, Verdict] | _Refusal:
        try:
            body = parse_body(raw)
        except QueryError as error:
            return _Refusal(400, str(error))
        self._verdict = await self._gateway.handle(body.data, self._headers, client=_client(self._headers))
        return body, self._verdict

    def _route(self, verdict: Verdict) -> wire.HeaderMutation:
        """The route header; none for a body that names no model: it goes the default route."""
        value = header_value(verdict.model)
        return wire.HeaderMutation(set_headers=[_set(self._config.route_header, value)] if value else [])

    def _response_headers(self) -> wire.ProcessingResponse:
        """What was decided, for the client: only where Envoy sends the response's headers."""
        answer = wire.ProcessingResponse(response_headers=wire.HeadersResponse())
        if self._verdict is not None:
            options = [_set(name, value) for name, value in self._verdict.headers().items()]
            answer.response_headers.response.header_mutation.set_headers.extend(options)
        return answer


def _set(name: str, value: str) -> HeaderValueOption:
    return HeaderValueOption(
        header=HeaderValue(key=name, raw_value=value.encode("ascii")),
        append_action=HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD,
    )


def _body(data: bytes, end: bool) -> wire.ProcessingResponse:
    streamed = wire.StreamedBodyResponse(body=data, end_of_stream=end)
    common = wire.CommonResponse(body_mutation=wire.BodyMutation(streamed_response=streamed))
    return wire.ProcessingResponse(request_body=wire.BodyResponse(response=common))


def _described(answer: wire.ProcessingResponse, verdict: Verdict) -> wire.ProcessingResponse:
    """With the decision as metadata, by its headers' short names: ``%DYNAMIC_METADATA(arllm:selected-model)%``."""
    fields = answer.dynamic_metadata.fields[METADATA].struct_value.fields
    for name, value in verdict.headers().items():
        fields[name[len(PREFIX) :]].string_value = value
    return answer


def _client(headers: Mapping[str, str]) -> str:
    """Who asks: a hash of the key, so that conversations of different clients are never one."""
    key = headers.get("authorization") or headers.get("x-api-key") or ""
    return hashlib.blake2b(key.encode("latin-1", "replace"), digest_size=16).hexdigest() if key else ""
