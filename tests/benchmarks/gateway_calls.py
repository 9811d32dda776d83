"""What a gateway adds to `Router.route`: in the event loop and through a thread, interleaved on one machine.

python tests/benchmarks/gateway_calls.py [BUNDLE] [QUERY]
"""

from __future__ import annotations

import asyncio
import sys
import time

import numpy as np

from arllm.runtime.gateways.config import GatewayConfig
from arllm.runtime.gateways.gate import Gateway
from arllm.runtime.router import Router

ROUNDS = 1000


def main(bundle: str = "nano", query: str = "What is the capital of France?") -> None:
    """Print milliseconds of each way, and the median difference to the router alone within a round."""
    default = Router.load(bundle).pool.names[0]
    gateways = {
        name: Gateway(GatewayConfig(default, bundle=bundle, deadline_ms=60_000.0, inline_ms=inline_ms))
        for name, inline_ms in (("in the loop", 60_000.0), ("thread", 0.0))
    }
    router = gateways["thread"].engine.router
    body = {"model": "auto", "messages": [{"role": "user", "content": query}]}

    async def rounds() -> dict[str, list[float]]:
        taken: dict[str, list[float]] = {"router": [], **{name: [] for name in gateways}}
        for _ in range(ROUNDS):
            started = time.perf_counter()
            router.route(query)
            taken["router"].append(time.perf_counter() - started)
            for name, gateway in gateways.items():
                started = time.perf_counter()
                await gateway.handle(body)
                taken[name].append(time.perf_counter() - started)
        return taken

    taken = {name: 1e3 * np.array(values) for name, values in asyncio.run(rounds()).items()}
    for name, values in taken.items():
        p50, p95, p99 = np.percentile(values, [50, 95, 99])
        added = np.median(values - taken["router"])
        print(f"{name:<12} p50 {p50:7.3f}  p95 {p95:7.3f}  p99 {p99:7.3f}  added {added:+.3f} ms")
    for gateway in gateways.values():
        gateway.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
