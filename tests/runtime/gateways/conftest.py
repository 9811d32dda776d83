"""Fixtures of the gateways' tests: a router of three candidates that does as told, gateways and servers around it."""

from __future__ import annotations

import dataclasses
import gc
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

from arllm.runtime.answer import Decision
from arllm.runtime.decision import candidate_mask, choose, normalize_costs, utility
from arllm.runtime.gateways.calibration import Calibration
from arllm.runtime.gateways.config import GatewayConfig
from arllm.runtime.gateways.engine import Engine
from arllm.runtime.gateways.gate import Gateway
from arllm.runtime.pool import Candidate, Pool
from arllm.runtime.router import Router

POOL = Pool(
    (
        Candidate(
            "small", 0.1, (0.5,), {"context_length": 1000, "vision": False, "tools": False, "json_mode": False}
        ),
        Candidate("medium", 1.0, (0.7,), {"max_input_tokens": "8000", "supports_vision": "no", "tools": True}),
        Candidate("large", 10.0, (0.9,), {"context_length": 100_000, "vision": True, "tools": True}),
    ),
    "USD",
)
QUALITY = {"small": 0.5, "medium": 0.7, "large": 0.9}


class StubRouter:
    """Routes like the real one, but its qualities are a candidate's name in the query: "… large …" → large is best.

    ``behave`` runs before every decision: it may sleep, raise, or count.
    """

    def __init__(self, template: Decision) -> None:
        self.pool = POOL
        self.policies = ("nir", "hdp")
        self.variant = "stub"
        self.bundle = SimpleNamespace(manifest=SimpleNamespace(name="stub"), digest="ab" * 32)
        self.behave: Callable[[], object] = lambda: None
        self.calls: list[tuple[str, float, str | None, list[str] | None]] = []
        self.threads: list[str] = []
        self._template = template

    def route(
        self, text: str, beta: float = 0.5, policy: str | None = None, candidates: list[str] | None = None
    ) -> Decision:
        self.calls.append((text, beta, policy, candidates))
        self.threads.append(threading.current_thread().name)
        self.behave()
        names = self.pool.names
        quality = np.array([1.0 if name in text else QUALITY[name] / 10 for name in names])
        utilities = utility(quality, normalize_costs(self.pool.costs, 0.1, 10.0), beta)
        mask = candidate_mask(names, candidates)
        kept = slice(None) if mask is None else mask
        return dataclasses.replace(
            self._template,
            model=names[int(choose(utilities, mask))],
            candidates=tuple(np.array(names)[kept].tolist()),
            qualities=quality[kept],
            utilities=utilities[kept],
            costs=self.pool.costs[kept],
            beta=beta,
            policy=policy or "nir",
            variant=self.variant,
        )


@pytest.fixture(scope="module", autouse=True)
def short_collections() -> Iterator[None]:
    """A full collection of all that a run of the tests holds stops every thread for a second: past any deadline."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def nano() -> Router:
    """The bundle that ships."""
    return Router.load("nano")


@pytest.fixture(scope="module")
def router(tiny_bundle: Path) -> Router:
    """The small bundle, as the processes under test load it."""
    return Router.load(tiny_bundle)


@pytest.fixture(scope="module")
def providers(router: Router) -> Iterator[Any]:
    """Fake providers of the small bundle's candidates, behind a LiteLLM proxy."""
    from litellm_world import Providers

    made = Providers(router.pool.names)
    yield made
    made.close()


@pytest.fixture
def stub(nano: Router) -> StubRouter:
    return StubRouter(nano.route("a template for the fields that no test looks at"))


@pytest.fixture
def make_gateway(stub: StubRouter) -> Iterator[Callable[..., Gateway]]:
    """Gateways around the stub; ``inline`` = the longest query that runs in the event loop, in bytes."""
    made = []

    def make(*, inline: int = 10_000, **settings: Any) -> Gateway:
        given = {"default_model": "small", "bundle": "stub", "beta": 0.0, "deadline_ms": 1000.0} | settings
        config = GatewayConfig(**given)
        gateway = Gateway(config, load=lambda c: Engine.of(stub, c, Calibration(inline, 0.01, 0.002, 0.001)))  # type: ignore[arg-type]
        made.append(gateway)
        return gateway

    yield make
    for gateway in made:
        gateway.close()


@pytest.fixture
def gateway(make_gateway: Callable[..., Gateway]) -> Gateway:
    return make_gateway()


@pytest.fixture
def http_server() -> Iterator[Callable[..., httpx.Client]]:
    """Starts real uvicorn servers on loopback, each in a thread, and gives a client of each."""
    server_module = pytest.importorskip("arllm.runtime.gateways.server", reason="the extra serve is not installed")
    running: list[tuple[Any, threading.Thread, Any, httpx.Client]] = []

    def start(gateway: Gateway, **settings: Any) -> httpx.Client:
        config = server_module.HttpConfig(port=0, **{"grace_seconds": 5.0, **settings})
        listener = server_module.listen(config.host, config.port)
        server = server_module.make_server(gateway, config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        client = httpx.Client(
            base_url=f"http://127.0.0.1:{listener.getsockname()[1]}",
            timeout=30,
            limits=httpx.Limits(max_connections=None),
            trust_env=False,
        )
        running.append((server, thread, listener, client))
        return client

    yield start
    for server, thread, listener, client in running:
        client.close()
        server.should_exit = True
        thread.join(20)
        listener.close()
        assert not thread.is_alive()


def ask(text: str, model: str = "auto", **fields: Any) -> dict[str, Any]:
    """A chat request."""
    return {"model": model, "messages": [{"role": "user", "content": text}], **fields}


@pytest.fixture(name="ask")
def ask_fixture() -> Callable[..., dict[str, Any]]:
    return ask
