"""Tests of runtime/pool.py: Candidate, Pool, pool.json and its prices; every error with its place."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arllm.runtime.errors import ArllmError, PoolError
from arllm.runtime.pool import Candidate, Pool, candidate_from_json, pool_from_json, price_cost, read_pool_json

GOOD = {"name": "a", "cost": 1}
HUGE = 10**400  # valid JSON, beyond any float


def three() -> Pool:
    return Pool((Candidate("c", 3.0), Candidate("b", 1.0, None, {"params": 7}), Candidate("a", 1.0)), "USD")


def write(path: Path, data: Any) -> Path:
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


def test_a_pool_stands_in_tie_break_order() -> None:
    pool = three()
    assert pool.names == ("a", "b", "c")
    assert pool.costs.tolist() == [1.0, 1.0, 3.0]
    assert len(pool) == 3


@pytest.mark.parametrize("name", ["", "  ", None, 5, b"a"])
def test_a_candidate_needs_a_name(name: Any) -> None:
    with pytest.raises(PoolError, match="non-empty string"):
        Candidate(name, 1.0)


@pytest.mark.parametrize("cost", [-1, -1e-9, math.nan, math.inf, True, "1", None, HUGE])
def test_a_cost_is_finite_and_not_negative(cost: Any) -> None:
    with pytest.raises(PoolError, match="'a': cost must be a finite number >= 0"):
        Candidate("a", cost)


def test_a_free_candidate_is_fine() -> None:
    assert Candidate("a", 0).cost == 0


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf])
def test_a_model_vector_lies_between_0_and_1(value: float) -> None:
    with pytest.raises(PoolError, match=r"'a': every entry .* \[0, 1\]"):
        Candidate("a", 1.0, (0.5, value))


def test_an_empty_pool_and_a_repeated_name_are_refused() -> None:
    with pytest.raises(PoolError, match="no candidates"):
        Pool(())
    with pytest.raises(PoolError, match="'a' stands in the pool twice"):
        Pool((Candidate("a", 1.0), Candidate("b", 2.0), Candidate("a", 3.0)))


def test_pools_and_candidates_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        three().candidates[0].cost = 2.0  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        three().unit = "EUR"  # type: ignore[misc]


def test_vectors_follow_the_pools_order() -> None:
    pool = Pool((Candidate("b", 2.0, (0.25, 0.5)), Candidate("a", 1.0, (0.75, 1.0))))
    assert pool.vectors().tolist() == [[0.75, 1.0], [0.25, 0.5]]
    assert pool.vectors().dtype == np.float32


def test_missing_and_uneven_vectors_are_refused() -> None:
    with pytest.raises(PoolError, match="'b' has no model vector"):
        Pool((Candidate("a", 1.0, (0.5,)), Candidate("b", 1.0))).vectors()
    with pytest.raises(PoolError, match=r"different widths: \[1, 2\]"):
        Pool((Candidate("a", 1.0, (0.5,)), Candidate("b", 1.0, (0.5, 0.5)))).vectors()


def test_with_vectors_matches_rows_by_name_and_keeps_the_rest() -> None:
    pool = three().with_vectors(("c", "a", "b"), np.array([[0.5], [0.25], [0.75]]))
    assert {c.name: c.vector for c in pool.candidates} == {"a": (0.25,), "b": (0.75,), "c": (0.5,)}
    assert pool.unit == "USD"
    assert pool.candidates[1].metadata == {"params": 7}
    assert three().candidates[0].vector is None  # the original is as it was


def test_with_vectors_needs_a_row_for_every_name() -> None:
    with pytest.raises(ValueError, match="zip"):
        three().with_vectors(("a", "b", "c"), np.zeros((2, 1)))


def test_subset_keeps_unit_and_order() -> None:
    pool = three().subset(["c", "a"])
    assert pool.names == ("a", "c")
    assert pool.unit == "USD"


def test_subset_refuses_unknown_names_and_none_at_all() -> None:
    with pytest.raises(PoolError, match="unknown candidate 'z': the pool has a, b, c"):
        three().subset(["a", "z"])
    with pytest.raises(PoolError, match="no candidates"):
        three().subset([])


def test_price_cost_by_hand() -> None:
    record = {"input_price": 3, "output_price": 15.0, "expected_input_tokens": 400, "expected_output_tokens": 200}
    # (3 * 400 + 15 * 200) / 1e6
    assert price_cost(record, "here") == 0.0042
    del record["expected_input_tokens"]
    assert price_cost(record, "here") == 0.003
    del record["input_price"]
    assert price_cost(record, "here") == 0.003


@pytest.mark.parametrize(
    ("record", "key"),
    [
        ({"output_price": 1}, "expected_output_tokens"),
        ({"expected_output_tokens": 1}, "output_price"),
        ({"output_price": 1, "expected_output_tokens": 1, "expected_input_tokens": 5}, "input_price"),
        ({"output_price": -1, "expected_output_tokens": 1}, "output_price"),
        ({"output_price": math.nan, "expected_output_tokens": 1}, "output_price"),
        ({"output_price": HUGE, "expected_output_tokens": 1}, "output_price"),
        ({"output_price": "1", "expected_output_tokens": 1}, "output_price"),
        ({"output_price": 1, "expected_output_tokens": True}, "expected_output_tokens"),
        ({"output_price": 1, "expected_output_tokens": 1, "input_price": math.inf}, "input_price"),
        ({"output_price": 1, "expected_output_tokens": 1, "expected_input_tokens": -1}, "expected_input_tokens"),
    ],
)
def test_unusable_prices_name_the_field(record: dict[str, Any], key: str) -> None:
    with pytest.raises(PoolError, match=f"^here: {key} must be a finite number"):
        price_cost(record, "here")


def test_prices_that_overflow_are_refused() -> None:
    with pytest.raises(PoolError, match=r"here: .*cost must be a finite number"):
        candidate_from_json({"name": "a", "output_price": 1e308, "expected_output_tokens": 1e308}, "here")


def test_reading_pool_json(tmp_path: Path) -> None:
    path = write(
        tmp_path / "pool.json",
        {
            "unit": "USD per query",
            "candidates": [
                {"name": "priced", "output_price": 10, "expected_output_tokens": 500, "family": "x"},
                {"name": "flat", "cost": 0.001, "vector": [0.5, 1], "metadata": {"params": 7}},
            ],
        },
    )
    pool = read_pool_json(path)
    assert pool.unit == "USD per query"
    assert pool.names == ("flat", "priced")
    flat, priced = pool.candidates
    assert (flat.cost, flat.vector, flat.metadata) == (0.001, (0.5, 1), {"params": 7})
    assert (priced.cost, priced.vector) == (0.005, None)
    assert priced.metadata["family"] == "x"


def test_to_json_round_trips() -> None:
    pool = three().with_vectors(("a", "b", "c"), np.array([[0.5, 0.25], [0.0, 1.0], [0.125, 0.75]]))
    again = pool_from_json(json.loads(json.dumps(pool.to_json())), "memory")
    assert again == pool


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("", "not valid JSON"),
        ([], "expected"),
        ({}, "expected"),
        ({"candidates": {}}, "expected"),
        ({"candidates": []}, "no candidates"),
        ({"candidates": [GOOD], "unit": 5}, "unit must be a string"),
        ({"candidates": [GOOD, "b"]}, "candidate 2: a candidate must be an object"),
        ({"candidates": [{"cost": 1}]}, "candidate 1: .*name"),
        ({"candidates": [GOOD, {"name": "b"}]}, "candidate 2: no cost"),
        ({"candidates": [GOOD, {"name": "b", "cost": None}]}, "candidate 2: .*cost must be"),
        ({"candidates": [GOOD, {"name": "b", "cost": -1}]}, "candidate 2: .*cost must be"),
        ({"candidates": [GOOD, {"name": "b", "cost": HUGE}]}, "candidate 2: .*cost must be"),
        ('{"candidates": [{"name": "b", "cost": NaN}]}', "candidate 1: .*cost must be"),
        ({"candidates": [{**GOOD, "output_price": 1}]}, "candidate 1: give either cost or prices"),
        ({"candidates": [{"name": "b", "output_price": 1}]}, "candidate 1: expected_output_tokens"),
        ({"candidates": [{**GOOD, "vector": 0.5}]}, "candidate 1: vector must be a list"),
        ({"candidates": [{**GOOD, "vector": ["0.5"]}]}, "candidate 1: vector must be a list"),
        ({"candidates": [{**GOOD, "vector": [True]}]}, "candidate 1: vector must be a list"),
        ({"candidates": [{**GOOD, "vector": [2]}]}, r"candidate 1: .*\[0, 1\]"),
        ({"candidates": [{**GOOD, "metadata": []}]}, "candidate 1: metadata must be an object"),
        ({"candidates": [GOOD, GOOD]}, "'a' stands in the pool twice"),
    ],
)
def test_every_error_names_the_file(tmp_path: Path, data: Any, message: str) -> None:
    path = write(tmp_path / "pool.json", data)
    with pytest.raises(PoolError, match=message) as caught:
        read_pool_json(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert isinstance(caught.value, ArllmError)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(PoolError, match="can't be read"):
        read_pool_json(tmp_path / "absent.json")
    (tmp_path / "latin.json").write_bytes(b'{"candidates": "\xff"}')
    with pytest.raises(PoolError, match=r"latin\.json: not valid JSON"):
        read_pool_json(tmp_path / "latin.json")
