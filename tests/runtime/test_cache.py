"""Tests of runtime/cache.py and of a router with a cache: exact keys, bounds, counters, honest timing, threads."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arllm.runtime.answer import Decision, Timing
from arllm.runtime.cache import BYTES_PER_ENTRY, CacheInfo, DecisionCache, Key
from arllm.runtime.errors import BetaError, CandidateError, InputError, PolicyError, QueryError
from arllm.runtime.pool import Candidate, Pool
from arllm.runtime.router import Router

TEXT = "What is 17 + 25?"


@pytest.fixture
def remembering(tiny_bundle: Path) -> Router:
    return Router.load(tiny_bundle, variant="cpu-fp32", cache=3)


def info(router: Router) -> CacheInfo:
    found = router.cache_info()
    assert found is not None
    return found


def same(one: Decision, other: Decision) -> bool:
    """Equal but for the time spent and where it came from."""
    arrays = ("qualities", "utilities", "costs", "vector")
    fields = ("model", "candidates", "familiarity", "beta", "policy", "truncation", "reason")
    return all(getattr(one, n).tobytes() == getattr(other, n).tobytes() for n in arrays) and all(
        getattr(one, n) == getattr(other, n) for n in fields
    )


def test_a_repeated_question_is_answered_out_of_the_cache(remembering: Router, router: Router) -> None:
    first, again = remembering.route(TEXT, 0.25), remembering.route(TEXT, 0.25)
    assert (first.cached, again.cached) == (False, True)
    assert same(first, again)
    assert same(router.route(TEXT, 0.25), again)
    assert (info(remembering).hits, info(remembering).misses, info(remembering).entries) == (1, 1, 1)
    assert again.to_dict()["cached"] is True


def test_a_cached_decisions_timing_is_its_own(remembering: Router) -> None:
    first, again = remembering.route(TEXT).timing, remembering.route(TEXT).timing
    assert (first.lookup_ms, again.tokenize_ms, again.encode_ms, again.score_ms) == (0, 0, 0, 0)
    assert again.total_ms == again.lookup_ms > 0
    assert first.encode_ms > 0


@pytest.mark.parametrize(
    "other",
    [
        {"text": TEXT + " "},
        {"beta": 0.5},
        {"policy": "hdp"},
        {"candidates": ["sim-tiny", "sim-math"]},
        {"candidates": ["sim-tiny", "sim-large"]},
    ],
)
def test_another_question_is_another_entry(remembering: Router, router: Router, other: dict[str, Any]) -> None:
    asked = {"text": TEXT, "beta": 0.25, "candidates": ["sim-tiny"], **other}
    remembering.route(TEXT, 0.25, candidates=["sim-tiny"])
    found = remembering.route(**asked)
    assert not found.cached
    assert same(found, router.route(**asked))
    assert info(remembering).entries == 2


def test_the_same_question_in_other_words_of_the_api_is_the_same_entry(remembering: Router) -> None:
    remembering.route(TEXT, 1, candidates=["sim-tiny", "sim-math"])
    assert remembering.route(TEXT, 1.0, "nir", {"sim-math", "sim-tiny"}).cached
    assert remembering.route_batch([TEXT], 1, "nir", ("sim-math", "sim-tiny", "sim-tiny"))[0].cached


def test_a_batch_uses_and_fills_the_cache(remembering: Router, router: Router) -> None:
    remembering.route("b")
    batch = remembering.route_batch(["a", "b", "c"])
    assert [decision.cached for decision in batch] == [False, True, False]
    assert remembering.route("c").cached
    for text, decision in zip("abc", batch, strict=True):
        assert same(decision, router.route(text))


def test_the_least_recently_used_makes_room(remembering: Router) -> None:
    for text in ("a", "b", "c", "a", "d"):  # b is the oldest when d comes
        remembering.route(text)
    assert info(remembering).entries == info(remembering).capacity == 3
    assert not remembering.route("b").cached  # and c makes room for it
    assert [remembering.route(text).cached for text in ("a", "d", "b", "c")] == [True, True, True, False]


def test_without_a_cache_nothing_is_remembered(router: Router) -> None:
    assert router.cache_info() is None
    router.route(TEXT)
    assert not router.route(TEXT).cached


def test_another_pool_is_another_cache(tiny_bundle: Path, remembering: Router) -> None:
    remembering.route(TEXT, 1.0)
    pool = Pool(tuple(Candidate(c.name, 3.0 - c.cost) for c in remembering.pool.candidates), remembering.pool.unit)
    changed = Router.load(tiny_bundle, variant="cpu-fp32", pool=pool, cache=3)
    assert not changed.route(TEXT, 1.0).cached
    assert changed.route(TEXT, 1.0).model != remembering.route(TEXT, 1.0).model


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (QueryError, {"text": ["x"]}),
        (QueryError, {"text": None}),
        (BetaError, {"beta": float("nan")}),
        (PolicyError, {"policy": "best"}),
        (CandidateError, {"candidates": ["nobody"]}),
    ],
)
def test_bad_input_is_refused_as_ever(remembering: Router, error: type[Exception], arguments: dict[str, Any]) -> None:
    remembering.route(TEXT)
    for _ in range(2):
        with pytest.raises(error):
            remembering.route(**{"text": TEXT, **arguments})
    assert info(remembering).entries == 1


@pytest.mark.parametrize("cache", [-1, True, 1.5, "3", None])
def test_an_unusable_size_is_refused(tiny_bundle: Path, cache: Any) -> None:
    with pytest.raises(InputError, match="cache must be a whole number of at least 0"):
        Router.load(tiny_bundle, cache=cache)


def test_arrays_that_decisions_share_are_read_only(remembering: Router) -> None:
    for decision in (remembering.route(TEXT), *remembering.route_batch([TEXT, "other"])):
        for array in (decision.qualities, decision.utilities, decision.costs, decision.vector):
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 9.0


def test_eight_threads_share_a_cache(tiny_bundle: Path, router: Router) -> None:
    shared = Router.load(tiny_bundle, variant="cpu-fp32", cache=4)
    texts = [f"question {n % 7}" for n in range(280)]
    expected = {text: router.route(text) for text in texts}
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(shared.route, texts))
    assert all(same(expected[text], decision) for text, decision in zip(texts, found, strict=True))
    counted = info(shared)
    assert counted.hits + counted.misses == len(texts)
    assert counted.hits == sum(decision.cached for decision in found)
    assert counted.entries == 4


# --- the bounds, against a plain list -------------------------------------------------------------------------

ONE = np.ones(1)
DECISION = Decision(
    *("a", ("a",), ONE, ONE, ONE, np.ones(2, np.float32), ("d",), 1.0, 0.5, "nir", "v", False, None),
    timing=Timing(1.0, 1.0, 1.0),
)


def key(text: str) -> Key:
    return Key(text, 0.5, "nir", None)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 14_000)), max_size=30))
def test_the_newest_entries_that_fit_are_held(capacity: int, asked: list[tuple[str, int]]) -> None:
    cache, used = DecisionCache(capacity), list[str]()  # the oldest first
    for letter, length in asked:
        text = letter * (length + 1)
        hit = cache.get(key(text)) is not None
        assert hit == (text in used)
        if not hit:
            cache.put(key(text), DECISION)
            fits = sys.getsizeof(text) <= capacity * BYTES_PER_ENTRY
        if hit or fits:
            used = [one for one in used if one != text] + [text]
        while len(used) > capacity or sum(map(sys.getsizeof, used)) > capacity * BYTES_PER_ENTRY:
            used.pop(0)
        held = cache.info()
        assert (held.entries, held.text_bytes) == (len(used), sum(map(sys.getsizeof, used)))
        assert held.text_bytes <= held.text_capacity


def test_keys_of_one_hash_are_told_apart() -> None:
    class Collides(str):
        __slots__ = ()

        def __hash__(self) -> int:
            return 1

    cache = DecisionCache(4)
    cache.put(key(Collides("one")), DECISION)
    assert hash(key(Collides("one"))) == hash(key(Collides("two")))
    assert cache.get(key(Collides("two"))) is None
    assert cache.get(key(Collides("one"))) is DECISION


def test_putting_twice_counts_once() -> None:
    cache = DecisionCache(2)
    cache.put(key("x" * 100), DECISION)
    before = cache.info()
    cache.put(key("x" * 100), DECISION)
    assert cache.info() == before
