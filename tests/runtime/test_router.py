"""Tests of runtime/router.py: decisions by hand, batches, candidates, pool overrides, threads, every bad input."""

from __future__ import annotations

import asyncio
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arllm.runtime import session
from arllm.runtime.answer import Decision
from arllm.runtime.devices import cores
from arllm.runtime.errors import (
    ArllmError,
    BetaError,
    CandidateError,
    InputError,
    PolicyError,
    PoolError,
    QueryError,
    VariantError,
)
from arllm.runtime.pool import Candidate, Pool
from arllm.runtime.router import Router

TEXTS = [
    "",
    "What is 17 + 25?",
    "not ( True and False ) or False is",
    "def f(n):\n    return n\nprint(f(3))",
    "Sort these words alphabetically: walnut, cherry, almond",
    "日本の首都はどこですか。 🙂 \x00",
    "one two three " * 100,
    "What is 17 + 25?",
]
BETAS = (0.0, 0.02, 0.1, 0.5, 1.0)
POLICIES = ("nir", "hdp", "hdp-paper")
ARRAYS = ("qualities", "utilities", "costs", "vector")


def assert_same(one: Decision, other: Decision) -> None:
    """Equal to the bit, time spent aside."""
    for name in ARRAYS:
        a, b = getattr(one, name), getattr(other, name)
        assert a.dtype == b.dtype
        assert a.tobytes() == b.tobytes()
    same = ("model", "candidates", "familiarity", "reason", "beta", "policy", "variant", "pool_overridden")
    for name in (*same, "truncation"):
        assert getattr(one, name) == getattr(other, name)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("beta", BETAS)
def test_utilities_and_choice_by_hand(router: Router, policy: str, beta: float) -> None:
    costs = {c.name: c.cost for c in router.pool.candidates}
    low, high = min(costs.values()), max(costs.values())
    for text in TEXTS:
        decision = router.route(text, beta, policy)
        assert (decision.beta, decision.policy, decision.variant) == (beta, policy, "cpu-fp32")
        assert decision.cost == costs
        for name, quality in decision.quality.items():
            assert 0.0 <= quality <= 1.0
            want = (1 - beta) * quality - beta * (costs[name] - low) / (high - low)
            assert decision.utility[name] == pytest.approx(want, abs=1e-12)
        utility = decision.utility
        assert decision.model == min(costs, key=lambda name: (-utility[name], costs[name], name))


def test_preference_matters(router: Router) -> None:
    chosen = {beta: {router.route(text, beta).model for text in TEXTS} for beta in BETAS}
    assert chosen[1.0] == {"sim-tiny"}  # the cheapest
    assert chosen[0.0] != chosen[1.0]


def test_the_default_is_the_bundles_policy_at_one_half(router: Router) -> None:
    assert_same(router.route(TEXTS[1]), router.route(TEXTS[1], 0.5, router.bundle.manifest.default_policy))


def test_a_decisions_fields(router: Router) -> None:
    decision = router.route(TEXTS[1], np.float32(0.25))  # type: ignore[arg-type]
    manifest = router.bundle.manifest
    vector = decision.query_vector
    assert tuple(vector.domains) == manifest.domains
    assert sum(vector.domains.values()) == pytest.approx(1.0, abs=1e-5)
    assert 0.0 <= vector.difficulty <= 1.0
    assert len(vector.embedding) == manifest.embedding_width == 8
    assert decision.vector.tolist() == [*vector.domains.values(), vector.difficulty, *vector.embedding]
    assert decision.candidates == router.pool.names
    assert decision.pool_overridden is False
    assert decision.truncation is not None
    assert not decision.truncation.truncated
    times = decision.timing
    assert min(times.tokenize_ms, times.encode_ms, times.score_ms) >= 0
    assert times.total_ms == times.tokenize_ms + times.encode_ms + times.score_ms


@pytest.mark.parametrize("policy", POLICIES)
def test_to_dict_is_json(router: Router, policy: str) -> None:
    decision = router.route(TEXTS[6], 0.25, policy, ["sim-tiny", "sim-math"])
    data = json.loads(json.dumps(decision.to_dict(), allow_nan=False))
    assert data == decision.to_dict()
    assert data["model"] == decision.model
    assert data["quality"] == decision.quality
    assert data["utility"] == decision.utility
    assert set(data["cost"]) == {"sim-tiny", "sim-math"}
    assert data["domains"] == dict(decision.query_vector.domains)
    assert data["difficulty"] == decision.query_vector.difficulty
    assert (data["familiarity"], data["reason"]) == (decision.familiarity, decision.reason)
    assert (data["beta"], data["policy"], data["variant"]) == (0.25, policy, "cpu-fp32")
    assert data["truncated"] is True
    assert data["timing_ms"]["total"] == decision.timing.total_ms
    json.dumps(router.route_vector(decision.vector).to_dict(), allow_nan=False)


