"""``arllm serve``: decisions over HTTP. Starlette and uvicorn; it proxies no completions, gateways do that.

Needs the extra ``serve``. Everything that a client sends is bounded here: headers, body, time, concurrency.
"""

from __future__ import annotations

import asyncio
import hmac
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import h11
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from arllm.runtime.errors import QueryError
from arllm.runtime.gateways import openapi
from arllm.runtime.gateways.body import parse_body
from arllm.runtime.gateways.gate import Gateway
from arllm.runtime.gateways.sockets import bracketed, listen

# A server that lives beside the HTTP one, in its event loop, for as long as that serves: the seam for `--envoy`.
Companion = Callable[[Gateway], AbstractAsyncContextManager[object]]

DISCARDED = 8  # times max_body: so much of a body that is too large is read, so that its sender hears the answer


@dataclass(frozen=True)
class HttpConfig:
    """The server's own settings.

    Attributes:
        token: asked of everybody as a bearer token, but for /healthz, /readyz and /openapi.json.
        max_body: bytes of a request's body; max_header: of its request line and headers together.
        max_concurrency: requests at once; beyond, 503.
        body_seconds: for a body to arrive; idle_seconds: for a connection without a request.
        grace_seconds: for accepted requests to finish when the server stops.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    token: str | None = None
    max_body: int = 8_000_000
    max_header: int = 16_384
    max_concurrency: int = 256
    body_seconds: float = 10.0
    idle_seconds: float = 30.0
    grace_seconds: float = 30.0


def make_app(gateway: Gateway, config: HttpConfig, companions: Sequence[Companion] = ()) -> Starlette:
    """The ASGI application. It does not close the gateway."""
    server = _Server(gateway, config)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for companion in companions:
                await stack.enter_async_context(companion(gateway))
            yield

    app = Starlette(
        routes=[
            Route("/v1/route", server.guarded(server.route), methods=["POST"]),
            Route("/v1/models", server.guarded(server.models), methods=["GET"]),
            Route("/metrics", server.guarded(server.metrics), methods=["GET"]),
            Route("/healthz", server.healthz, methods=["GET"]),
            Route("/readyz", server.readyz, methods=["GET"]),
            Route("/openapi.json", server.openapi, methods=["GET"]),
        ],
        exception_handlers={HTTPException: _refuse, Exception: _fail},
        lifespan=lifespan,
    )
    app.add_middleware(_HeaderLimit, limit=config.max_header)
    return app


def make_server(gateway: Gateway, config: HttpConfig, companions: Sequence[Companion] = ()) -> uvicorn.Server:
    """uvicorn, with every bound of ``config``; ``run(sockets=[listener])`` serves."""
    return uvicorn.Server(
        uvicorn.Config(
            make_app(gateway, config, companions),
            http=_Protocol,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=max(1, round(config.idle_seconds)),
            timeout_graceful_shutdown=max(1, round(config.grace_seconds)),
            h11_max_incomplete_event_size=config.max_header,
        )
    )


def serve(
    gateway: Gateway,
    config: HttpConfig,
    companions: Sequence[Companion] = (),
    started: Callable[[str], None] = lambda address: None,
) -> None:
    """Serve until SIGTERM or SIGINT, then finish what was accepted. SIGHUP reloads the bundle.

    Args:
        started: gets the address, where connections are taken from now on.

    Raises:
        InputError: the address can't be listened on.
    """
    _more_files()
    with listen(config.host, config.port) as listener:
        host, port = listener.getsockname()[:2]
        server = make_server(gateway, config, (*companions, _reload_on_hangup))
        # uvicorn raises the signal again once it has stopped: a stop that was asked for is a success.
        before = {stop: signal.signal(stop, lambda *_: None) for stop in (signal.SIGTERM, signal.SIGINT)}
        try:
            started(f"http://{bracketed(host)}:{port}")
            server.run(sockets=[listener])
        finally:
            for stop, handler in before.items():
                signal.signal(stop, handler)


class _Server:
    """The endpoints."""

    def __init__(self, gateway: Gateway, config: HttpConfig) -> None:
        self._gateway, self._config = gateway, config
        self._expected = None if config.token is None else f"Bearer {config.token}".encode()
        self._running = 0
        self._openapi = openapi.description(gateway.config, with_token=config.token is not None)

    def guarded(self, endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """The endpoint behind the token and the bound on concurrency."""

        async def call(request: Request) -> Response:
            given = request.headers.get("authorization", "").encode("latin-1")
            if self._expected is not None and not hmac.compare_digest(given, self._expected):
                raise HTTPException(401, "the bearer token is missing or wrong", {"www-authenticate": "Bearer"})
            if self._running >= self._config.max_concurrency:
                raise HTTPException(503, "too many requests at once", {"retry-after": "1"})
            self._running += 1
            try:
                return await endpoint(request)
            finally:
                self._running -= 1

        return call

    async def route(self, request: Request) -> Response:
        try:
            raw = await asyncio.wait_for(self._body(request), self._config.body_seconds)
        except asyncio.TimeoutError:
            raise HTTPException(408, "the body did not arrive in time", {"connection": "close"}) from None
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        try:
            body = parse_body(raw).data
        except QueryError as error:
            raise HTTPException(400, str(error)) from None
        wrong = openapi.problem(body, request.headers, self._gateway.config)
        if wrong is not None:
            raise HTTPException(400, wrong)
        body.setdefault("model", self._gateway.config.alias)
        verdict = await self._gateway.handle(body, request.headers)
        decision = None
        if verdict.decision is not None:
            shown = verdict.decision.to_dict().items()
            decision = {name: value for name, value in shown if name not in ("domains", "embedding")}
        answer = {
            "model": verdict.model,
            "reason": verdict.reason,
            "changed": verdict.changed,
            "candidate": verdict.candidate,
            "bundle": verdict.bundle,
            "routing_ms": round(verdict.routing_ms, 3),
            "ignored": list(verdict.ignored),
            "decision": decision,
        }
        return JSONResponse(answer, headers=verdict.headers())

    async def _body(self, request: Request) -> bytes:
        limit = self._config.max_body
        length = request.headers.get("content-length", "0")
        told = int(length) if length.isdecimal() else 0
        data = bytearray()
        size = 0
        if told > limit and (told > DISCARDED * limit or "expect" in request.headers):
            raise self._too_large()
        async for chunk in request.stream():
            size += len(chunk)
            if size <= limit:
                data += chunk
            elif size > DISCARDED * limit:
                break
            else:
                data.clear()
        if size > limit:
            raise self._too_large()
        return bytes(data)

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"the body is larger than {self._config.max_body} bytes", {"connection": "close"})

    async def models(self, request: Request) -> Response:
        config, router = self._gateway.config, self._gateway.engine.router
        names = [config.alias, *(f"{config.alias}/{policy}" for policy in router.policies)]
        data: list[dict[str, Any]] = [{"id": name, "object": "model", "owned_by": "arllm"} for name in names]
        data += [
            {"id": config.upstream(c.name), "object": "model", "candidate": c.name, "cost": c.cost}
            for c in router.pool.candidates
        ]
        return JSONResponse({"object": "list", "data": data})

    async def metrics(self, request: Request) -> Response:
        assert self._gateway.metrics is not None  # the extra serve brings prometheus_client
        text, kind = self._gateway.metrics.exposition()
        return Response(text, headers={"content-type": kind})

    async def healthz(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def readyz(self, request: Request) -> Response:
        gateway = self._gateway
        return JSONResponse(
            {
                "status": "ready",
                "bundle": gateway.engine.label,
                "variant": gateway.engine.router.variant,
                "deadline_ms": round(gateway.engine.deadline * 1e3, 3),
                "queue": gateway.queue_length,
                "breaker": "open" if gateway.breaker_open else "closed",
                "last_reload": gateway.last_reload or None,
            }
        )

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(self._openapi)


class _HeaderLimit:
    """Refuses long headers that came in one piece; of those that trickle in, h11 buffers no more than the limit."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            size = len(scope["raw_path"]) + len(scope["query_string"])
            size += sum(len(name) + len(value) + 4 for name, value in scope["headers"])
            if size > self._limit:
                refusal = JSONResponse({"error": {"message": f"the headers exceed {self._limit} bytes"}}, 431)
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)


class _Protocol(H11Protocol):
    """uvicorn's HTTP/1.1 on h11, and a bound on how long headers take to arrive."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._forget()

    def _watch(self) -> None:
        """The timer runs from a request's first byte (or the connection's begin) until its headers are complete."""
        if self.conn.their_state is not h11.IDLE:
            self._forget()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self.config.timeout_keep_alive, self._late)

    def _late(self) -> None:
        self._deadline = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.transport.close()

    def _forget(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


@asynccontextmanager
async def _reload_on_hangup(gateway: Gateway) -> AsyncIterator[None]:
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, lambda: loop.run_in_executor(None, gateway.try_reload))
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": {"message": error.detail}}, error.status_code, headers=error.headers)


async def _fail(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": {"message": "internal error"}}, 500)


def _more_files() -> None:
    """Idle connections are files: raise the soft limit to the hard one, as far as a server needs."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
