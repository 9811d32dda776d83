"""Tests of train/pools.py: every published form of a pool, and every error with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from arllm.runtime.errors import PoolError
from arllm.runtime.pool import Candidate, Pool
from arllm.train.outcomes import read_outcomes
from arllm.train.pools import CO2_UNIT, match_pool, models_info_domains, read_pool

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
NAN = float("nan")

INFO = {
    "big": {"bbh_acc": 0.75, "math_acc": 0.5, "co2_cost": 2.0, "params": 70},
    "small": {"bbh_acc": 0.25, "math_acc": 0.125, "co2_cost": 1, "params": 7},
}


def write(path: Path, data: Any) -> Path:
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


def error(path: Path, **options: Any) -> str:
    with pytest.raises(PoolError) as caught:
        read_pool(path, **options)
    return str(caught.value)


# --- pool.json ----------------------------------------------------------------------------------------------


def test_pool_json(tmp_path: Path) -> None:
    pool = Pool((Candidate("a", 2.0, (0.5,), {"k": 1}), Candidate("b", 1.0)), "USD")
    path = write(tmp_path / "pool.json", pool.to_json())
    assert read_pool(path) == pool
    assert read_pool(str(path), unit="EUR").unit == "EUR"
    assert models_info_domains(path) is None


def test_pool_json_refuses_what_it_has_no_place_for(tmp_path: Path) -> None:
    path = write(tmp_path / "pool.json", {"candidates": [{"name": "a", "cost": 1}]})
    assert "drop the cost column 'usd'" in error(path, cost_column="usd")
    assert "drop the condition on 'bundle'" in error(path, where={"bundle": "x"})
    bad = write(tmp_path / "pool.json", {"candidates": [{"name": "a", "cost": 1}, {"name": "b"}]})
    assert error(bad).startswith(f"{bad}: candidate 2: no cost")


# --- models_info.json ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, "model", "name", "model_name"])
def test_models_info_in_both_shapes(tmp_path: Path, key: str | None) -> None:
    data = INFO if key is None else [{key: name, **info} for name, info in INFO.items()]
    path = write(tmp_path / "models_info.json", data)
    pool = read_pool(path)
    assert pool.names == ("small", "big")  # by cost
    assert pool.costs.tolist() == [1.0, 2.0]
    assert pool.unit == CO2_UNIT
    assert pool.vectors().tolist() == [[0.25, 0.125], [0.75, 0.5]]
    assert pool.candidates[0].metadata == {"params": 7}
    assert models_info_domains(path) == ("bbh", "math")


def test_percents_are_scaled_over_the_whole_file(tmp_path: Path) -> None:
    data = {
        "a": {"bbh_acc": 75.0, "math_acc": 50, "co2_cost": 1},
        "b": {"bbh_acc": 0.5, "math_acc": 1, "co2_cost": 2},  # half a percent, not a half
    }
    pool = read_pool(write(tmp_path / "m.json", data))
    assert [c.vector for c in pool.candidates] == [(0.75, 0.5), (0.005, 0.01)]
    assert all(c.metadata == {"accuracy_scale": "percent"} for c in pool.candidates)


def test_feature_vector_stands_for_the_accuracies(tmp_path: Path) -> None:
    data = {name: {**info, "feature_vector": [10, 20]} for name, info in INFO.items()}
    path = write(tmp_path / "m.json", data)
    first = read_pool(path).candidates[0]
    assert first.vector == (0.1, 0.2)
    assert first.metadata["bbh_acc"] == 0.25
    assert models_info_domains(path) == ("bbh", "math")
    data = {name: {**info, "feature_vector": [0.1, 0.2, 0.3]} for name, info in INFO.items()}
    assert models_info_domains(write(path, data)) is None


def test_models_info_without_accuracies_has_no_vectors(tmp_path: Path) -> None:
    path = write(tmp_path / "m.json", {"a": {"co2_cost": 1}, "b": {"co2_cost": 2}})
    assert [c.vector for c in read_pool(path).candidates] == [None, None]
    assert models_info_domains(path) is None


def test_models_info_with_another_cost(tmp_path: Path) -> None:
    pool = read_pool(write(tmp_path / "m.json", INFO), cost_column="params")
    assert pool.costs.tolist() == [7.0, 70.0]
    assert pool.unit == "params"
    assert pool.candidates[0].metadata == {"co2_cost": 1}
    assert read_pool(tmp_path / "m.json", unit="kg").unit == "kg"


def with_small(**changes: Any) -> dict[str, Any]:
    return {"big": INFO["big"], "small": {**INFO["small"], **changes}}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (with_small(co2_cost=None), "model 'small': co2_cost must be a finite number >= 0, not None; give"),
        (with_small(co2_cost="1"), "model 'small': co2_cost"),
        (with_small(co2_cost=-1), "model 'small': co2_cost"),
        (with_small(co2_cost=NAN), "model 'small': co2_cost"),
        (with_small(bbh_acc=100.5), "model 'small': bbh_acc"),
        (with_small(bbh_acc=-0.5), "model 'small': bbh_acc"),
        (with_small(bbh_acc=None), "model 'small': bbh_acc"),
        (with_small(bbh_acc=True), "model 'small': bbh_acc"),
        (with_small(extra_acc=0.5), "model 'small' has the accuracies (bbh_acc, math_acc, extra_acc)"),
        (
            {"big": INFO["big"], "small": dict(reversed(INFO["small"].items()))},
            "model 'small' has the accuracies (math_acc, bbh_acc), 'big' has (bbh_acc, math_acc)",
        ),
        (with_small(feature_vector=[0.5]), "model 'big' has no feature_vector"),
        ({"a": {"co2_cost": 1, "feature_vector": 3}}, "feature_vector must be a list"),
        ({"a": {"co2_cost": 1, "feature_vector": [0.5, "x"]}}, "feature_vector[1]"),
        (
            {"a": {"co2_cost": 1, "feature_vector": [1]}, "b": {"co2_cost": 1, "feature_vector": [1, 0]}},
            "different widths [1, 2]",
        ),
        ({"a": 3}, "model 'a' must be an object"),
        ({" ": {}}, "name must be a non-empty string"),
        ([{"co2_cost": 1}], "record 1 must be an object with one of model, name, model_name"),
        ([{"name": "a", "co2_cost": 1}, {"name": "a", "co2_cost": 1}], "model 'a' stands there twice"),
        ([], "no candidates"),
        ("3", "expected a pool.json"),
    ],
)  # fmt: skip
def test_bad_models_info(tmp_path: Path, data: Any, says: str) -> None:
    path = write(tmp_path / "models_info.json", data)
    message = error(path)
    assert message.startswith(f"{path}: ")
    assert says in message


def test_bad_files(tmp_path: Path) -> None:
    assert error(write(tmp_path / "m.json", '{\n"a": }')).startswith(f"{tmp_path / 'm.json'}:2: malformed JSON")
    assert error(tmp_path / "absent.json").endswith("absent.json: no such file")
    assert error(tmp_path / "absent.csv").endswith("absent.csv: no such file")
    assert "unknown form" in error(tmp_path / "pool.yaml")
    (tmp_path / "latin.csv").write_bytes(b"name,cost\n\xe9,1\n")
    assert "latin.csv:2: not valid UTF-8" in error(tmp_path / "latin.csv")


# --- CSV ----------------------------------------------------------------------------------------------------


def test_csv_with_cost(tmp_path: Path) -> None:
    pool = read_pool(write(tmp_path / "p.csv", "model,cost,unit,note\nbig,2,USD,dear\nsmall,1,USD,\n"))
    assert pool.unit == "USD"
    assert [(c.name, c.cost, c.vector, c.metadata) for c in pool.candidates] == [
        ("small", 1.0, None, {}),
        ("big", 2.0, None, {"note": "dear"}),
    ]


def test_csv_with_prices(tmp_path: Path) -> None:
    text = (
        "name,input_price,output_price,expected_input_tokens,expected_output_tokens,model\n"
        "both,1,10,200,50,vendor/x\n"
        "output,,10,,50,\n"
    )
    pool = read_pool(write(tmp_path / "p.csv", text))
    assert pool.names == ("output", "both")
    assert pool.costs.tolist() == pytest.approx([500e-6, 700e-6])
    assert pool.candidates[1].metadata == {"model": "vendor/x"}
    assert pool.unit == "unspecified"


COSTS = "bundle,model,usd\nx,a,1\ny,a,5\nx,b,2\n"


def test_csv_rows_and_cost_column_of_choice(tmp_path: Path) -> None:
    path = write(tmp_path / "p.csv", COSTS)
    pool = read_pool(path, cost_column="usd", where={"bundle": "x"})
    assert (pool.names, pool.costs.tolist(), pool.unit) == (("a", "b"), [1.0, 2.0], "usd")
    assert pool.candidates[0].metadata == {"bundle": "x"}
    assert read_pool(path, cost_column="usd", where={"bundle": "y"}, unit="USD").unit == "USD"


@pytest.mark.parametrize(
    ("text", "options", "at", "says"),
    [
        (COSTS, {"cost_column": "usd"}, ":3", "candidate 'a' stands already at"),
        (COSTS, {"where": {"bundle": "x"}}, ":2", "no cost; give cost"),
        (COSTS, {"where": {"folder": "x"}}, ":1", "no column folder; there are: bundle, model, usd"),
        (COSTS, {"where": {"bundle": "z"}}, "", "no candidates where bundle = 'z'"),
        (COSTS, {"cost_column": "eur"}, ":1", "no column eur"),
        ("id,cost\na,1\n", {}, ":1", "no column name or model"),
        ("name,cost,cost\na,1,1\n", {}, ":1", "column 'cost' stands twice"),
        ("name,cost\na,1\nb,1,2\n", {}, ":3", "3 fields"),
        ('name,cost\na,1\n"b,1\n', {}, ":3", "malformed CSV"),
        ("name,cost\n,1\n", {}, ":2", "name is blank"),
        ("name,cost\na,1\nb,x\n", {}, ":3", "candidate 'b': cost must be a finite number >= 0, not 'x'"),
        ("name,cost\na,-1\n", {}, ":2", "cost must be"),
        ("name,cost\na,nan\n", {}, ":2", "cost must be"),
        ("name,cost\na,\n", {}, ":2", "no cost; give cost"),
        ("name,usd\na,\n", {"cost_column": "usd"}, ":2", "usd is blank"),
        ("name,cost,output_price\na,1,1\n", {}, ":2", "either cost or prices"),
        ("name,output_price\na,1\n", {}, ":2", "expected_output_tokens"),
        ("name,cost,unit\na,1,USD\nb,1,EUR\n", {}, ":3", "costs in units 'USD', 'EUR'"),
        ("name,cost\n", {}, "", "no candidates; add a row"),
        ("", {}, "", "no rows"),
    ],
)
def test_bad_csv(tmp_path: Path, text: str, options: dict[str, Any], at: str, says: str) -> None:
    path = write(tmp_path / "p.csv", text)
    message = error(path, **options)
    assert message.startswith(f"{path}{at}: ")
    assert says in message


# --- matching -----------------------------------------------------------------------------------------------


def test_match_pool() -> None:
    pool = Pool((Candidate("a", 1.0), Candidate("b", 2.0), Candidate("c", 3.0)), "USD")
    assert match_pool(pool, ["c", "a"]) == Pool((pool.candidates[0], pool.candidates[2]), "USD")
    with pytest.raises(PoolError, match=r"'z' has outcomes but is not in the pool \(a, b, c\)"):
        match_pool(pool, ["a", "z"])


@pytest.mark.parametrize(("folder", "size"), [("ollb2", 15), ("zeroeval", 48)])
def test_real_costs_cover_the_real_outcomes(folder: str, size: int) -> None:
    if not (DATA / "costs.csv").is_file():
        pytest.skip(f"no real costs at {DATA / 'costs.csv'}")
    pool = read_pool(DATA / "costs.csv", cost_column="usd_out_per_Mtok", where={"bundle": folder})
    found = read_outcomes(DATA / folder, candidates=pool.names)
    assert len(match_pool(pool, found.candidates)) == size
