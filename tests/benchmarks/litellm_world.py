"""LiteLLM's real proxy in a process of its own, and fake providers behind it, on free ports of loopback.

For the end-to-end tests and the load run. Knows nothing about what they check.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
from load import Background, Seen, Upstream
from openai import OpenAI

MASTER = "sk-master"
COMMAND = "from litellm.proxy.proxy_cli import run_server; run_server()"
HOOK = "arllm.runtime.gateways.litellm.hook"
PATIENCE = 180.0  # seconds until a proxy must be up: a cold start on a busy machine takes most of a minute

# A module for a proxy's folder: the hook as it is, around a router that first does what `BEFORE` says.
AROUND = """
import time
from pathlib import Path

import litellm
from arllm.runtime.gateways.config import GatewayConfig
from arllm.runtime.gateways.engine import load_engine
from arllm.runtime.gateways.gate import Gateway
from arllm.runtime.gateways.litellm import RoutingHook
from prometheus_client import REGISTRY


class Around:
    def __init__(self, router):
        self._router = router

    def __getattr__(self, name):
        return getattr(self._router, name)

    def route(self, *arguments):
        BEFORE
        return self._router.route(*arguments)


def load(config):
    engine = load_engine(config)
    object.__setattr__(engine, "router", Around(engine.router))
    return engine


hook = RoutingHook(Gateway(GatewayConfig(**litellm.callback_settings["arllm"]), load=load, registry=REGISTRY))
"""


class Proxy:
    """LiteLLM's own server, one worker. Ended by :meth:`close`.

    Args:
        folder: where it runs; its YAML, its output and ``files`` (name → text) are written there.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], files: Mapping[str, str] | None = None, **environment: str
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.log = folder, folder / "proxy.log"
        for name, text in {"litellm.yaml": json.dumps(settings), **(files or {})}.items():  # JSON is YAML
            (folder / name).write_text(text, encoding="utf-8")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = int(free.getsockname()[1])
        command = [sys.executable, "-c", COMMAND]
        command += ["--config", "litellm.yaml", "--host", "127.0.0.1", "--port", str(self.port)]
        own = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=folder, stdout=log, stderr=log, env={**os.environ, **own, **environment}
            )
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60, trust_env=False)

    def wait(self) -> None:
        """Until it takes requests. Raises RuntimeError, with its output: it ended, or took too long."""
        until = time.monotonic() + PATIENCE
        while self.process.poll() is None and time.monotonic() < until:
            with contextlib.suppress(httpx.TransportError):
                if self.http.get("/health/liveliness").status_code == 200:
                    return
            time.sleep(0.1)
        raise RuntimeError(f"the proxy is not up:\n{self.text()}")

    def text(self) -> str:
        """The end of its output."""
        return self.log.read_text(encoding="utf-8", errors="replace")[-8000:]

    def client(self, key: str = MASTER) -> Any:
        return OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1",
            api_key=key,
            max_retries=0,
            timeout=60,
            http_client=httpx.Client(trust_env=False),
        )

    def metrics(self) -> dict[str, float]:
        """arllm's lines of LiteLLM's ``/metrics``."""
        answer = self.http.get("/metrics/", headers={"authorization": f"Bearer {MASTER}"})
        answer.raise_for_status()
        lines = (line.rpartition(" ") for line in answer.text.splitlines() if line.startswith("arllm_"))
        return {name: float(value) for name, _, value in lines}

    def close(self) -> None:
        self.http.close()
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


class Providers:
    """Three upstreams; every candidate of a pool lives on one of them."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._loop = Background()
        self.upstreams = [self._loop.run(Upstream(f"provider-{number}").start()) for number in range(3)]
        self.of = {name: self.upstreams[number % 3] for number, name in enumerate(names)}

    def models(self) -> list[dict[str, Any]]:
        """A ``model_list``: ``at-<candidate>`` is the proxy's name of it, the candidate's own the provider's."""
        rows = [(f"at-{name}", name) for name in self.of]
        rows.append(("auto", next(iter(self.of))))
        return [
            {
                "model_name": shown,
                "litellm_params": {"model": f"openai/{name}", "api_base": self.of[name].url, "api_key": "none"},
            }
            for shown, name in rows
        ]

    def names(self) -> dict[str, str]:
        """arllm's setting ``names`` for them."""
        return {name: f"at-{name}" for name in self.of}

    def seen(self) -> list[tuple[str, Seen]]:
        """(provider, request) of everything that arrived."""
        return [(upstream.name, seen) for upstream in self.upstreams for seen in upstream.seen]

    def forget(self) -> None:
        for upstream in self.upstreams:
            upstream.seen.clear()
            upstream.models.clear()
            upstream.status, upstream.delay = 200, 0.0

    def counts(self) -> Counter[str]:
        return sum((upstream.models for upstream in self.upstreams), Counter())

    def close(self) -> None:
        for upstream in self.upstreams:
            self._loop.run(upstream.stop())
        self._loop.close()


def settings_of(model_list: list[dict[str, Any]], hook: str | None, **routing: Any) -> dict[str, Any]:
    """A proxy's YAML. The three lines of arllm are ``callbacks`` and ``callback_settings``; hook None = without."""
    return {
        "model_list": model_list,
        "litellm_settings": {"callbacks": ["prometheus"] if hook is None else ["prometheus", hook]},
        "callback_settings": {"arllm": routing} if hook is not None else {},
        "general_settings": {"master_key": MASTER},
        "router_settings": {"num_retries": 0},
    }


def ask(client: Any, text: str, model: str = "auto", stream: bool = False, **more: Any) -> tuple[str, dict[str, str]]:
    """(what was answered, response headers in lower case)."""
    raw = client.chat.completions.with_raw_response.create(
        model=model, messages=[{"role": "user", "content": text}], stream=stream, **more
    )
    headers = {name.lower(): value for name, value in raw.headers.items()}
    answer = raw.parse()
    if not stream:
        return answer.choices[0].message.content, headers
    return "".join(chunk.choices[0].delta.content or "" for chunk in answer if chunk.choices), headers
