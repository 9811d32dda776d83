"""Tests of train/evaluate.py: the table on SYNTHETIC outcomes, the gateway's own choices, and the known figures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arllm.runtime.errors import OutcomesError
from arllm.runtime.pool import Candidate, Pool, read_pool_json
from arllm.train import curves
from arllm.train.bench import Bench, prepare, router_qualities
from arllm.train.evaluate import evaluate
from arllm.train.metrics import mean_per_subset
from arllm.train.outcomes import Outcomes, read_outcomes
from arllm.train.pools import read_pool

NAN = float("nan")
FAST = ("random", "mean per true dataset", "mean per true subset")


@pytest.fixture(scope="module")
def bench(outcomes_folder: Path) -> Bench:
    return prepare(read_outcomes(outcomes_folder), read_pool_json(outcomes_folder / "pool.json"), coverage=0.8)


@pytest.fixture(scope="module")
def oracle(bench: Bench) -> np.ndarray:
    return np.nan_to_num(bench.outcomes.correct.astype(np.float64))


@pytest.fixture(scope="module")
def result(bench: Bench, oracle: np.ndarray) -> dict[str, Any]:
    subset = mean_per_subset(bench.outcomes.split("train"), bench.outcomes)
    return evaluate(bench, {"perfect": oracle, "plain": subset}, extra={"flat": np.full_like(oracle, 0.5)},
                    baselines=FAST, resamples=100)  # fmt: skip


def test_the_table_is_plain_json(result: dict[str, Any]) -> None:
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_it_holds_every_router_and_every_single_model(result: dict[str, Any], bench: Bench) -> None:
    assert result["routers"] == ["perfect", "plain", "flat", *FAST]
    assert set(result["results"]) == {"val", "test"}  # there is no ood here
    test = result["results"]["test"]
    assert list(test["singles"]) == list(bench.pool.names)
    assert test["queries"] == result["queries"]["test"] == bench.outcomes.splits.count("test")
    assert set(test["differences"]["plain"]) == {"perfect", "flat", *FAST}
    assert sum(part["queries"] for part in test["by_dataset"].values()) == test["queries"]


def test_a_perfect_router_closes_the_gap_and_a_blind_one_does_not(result: dict[str, Any]) -> None:
    routers = result["results"]["test"]["routers"]
    assert routers["perfect"]["gap_closed"] == pytest.approx(1.0)
    assert routers["perfect"]["auc"] == pytest.approx(1.0)
    assert routers["perfect"]["ece"] == pytest.approx(0.0)
    assert routers["flat"]["gap_closed"] < 0.0
    assert routers["flat"]["auc"] == pytest.approx(0.5)
    assert routers["flat"]["cost_to_match"] is None  # never
    assert routers["flat"]["pairs"][0]["apgr"] == pytest.approx(0.5)
    assert all(routers[name]["gap_closed"] < 1.0 for name in routers if name != "perfect")


def test_a_router_equals_its_baseline_twin(result: dict[str, Any]) -> None:
    test = result["results"]["test"]
    twin = test["differences"]["plain"]["mean per true subset"]
    assert all(entry == {"difference": 0.0, "interval": [0.0, 0.0]} for entry in twin.values())
    against = test["differences"]["perfect"]["plain"]["gap_closed"]
    assert against["interval"][0] > 0.0
    assert against["interval"][0] < against["difference"] < against["interval"][1]


def test_differences_by_dataset_are_paired_there(bench: Bench, oracle: np.ndarray, result: dict[str, Any]) -> None:
    """Each is what an evaluation of that dataset's queries alone gives, operating points being those of val."""
    test = result["results"]["test"]
    assert len(test["by_dataset"]) > 1
    for dataset, part in test["by_dataset"].items():
        assert set(part["differences"]) == {"perfect", "plain"}
        twin = part["differences"]["plain"]["mean per true subset"]
        assert twin.keys() == test["differences"]["plain"]["flat"].keys()
        assert all(entry == {"difference": 0.0, "interval": [0.0, 0.0]} for entry in twin.values())
        kept = np.array([s == "val" or d == dataset for s, d in zip(bench.outcomes.splits, bench.outcomes.datasets,
                                                                    strict=True)])  # fmt: skip
        train = np.array([s == "train" for s in bench.outcomes.splits])
        rows = np.flatnonzero(kept | train)  # training stays whole: it chooses the best single model
        alone = Bench(bench.outcomes.rows(rows), bench.pool, {})
        subset = mean_per_subset(bench.outcomes.split("train"), bench.outcomes)
        ours = {"perfect": oracle[rows], "plain": subset[rows]}
        found = evaluate(alone, ours, baselines=(), splits=("test",), resamples=100)["results"]["test"]
        assert found["queries"] == part["queries"]
        assert part["differences"]["perfect"]["plain"] == found["differences"]["perfect"]["plain"]
        point = part["routers"]["perfect"]["accuracy"] - part["routers"]["plain"]["accuracy"]
        assert part["differences"]["perfect"]["plain"]["accuracy"]["difference"] == pytest.approx(point)
        low, high = part["differences"]["perfect"]["plain"]["accuracy"]["interval"]
        assert low < point < high


