"""What arllm adds to LiteLLM's proxy under load: the same proxy with and without it. Of load_gateways.py."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import load
from litellm_world import AROUND, HOOK, MASTER, Proxy, settings_of
from load_found import DEADLINE_MS, QUERIES, SLOW_MS, WATCH, Found, Plan

from arllm.runtime.router import Router

LIMIT_MS = 1.0
IDLE = """
from litellm.integrations.custom_logger import CustomLogger

hook = CustomLogger()  # LiteLLM's own class, whose every hook does nothing
"""
SLOW = f"time.sleep({SLOW_MS / 1e3})"


def proxy(folder: Path, upstream: load.Upstream, names: tuple[str, ...], hook: str | None, **routing: Any) -> Proxy:
    """A proxy whose models are all one upstream's. Without a hook its `auto` is a model like the others."""
    models = [
        {
            "model_name": name,
            "litellm_params": {"model": f"openai/{name}", "api_base": upstream.url, "api_key": "none"},
        }
        for name in (*names, "auto")
    ]
    settings = settings_of(models, hook, default_model=names[0], beta=0.1, **routing)
    return Proxy(folder, settings, {"slow.py": AROUND.replace("BEFORE", SLOW), "idle.py": IDLE})


def target(proxy: Proxy) -> load.Target:
    bodies = [{"model": "auto", "messages": [{"role": "user", "content": query}]} for query in QUERIES]
    return load.Target(
        proxy.port,
        "/v1/chat/completions",
        [json.dumps(body).encode() for body in bodies],
        {"authorization": f"Bearer {MASTER}"},
        WATCH,
    )


async def measure(plan: Plan) -> Found:
    """Both arms at rising concurrency, and beside one client a hook that does nothing; last, a crowd against a router
    that can't keep up.
    """
    names = Router.load(plan.bundle).pool.names
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        async with load.Upstream("provider", keep=False) as upstream:
            crowded: dict[str, Any] = {"bundle": plan.bundle, "inline_ms": 0, "deadline_ms": DEADLINE_MS}
            arms = [
                proxy(Path(folder, "plain"), upstream, names, None),
                proxy(Path(folder, "routed"), upstream, names, HOOK, bundle=plan.bundle),
                proxy(Path(folder, "slow"), upstream, names, "slow.hook", **crowded),
                proxy(Path(folder, "idle"), upstream, names, "idle.hook"),
            ]
            for arm in arms:
                stack.callback(arm.close)
            for arm in arms:
                await asyncio.to_thread(arm.wait)
            rising, overload = await plan.compare(*map(target, arms))
            return Found(f"LiteLLM {version('litellm')}", LIMIT_MS, rising, overload)
