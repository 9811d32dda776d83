"""``arllm eval`` and ``arllm data import``: the glue between the command line and the libraries behind it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from arllm import cli
from arllm.train.outcomes import read_outcomes


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, list(arguments), catch_exceptions=False)


def test_eval_judges_a_bundle_beside_the_baselines(tiny_bundle: Path, outcomes_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra eval brings matplotlib")
    arguments = ["eval", str(tiny_bundle), str(outcomes_folder), "--split", "val", "--resamples", "20"]
    arguments += [
        "--baseline",
        "random",
        "--baseline",
        "mean per true subset",
        "--report",
        str(tmp_path / "report"),
        "--json",
    ]
    done = run(*arguments)
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result["results"]) == {"val"}
    assert {"nir", "hdp", "hdp-paper"} <= set(result["routers"])
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_eval_trains_the_published_recipe_where_it_is_asked_to(tiny_bundle: Path, outcomes_folder: Path) -> None:
    arguments = ["eval", str(tiny_bundle), str(outcomes_folder), "--split", "val", "--resamples", "20"]
    done = run(*arguments, "--policy", "hdp", "--baseline", "random", "--published-recipe", "--json")
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["routers"] == ["hdp", "published NIR recipe", "random"]
    recipe = result["results"]["val"]["routers"]["published NIR recipe"]
    assert recipe["auc"] > 0.55  # it has learned something
    assert "published NIR recipe" in result["results"]["val"]["differences"]["hdp"]


def test_eval_refuses_an_unknown_baseline(tiny_bundle: Path, outcomes_folder: Path) -> None:
    done = run("eval", str(tiny_bundle), str(outcomes_folder), "--baseline", "tea leaves")
    assert done.exit_code == 2
    assert "no baseline 'tea leaves'" in done.stderr


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    path = tmp_path / "wide.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["sample_id", "prompt", "eval_name", "small", "large"])
        writer.writerows([["a", "What is 1 + 1?", "sums", 1, 1], ["b", "Prove it.\nNow.", "proofs", 0, ""]])
    return path


def test_import_of_a_wide_csv(wide: Path, tmp_path: Path) -> None:
    out = tmp_path / "outcomes"
    columns = ["--query-column", "prompt", "--dataset-column", "eval_name", "--id-column", "sample_id"]
    done = run("data", "import", "--from", "wide", str(wide), *columns, "--out", str(out))
    assert done.exit_code == 0, done.stderr
    assert done.stdout == ""
    assert "2 queries × 2 candidates, 75.0% evaluated" in done.stderr
    read = read_outcomes(out)
    assert read.queries == ("What is 1 + 1?", "Prove it.\nNow.")
    assert read.datasets == ("sums", "proofs")


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["--from", "wide"], 2, "--from wide needs --query-column"),
        (["--from", "harness", "--query-column", "prompt"], 2, "--query-column does not go with --from harness"),
        (
            ["--from", "wide", "--query-column", "prompt", "--dataset", "a", "--dataset", "b"],
            2,
            "one NAME, or several",
        ),
        (["--from", "wide", "--query-column", "nothing"], 1, "nothing"),
    ],
)
def test_import_failures(wide: Path, tmp_path: Path, arguments: list[str], code: int, complaint: str) -> None:
    done = run("data", "import", str(wide), *arguments, "--out", str(tmp_path / "outcomes"))
    assert done.exit_code == code
    assert complaint in done.stderr
    assert not (tmp_path / "outcomes").exists()
