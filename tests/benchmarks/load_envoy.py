"""What `arllm` adds to Envoy: bounded load at rising concurrency, with and without ext_proc, by turns in one run.

python tests/benchmarks/load_envoy.py [--seconds 30] [--levels 1,4,16] [--bundle nano] [--json]

Exits with 1 where a request failed. The upstreams answer at once: what is measured is the gateway.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from envoy_world import DEFAULT, UPSTREAMS, World, without_arllm
from load import Level, Target, Upstream, as_json, compare, failed, table

from arllm.runtime.router import Router

PATH = "/v1/chat/completions"
REASON = "x-arllm-decision-reason"
QUERIES = (
    "What is the capital of France?",
    "Write a haiku about autumn rain.",
    "not ( True and False ) and ( not True ) is",
    "Prove that the square root of two is irrational.",
    "Today is the 28th of February 2023. What is the date in ten days?",
    "Which organ of the human body makes insulin, and what happens where it is missing?",
)


async def run(bundle: str, levels: list[int], overload: int, seconds: float, example: str) -> dict[str, Any]:
    """Both arms at every level, and the overload; ``seconds`` are of all of it."""
    with tempfile.TemporaryDirectory(prefix="arllm-load-") as scratch:
        pool = Path(scratch, "pool.json")
        candidates = {c.name: c for c in Router.load(bundle).pool.candidates}
        kept = [{"name": name, "cost": candidates[name].cost} for name in UPSTREAMS.values()]
        pool.write_text(json.dumps({"candidates": kept}))
        upstreams = [await Upstream(name, keep=False).start() for name in UPSTREAMS.values()]
        worlds = {}
        try:
            for arm in ("plain", "routed"):
                Path(scratch, arm).mkdir()
                worlds[arm] = World(Path(scratch, arm), [upstream.port for upstream in upstreams])
            plain, routed = worlds["plain"], worlds["routed"]
            serve = [bundle, "--default-model", DEFAULT, "--pool", str(pool), "--beta", "0.1"]
            await asyncio.to_thread(routed.start_arllm, *serve)
            await asyncio.to_thread(routed.start_envoy, example)
            await asyncio.to_thread(plain.start_envoy, example, without_arllm)
            await asyncio.to_thread(routed.healthy)
            bodies = [
                json.dumps({"messages": [{"role": "user", "content": query}], "model": "auto"}).encode()
                for query in QUERIES
            ]
            arms = [Target(world.port, PATH, bodies, watch=[REASON]) for world in (plain, routed)]
            rising = await compare(*arms, levels, seconds * 0.75)
            beyond = await compare(*arms, [overload], seconds * 0.25)
            ready = json.loads(await asyncio.to_thread(routed.arllm, "readyz"))
        finally:
            for world in worlds.values():
                world.stop()
            for upstream in upstreams:
                await upstream.stop()
    return {"levels": rising, "overload": beyond, "deadline_ms": ready["deadline_ms"], "bundle": ready["bundle"]}


def reasons(level: Level) -> dict[str, int]:
    """Decisions of the routed arm by reason; none = Envoy went on without arllm."""
    return dict(Counter(reason or "without arllm" for reason in level.routed.watched[REASON]))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--levels", default="1,4,16")
    parser.add_argument("--overload", type=int, default=256)
    parser.add_argument("--bundle", default="nano")
    parser.add_argument("--example", default="envoy.yaml")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    levels = [int(level) for level in given.levels.split(",")]
    found = asyncio.run(run(given.bundle, levels, given.overload, given.seconds, given.example))
    both = [*found["levels"], *found["overload"]]
    if given.json:
        rows = [{**row, "reasons": reasons(level)} for row, level in zip(as_json(both), both, strict=True)]
        print(json.dumps({"bundle": found["bundle"], "deadline_ms": found["deadline_ms"], "levels": rows}))
    else:
        print(f"Envoy, {given.example}, {found['bundle']}, deadline {found['deadline_ms']} ms; p50 / p95 / p99")
        print(table(both))
        for level in both:
            print(f"{level.concurrency} clients:", ", ".join(f"{n} {reason}" for reason, n in reasons(level).items()))
    return 1 if failed(both) else 0


if __name__ == "__main__":
    sys.exit(main())
