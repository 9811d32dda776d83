"""Tests of runtime/router_graph.py: ``router.onnx`` decides as the router does, whatever pool, mask, beta, batch."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arllm.runtime.answer import Decision
from arllm.runtime.bundle import Bundle, list_files, open_bundle
from arllm.runtime.conformance import rerun
from arllm.runtime.decision import NUMERIC_TIE
from arllm.runtime.doctor import examine
from arllm.runtime.errors import BundleIOMismatchError, BundleSchemaError, VariantError
from arllm.runtime.pool import Candidate, Pool
from arllm.runtime.router import Router
from arllm.runtime.router_graph import Routed, RouterGraph

TEXTS = ("", "Hello!", "What is 17 + 25?", "add 3 to 4 and sort the words", "x " * 60)
VARIANTS = ("cpu-fp32", "cpu-int8")


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return open_bundle(tiny_bundle)


def router_graph(bundle: Bundle, variant: str = "cpu-fp32", pool: Pool | None = None) -> RouterGraph:
    return RouterGraph(bundle, bundle.manifest.variants[variant], pool)


def padded(router: Router, texts: tuple[str, ...], width: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of a batch, (B, tokens)."""
    rows = [router.tokenize(text)[0] for text in texts]
    length = max(width, *(len(row) for row in rows))
    ids, mask = np.zeros((2, len(rows), length), dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    return ids, mask


def assert_decides_as(decision: Decision, routed: Routed, row: int, pool: Pool) -> None:
    """Quality and utility of the allowed candidates, familiarity, and the choice but for a numeric tie."""
    allowed = [pool.names.index(name) for name in decision.candidates]
    np.testing.assert_allclose(routed.quality[row, allowed], decision.qualities, rtol=0, atol=2e-5)
    np.testing.assert_allclose(routed.utility[row, allowed], decision.utilities, rtol=0, atol=2e-5)
    assert routed.familiarity[row] == pytest.approx(decision.familiarity, abs=1e-5)
    chosen = pool.names[routed.choice[row]]
    assert chosen == decision.model or decision.utility[chosen] >= max(decision.utilities) - NUMERIC_TIE


# --- decisions ----------------------------------------------------------------------------------------------


@st.composite
def pools(draw: st.DrawFn, known: tuple[str, ...], domains: int) -> Pool:
    """Known and new candidates; equal costs, a zero span, costs outside the bundle's bounds and equal vectors."""
    names = draw(st.lists(st.sampled_from([*known, "new", "zz", "a/b", "é"]), min_size=1, max_size=9, unique=True))
    rows = []
    for name in names:
        cost = draw(st.sampled_from([0.0, 0.4, 0.4000000001, 1.0]) | st.floats(0, 10))
        accuracy = draw(st.sampled_from([0.0, 0.5, 1.0]) | st.none())
        seed = draw(st.integers(0, 99))
        drawn = np.random.default_rng(seed).random(domains).astype(np.float32)
        vector = drawn.tolist() if accuracy is None else [accuracy] * domains
        rows.append(Candidate(name, cost, tuple(vector)))
    return Pool(tuple(rows), "unspecified")


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_pool_mask_preference_and_batch_is_decided_as_by_the_router(bundle: Bundle, data: st.DataObject) -> None:
    pool = data.draw(pools(bundle.pool.names, len(bundle.manifest.domains)))
    allowed = data.draw(st.lists(st.sampled_from(pool.names), min_size=1, unique=True))
    texts = tuple(data.draw(st.lists(st.sampled_from(TEXTS), min_size=1, max_size=3)))
    betas = [data.draw(st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0, 1)) for _ in texts]
    router = Router.of(bundle, bundle.manifest.variants["cpu-fp32"], pool=pool)
    mask = np.array([name in allowed for name in pool.names])
    assert bundle.manifest.tokens is not None
    ids, tokens = padded(router, texts, data.draw(st.integers(0, bundle.manifest.tokens.max_tokens)))
    routed = router_graph(bundle, pool=pool).run(ids, tokens, np.array(betas), mask)
    for row, (text, beta) in enumerate(zip(texts, betas, strict=True)):
        assert_decides_as(router.route(text, beta, candidates=allowed), routed, row, pool)


@pytest.mark.parametrize("variant", VARIANTS)
def test_single_queries_are_decided_as_by_the_router(bundle: Bundle, variant: str) -> None:
    router, graph = Router.of(bundle, bundle.manifest.variants[variant]), router_graph(bundle, variant)
    for text in TEXTS:
        for beta in (0.0, 0.1, 0.3, 1.0):
            routed = graph.run(*padded(router, (text,)), np.array([beta]))
            decision = router.route(text, beta)
            assert_decides_as(decision, routed, 0, bundle.pool)
            assert bundle.pool.names[routed.choice[0]] == decision.model


