"""Tests of gateways/engine.py and reload.py, with the real `nano`: loading, measuring, swapping, refusing."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from arllm.runtime.bundle import find_bundle
from arllm.runtime.errors import ArllmError, BundleIntegrityError
from arllm.runtime.gateways.config import GatewayConfig
from arllm.runtime.gateways.engine import load_engine
from arllm.runtime.gateways.gate import Gateway
from arllm.runtime.gateways.reload import Watcher, signature
from arllm.runtime.router import Router

DEFAULT = "google/gemma-2b-it"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A copy of the bundle that ships, to be damaged."""
    return Path(shutil.copytree(find_bundle("nano"), tmp_path / "nano"))


@pytest.fixture
def served(bundle: Path, tmp_path: Path) -> Iterator[Gateway]:
    pool = json.loads((bundle / "pool.json").read_bytes())
    (tmp_path / "pool.json").write_text(json.dumps(pool), encoding="utf-8")
    settings: dict[str, Any] = {"bundle": str(bundle), "pool": str(tmp_path / "pool.json"), "deadline_ms": 20_000.0}
    gateway = Gateway(GatewayConfig(DEFAULT, **settings))
    yield gateway
    gateway.close()


def count(gateway: Gateway, result: str) -> float:
    assert gateway.metrics is not None
    return gateway.metrics.registry.get_sample_value("arllm_reloads_total", {"result": result}) or 0.0


def test_the_engine_decides_as_the_router_does(nano: Router, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="arllm.gateway")
    engine = load_engine(GatewayConfig(DEFAULT))
    assert engine.calibration.told(engine.deadline, by_operator=False) in caplog.text
    assert engine.label == f"nano@{nano.bundle.digest[:12]}"
    assert engine.candidates == frozenset(nano.pool.names)
    assert engine.deadline == engine.calibration.default_deadline
    gateway = Gateway(GatewayConfig(DEFAULT, beta=0.1), load=lambda config: engine)
    texts = ["What is 17 * 23?", "not ( True and False ) is", "long " * 500]

    async def main() -> None:
        for text in texts:
            verdict = await gateway.handle({"model": "auto", "messages": [{"role": "user", "content": text}]})
            if verdict.reason == "routed":  # a busy machine may be too late
                assert verdict.model == nano.route(text, 0.1).model

    asyncio.run(main())
    gateway.close()


def test_the_bundle_is_read_from_a_copy_that_leaves_nothing(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    router = load_engine(GatewayConfig(DEFAULT, bundle=str(bundle))).router
    expected = router.route("What is 17 * 23?").utility
    for path in bundle.rglob("*.*"):
        if path.is_file():
            path.write_bytes(b"\0" * 10)  # in place: a mapped file would change, or crash, the router
    assert router.route("What is 17 * 23?").utility == expected
    assert list(scratch.iterdir()) == []
    with pytest.raises(ArllmError):
        load_engine(GatewayConfig(DEFAULT, bundle=str(bundle)))
    assert list(scratch.iterdir()) == []


def test_a_link_in_a_bundle_is_refused(bundle: Path) -> None:
    (bundle / "pool.json").rename(bundle.parent / "elsewhere.json")
    (bundle / "pool.json").symlink_to(bundle.parent / "elsewhere.json")
    with pytest.raises(BundleIntegrityError, match="no links"):
        load_engine(GatewayConfig(DEFAULT, bundle=str(bundle)))


def test_a_corrupt_bundle_is_refused_and_the_old_one_serves(served: Gateway, bundle: Path) -> None:
    before = served.engine
    weights = bundle / "cpu-int8" / "weights.bin"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    with pytest.raises(BundleIntegrityError, match=r"weights\.bin"):
        served.reload()
    assert not served.try_reload()
    assert served.engine is before
    assert served.last_reload.startswith("refused: ")
    assert (count(served, "refused"), count(served, "swapped")) == (2, 0)


def test_a_new_pool_is_swapped_in_and_a_bad_one_refused(served: Gateway, tmp_path: Path) -> None:
    pool = json.loads((tmp_path / "pool.json").read_bytes())
    pool["candidates"] = pool["candidates"][:2]
    (tmp_path / "pool.json").write_text(json.dumps(pool), encoding="utf-8")
    assert served.try_reload()
    assert len(served.engine.candidates) == 2
    pool["candidates"][0]["context_length"] = "long"
    (tmp_path / "pool.json").write_text(json.dumps(pool), encoding="utf-8")
    assert not served.try_reload()
    assert "context_length must be a number of tokens" in served.last_reload
    assert len(served.engine.candidates) == 2


def test_reloads_under_requests_lose_none(served: Gateway, bundle: Path) -> None:
    weights = bundle / "cpu-int8" / "weights.bin"
    good = weights.read_bytes()
    stop = threading.Event()
    results = []

    def reload() -> None:
        for damage in (False, True, False, True):
            weights.write_bytes(b"\0" * 100 if damage else good)
            results.append(served.try_reload())
        stop.set()

    async def main() -> set[str]:
        thread = threading.Thread(target=reload)
        thread.start()
        reasons = set()
        while not stop.is_set():
            body = {"model": "auto", "messages": [{"role": "user", "content": "What is 17 * 23?"}]}
            reasons.add((await served.handle(body)).reason)
            await asyncio.sleep(0)
        thread.join()
        return reasons

    assert asyncio.run(main()) == {"routed"}
    assert results == [True, False, True, False]


def test_the_watcher_waits_for_rest_and_tries_each_state_once() -> None:
    states, tried = ["a"], []
    watcher = Watcher(lambda: states[0], lambda: tried.append(states[0]), 3600)  # type: ignore[arg-type,return-value]
    for state in "aabbbcdeeeffa":
        states[0] = state
        watcher.step()
    watcher.close()
    assert tried == ["b", "e", "f"]


def test_the_signature_sees_every_change(bundle: Path, tmp_path: Path) -> None:
    pool = tmp_path / "pool.json"
    seen = [signature(str(bundle), str(pool))]
    pool.write_text("{}", encoding="utf-8")
    seen.append(signature(str(bundle), str(pool)))
    (bundle / "cpu-int8" / "weights.bin").write_bytes(b"")
    seen.append(signature(str(bundle), str(pool)))
    shutil.rmtree(bundle)
    seen.append(signature(str(bundle), str(pool)))
    assert len(set(seen)) == 4
    assert signature("nano", None) == signature("nano", None) != ()


def test_a_changed_bundle_is_found_without_being_told(bundle: Path) -> None:
    gateway = Gateway(GatewayConfig(DEFAULT, bundle=str(bundle), reload_seconds=0.05))
    (bundle / "manifest.json").write_bytes(b"{}")
    stop = time.monotonic() + 60
    while not gateway.last_reload:
        assert time.monotonic() < stop
        time.sleep(0.01)
    gateway.close()
    assert gateway.last_reload.startswith("refused: ")
