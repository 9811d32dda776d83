"""``arllm calibrate``: from a wish to a beta, what it prints, and what it says when the wish can't be met."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from arllm import cli
from arllm.runtime import Router
from arllm.train.outcomes import read_outcomes


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, ["calibrate", *arguments], catch_exceptions=False)


def answer(*arguments: str) -> dict[str, Any]:
    done = run(*arguments, "--policy", "hdp", "--resamples", "50", "--json")
    assert done.exit_code == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def router(tiny_bundle: Path) -> Router:
    return Router.load(tiny_bundle)


@pytest.fixture(scope="module")
def texts(outcomes_folder: Path) -> list[str]:
    outcomes = read_outcomes(outcomes_folder)
    return [q for q, split in zip(outcomes.queries, outcomes.splits, strict=True) if split != "train"][:40]


@pytest.fixture(scope="module")
def queries(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("traffic") / "queries.jsonl"
    path.write_text("".join(json.dumps({"query": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def spent(router: Router, texts: list[str]) -> tuple[float, float]:
    """Mean cost at beta 1 and at beta 0."""
    ends = [[router.route(text, beta, "hdp") for text in texts] for beta in (1.0, 0.0)]
    low, high = (float(np.mean([d.cost[d.model] for d in decisions])) for decisions in ends)
    return low, high


def test_the_beta_of_a_budget_keeps_it_at_the_gateway(
    tiny_bundle: Path, router: Router, queries: str, texts: list[str], spent: tuple[float, float]
) -> None:
    budget = sum(spent) / 2
    found = answer(str(tiny_bundle), queries, "--budget", repr(budget))
    decisions = [router.route(text, found["beta"], "hdp") for text in texts]
    cost = float(np.mean([d.cost[d.model] for d in decisions]))
    assert cost <= budget
    expected = found["expect"]
    assert expected["cost"]["value"] == pytest.approx(cost)
    assert expected["accuracy_predicted"]["value"] == pytest.approx(np.mean([d.quality[d.model] for d in decisions]))
    for name, share in expected["shares"].items():
        assert share["value"] == pytest.approx(np.mean([d.model == name for d in decisions]))
    dearer = [router.route(text, found["same_choices"][0] - 1e-4, "hdp") for text in texts]
    assert np.mean([d.cost[d.model] for d in dearer]) > budget  # so no smaller beta would do
    assert found["attainable_cost"] == pytest.approx(spent)
    assert found["queries"] == len(texts)
    assert expected["accuracy_measured"] is None
    assert [entry["beta"] for entry in found["beside"]][:: len(found["beside"]) - 1] == [0.0, 1.0]
    assert len(found["beside"]) >= 4
    assert "predicted accuracy holds for traffic like the router's training queries" in found["notes"][0]


def test_the_beta_of_a_share(tiny_bundle: Path, router: Router, queries: str, texts: list[str]) -> None:
    cheapest = router.pool.names[0]
    found = answer(str(tiny_bundle), queries, "--share", f"{cheapest}=50%")
    chosen = [router.route(text, found["beta"], "hdp").model for text in texts]
    assert np.mean([name == cheapest for name in chosen]) == pytest.approx(0.5, abs=0.5 / len(texts))
    assert found["wish"] == {"share": {cheapest: 0.5}}


def test_matching_the_best_without_outcomes_is_predicted(tiny_bundle: Path, queries: str) -> None:
    found = answer(str(tiny_bundle), queries, "--match-best")
    expected, best = found["expect"], found["best_single"]
    assert expected["lead_predicted"]["value"] >= -1e-9
    assert expected["accuracy_predicted"]["value"] >= best["accuracy_predicted"] - 1e-9
    dearer = next(entry for entry in found["beside"] if entry["beta"] > found["same_choices"][1])
    assert dearer["lead_predicted"]["value"] < 0.0


def test_matching_the_best_with_outcomes_is_measured(
    tiny_bundle: Path, outcomes_folder: Path, router: Router, tmp_path: Path
) -> None:
    """Outcomes in which the cheapest candidate is always right: nothing is dearer than needed."""
    outcomes = read_outcomes(outcomes_folder)
    rows = [
        {"query": outcomes.queries[i], "dataset": "d", "model": name, "correct": float(m == 0), "split": split}
        for i, split in ((0, "train"), (1, "test"), (2, "val"))
        for m, name in enumerate(router.pool.names)
    ]
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = answer(str(tiny_bundle), str(path), "--match-best")
    assert found["queries"] == 2  # without the training query
    assert found["best_single"]["name"] == router.pool.names[0]
    assert found["best_single"]["accuracy_measured"] == 1.0
    assert found["expect"]["accuracy_measured"]["value"] == 1.0
    assert found["expect"]["shares"][router.pool.names[0]]["value"] == 1.0
    assert any("measured on these very queries" in note for note in found["notes"])
    assert answer(str(tiny_bundle), str(path), "--match-best", "--split", "val")["queries"] == 1


def test_the_text(tiny_bundle: Path, router: Router, queries: str, spent: tuple[float, float]) -> None:
    names = router.pool.names
    wish = ["--budget", repr(spent[1]), "--candidates", f"{names[0]}, {names[-1]}", "--policy", "hdp-paper"]
    done = run(str(tiny_bundle), queries, *wish)
    assert done.exit_code == 0, done.stderr
    assert "predicting 40 of 40 queries with hdp-paper" in done.stderr
    assert done.stdout.startswith("beta ")
    for word in ("accuracy, predicted", "mean cost of a query", f"share of {names[0]}", "at other betas", "[",
                 f"costs in {router.pool.unit}", "note: predicted accuracy", "is no probability"):  # fmt: skip
        assert word in done.stdout
    assert names[1] not in done.stdout
    assert "measured" not in done.stdout


def test_other_costs(tiny_bundle: Path, router: Router, queries: str, tmp_path: Path) -> None:
    rows = [{"name": c.name, "cost": c.cost * 2} for c in router.pool.candidates]
    (tmp_path / "pool.json").write_text(json.dumps({"unit": router.pool.unit, "candidates": rows}))
    found = answer(str(tiny_bundle), queries, "--budget", "1e9", "--pool", str(tmp_path / "pool.json"))
    plain = answer(str(tiny_bundle), queries, "--budget", "1e9")
    assert (found["beta"], plain["beta"]) == (0.0, 0.0)
    assert found["expect"]["cost"]["value"] == pytest.approx(2 * plain["expect"]["cost"]["value"])


def test_no_wish_or_two(tiny_bundle: Path, queries: str) -> None:
    for wish in ([], ["--budget", "1", "--match-best"], ["--share", "a=1%", "--budget", "0"]):
        done = run(str(tiny_bundle), queries, *wish)
        assert done.exit_code == 2
        assert "give exactly one of --budget, --share and --match-best" in done.stderr


@pytest.mark.parametrize("share", ["strong", "strong=20", "strong=-1%", "strong=101%", "strong=nan%", "=20%", "a=b%"])
def test_a_share_that_is_none(tiny_bundle: Path, queries: str, share: str) -> None:
    done = run(str(tiny_bundle), queries, "--share", share)
    assert done.exit_code == 2
    assert "--share takes NAME=P%" in done.stderr


@pytest.mark.parametrize(
    ("wish", "code", "complaint"),
    [
        (["--budget", "0"], 2, "a budget of 0 can't be kept: on this traffic the mean cost of a query runs from"),
        (["--share", "nobody=20%"], 2, "unknown candidate 'nobody'"),
        (["--match-best", "--candidates", "nobody"], 2, "unknown candidate 'nobody'"),
        (["--match-best", "--policy", "dice"], 2, "no policy 'dice'"),
        (["--match-best", "--variant", "gpu"], 1, "gpu"),
        (["--match-best", "--split", "ood"], 1, "no query of the wanted splits; the file has: none"),
    ],
)
def test_a_wish_that_cannot_be_met(
    tiny_bundle: Path, queries: str, wish: list[str], code: int, complaint: str
) -> None:
    done = run(str(tiny_bundle), queries, *wish)
    assert done.exit_code == code
    assert complaint in done.stderr
    assert done.stdout == ""


def test_outcomes_of_other_models_measure_nothing(tiny_bundle: Path, texts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    row = {"dataset": "d", "model": "stranger", "correct": 1, "split": "val"}
    path.write_text("".join(json.dumps({"query": text, **row}) + "\n" for text in dict.fromkeys(texts[:5])))
    found = answer(str(tiny_bundle), str(path), "--budget", "1e9")
    assert found["expect"]["accuracy_measured"] is None
    assert "the outcomes are of other models" in found["notes"][-1]
    done = run(str(tiny_bundle), str(path), "--match-best")
    assert done.exit_code == 2
    assert "give the queries alone" in done.stderr
