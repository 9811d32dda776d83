"""What arllm adds to LiteLLM's proxy under load: the same proxy with and without it, by turns, in one run.

python tests/benchmarks/load_litellm.py [--seconds 30] [--clients 1,4,16] [--json]

Needs the extra ``litellm``; Python puts this folder first on the path, which is where ``load`` comes from.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import load
from litellm_world import AROUND, HOOK, MASTER, Proxy, settings_of

from arllm.runtime.router import Router

QUERIES = (
    "What is 17 * 23?",
    "Write a haiku about autumn.",
    "Which enzyme unwinds DNA, and in which direction does it move along the strand?",
    "not ( True and False ) and ( not True ) is",
    "Summarize in one sentence why the sky is blue. " * 4,
)
# Overload: a router that takes so long, with one thread, is asked by so many clients at once.
SLOW_MS, DEADLINE_MS, CROWD = 50.0, 100.0, 32
SHARE = 0.25  # of the seconds, for overload
ROUTING_MS, REASON = "x-arllm-routing-ms", "x-arllm-decision-reason"

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
    return Proxy(folder, settings, {"slow.py": AROUND.replace("BEFORE", SLOW)})


def target(proxy: Proxy) -> load.Target:
    bodies = [{"model": "auto", "messages": [{"role": "user", "content": query}]} for query in QUERIES]
    return load.Target(
        proxy.port,
        "/v1/chat/completions",
        [json.dumps(body).encode() for body in bodies],
        {"authorization": f"Bearer {MASTER}"},
        (ROUTING_MS, REASON),
    )


async def measure(bundle: str, clients: list[int], seconds: float) -> list[load.Level]:
    """Both arms at rising concurrency; last, a crowd against a router that can't keep up."""
    names = Router.load(bundle).pool.names
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        async with load.Upstream("provider", keep=False) as upstream:
            crowded: dict[str, Any] = {"bundle": bundle, "inline_ms": 0, "deadline_ms": DEADLINE_MS}
            arms = [
                proxy(Path(folder, "plain"), upstream, names, None),
                proxy(Path(folder, "routed"), upstream, names, HOOK, bundle=bundle),
                proxy(Path(folder, "slow"), upstream, names, "slow.hook", **crowded),
            ]
            for arm in arms:
                stack.callback(arm.close)
            for arm in arms:
                await asyncio.to_thread(arm.wait)
            plain, routed, slow = map(target, arms)
            levels = await load.compare(plain, routed, clients, seconds * (1 - SHARE))
            return levels + await load.compare(plain, slow, [CROWD], seconds * SHARE)


def told(level: load.Level) -> dict[str, Any]:
    """What the hook says of itself: milliseconds that it took, and how it decided."""
    taken = [float(value) for value in level.routed.watched[ROUTING_MS]]
    return {"routing_ms": load.percentiles(taken), "reasons": dict(Counter(level.routed.watched[REASON]))}


def main() -> None:
    parser = argparse.ArgumentParser(description="arllm in LiteLLM's proxy, under load")
    parser.add_argument("--seconds", type=float, default=30.0, help="of load; the proxies' starts come on top")
    parser.add_argument("--clients", default="1,4,16", help="at once, rising")
    parser.add_argument("--bundle", default="nano")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    clients = [int(number) for number in given.clients.split(",")]
    levels = asyncio.run(measure(given.bundle, clients, given.seconds))
    rows = [{**row, **told(level)} for row, level in zip(load.as_json(levels), levels, strict=True)]
    failures = load.failed(levels)
    if given.json:
        found = {"gateway": "litellm", "bundle": given.bundle, "levels": rows[:-1]}
        found |= {"overload": {"router_ms": SLOW_MS, "deadline_ms": DEADLINE_MS, **rows[-1]}, "failed": failures}
        print(json.dumps(found, indent=1))
    else:
        print(f"LiteLLM's proxy without and with arllm ({given.bundle}); p50 / p95 / p99")
        print(load.table(levels[:-1]))
        print(f"\noverload: a router of {SLOW_MS:.0f} ms with one thread, a deadline of {DEADLINE_MS:.0f} ms")
        print(load.table(levels[-1:]))
        print()
        for row in rows:
            inside = " / ".join(f"{value:.2f}" for value in row["routing_ms"].values())
            reasons = ", ".join(f"{count} {reason}" for reason, count in row["reasons"].items())
            print(f"{row['concurrency']} clients: the hook took {inside} ms; {reasons}")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
