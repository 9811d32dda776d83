"""Tests of train/familiarity.py: densities and marks by hand, strange wording below known wording, padding."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from arllm.runtime.tokens import TokenSpec
from arllm.train.backbones import nano_spec
from arllm.train.encoder import PAIRS, EncoderSpec, QueryEncoder, pad_batch, pair_slots
from arllm.train.familiarity import LEAST_SLOPE, MARKS, STEPS, fit_familiarity, wordings

Rows = list[NDArray[np.int64]]
SPEC = EncoderSpec(
    dataclasses.replace(nano_spec(200, layers=1, width=64), intermediate_size=64),
    TokenSpec(64, (1,), (2,), 0),
    ("a", "b"),
    0,
)


def encoder() -> QueryEncoder:
    torch.manual_seed(0)
    return QueryEncoder(SPEC).eval()


def rows(*ids: list[int]) -> Rows:
    return [np.array(row, dtype=np.int64) for row in ids]


def spoken(count: int, seed: int) -> Rows:
    """Queries in a language: after a token come three others only, its successors."""
    rng = np.random.default_rng(seed)
    successors = np.random.default_rng(99).integers(3, 200, (200, 3))
    found = []
    for _ in range(count):
        row = [int(rng.integers(3, 200))]
        for _ in range(int(rng.integers(8, 30))):
            row.append(int(rng.choice(successors[row[-1]])))
        found.append(np.array([1, *row, 2], dtype=np.int64))
    return found


def scrambled(queries: Rows, seed: int = 5) -> Rows:
    """The same words in another order."""
    rng = np.random.default_rng(seed)
    return [np.concatenate([row[:1], rng.permutation(row[1:-1]), row[-1:]]) for row in queries]


@pytest.fixture(scope="module")
def fitted() -> QueryEncoder:
    some = encoder()
    fit_familiarity(some, spoken(2000, 0), spoken(300, 1))
    return some


def density(some: QueryEncoder, first: int, second: int) -> int:
    return int(some.pair_density[pair_slots(first, second)])


def test_densities_by_hand() -> None:
    some = encoder()
    train = rows([1, 5, 6, 2], [1, 5, 7, 2], [5, 6, 5, 6], [9])
    fit_familiarity(some, train, train)
    one, two = (round(STEPS * math.log(1 + n)) for n in (1, 2))
    assert (one, two) == (11, 18)
    assert density(some, 1, 5) == two
    assert density(some, 5, 6) == two  # of the queries that hold it: three times, in two
    assert density(some, 6, 2) == density(some, 5, 7) == density(some, 7, 2) == density(some, 6, 5) == one
    assert int((some.pair_density > 0).sum()) == 6
    assert density(some, 5, 1) == density(some, 2, 5) == 0  # a pair has an order; queries don't run on
    assert some.pair_density.shape == (PAIRS,)
    assert some.pair_density.dtype == torch.uint8


@torch.inference_mode()
def familiarities(some: QueryEncoder, queries: Sequence[NDArray[np.int64]]) -> NDArray[np.float32]:
    found: NDArray[np.float32] = some.familiarity(*pad_batch(queries, some.spec.tokens.pad_id)).numpy()
    return found


def test_wording_by_hand() -> None:
    some = encoder()
    fit_familiarity(some, rows([1, 5, 6, 2], [1, 5, 7, 2]), rows([1, 5, 6, 2]))
    found = wordings(some, rows([1, 5, 6, 2], [1, 5, 9], [6, 2], [9, 8, 7]))
    assert found.tolist() == pytest.approx([(18 + 11 + 11) / 3, 9.0, 11.0, 0.0])


def test_the_marks_are_quantiles_of_validation(fitted: QueryEncoder) -> None:
    val = wordings(fitted, spoken(300, 1))
    low, high = fitted.familiar.tolist()
    assert (low, high) == pytest.approx(tuple(np.quantile(val, MARKS)), rel=1e-6)
    assert high - low > LEAST_SLOPE
    known = familiarities(fitted, spoken(300, 1))
    assert known.dtype == np.float32
    np.testing.assert_allclose(known, np.clip((val - low) / (high - low), 0.0, 1.0), atol=1e-6)
    assert (known == 0.0).mean() == pytest.approx(MARKS[0], abs=0.01)
    assert (known == 1.0).mean() == pytest.approx(1 - MARKS[1], abs=0.01)
    assert 0.0 < known[known < 1.0].mean() < 1.0


def test_the_marks_come_from_validation_not_from_training() -> None:
    one, other = encoder(), encoder()
    fit_familiarity(one, spoken(500, 0), spoken(100, 1))
    fit_familiarity(other, spoken(500, 0), scrambled(spoken(100, 1)))
    assert torch.equal(one.pair_density, other.pair_density)
    assert one.familiar[1] > other.familiar[1] + 1.0


def test_validation_queries_that_are_all_alike_make_no_step() -> None:
    some = encoder()
    train = rows([1, 5, 6, 2], [1, 5, 7, 2])
    fit_familiarity(some, train, train * 20)
    high = (18 + 11 + 11) / 3
    assert some.familiar.tolist() == pytest.approx([high - LEAST_SLOPE, high])


def test_strange_wording_scores_below_known_wording(fitted: QueryEncoder) -> None:
    fresh = spoken(200, 7)
    known, mixed = familiarities(fitted, fresh), familiarities(fitted, scrambled(fresh))
    rng = np.random.default_rng(3)
    noise = familiarities(fitted, [np.array([1, *rng.integers(3, 200, len(row) - 2), 2]) for row in fresh])
    assert known.mean() > 0.7
    assert mixed.mean() < 0.1  # the words alone are not what is known
    assert noise.mean() < 0.1
    half = [
        np.concatenate([a[: len(a) // 2], b[len(b) // 2 :]]) for a, b in zip(fresh, scrambled(fresh), strict=True)
    ]
    between = wordings(fitted, half).mean()
    assert wordings(fitted, scrambled(fresh)).mean() < between < wordings(fitted, fresh).mean()


def test_padding_does_not_matter(fitted: QueryEncoder) -> None:
    some = [*spoken(20, 8), *rows([1, 2], [7])]
    alone = np.concatenate([wordings(fitted, [row]) for row in some])
    np.testing.assert_allclose(wordings(fitted, some), alone, rtol=1e-6)
    ids, mask = pad_batch(some, 0)
    junk = torch.where(mask.bool(), ids, torch.tensor(5))
    for function in (fitted.wording, fitted.familiarity):
        assert torch.equal(function(junk, mask), function(ids, mask))
    assert alone.std() > 1.0


def test_a_token_that_is_hidden_takes_its_pairs_along(fitted: QueryEncoder) -> None:
    (row,) = spoken(1, 4)
    ids, mask = pad_batch([row], 0)
    mask[0, 3] = 0
    pairs = [density(fitted, int(a), int(b)) for a, b in itertools.pairwise(row)]
    left = [pair for i, pair in enumerate(pairs) if i not in (2, 3)]
    assert np.mean(left) != pytest.approx(np.mean(pairs))
    assert fitted.wording(ids, mask).tolist() == pytest.approx([np.mean(left)])


def test_a_query_of_one_token_is_unfamiliar(fitted: QueryEncoder) -> None:
    assert wordings(fitted, rows([1], [50])).tolist() == [0.0, 0.0]
    assert familiarities(fitted, rows([1], [50])).tolist() == [0.0, 0.0]


def test_many_queries_keep_their_order(fitted: QueryEncoder) -> None:
    some = spoken(600, 11)  # more than two batches
    backwards = familiarities(fitted, some[::-1])
    np.testing.assert_allclose(familiarities(fitted, some), backwards[::-1], atol=1e-6)
    assert backwards.shape == (600,)


def test_it_travels_with_the_weights(fitted: QueryEncoder) -> None:
    other = encoder()
    other.load_state_dict(fitted.state_dict())
    some = spoken(50, 12)
    np.testing.assert_array_equal(familiarities(other, some), familiarities(fitted, some))