def test_truncation_is_reported(router: Router) -> None:
    room = router.bundle.manifest.tokens
    assert room is not None
    text = "word " * 200  # more than 48 tokens, more than 768 bytes
    decision = router.route(text)
    assert decision.truncation is not None
    assert decision.truncation.bytes_total == len(text)
    assert decision.truncation.bytes_dropped == len(text) - room.max_bytes
    assert decision.truncation.tokens_dropped > 0
    data = decision.to_dict()
    assert (data["truncated"], data["bytes_dropped"]) == (True, len(text) - room.max_bytes)
    assert len(router.tokenize(text)[0]) == room.max_tokens


def test_ten_megabytes_are_routed_and_the_middle_does_not_matter(router: Router) -> None:
    ends = "x" * 5_000
    one, other = (router.route(ends + middle * 1_000_000 + ends) for middle in ("abcdefghij", "0123456789"))
    assert one.truncation is not None
    assert one.truncation.bytes_total == 10_010_000
    assert_same(one, other)


@pytest.mark.parametrize("text", ["", " ", "\x00", "\ud800", "a\udfffb", "\ud83d\ude42", "\u2028"])
def test_odd_text_has_a_decision(router: Router, text: str) -> None:
    decision = router.route(text)
    assert decision.model in router.pool.names
    assert np.isfinite(decision.vector).all()
    assert np.isfinite(decision.utilities).all()


@pytest.mark.parametrize("variant", ["cpu-fp32", "cpu-int8"])
def test_a_batch_decides_as_single_queries_do(tiny_bundle: Path, variant: str) -> None:
    router = Router.load(tiny_bundle, variant=variant)
    for policy in POLICIES:
        batch = router.route_batch(iter(TEXTS), 0.1, policy, ["sim-large", "sim-tiny"])
        assert len(batch) == len(TEXTS)
        for text, decision in zip(TEXTS, batch, strict=True):
            assert_same(decision, router.route(text, 0.1, policy, ["sim-large", "sim-tiny"]))
    assert router.route_batch([]) == []


def test_route_vector_continues_where_the_encoder_ends(router: Router) -> None:
    for text in TEXTS:
        whole = router.route(text, 0.1)
        vector, familiarity, cut = router.encode(text)
        assert vector.tobytes() == whole.vector.tobytes()
        assert (familiarity, cut) == (whole.familiarity, whole.truncation)
        half = router.route_vector(vector.tolist(), 0.1, familiarity=familiarity)
        assert half.truncation is None
        for name in ARRAYS:
            assert getattr(half, name).tobytes() == getattr(whole, name).tobytes()
        assert (half.model, half.familiarity, half.reason) == (whole.model, familiarity, whole.reason)


def test_a_decision_does_not_change_with_the_callers_array(router: Router) -> None:
    vector = router.encode(TEXTS[1]).vector.copy()
    decision = router.route_vector(vector)
    before = decision.vector.tolist()
    vector[:] = 7.0
    assert decision.vector.tolist() == before


def test_shared_arrays_are_read_only(router: Router) -> None:
    for shared in (router.route("x").costs, router.normalized_costs):
        with pytest.raises(ValueError, match="read-only"):
            shared[0] = 99.0


def test_predict_agrees_with_route(router: Router) -> None:
    encoded = [router.encode(text) for text in TEXTS]
    vectors, familiarity = np.stack([e.vector for e in encoded]), np.array([e.familiarity for e in encoded])
    for policy in router.policies:
        table = router.predict(vectors, policy, familiarity)
        assert table.shape == (len(TEXTS), len(router.pool))
        for text, row in zip(TEXTS, table, strict=True):
            assert router.route(text, policy=policy).qualities == pytest.approx(row, abs=1e-6)


def test_aroute_is_route(router: Router) -> None:
    async def both() -> list[Decision]:
        return list(await asyncio.gather(*(router.aroute(text, 0.1, "hdp", ["sim-code"]) for text in TEXTS)))

    for text, decision in zip(TEXTS, asyncio.run(both()), strict=True):
        assert_same(decision, router.route(text, 0.1, "hdp", ["sim-code"]))
    with pytest.raises(BetaError):
        asyncio.run(router.aroute("x", math.nan))


