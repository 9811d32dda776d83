"""What arllm adds to LiteLLM and to Envoy under load, with and without it by turns in one run: `make load`.

python tests/benchmarks/load_gateways.py [litellm] [envoy] [--seconds 30] [--clients 1,4,16] [--json] [--write FILE]

Exits with 1 where a request failed. Python puts this folder first on the path, which is where the rest comes from.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import os
import platform
import shlex
import sys
from pathlib import Path

from load_found import Found, Plan, overload_is

from arllm.runtime.devices import cores
from arllm.train.latency.machine import processor

GATEWAYS = ("litellm", "envoy")


def machine() -> str:
    """What this ran on."""
    return f"{cores()} × {processor()}, {platform.system()}"


def document(found: list[Found], command: str, bundle: str, busy: tuple[float, float]) -> str:
    parts = [
        "# What arllm adds to a gateway under load",
        f"Written by `make load` (`{command}`). p50 / p95 / p99 in milliseconds, as clients saw it. The arms ran "
        "in short slices by turns, on one machine with the clients and the upstreams, which answer at once: read the "
        "differences and ratios. What is judged is the median, over rounds of slices, of the difference of p50s. "
        "Where clients wait for each other, what routing adds counts for all behind it; the target for p50 is of one "
        "client. *Decisions* are arllm's reasons; `unanswered`: Envoy went on without it.",
        f"- machine: {machine()}; Python {platform.python_version()}; load average {busy[0]:.1f} before, "
        f"{busy[1]:.1f} after\n- bundle: `{bundle}`\n- {overload_is()}",
    ]
    return "\n\n".join([*parts, *(one.markdown() for one in found)]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="arllm in LiteLLM and Envoy, under load")
    parser.add_argument("gateways", nargs="*", metavar="litellm|envoy", help="both, where none is named")
    parser.add_argument("--seconds", type=float, default=30.0, help="of load on each; their start comes on top")
    parser.add_argument("--clients", default="1,4,16", help="at once, rising")
    parser.add_argument("--bundle", default="nano")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", type=Path, help="the table, as Markdown")
    given = parser.parse_args()
    unknown = sorted(set(given.gateways) - set(GATEWAYS))
    if unknown:
        parser.error(f"no gateway {unknown[0]!r}: there are {', '.join(GATEWAYS)}")
    plan = Plan(given.bundle, tuple(int(number) for number in given.clients.split(",")), given.seconds)
    before = os.getloadavg()[0]
    found: list[Found] = []
    for name in given.gateways or GATEWAYS:
        print(f"{name}: starting, then {given.seconds:g} s of load", file=sys.stderr)
        one = asyncio.run(importlib.import_module(f"load_{name}").measure(plan))
        found.append(one)
        if not given.json:
            print(one.text(), end="\n\n", flush=True)
    if given.json:
        print(json.dumps([one.as_json() for one in found], indent=1))
    if given.write is not None:
        command = shlex.join(["python", "tests/benchmarks/load_gateways.py", *sys.argv[1:]])
        text = document(found, command, given.bundle, (before, os.getloadavg()[0]))
        given.write.write_text(text, encoding="utf-8")
    return 1 if any(one.failed for one in found) else 0


if __name__ == "__main__":
    sys.exit(main())
