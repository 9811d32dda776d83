"""The synthetic outcomes: reproducible, well-formed, true to their response model, written whole."""

from __future__ import annotations

import csv
import gzip
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from arllm.runtime.errors import OutcomesError
from arllm.runtime.pool import read_pool_json
from arllm.train import synthetic
from arllm.train.outcomes import read_outcomes

FILES = {"samples.jsonl", "queries.jsonl.gz", "labels.csv.gz", "pool.json", "README.md"}
FAMILIES = {query["subset"] for query in synthetic.generate(500).queries}


@pytest.fixture(scope="module")
def outcomes() -> synthetic.SyntheticOutcomes:
    return synthetic.generate()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_equal_seeds_give_byte_equal_files_and_other_seeds_others(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        synthetic.write(tmp_path / name, n_queries=120, seed=seed)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert set(a) == FILES
    assert a == b
    assert a["queries.jsonl.gz"] != c["queries.jsonl.gz"]
    assert a["labels.csv.gz"] != c["labels.csv.gz"]


def test_queries_are_distinct_and_of_readable_length(outcomes: synthetic.SyntheticOutcomes) -> None:
    texts = [query["query"] for query in outcomes.queries]
    assert len(set(texts)) == len({query["query_id"] for query in outcomes.queries}) == 2400
    words = [len(text.split()) for text in texts]
    assert min(words) >= 5
    assert max(words) <= 150
    assert not any("{" in text or "}" in text for text in texts), "an unfilled template"


def test_every_family_and_data_set_is_there(outcomes: synthetic.SyntheticOutcomes) -> None:
    families = Counter(query["subset"] for query in outcomes.queries)
    assert len(families) == 9
    assert min(families.values()) > 0.8 * 2400 / 9
    assert {query["dataset"] for query in outcomes.queries} == {
        "synthetic_math",
        "synthetic_language",
        "synthetic_logic",
        "synthetic_code",
    }


def test_split_shares_are_70_10_20(outcomes: synthetic.SyntheticOutcomes) -> None:
    splits = Counter(query["split"] for query in outcomes.queries)
    assert set(splits) == {"train", "val", "test"}
    for split, share in (("train", 0.7), ("val", 0.1), ("test", 0.2)):
        deviation = np.sqrt(share * (1 - share) / 2400)
        assert abs(splits[split] / 2400 - share) < 4 * deviation


def test_a_smaller_set_is_the_start_of_a_larger_one() -> None:
    few, many = synthetic.generate(50), synthetic.generate(100)
    assert few.queries == many.queries[:50]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_text_shows_the_difficulty(outcomes: synthetic.SyntheticOutcomes, family: str) -> None:
    rows = [i for i, query in enumerate(outcomes.queries) if query["subset"] == family]
    lengths = [len(outcomes.queries[i]["query"]) for i in rows]
    # Arithmetic is the weakest, .45: sums in figures and sums told as a story differ in length anyway.
    assert np.corrcoef(lengths, outcomes.difficulty[rows])[0, 1] > 0.4


def test_programs_compile_and_print_a_number(
    outcomes: synthetic.SyntheticOutcomes, capsys: pytest.CaptureFixture[str]
) -> None:
    programs = [q["query"].split("\n\n", 1)[1] for q in outcomes.queries if q["dataset"] == "synthetic_code"]
    for program in programs[:100]:
        exec(compile(program, "<query>", "exec"), {})
        int(capsys.readouterr().out)


def test_labels_follow_the_documented_probability(outcomes: synthetic.SyntheticOutcomes) -> None:
    abilities = {c.name: c.ability for c in synthetic.CANDIDATES}
    for j, name in enumerate(outcomes.candidates):
        ability = np.array([abilities[name][query["subset"]] for query in outcomes.queries])
        expected = 0.05 + 0.95 / (1 + np.exp(-8 * (ability - outcomes.difficulty)))
        np.testing.assert_allclose(outcomes.probability[:, j], expected)
        answered = ~np.isnan(outcomes.correct[:, j])
        p, correct = expected[answered], outcomes.correct[answered, j]
        assert set(correct) == {0.0, 1.0}
        assert abs((correct - p).sum()) < 4 * np.sqrt((p * (1 - p)).sum()), name


def test_about_three_percent_are_blank(outcomes: synthetic.SyntheticOutcomes) -> None:
    assert 0.025 < np.isnan(outcomes.correct).mean() < 0.035


@pytest.mark.parametrize(
    ("specialist", "families"),
    [("sim-code", {"loops", "functions"}), ("sim-math", {"arithmetic", "dates", "sequences"})],
)
def test_specialists_lead_the_dearer_large_model_in_their_families_alone(
    outcomes: synthetic.SyntheticOutcomes, specialist: str, families: set[str]
) -> None:
    special, large = (outcomes.candidates.index(name) for name in (specialist, "sim-large"))
    inside = np.array([query["subset"] in families for query in outcomes.queries])
    accuracy = np.nanmean(outcomes.correct[inside], axis=0)
    assert accuracy[special] > accuracy[large] + 0.1
    outside = np.nanmean(outcomes.correct[~inside], axis=0)
    assert outside[special] < outside[large] - 0.1


def test_beta_moves_the_best_choice_over_the_pool(outcomes: synthetic.SyntheticOutcomes) -> None:
    costs = np.array([c.cost for c in synthetic.CANDIDATES])
    normalized = (costs - costs.min()) / (costs.max() - costs.min())

    def shares(beta: float) -> dict[str, float]:
        choice = ((1 - beta) * outcomes.probability - beta * normalized).argmax(axis=1)
        return {name: float((choice == j).mean()) for j, name in enumerate(outcomes.candidates)}

    assert {name for name, share in shares(0.0).items() if share > 0.05} == {
        "sim-code",
        "sim-math",
        "sim-frontier",
    }
    assert {name for name, share in shares(0.3).items() if share > 0.05} == set(outcomes.candidates) - {"sim-tiny"}
    assert shares(1.0)["sim-tiny"] == 1.0


def test_files_hold_what_was_generated(tmp_path: Path) -> None:
    synthetic.write(tmp_path / "demo", n_queries=200, seed=1)
    expected = synthetic.generate(200, 1)
    with gzip.open(tmp_path / "demo" / "queries.jsonl.gz", "rt", encoding="utf-8") as lines:
        assert [json.loads(line) for line in lines] == expected.queries
    with gzip.open(tmp_path / "demo" / "labels.csv.gz", "rt", encoding="utf-8", newline="") as lines:
        header, *rows = csv.reader(lines)
    assert header == ["query_id", *expected.candidates]
    assert [row[0] for row in rows] == [query["query_id"] for query in expected.queries]
    read = np.array([[float(value or "nan") for value in row[1:]] for row in rows])
    np.testing.assert_array_equal(read, expected.correct)


def test_round_trip_through_the_readers_of_outcomes(tmp_path: Path) -> None:
    synthetic.write(tmp_path / "demo", n_queries=200, seed=1)
    expected = synthetic.generate(200, 1)
    read = read_outcomes(tmp_path / "demo")
    assert read.candidates == expected.candidates
    assert read.query_ids == tuple(query["query_id"] for query in expected.queries)
    assert read.queries == tuple(query["query"] for query in expected.queries)
    assert read.subsets == tuple(query["subset"] for query in expected.queries)
    assert read.splits == tuple(query["split"] for query in expected.queries)
    np.testing.assert_array_equal(read.correct, expected.correct)


def test_the_pool_reads_and_says_that_it_is_synthetic(tmp_path: Path) -> None:
    synthetic.write(tmp_path / "demo", n_queries=20)
    pool = read_pool_json(tmp_path / "demo" / "pool.json")
    assert pool.names == tuple(c.name for c in synthetic.CANDIDATES)
    assert "synthetic" in pool.unit
    assert all(candidate.metadata["synthetic"] is True for candidate in pool.candidates)


def test_the_readme_says_synthetic_and_states_the_response_model(tmp_path: Path) -> None:
    synthetic.write(tmp_path / "demo", n_queries=20, seed=5)
    readme = (tmp_path / "demo" / "README.md").read_text(encoding="utf-8")
    assert "SYNTHETIC" in readme
    assert "P(correct) = guess + (1 - guess) * sigmoid(slope * (ability[candidate, family] - difficulty))" in readme
    assert "20 queries, seed 5" in readme


def test_an_empty_folder_is_taken_and_a_full_one_refused(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    folder.mkdir()
    synthetic.write(folder, n_queries=20)
    before = contents(folder)
    with pytest.raises(OutcomesError, match="not an empty folder"):
        synthetic.write(folder, n_queries=30)
    assert contents(folder) == before
    with pytest.raises(OutcomesError, match="not an empty folder"):
        synthetic.write(folder / "pool.json")
    assert set(tmp_path.iterdir()) == {folder}


def test_a_failure_while_writing_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_write = Path.write_bytes

    def full_disk(path: Path, data: bytes) -> int:
        if path.name == "pool.json":
            raise OSError(28, "No space left on device")
        return whole_write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        synthetic.write(tmp_path / "demo", n_queries=20)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_rename_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(f"{source} to {target}")

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(PermissionError):
        synthetic.write(tmp_path / "demo", n_queries=20)
    assert list(tmp_path.iterdir()) == []


def test_no_queries_are_refused() -> None:
    with pytest.raises(OutcomesError, match="at least 1, not 0"):
        synthetic.generate(0)


def test_sample_queries_are_fixed_and_not_generated(outcomes: synthetic.SyntheticOutcomes) -> None:
    samples = synthetic.sample_queries()
    assert samples == synthetic.sample_queries()
    assert len(set(samples)) == len(samples) == 6
    assert not set(samples) & {query["query"] for query in outcomes.queries}