def test_warmup_changes_nothing(router: Router) -> None:
    before = router.route(TEXTS[1])
    router.warmup()
    router.warmup(lengths=(0, 1, 10_000))
    router.warmup(lengths=())
    assert_same(router.route(TEXTS[1]), before)


def test_warmup_reaches_the_longest_query(router: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    assert router._encoder is not None
    lengths, real = [], router._encoder.encode

    def watched(ids: Any) -> Any:
        lengths.append(len(ids))
        return real(ids)

    monkeypatch.setattr(router._encoder, "encode", watched)
    router.warmup()
    assert router.bundle.manifest.tokens is not None
    assert max(lengths) == router.bundle.manifest.tokens.max_tokens
    assert min(lengths) < max(lengths)


def test_candidates_narrow_the_choice_and_keep_the_scale(router: Router) -> None:
    allowed = ("sim-large", "sim-small", "sim-math")
    for beta in BETAS:
        whole = router.route(TEXTS[1], beta)
        some = router.route(TEXTS[1], beta, candidates=allowed)
        assert some.candidates == ("sim-small", "sim-math", "sim-large")  # by cost
        assert some.utility == {name: whole.utility[name] for name in some.candidates}
        assert some.quality == {name: whole.quality[name] for name in some.candidates}
        assert some.model == max(some.candidates, key=lambda name: some.utility[name])
    only = router.route(TEXTS[1], 1.0, candidates={"sim-frontier"})
    assert (only.model, only.utility) == ("sim-frontier", {"sim-frontier": -1.0})


def test_eight_threads_decide_as_one_does(router: Router) -> None:
    jobs = [(text, beta, policy) for text in TEXTS for beta in BETAS for policy in POLICIES] * 3
    expected = [router.route(*job) for job in jobs]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda job: router.route(*job), jobs))
    for one, other in zip(expected, found, strict=True):
        assert_same(one, other)


def test_an_override_brings_new_prices_on_the_old_scale(tiny_bundle: Path, router: Router, tmp_path: Path) -> None:
    prices = {"sim-frontier": 0.0, "sim-tiny": 6.0, "sim-math": 0.4}
    pool = Pool(tuple(Candidate(name, cost) for name, cost in prices.items()), router.pool.unit)
    path = tmp_path / "pool.json"
    path.write_text(json.dumps(pool.to_json()), encoding="utf-8")
    for given in (pool, path, str(path)):
        changed = Router.load(tiny_bundle, variant="cpu-fp32", pool=given)
        decision = changed.route(TEXTS[1], 0.5)
        assert decision.pool_overridden is True
        assert decision.to_dict()["pool_overridden"] is True
        assert decision.candidates == ("sim-frontier", "sim-math", "sim-tiny")
        assert decision.cost == prices
        before = router.route(TEXTS[1], 0.5)
        assert decision.vector.tobytes() == before.vector.tobytes()
        for name, cost in prices.items():
            assert decision.quality[name] == pytest.approx(before.quality[name], abs=1e-6)
            want = 0.5 * decision.quality[name] - 0.5 * (cost - 0.05) / (3.0 - 0.05)
            assert decision.utility[name] == pytest.approx(want, abs=1e-12)
        assert changed.route(TEXTS[1], 1.0).model == "sim-frontier"


def test_an_override_may_add_a_candidate_with_a_vector(tiny_bundle: Path, router: Router) -> None:
    width = len(router.bundle.manifest.domains)
    pool = Pool((*router.pool.candidates, Candidate("new", 0.01, (1.0,) * width)))
    changed = Router.load(tiny_bundle, variant="cpu-fp32", pool=pool)
    assert changed.route(TEXTS[1], 1.0).model == "new"
    assert changed.route(TEXTS[1], 0.5, "hdp").model == "new"  # cheapest, and right in every domain


