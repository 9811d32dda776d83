"""Tests of runtime/encoder.py: what runs together, that no bit depends on it, a promise that is broken."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from arllm.runtime.bundle import Graph, open_bundle
from arllm.runtime.encoder import TOGETHER, TOKENS_TOGETHER, QueryEncoder
from arllm.runtime.router import Router
from arllm.runtime.tokens import TextTokenizer

Ids = NDArray[np.int64]


class Additive:
    """Stands for a session: a query's vector is the sum of its ids; with ``drift``, a batch's differ a little."""

    def __init__(self, drift: float = 0.0) -> None:
        self.drift = drift
        self.shapes: list[tuple[int, ...]] = []

    def run_many(self, outputs: tuple[str, ...], inputs: dict[str, Any]) -> list[NDArray[np.float32]]:
        ids = inputs["input_ids"]
        assert inputs["attention_mask"].shape == ids.shape
        assert inputs["attention_mask"].all()
        self.shapes.append(ids.shape)
        found = ids.sum(axis=1, keepdims=True).astype(np.float32) + (self.drift if len(ids) > 1 else 0.0)
        return [np.repeat(found, 3, axis=1), found[:, 0] / 1e6]


Parts = tuple[TextTokenizer, Graph]


@pytest.fixture(scope="module")
def parts(tiny_bundle: Path) -> Parts:
    """What an encoder needs beside a session."""
    manifest = open_bundle(tiny_bundle, verify=False).manifest
    graph = manifest.variants["cpu-fp32"].encoder
    assert manifest.tokens is not None
    assert graph is not None
    longer = dataclasses.replace(manifest.tokens, max_tokens=TOKENS_TOGETHER)
    return TextTokenizer.from_file(tiny_bundle / "tokenizer.json", longer), graph


def encoder_of(parts: Parts, session: Additive, batch_invariant: bool = True) -> QueryEncoder:
    return QueryEncoder(parts[0], session, parts[1], batch_invariant)  # type: ignore[arg-type]


def rows_of(lengths: list[int]) -> list[Ids]:
    return [np.arange(i, i + length, dtype=np.int64) for i, length in enumerate(lengths)]


def encoded(encoder: QueryEncoder, rows: list[Ids]) -> dict[int, tuple[bytes, bytes]]:
    found = {}
    for group, (vectors, familiarity) in encoder.encode_groups(rows):
        assert len(group) == len(vectors) == len(familiarity)
        for i, vector, certain in zip(group, vectors, familiarity, strict=True):
            assert i not in found
            found[i] = vector.tobytes(), certain.tobytes()
    return found


@pytest.mark.parametrize("batch_invariant", [True, False])
@pytest.mark.parametrize("drift", [0.0, 1.0])
def test_every_query_gets_what_it_gets_alone(parts: Parts, batch_invariant: bool, drift: float) -> None:
    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.integers(1, 6), max_size=90))
    def holds(lengths: list[int]) -> None:
        encoder, rows = encoder_of(parts, Additive(drift), batch_invariant), rows_of(lengths)
        alone = {i: tuple(part.tobytes() for part in encoder.encode(row)) for i, row in enumerate(rows)}
        assert encoded(encoder, rows) == alone

    holds()


def test_equal_lengths_run_together_after_one_look_at_each_size(parts: Parts) -> None:
    session = Additive()
    encoder = encoder_of(parts, session)
    rows = rows_of([5] * 35 + [7])
    encoded(encoder, rows)
    assert session.shapes == [(32, 5), *[(1, 5)] * 32, (2, 5), *[(1, 5)] * 2, (1, 5), (1, 7)]
    session.shapes.clear()
    encoded(encoder, rows)  # both sizes are known by now
    assert session.shapes == [(32, 5), (2, 5), (1, 5), (1, 7)]


def test_a_batch_holds_a_bounded_number_of_tokens(parts: Parts) -> None:
    session = Additive()
    encoder = encoder_of(parts, session)
    encoded(encoder, rows_of([TOKENS_TOGETHER // 3] * 5))
    assert max(rows * width for rows, width in session.shapes) <= TOKENS_TOGETHER
    assert (2, TOKENS_TOGETHER // 3) in session.shapes
    assert max(TOGETHER) == TOGETHER[0]


def test_a_processor_that_breaks_the_promise_is_found_out_once(parts: Parts) -> None:
    session = Additive(drift=1.0)
    encoder = encoder_of(parts, session)
    encoded(encoder, rows_of([5] * 8))
    assert (8, 5) in session.shapes
    session.shapes.clear()
    encoded(encoder, rows_of([5] * 8))
    assert set(session.shapes) == {(1, 5)}


def test_without_the_promise_queries_run_singly(parts: Parts) -> None:
    session = Additive()
    encoded(encoder_of(parts, session, batch_invariant=False), rows_of([5] * 8))
    assert session.shapes == [(1, 5)] * 8


words = st.lists(st.sampled_from(["sum", "of", "17", "and", "25", "\n", "x" * 40, "日本"]), max_size=12)


@pytest.mark.parametrize("variant", ["cpu-fp32", "cpu-int8"])
def test_a_batch_is_its_queries_to_the_bit(tiny_bundle: Path, variant: str) -> None:
    """Whatever the variant promises: over random batches with many equal lengths."""
    router = Router.load(tiny_bundle, variant=variant)

    @settings(max_examples=25, deadline=None)
    @given(st.lists(words.map(" ".join), max_size=40))
    def holds(texts: list[str]) -> None:
        for text, decision in zip(texts, router.route_batch(texts, 0.1), strict=True):
            alone = router.route(text, 0.1)
            assert decision.model == alone.model
            assert decision.truncation == alone.truncation
            assert decision.familiarity == alone.familiarity
            for name in ("vector", "qualities", "utilities"):
                assert getattr(decision, name).tobytes() == getattr(alone, name).tobytes()

    holds()
