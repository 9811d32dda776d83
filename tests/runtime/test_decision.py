"""Tests of runtime/decision.py: normalisation, utility, mask, tie-break, by hand and as properties; beta's errors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arllm.runtime.decision import candidate_mask, check_beta, choose, normalize_costs, utility
from arllm.runtime.errors import ArllmError, BetaError, CandidateError
from arllm.runtime.pool import Candidate, Pool

NAMES = ("a", "b", "c")


@pytest.mark.parametrize("beta", [0, 1, 0.0, 1.0, 0.5, np.float32(0.25), np.float64(0.5), np.int64(1)])
def test_beta_is_returned_as_a_float(beta: Any) -> None:
    value = check_beta(beta)
    assert type(value) is float
    assert value == float(beta)


@pytest.mark.parametrize(
    "beta",
    [math.nan, -0.1, 1.1, -1e-12, math.inf, -math.inf, True, False, np.True_, "0.5", None, [0.5], 0.5j, 10**400],
)
def test_unusable_beta_is_refused(beta: Any) -> None:
    with pytest.raises(BetaError, match="beta must") as caught:
        check_beta(beta)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, ArllmError)


def test_costs_are_scaled_to_the_bundles_span() -> None:
    scaled = normalize_costs(np.array([1.0, 2.0, 5.0]), 1.0, 5.0)
    assert scaled.tolist() == [0.0, 0.25, 1.0]
    assert scaled.dtype == np.float64


def test_costs_outside_the_span_extrapolate() -> None:
    assert normalize_costs(np.array([0.0, 1.0, 9.0]), 1.0, 5.0).tolist() == [-0.25, 0.0, 2.0]


def test_a_narrowed_candidate_set_is_not_rescaled() -> None:
    whole = normalize_costs(np.array([1.0, 2.0, 5.0]), 1.0, 5.0)
    assert normalize_costs(np.array([2.0]), 1.0, 5.0)[0] == whole[1]


@pytest.mark.parametrize("costs", [[3.0, 3.0], [3.0, 8.0]])
def test_zero_span_gives_zero(costs: list[float]) -> None:
    assert normalize_costs(np.array(costs), 3.0, 3.0).tolist() == [0.0, 0.0]


def test_utility_by_hand() -> None:
    quality = np.array([[0.5, 0.75, 1.0], [0.0, 0.25, 0.5]], dtype=np.float32)
    got = utility(quality, np.array([0.0, 0.5, 1.0]), 0.25)
    # 0.75 * quality - 0.25 * cost
    assert got.tolist() == [[0.375, 0.4375, 0.5], [0.0, 0.0625, 0.125]]
    assert got.dtype == np.float64


def test_utility_at_the_ends_is_quality_alone_and_cost_alone() -> None:
    quality, cost = np.array([0.5, 0.75]), np.array([0.25, 1.0])
    assert utility(quality, cost, 0.0).tolist() == [0.5, 0.75]
    assert utility(quality, cost, 1.0).tolist() == [-0.25, -1.0]


def test_choose_takes_the_highest_of_each_row() -> None:
    assert choose(np.array([[0.1, 0.3, 0.2], [0.9, 0.3, 0.2]])).tolist() == [1, 0]
    assert int(choose(np.array([0.1, 0.3, 0.2]))) == 1


def test_choose_ignores_masked_candidates() -> None:
    mask = np.array([True, False, True])
    assert choose(np.array([[0.1, 0.3, 0.2], [0.1, 0.3, 0.0]]), mask).tolist() == [2, 0]


def test_choose_leaves_its_argument_alone() -> None:
    utilities = np.array([0.1, 0.3])
    choose(utilities, np.array([True, False]))
    assert utilities.tolist() == [0.1, 0.3]


def test_ties_go_to_the_lower_cost_then_to_the_name() -> None:
    pool = Pool((Candidate("b", 1.0), Candidate("a", 2.0), Candidate("c", 1.0)))
    assert pool.names == ("b", "c", "a")
    tied = np.zeros(3)
    assert pool.names[int(choose(tied))] == "b"  # the cheap two come first, b before c
    assert pool.names[int(choose(tied, np.array([False, True, True])))] == "c"
    assert pool.names[int(choose(tied, np.array([False, False, True])))] == "a"


def test_a_tie_of_quality_and_cost_together() -> None:
    # beta 0.5: 0.5 * 0.5 - 0.5 * 0 = 0.5 * 1 - 0.5 * 0.5: the dear and better candidate ties with the cheap one
    utilities = utility(np.array([0.5, 1.0]), np.array([0.0, 0.5]), 0.5)
    assert utilities[0] == utilities[1]
    assert int(choose(utilities)) == 0


@pytest.mark.parametrize(
    ("allowed", "mask"),
    [
        (["b"], [False, True, False]),
        (("c", "a", "a"), [True, False, True]),
        ({"a": 1, "b": 2}, [True, True, False]),
        ((name for name in ("a", "b")), [True, True, False]),
        (np.array(["b", "c"]), [False, True, True]),
    ],
)
def test_mask_of_any_collection(allowed: Any, mask: list[bool]) -> None:
    got = candidate_mask(NAMES, allowed)
    assert got is not None
    assert got.tolist() == mask


def test_no_mask_means_all() -> None:
    assert candidate_mask(NAMES, None) is None


@pytest.mark.parametrize(
    ("allowed", "message"),
    [
        ([], "empty"),
        (set(), "empty"),
        (iter(()), "empty"),
        (["a", "z"], "unknown candidate 'z'"),
        ([1, "z", None], "unknown candidate"),
        ("a", "not the string 'a'"),
        ("", "not the string"),
        (5, "must be a collection"),
        ([["a"]], "must be a collection"),
    ],
)
def test_unusable_candidate_sets_are_refused(allowed: Any, message: str) -> None:
    with pytest.raises(CandidateError, match=message) as caught:
        candidate_mask(NAMES, allowed)
    assert isinstance(caught.value, ValueError)


# Few distinct values, so that ties of every kind are common.
rows = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 3), st.sampled_from("abcdefgh")),
    min_size=1,
    max_size=8,
    unique_by=lambda row: row[2],
)


@given(rows, st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), st.data())
def test_choice_equals_an_explicit_sort(table: list[tuple[int, int, str]], beta: float, data: st.DataObject) -> None:
    quality = {name: q / 4 for q, _, name in table}
    pool = Pool(tuple(Candidate(name, float(cost)) for _, cost, name in table))
    allowed = data.draw(st.none() | st.sets(st.sampled_from(pool.names), min_size=1))
    costs = normalize_costs(pool.costs, float(pool.costs.min()), float(pool.costs.max()))
    utilities = utility(np.array([quality[name] for name in pool.names]), costs, beta)
    chosen = pool.names[int(choose(utilities, candidate_mask(pool.names, allowed)))]
    ranked = sorted(
        (-u, cost, name)
        for u, cost, name in zip(utilities.tolist(), pool.costs.tolist(), pool.names, strict=True)
        if allowed is None or name in allowed
    )
    assert chosen == ranked[0][2]
