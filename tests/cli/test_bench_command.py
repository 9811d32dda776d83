"""``arllm bench``: what it prints and writes, and what it refuses before it measures."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from arllm import cli
from arllm.runtime import Router
from arllm.train.latency import commands as latency_commands

QUICK = ("--rounds", "1", "--tokens", "8,16", "--callers", "1")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, ["bench", *arguments], catch_exceptions=False)


def test_json_has_every_part_and_progress_goes_to_stderr(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    queries, image = tmp_path / "q.jsonl", tmp_path / "out.png"
    queries.write_text('{"text": "What is 17 * 23?"}\n')
    done = run("nano", *QUICK, "--queries", str(queries), "--plot", str(image), "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert [subject["label"] for subject in found["subjects"]] == ["nano cpu-int8"]
    assert [row["tokens"] for row in found["tokens"]] == [8, 16]
    assert found["mix_of"]["queries"] == 1
    assert found["mix_of"]["source"] == str(queries)
    (cold,) = found["cold"]
    assert cold["processes"] == 1
    assert cold["whole_ms"] >= sum(cold["parts"].values()) * 0.99
    assert cold["peak_mb"] > 20
    assert image.read_bytes().startswith(b"\x89PNG")
    assert "cold starts" in done.stderr
    assert str(image) in done.stderr


def test_thread_counts_are_told_apart_and_repeats_measured_once() -> None:
    done = run("nano", "nano", *QUICK, "--threads", "1", "--threads", "2", "--variant", "auto", "--variant",
               "cpu-int8")  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert "nano cpu-int8 1 threads" in done.stdout
    assert "nano cpu-int8 2 threads" in done.stdout
    assert "faster" in done.stdout
    assert "peak MB" in done.stdout


def test_bundles_of_one_name_are_told_apart_by_folder_or_path(tmp_path: Path) -> None:
    nano = Router.load("nano").bundle.path
    for folder in ("a/left", "a/right", "b/left"):
        shutil.copytree(nano, tmp_path / folder)
    paths = [str(tmp_path / folder) for folder in ("a/left", "a/right", "b/left")]
    subjects = latency_commands._subjects
    assert [s.label for s in subjects(paths[:2], ["auto"], [1])] == ["left cpu-int8", "right cpu-int8"]
    assert [s.label for s in subjects(paths, ["auto"], [1])] == [f"{path} cpu-int8" for path in paths]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("nano", "--variant", "cpu-int3"), 1, "no variant 'cpu-int3'"),
        (("nowhere",), 1, "nowhere"),
        (("nano", "--queries", "missing.txt"), 2, "does not exist"),
        (("nano", "--seconds", "1", "--rounds", "1"), 2, "exclude each other"),
        (("nano", "--seconds", "0"), 2, "--seconds"),
        (("nano", "--tokens", "8,many"), 2, "--tokens takes whole numbers"),
        (("nano", "--tokens", "0"), 2, "--tokens takes whole numbers"),
        (("nano", "--plot", "no/such/folder/a.png"), 2, "is no folder"),
        ((), 2, "Missing argument"),
    ],
)
def test_what_it_refuses(arguments: tuple[str, ...], code: int, message: str) -> None:
    done = run(*arguments)
    assert done.exit_code == code
    assert message in done.stderr
    assert not done.stdout


def test_an_empty_queries_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.touch()
    done = run("nano", "--queries", str(path))
    assert (done.exit_code, done.stdout) == (1, "")
    assert f"{path}: no query in the file" in done.stderr


def test_a_plot_without_matplotlib_fails_before_the_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = run("nano", "--plot", str(tmp_path / "a.png"))
    assert done.exit_code == 1
    assert 'pip install "arllm[eval]"' in done.stderr
    assert "cold starts" not in done.stderr