def test_shares_end_at_the_cheapest(result: dict[str, Any]) -> None:
    rows = result["results"]["test"]["routers"]["plain"]["shares"]
    assert [row["beta"] for row in rows][::20] == [0.0, 1.0]
    assert all(sum(row["shares"]) == pytest.approx(1.0) for row in rows)
    assert rows[-1]["shares"][0] > 0.9  # the cheapest, wherever it was evaluated


def test_missing_training_is_said(bench: Bench, oracle: np.ndarray) -> None:
    kept = np.array([split != "train" for split in bench.outcomes.splits])
    small = Bench(bench.outcomes.rows(kept), bench.pool, {})
    found = evaluate(small, {"ours": oracle[kept]}, splits=("test",), resamples=10)
    assert found["routers"] == ["ours"]
    assert "no training queries" in found["notes"][0]


def test_unseen_candidates_are_told_apart(bench: Bench, oracle: np.ndarray) -> None:
    name = bench.pool.names[-1]
    blind = oracle.copy()
    blind[:, -1] = 0.5
    found = evaluate(bench, {"ours": blind}, baselines=(), unseen=[name], splits=("test",), resamples=10)
    entry = found["results"]["test"]["routers"]["ours"]
    assert entry["auc_seen"] == pytest.approx(1.0)
    assert entry["auc_unseen"] == pytest.approx(0.5)
    assert entry["without_unseen"]["gap_closed"] < 1.0
    assert [c["seen"] for c in found["candidates"]].index(False) == len(bench.pool) - 1


def test_costs_per_query_are_what_is_judged(bench: Bench, oracle: np.ndarray) -> None:
    double = replace(bench, paid=np.broadcast_to(bench.pool.costs * 2.0, oracle.shape))
    kw: dict[str, Any] = {"baselines": (), "splits": ("test",), "resamples": 10}
    once, twice = (evaluate(b, {"o": oracle}, **kw)["results"]["test"] for b in (bench, double))
    assert twice["best_single"]["cost"] == pytest.approx(2 * once["best_single"]["cost"])
    assert twice["routers"]["o"]["aiq"] == pytest.approx(once["routers"]["o"]["aiq"])


def test_wrong_shapes_and_names(bench: Bench, oracle: np.ndarray) -> None:
    with pytest.raises(OutcomesError, match="quality of 'ours' has shape"):
        evaluate(bench, {"ours": oracle[:, :-1]}, baselines=())
    with pytest.raises(OutcomesError, match="'nobody' is not among those compared"):
        evaluate(bench, {"ours": oracle}, baselines=(), unseen=["nobody"])


# --- prepare ------------------------------------------------------------------------------------------------


def small(correct: list[list[float]], datasets: list[str], splits: list[str]) -> Outcomes:
    n = len(correct)
    ids = tuple(map(str, range(n)))
    texts = tuple(f"query {i}" for i in range(n))
    names = ("dear", "cheap", "sparse")
    return Outcomes(ids, texts, tuple(datasets), tuple(datasets), tuple(splits), names, np.array(correct, np.float32))


def test_prepare_keeps_what_can_be_compared() -> None:
    pool = Pool(tuple(Candidate(name, cost) for name, cost in (("dear", 3), ("cheap", 1), ("sparse", 2), ("new", 5))))
    rows = [[1, 0, 1], [1, 0, NAN], [1, 0, 1], [1, 1, 1], [NAN, NAN, 1]]
    outcomes = small(rows, ["a", "b", "a", "b", "a"], ["train", "val", "test", "test", "test"])
    found = prepare(outcomes, pool, coverage=0.5)
    assert found.pool.names == ("cheap", "sparse", "dear")  # each on half of the judged queries of a or b, at least
    strict = prepare(outcomes.rows(range(4)), pool)
    assert strict.pool.names == strict.outcomes.candidates == ("cheap", "dear")
    assert strict.outcomes.correct.tolist() == [[0, 1], [0, 1], [0, 1], [1, 1]]
    assert strict.left_out == {"new": "no outcomes", "sparse": "evaluated on 50% of b"}