def test_equal_utilities_go_to_the_lower_cost_then_by_name(bundle: Bundle) -> None:
    vector = tuple([0.6] * len(bundle.manifest.domains))
    pool = Pool(tuple(Candidate(name, cost, vector) for name, cost in (("c", 2), ("b", 1), ("a", 1))), "u")
    router, graph = (
        Router.of(bundle, bundle.manifest.variants["cpu-fp32"], pool=pool),
        router_graph(bundle, pool=pool),
    )
    ids, mask = padded(router, TEXTS[1:4])
    for beta in (0.0, 0.5, 1.0):
        assert graph.run(ids, mask, np.full(3, beta)).choice.tolist() == [0, 0, 0]
        without_a = graph.run(ids, mask, np.full(3, beta), np.array([False, True, True]))
        assert without_a.choice.tolist() == [1, 1, 1]


def test_costs_that_single_precision_confuses_are_told_apart(bundle: Bundle) -> None:
    vector = tuple([0.6] * len(bundle.manifest.domains))
    low, high = 1e6, 1e6 + 0.01  # one float32
    pool = Pool(tuple(Candidate(name, cost, vector) for name, cost in (("a", high), ("b", low))), "u")
    narrow = dataclasses.replace(bundle.manifest, cost_minimum=low, cost_maximum=high)
    graph = router_graph(dataclasses.replace(bundle, manifest=narrow), pool=pool)
    router = Router.of(bundle, bundle.manifest.variants["cpu-fp32"])
    utility = graph.run(*padded(router, ("Hello!",)), np.array([1.0])).utility[0]
    assert pool.names == ("b", "a")
    np.testing.assert_allclose(utility, [0.0, -1.0])


def test_what_is_no_request_gets_no_candidate(bundle: Bundle) -> None:
    router, graph = Router.of(bundle, bundle.manifest.variants["cpu-fp32"]), router_graph(bundle)
    ids, mask = padded(router, ("Hello!",) * 4)
    betas = np.array([0.5, np.nan, -0.01, 1.01])
    choice = graph.run(ids, mask, betas).choice
    assert choice[0] >= 0
    assert choice[1:].tolist() == [-1, -1, -1]
    nobody = np.zeros(len(bundle.pool), dtype=bool)
    assert graph.run(ids, mask, np.full(4, 0.5), nobody).choice.tolist() == [-1] * 4


# --- bundles ---


def changed_copy(bundle: Bundle, out: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of the bundle whose manifest was changed, hashes made to fit."""
    if not out.exists():
        shutil.copytree(bundle.path, out)
    manifest = json.loads((out / "manifest.json").read_text())
    change(manifest)
    manifest["files"] = list_files(out)
    (out / "manifest.json").write_text(json.dumps(manifest))
    return out


def test_an_older_bundle_has_no_such_graph(bundle: Bundle, tmp_path: Path) -> None:
    shutil.copytree(bundle.path, tmp_path / "old")
    for variant in VARIANTS:
        (tmp_path / "old" / variant / "router.onnx").unlink()

    def older(data: dict[str, Any]) -> None:
        data["schema_version"] = 2
        for variant in data["variants"]:
            del variant["graphs"]["router"]

    old = open_bundle(changed_copy(bundle, tmp_path / "old", older))
    result = rerun(Router.load(old.path))
    assert (result.problems, result.router_graph_difference) == ((), None)
    report, healthy = examine(str(old.path))
    assert healthy
    assert "router.onnx" not in report["variants"]["cpu-fp32"]["verdict"]
    with pytest.raises(VariantError, match=r"'cpu-fp32' has no router\.onnx: export it anew"):
        router_graph(old)


def test_a_router_graph_that_differs_from_the_manifest_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    def single(data: dict[str, Any]) -> None:
        (costs,) = (t for t in data["variants"][0]["graphs"]["router"]["inputs"] if t["name"] == "costs")
        costs["dtype"] = "float32"

    other = open_bundle(changed_copy(bundle, tmp_path / "single", single))
    with pytest.raises(BundleIOMismatchError, match=r"cpu-int8/router\.onnx: input 'costs'"):
        router_graph(other, "cpu-int8")


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(default_policy="hdp"),
        lambda data: (data.update(tokens=None), [v["graphs"].pop("encoder") for v in data["variants"]]),
    ],
)
def test_a_router_graph_of_another_policy_or_without_an_encoder_is_refused(
    bundle: Bundle, tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    with pytest.raises(BundleSchemaError, match="has a router graph, but no encoder, or another policy"):
        open_bundle(changed_copy(bundle, tmp_path / "other", change))
