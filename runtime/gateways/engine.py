"""A loaded and measured router with what a gateway needs beside it. Made by :func:`load_engine`, never changed."""

from __future__ import annotations

import math
import random
import shutil
import string
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from arllm.runtime.bundle import find_bundle
from arllm.runtime.errors import InputError, PolicyError
from arllm.runtime.gateways.config import ANY, GatewayConfig
from arllm.runtime.gateways.filters import Capabilities, capabilities
from arllm.runtime.router import Router

# Bytes of calibration texts: letters and digits at random, about two bytes a token, so that real text of the
# same length is never slower.
LENGTHS = (32, 64, 128, 256, 512)
INLINE_MOST = 1 << 15  # bytes: longer than any query that an encoder reads whole
RUNS, SECONDS = 20, 0.1  # of one length: at most so many runs, and no more once so long has passed (but 3)
LEAST_DEADLINE = 0.010


@dataclass(frozen=True)
class Calibration:
    """What this variant takes on this machine.

    ``inline_bytes``: texts up to this length are routed in less than the operator's ``inline_ms`` (median; 0 = none).
    ``p99``: seconds, of the longest query that the encoder reads.
    """

    inline_bytes: int
    p99: float


@dataclass(frozen=True)
class Engine:
    """A router and what was read or measured when it was loaded."""

    router: Router
    capabilities: Mapping[str, Capabilities]  # of every candidate, in the pool's order
    candidates: frozenset[str]
    calibration: Calibration
    deadline: float  # seconds
    label: str  # name@digest, for headers, metrics and logs
    digest: str

    @classmethod
    def of(cls, router: Router, config: GatewayConfig, calibration: Calibration) -> Engine:
        """Read the pool's capabilities, and check the settings against the bundle.

        Raises:
            InputError: a setting names a candidate or policy that is not there. PoolError: bad metadata.
        """
        names = router.pool.names
        known = set(names)
        for setting, wanted in (("names", set(config.names)), ("client_candidates", set(config.client_candidates))):
            unknown = sorted(wanted - known - {ANY, config.default_model})
            if unknown:
                raise InputError(
                    f"gateway setting {setting}: no candidate {unknown[0]!r}: the pool has {', '.join(names)}"
                )
        if config.policy is not None and config.policy not in router.policies:
            raise PolicyError(
                f"gateway setting policy: no policy {config.policy!r}: the bundle has {', '.join(router.policies)}"
            )
        deadline = config.deadline_ms
        return cls(
            router=router,
            capabilities={candidate.name: capabilities(candidate) for candidate in router.pool.candidates},
            candidates=frozenset(names),
            calibration=calibration,
            deadline=max(LEAST_DEADLINE, 3 * calibration.p99) if deadline is None else deadline / 1e3,
            label=f"{router.bundle.manifest.name}@{router.bundle.digest[:12]}",
            digest=router.bundle.digest,
        )


def load_engine(config: GatewayConfig) -> Engine:
    """Copy, verify, load, warm and measure the bundle that the settings name.

    The router reads a private copy: ONNX Runtime maps the weights into memory, and somebody who overwrites the
    bundle in place would change, or crash, the router that serves.

    Raises:
        ArllmError: as ``Router.load``; and settings that don't fit the bundle.
    """
    source = find_bundle(config.bundle)
    scratch = Path(tempfile.mkdtemp(prefix="arllm-"))
    try:
        copied = scratch / source.resolve().name
        shutil.copytree(source, copied, symlinks=True)
        router = Router.load(copied, config.variant, config.threads, pool=config.pool)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)  # mapped files outlive their names
    if router.bundle.manifest.tokens is None:
        raise InputError(f"{source}: this bundle holds no encoder (NIR alone): a gateway routes texts")
    router.warmup()
    return Engine.of(router, config, measure(router.route, config.inline_ms / 1e3))


def measure(route: Callable[[str], object], inline_seconds: float) -> Calibration:
    """Time ``route`` on texts of growing length."""
    letters = random.Random(0)
    inline = 0
    for length in LENGTHS:
        runs = _times(route, "".join(letters.choices(string.ascii_letters + string.digits + "   ", k=length)))
        if runs[len(runs) // 2] > inline_seconds:
            break
        inline = length
    longest = "warm up " * (INLINE_MOST // 8)
    runs = _times(route, longest)
    if runs[len(runs) // 2] <= inline_seconds:
        inline = len(longest)
    return Calibration(inline, runs[math.ceil(0.99 * len(runs)) - 1])


def _times(route: Callable[[str], object], text: str) -> list[float]:
    """Seconds of each run, ascending."""
    taken: list[float] = []
    while len(taken) < 3 or (len(taken) < RUNS and sum(taken) < SECONDS):
        started = time.perf_counter()
        route(text)
        taken.append(time.perf_counter() - started)
    return sorted(taken)
