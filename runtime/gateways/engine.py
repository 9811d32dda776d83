"""A loaded and measured router with what a gateway needs beside it. Made by :func:`load_engine`, never changed."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from arllm.runtime.bundle import find_bundle
from arllm.runtime.errors import InputError, PolicyError
from arllm.runtime.gateways.calibration import Calibration, measure
from arllm.runtime.gateways.config import ANY, GatewayConfig
from arllm.runtime.gateways.filters import Capabilities, capabilities
from arllm.runtime.router import Router

_LOGGER = logging.getLogger("arllm.gateway")


@dataclass(frozen=True)
class Engine:
    """A router and what was read or measured when it was loaded."""

    router: Router
    capabilities: Mapping[str, Capabilities]  # of every candidate, in the pool's order
    choosy: bool  # whether the pool declares any capability: else no candidate is ever ruled out by a request
    candidates: frozenset[str]
    upstreams: frozenset[str]  # the gateway's names of them
    by_name: Mapping[str, frozenset[str]]  # the candidates that a name of the gateway's or the pool's means
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
        able = {candidate.name: capabilities(candidate) for candidate in router.pool.candidates}
        by_name: dict[str, frozenset[str]] = {}
        for name in names:
            for called in {name, config.upstream(name)}:
                by_name[called] = by_name.get(called, frozenset()) | {name}
        return cls(
            router=router,
            capabilities=able,
            choosy=any(capability != Capabilities() for capability in able.values()),
            candidates=frozenset(names),
            upstreams=frozenset(map(config.upstream, names)),
            by_name=by_name,
            calibration=calibration,
            deadline=calibration.default_deadline if deadline is None else deadline / 1e3,
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
    engine = Engine.of(router, config, measure(router.route, config.inline_ms / 1e3))
    told = engine.calibration.told(engine.deadline, by_operator=config.deadline_ms is not None)
    _LOGGER.info("%s, variant %s: %s", engine.label, router.variant, told)
    return engine