def test_unusable_overrides_are_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(CandidateError, match="'stranger' of the pool override has no model vector"):
        Router.load(tiny_bundle, pool=Pool((Candidate("stranger", 1.0),)))
    with pytest.raises(PoolError, match=r"have 2 entries, the bundle expects \d+"):
        Router.load(tiny_bundle, pool=Pool((Candidate("sim-tiny", 1.0, (0.5, 0.5)),)))
    with pytest.raises(PoolError, match="different widths"):
        Router.load(tiny_bundle, pool=Pool((Candidate("sim-tiny", 1.0, (0.5,)), Candidate("sim-code", 1.0))))
    with pytest.raises(PoolError, match=r"absent\.json"):
        Router.load(tiny_bundle, pool=tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        *[(QueryError, {"text": text}) for text in (None, 5, b"x", ["x"])],
        *[(BetaError, {"beta": beta}) for beta in (math.nan, -0.1, 1.1, True, "0.5", None, math.inf)],
        *[(PolicyError, {"policy": policy}) for policy in ("best", "", "NIR", 5, ["nir"], {})],
        *[(CandidateError, {"candidates": names}) for names in ([], ["nobody"], ["sim-tiny", 5], "sim-tiny", 5)],
    ],
)
def test_bad_input_gives_its_typed_error(router: Router, error: type[Exception], arguments: dict[str, Any]) -> None:
    text = arguments.pop("text", "a query")
    calls = [lambda: router.route(text, **arguments), lambda: router.route_batch(["ok", text], **arguments)]
    if arguments:
        vector = np.full(router.bundle.manifest.query_width, 0.5)
        calls.append(lambda: router.route_vector(vector, **arguments))
    for call in calls:
        with pytest.raises(error) as caught:
            call()
        assert isinstance(caught.value, InputError)
        assert isinstance(caught.value, ValueError)
        assert isinstance(caught.value, ArllmError)


@pytest.mark.parametrize("text", ["one query", b"bytes"])
def test_a_batch_is_not_a_string(router: Router, text: Any) -> None:
    with pytest.raises(QueryError, match="call route"):
        router.route_batch(text)


@pytest.mark.parametrize(
    "vector",
    [
        [],
        [0.5] * 17,
        [0.5] * 19,
        [[0.5] * 18],
        0.5,
        None,
        "abc",
        [0.5] * 17 + [math.nan],
        [0.5] * 17 + [math.inf],
        [0.5] * 17 + [10**400],
        [0.5] * 17 + ["x"],
        [0.5] * 17 + [None],
        [0.5] * 17 + [[0.5]],
    ],
)
def test_an_unusable_query_vector_is_refused(router: Router, vector: Any) -> None:
    with pytest.raises(QueryError, match="query vector"):
        router.route_vector(vector)


@pytest.mark.parametrize("threads", [0, -1, True, 1.5, "2"])
def test_unusable_threads_are_refused(tiny_bundle: Path, threads: Any) -> None:
    with pytest.raises(VariantError, match="threads must be a whole number of at least 1"):
        Router.load(tiny_bundle, threads=threads)


@pytest.mark.parametrize("profile", ["", "fast", None, 1])
def test_an_unknown_profile_is_refused(tiny_bundle: Path, profile: Any) -> None:
    with pytest.raises(InputError, match="profile must be guest or latency"):
        Router.load(tiny_bundle, profile=profile)


@pytest.mark.parametrize(
    ("arguments", "threads", "spin"),
    [
        ({}, 1, "0"),
        ({"profile": "guest"}, 1, "0"),
        ({"threads": 3}, 3, "0"),
        ({"profile": "latency"}, cores(), "1"),
        ({"profile": "latency", "threads": 1}, 1, "1"),
    ],
)
def test_a_profile_is_what_every_graph_gets(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], threads: int, spin: str
) -> None:
    opened = []
    real = session.onnxruntime.InferenceSession

    def watched(source: Any, options: Any, **rest: Any) -> Any:
        spinning = options.get_session_config_entry("session.intra_op.allow_spinning")
        opened.append((options.intra_op_num_threads, options.inter_op_num_threads, spinning))
        return real(source, options, **rest)

    monkeypatch.setattr(session.onnxruntime, "InferenceSession", watched)
    Router.load(tiny_bundle, variant="cpu-fp32", **arguments)
    assert opened == [(threads, 1, spin)] * 2  # encoder and NIR


@pytest.mark.parametrize("arguments", [{"threads": 2}, {"profile": "latency"}])
def test_more_threads_decide_alike(tiny_bundle: Path, router: Router, arguments: dict[str, Any]) -> None:
    two = Router.load(tiny_bundle, variant="cpu-fp32", **arguments)
    for text in TEXTS:
        assert two.route(text).qualities == pytest.approx(router.route(text).qualities, abs=1e-5)