def test_prepare_drops_what_nobody_noted_the_cost_of() -> None:
    pool = Pool((Candidate("dear", 3), Candidate("cheap", 1), Candidate("sparse", 2)))
    outcomes = small([[1.0, 0.0, 1.0]] * 4, ["a", "b", "b", "c"], ["train", "val", "test", "test"])
    paid = np.array([[NAN] * 3, [1.0, 2.0, NAN], [3.0, 4.0, 5.0], [NAN] * 3])
    found = prepare(outcomes, pool, paid=paid)
    assert found.outcomes.query_ids == ("0", "1", "2")  # training needs no cost, and of c nothing is known
    assert found.left_out == {"sparse": "evaluated on 50% of b"}
    assert found.paid is not None
    np.testing.assert_array_equal(found.paid[1:], [[2.0, 1.0], [4.0, 3.0]])  # cheap, dear
    with pytest.raises(OutcomesError, match="shape"):
        prepare(outcomes, pool, paid=paid[:2])


def test_prepare_says_why_nothing_can_be_judged() -> None:
    pool = Pool((Candidate("dear", 3), Candidate("cheap", 1)))
    rows = [[1.0, 0.0, NAN], [1.0, NAN, NAN], [1.0, 1.0, NAN]]
    with pytest.raises(OutcomesError, match=r"cheap \(evaluated on 50% of a\)"):
        prepare(small(rows, ["a"] * 3, ["train", "val", "test"]), pool)
    full = small([[1.0, 0.0, NAN]] * 2, ["a"] * 2, ["train", "val"])
    with pytest.raises(OutcomesError, match="split test or ood"):
        prepare(full, pool)


# --- the gateway --------------------------------------------------------------------------------------------


def test_it_judges_what_the_gateway_would_do(tiny_bundle: Path, bench: Bench) -> None:
    from arllm.runtime import Router

    router = Router.load(tiny_bundle)
    few = bench.outcomes.rows([i for i, split in enumerate(bench.outcomes.splits) if split != "train"][:24])
    qualities = router_qualities(router, few)
    assert set(qualities) == set(router.policies)
    flat = replace(few, correct=np.zeros_like(few.correct))
    manifest = router.bundle.manifest
    table = curves.outcome_table(
        flat.correct, bench.pool.costs, bounds=(manifest.cost_minimum, manifest.cost_maximum)
    )
    betas = [0.0, 0.3, 0.7, 1.0]
    for policy, quality in qualities.items():
        chosen = curves.choices(quality, table, betas)
        for i, text in enumerate(few.queries):
            decided = [router.route(text, beta, policy, bench.pool.names).model for beta in betas]
            assert [bench.pool.names[k] for k in chosen[i]] == decided


def test_each_text_is_encoded_once_and_other_splits_are_left_blank(tiny_bundle: Path, bench: Bench) -> None:
    from arllm.runtime import Router

    router = Router.load(tiny_bundle)
    encode, texts = router.encode, []
    router.encode = lambda text: (texts.append(text), encode(text))[1]  # type: ignore[method-assign]
    few = bench.outcomes.rows(list(range(12)) * 2)
    quality = router_qualities(router, few, ["hdp"], splits=("train",))["hdp"]
    train = np.array([split == "train" for split in few.splits])
    assert len(texts) == train.sum() / 2
    assert np.isfinite(quality[train]).all()
    assert np.isnan(quality[~train]).all()
    with pytest.raises(OutcomesError, match="'stranger' is not in the router's pool"):
        router_qualities(router, replace(few, candidates=("stranger", *few.candidates[1:])))


# --- known figures on real outcomes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "candidates", "best", "zero", "oracle", "dataset", "subset"),
    [
        ("ollb2", 15, 0.6051, 0.5088, 0.8552, (0.022, 0.574, 0.90), (0.063, 0.686, 0.81)),
        ("zeroeval", 28, 0.9052, 0.9014, 0.9872, (0.173, 0.717, 1.03), (0.146, 0.753, 0.83)),
    ],
)
def test_the_figures_that_came_with_the_data(
    shared_data: Path,
    name: str,
    candidates: int,
    best: float,
    zero: float,
    oracle: float,
    dataset: tuple[float, float, float],
    subset: tuple[float, float, float],
) -> None:
    """../shared/data/README.md: operating points on val, figures on test, flat costs."""
    pool = read_pool(shared_data / "costs.csv", cost_column="usd_out_per_Mtok", where={"bundle": name})
    bench = prepare(read_outcomes(shared_data / name), pool)
    assert len(bench.pool) == candidates
    result = evaluate(bench, {}, baselines=FAST[1:], splits=("test",), resamples=50)["results"]["test"]
    assert result["best_single"]["accuracy"] == pytest.approx(best, abs=5e-5)
    assert result["zero"]["aiq"] == pytest.approx(zero, abs=5e-5)
    assert result["oracle"]["aiq"] == pytest.approx(oracle, abs=5e-5)
    for router, (gap, auc, match) in {FAST[1]: dataset, FAST[2]: subset}.items():
        entry = result["routers"][router]
        assert entry["gap_closed"] == pytest.approx(gap, abs=5.1e-4)
        assert entry["auc"] == pytest.approx(auc, abs=5.1e-4)
        assert entry["cost_to_match"] == pytest.approx(match, abs=5.1e-3)
