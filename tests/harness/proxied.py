"""A real Envoy with the example configurations, arllm, and fake upstreams that note what they see. Of the tests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import envoy_world
import httpx
import load
import openai

NAMES = ["sim-tiny", "sim-math", "sim-frontier"]  # in place of the example's models
DEFAULT = NAMES[0]


class World(envoy_world.World):
    """What a test sees: clients, what upstreams saw, and arllm with the test's bundle."""

    def __init__(self, folder: Path, upstreams: dict[str, Any], serve: list[str]) -> None:
        ports = [upstream.port for upstream in upstreams.values()]
        super().__init__(folder, ports, dict(zip(envoy_world.UPSTREAMS.values(), NAMES, strict=True)))
        self.folder, self.upstreams, self._serve = folder, upstreams, serve

    def serve(self) -> None:
        self.start_arllm(*self._serve)

    def seen(self) -> list[tuple[str, Any]]:
        """(upstream, request) of everything that arrived; forgets it."""
        found = [(name, seen) for name, upstream in self.upstreams.items() for seen in upstream.seen]
        for upstream in self.upstreams.values():
            upstream.seen.clear()
        return found

    def until_waiting(self, number: int) -> None:
        """Wait until so many requests wait for arllm."""
        line = f"cluster.arllm.upstream_rq_active: {number}\n"
        envoy_world.until(lambda: line in self.admin("stats"), line)

    def client(self) -> Any:
        http = httpx.Client(trust_env=False, timeout=60)
        return openai.OpenAI(api_key="sk-x", base_url=f"{self.url}/v1", max_retries=0, http_client=http)

    def post(self, content: bytes | Iterator[bytes], **headers: str) -> httpx.Response:
        sent = {"content-type": "application/json"} | {name.replace("_", "-"): v for name, v in headers.items()}
        url = f"{self.url}/v1/chat/completions"
        return httpx.post(url, content=content, headers=sent, trust_env=False, timeout=60)


def ask(query: str, model: str = "auto", **fields: Any) -> bytes:
    # As the OpenAI client writes it: the model comes last.
    return json.dumps({"messages": [{"role": "user", "content": query}], "model": model, **fields}).encode()


@contextmanager
def worlds(bundle: Path, pool: Path, fresh_folder: Callable[[], Path]) -> Iterator[Callable[..., World]]:
    """Makes worlds: everything but the processes, which end with the context."""
    background, made = load.Background(), []

    def make(*arguments: str) -> World:
        folder = fresh_folder()
        shutil.copytree(bundle, folder / "bundle")
        upstreams = {name: background.run(load.Upstream(name).start()) for name in NAMES}
        serve = [str(folder / "bundle"), "--pool", str(pool), "--default-model", DEFAULT, "--beta", "0.2"]
        # A slow machine must not change what is under test: deadlines have tests of their own.
        world = World(folder, upstreams, [*serve, "--deadline-ms", "20000", *arguments])
        made.append(world)
        return world

    yield make
    for world in made:
        world.stop()
        for upstream in world.upstreams.values():
            background.run(upstream.stop())
    background.close()
