"""``arllm pool add`` and ``arllm pool probe``: what they print, what they write, and what they refuse."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from arllm import cli
from arllm.runtime import Router
from arllm.train.outcomes import read_outcomes


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, ["pool", *arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def texts(outcomes_folder: Path) -> list[str]:
    return list(dict.fromkeys(read_outcomes(outcomes_folder).queries))[:20]


@pytest.fixture
def few(tmp_path: Path, texts: list[str]) -> Path:
    """20 scored queries, 16 of them right."""
    path = tmp_path / "few.jsonl"
    rows = [{"query": text, "correct": i % 5 != 0} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_add_prints_the_estimate_and_writes_a_bundle_that_routes(
    tiny_bundle: Path, few: Path, tmp_path: Path, texts: list[str]
) -> None:
    before = Router.load(tiny_bundle)
    cost = before.bundle.manifest.cost_minimum
    done = run("add", str(tiny_bundle), "acme/new", "--cost", str(cost), "--outcomes", str(few),
               "--out", str(tmp_path / "b2"), "--json")  # fmt: skip
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["interval"][0] < found["accuracy"] < found["interval"][1]
    assert found["queries"] == 20
    assert found["observed"] == pytest.approx(0.8)
    assert len(found["nearest"]) == 3
    assert {entry["name"] for entry in found["nearest"]} <= set(before.pool.names)
    assert found["cost_bounds"]["before"] == found["cost_bounds"]["now"]
    router = Router.load(tmp_path / "b2")
    assert "acme/new" in router.route(texts[0]).candidates
    (entry,) = router.bundle.manifest.source["additions"]
    assert entry["outcomes"]["sha256"] == hashlib.sha256(few.read_bytes()).hexdigest()
    assert entry["queries"] == 20
    at = router.pool.names.index("acme/new")
    shares = np.array(router.bundle.manifest.domain_shares)
    assert float(router.pool.vectors()[at] @ shares) == pytest.approx(found["accuracy"], abs=1e-4)


def test_add_says_in_words_what_it_did_and_that_beta_moved(tiny_bundle: Path, few: Path, tmp_path: Path) -> None:
    dear = 3 * Router.load(tiny_bundle).bundle.manifest.cost_maximum
    out = tmp_path / "b2"
    done = run("add", str(tiny_bundle), "acme/new", "--cost", str(dear), "--outcomes", str(few), "--out", str(out))
    assert done.exit_code == 0, done.stderr
    assert "acme/new: estimated accuracy 0." in done.stdout
    assert "95% interval" in done.stdout
    assert "nearest known candidates: " in done.stdout
    assert f"to {dear:g} " in done.stdout
    assert "the scale of beta has moved" in done.stdout
    assert f'arllm route {out} --explain "' in done.stdout
    assert "recording what it decides" in done.stderr


def test_right_answers_raise_the_estimate(tiny_bundle: Path, tmp_path: Path, texts: list[str]) -> None:
    accuracies = []
    for correct in ("0", "0.5", "true"):
        path = tmp_path / f"{correct}.csv"
        path.write_text("correct,query\n" + "".join(f"{correct},{json.dumps(t)}\n" for t in ("a", "b c", "d?")))
        done = run("add", str(tiny_bundle), "x", "--cost", "1", "--outcomes", str(path),
                   "--out", str(tmp_path / f"b{correct}"), "--json")  # fmt: skip
        assert done.exit_code == 0, done.stderr
        accuracies.append(json.loads(done.stdout)["accuracy"])
    assert accuracies == sorted(accuracies)
    assert accuracies[2] - accuracies[0] > 0.05


def test_of_several_models_the_newcomers_rows_are_taken(tiny_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.csv"
    path.write_text("query,model,correct\na,x,1\nb,y,0\nc,x,1\n", encoding="utf-8")
    options = ("--cost", "1", "--outcomes", str(path), "--json", "--out")
    done = run("add", str(tiny_bundle), "x", *options, str(tmp_path / "b2"))
    assert json.loads(done.stdout)["queries"] == 2
    assert json.loads(done.stdout)["observed"] == 1.0
    other = run("add", str(tiny_bundle), "z", *options, str(tmp_path / "b3"))
    assert other.exit_code == 1
    assert "outcomes of several models, none of them 'z'; it holds x, y" in other.stderr
    path.write_text("query,model,correct\na,x,1\nb,x,0\n", encoding="utf-8")
    alone = run("add", str(tiny_bundle), "z", *options, str(tmp_path / "b3"))
    assert json.loads(alone.stdout)["queries"] == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("few.csv", "query,correct\na,1\nb,2\n", "few.csv:3: correct is 2.0"),
        ("few.csv", "query,correct\na,\n", "few.csv:2: correct is empty"),
        ("few.csv", "query,right\na,1\n", 'few.csv:1: no column "correct"'),
        ("few.csv", "query,correct\n", "few.csv: no rows"),
        ("few.jsonl", '{"query": "a", "correct": true}\n{"query": "b"}\n', "few.jsonl:2: correct is empty"),
        ("few.jsonl", '{"correct": true}\n', 'few.jsonl:1: no "query"'),
        ("few.jsonl", "{\n", "few.jsonl:1: malformed JSON"),
        ("few.txt", "a\n", "few.txt: unknown form"),
    ],
)
def test_a_bad_row_is_named_and_nothing_is_written(
    tiny_bundle: Path, tmp_path: Path, name: str, content: str, message: str
) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    done = run("add", str(tiny_bundle), "x", "--cost", "1", "--outcomes", str(path), "--out", str(tmp_path / "b2"))
    assert done.exit_code == 1
    assert message in done.stderr
    assert done.stdout == ""
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_known_name_a_bad_cost_and_an_existing_out_are_refused(
    tiny_bundle: Path, few: Path, tmp_path: Path
) -> None:
    known = Router.load(tiny_bundle).pool.names[0]
    for name, cost, out, message in (
        (known, "1", "b2", f"the pool holds '{known}' already"),
        ("x", "-1", "b2", "cost must be a finite number >= 0, not -1.0"),
        ("x", "nan", "b2", "cost must be a finite number >= 0, not nan"),
        (" ", "1", "b2", "name must be a non-empty string"),
        ("x", "1", ".", "exists already"),
    ):
        done = run("add", str(tiny_bundle), name, f"--cost={cost}", "--outcomes", str(few), "--out",
                   str(tmp_path / out))  # fmt: skip
        assert done.exit_code == 1, message
        assert message in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["few.jsonl"]


def test_probe_prints_different_queries_that_pool_add_takes_once_scored(
    tiny_bundle: Path, texts: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "queries.jsonl"
    everything = [*texts, *(f"  {text.upper()} " for text in texts)]  # the same ones to a reader
    path.write_text("".join(json.dumps({"query": text}) + "\n" for text in everything), encoding="utf-8")
    done = run("probe", str(tiny_bundle), str(path), "--n", "5")
    assert done.exit_code == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    chosen = [row["query"] for row in rows]
    assert set(chosen) <= set(everything)
    assert len({query.strip().lower() for query in chosen}) == 5
    router = Router.load(tiny_bundle)
    for row in rows:
        assert (
            row["domain"] == router.bundle.manifest.domains[int(np.argmax(router.encode(row["query"]).vector[:-9]))]
        )
    scored = tmp_path / "scored.jsonl"
    scored.write_text("".join(json.dumps({**row, "correct": 1}) + "\n" for row in rows), encoding="utf-8")
    added = run("add", str(tiny_bundle), "x", "--cost", "1", "--outcomes", str(scored), "--out", str(tmp_path / "b"))
    assert added.exit_code == 0, added.stderr


def test_probe_reads_outcome_folders_and_says_when_there_are_too_few(
    tiny_bundle: Path, outcomes_folder: Path, tmp_path: Path
) -> None:
    done = run("probe", str(tiny_bundle), str(outcomes_folder), "--n", "3", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["queries"]) == 3
    assert found["considered"] == len(read_outcomes(outcomes_folder))
    path = tmp_path / "queries.csv"
    path.write_text("query\nWhat is 2 + 2?\nwhat is  2 + 2?\n", encoding="utf-8")
    done = run("probe", str(tiny_bundle), str(path))
    assert len(done.stdout.splitlines()) == 1
    assert "holds 1 different queries, fewer than --n 30" in done.stderr
