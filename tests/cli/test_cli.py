"""The command line: results on stdout, the rest on stderr, exit codes 0, 1, 2, messages that say what to do next."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from arllm import cli


def run(*arguments: str, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(cli.main, list(arguments), input=stdin, catch_exceptions=False)


def test_every_command_has_help_with_an_example() -> None:
    commands = [["train"], ["export"], ["route"], ["inspect"], ["doctor"], ["data", "synthesize"]]
    for command in commands:
        result = run(*command, "--help")
        assert result.exit_code == 0
        assert f"arllm {' '.join(command)}" in result.stdout.split("Example", 1)[1], command


def test_route_prints_the_model_alone(tiny_bundle: Path) -> None:
    result = run("route", str(tiny_bundle), "What is 17 + 25?", "Sort: b a c")
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 2
    assert all(line.startswith("sim-") for line in result.stdout.splitlines())
    assert result.stderr == ""


def test_route_with_several_betas_prints_each(tiny_bundle: Path) -> None:
    result = run("route", str(tiny_bundle), "x", "--beta", "0", "--beta", "1")
    assert [line.split("\t")[0] for line in result.stdout.splitlines()] == ["0", "1"]
    assert result.stdout.splitlines()[1].endswith("sim-tiny")  # at beta 1 the cheapest


def test_route_json_holds_the_whole_decision(tiny_bundle: Path) -> None:
    result = run("route", str(tiny_bundle), "--json", "--beta", "0.25", "--policy", "hdp", "What is 1 + 1?")
    decision = json.loads(result.stdout)
    assert decision["query"] == "What is 1 + 1?"
    assert decision["beta"] == 0.25
    assert decision["policy"] == "hdp"
    assert decision["variant"] == "cpu-int8"
    assert max(decision["utility"], key=decision["utility"].__getitem__) == decision["model"]
    assert set(decision["quality"]) == set(decision["cost"]) == set(decision["utility"])
    assert sum(decision["domains"].values()) == pytest.approx(1.0, abs=1e-4)
    assert not decision["truncated"]


def test_stdin_gives_one_query_a_line(tiny_bundle: Path) -> None:
    result = run("route", str(tiny_bundle), "-", "--json", stdin="first\nsecond\n\n")
    assert [json.loads(line)["query"] for line in result.stdout.splitlines()] == ["first", "second", ""]


def test_jsonl_requests_override_the_options_and_keep_their_id(tiny_bundle: Path) -> None:
    lines = [
        {"id": 7, "query": "two\nlines", "beta": 1},
        {"query": "x", "candidates": ["sim-large"], "policy": "hdp-paper"},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    result = run("route", str(tiny_bundle), "-", "--jsonl", "--json", "--beta", "0", stdin=text)
    first, second = (json.loads(line) for line in result.stdout.splitlines())
    assert (first["id"], first["beta"], first["model"]) == (7, 1.0, "sim-tiny")
    assert (second["model"], second["policy"], second["beta"]) == ("sim-large", "hdp-paper", 0.0)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "stdin:2: not valid JSON"),
        ("[]", 'stdin:2: expected an object with a string "query"'),
        ('{"query": 3}', "stdin:2"),
        ('{"query": "x", "betta": 0.1}', "stdin:2: unknown field 'betta'"),
        ('{"query": "x", "beta": "high"}', "stdin:2: beta must be a number"),
        ('{"query": "x", "candidates": ["nobody"]}', "stdin:2: unknown candidate 'nobody'"),
        ('{"query": "x", "candidates": "sim-tiny"}', "stdin:2: candidates must be a collection"),
        ('{"query": "x", "policy": ["nir"]}', "stdin:2: no policy"),
    ],
)
def test_a_bad_request_names_its_line(tiny_bundle: Path, line: str, complaint: str) -> None:
    result = run("route", str(tiny_bundle), "-", "--jsonl", stdin='{"query": "fine"}\n' + line + "\n")
    assert result.exit_code == 2
    assert complaint in result.stderr
    assert len(result.stdout.splitlines()) == 1  # the good line was answered


def test_invalid_utf8_on_stdin_is_routed_all_the_same(tiny_bundle: Path) -> None:
    result = run("route", str(tiny_bundle), "-", "--json", stdin=b"caf\xe9\n")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["query"] == "caf�"


def test_an_argument_that_is_not_utf8_gives_valid_json(tiny_bundle: Path) -> None:
    result = run("route", str(tiny_bundle), "--json", "caf\udce9")
    assert json.loads(result.stdout)["query"] == "caf\ufffd"


def test_a_request_with_its_own_beta_has_no_column_in_a_table(tiny_bundle: Path) -> None:
    result = run("route", str(tiny_bundle), "-", "--jsonl", "--table", stdin='{"query": "x", "beta": 0}\n')
    assert result.exit_code == 2
    assert "no column" in result.stderr


def test_names_of_candidates_may_have_spaces_around(tiny_bundle: Path) -> None:
    result = run("route", str(tiny_bundle), "x", "--candidates", "sim-large, sim-frontier", "--beta", "1")
    assert result.stdout == "sim-large\n"


def test_explain_and_table(tiny_bundle: Path) -> None:
    explained = run("route", str(tiny_bundle), "--explain", "word " * 500).stdout
    assert "difficulty" in explained
    assert "tokens dropped from the middle" in explained
    assert explained.count("sim-") >= 7  # every candidate, and the choice
    table = run("route", str(tiny_bundle), "--table", "--beta", "0", "--beta", "1", "a", "b").stdout.splitlines()
    assert table[0].split() == ["query", "beta", "0", "beta", "1"]
    assert len(table) == 3


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["route", "{bundle}", "x", "--beta", "2"], 2, "beta must lie in [0, 1]"),
        (["route", "{bundle}", "x", "--beta", "nan"], 2, "beta must lie in [0, 1]"),
        (["route", "{bundle}", "x", "--beta", "much"], 2, "not a valid float"),
        (["route", "{bundle}", "x", "--candidates", "nobody"], 2, "unknown candidate 'nobody'"),
        (["route", "{bundle}", "x", "--candidates", ","], 2, "candidate set is empty"),
        (["route", "{bundle}", "x", "--policy", "magic"], 2, "no policy 'magic'"),
        (["route", "{bundle}", "x", "--variant", "tpu"], 1, "no variant 'tpu'"),
        (["route", "{bundle}", "x", "--jsonl"], 2, "--jsonl reads stdin"),
        (["route", "{bundle}", "-", "x"], 2, "- reads stdin: give it alone"),
        (["route", "{bundle}", "x", "--json", "--table"], 2, "exclude each other"),
        (["data", "synthesize", "/proc/nowhere/x", "--queries", "20"], 1, "/proc/nowhere"),
        (["route", "nowhere", "x"], 1, "no bundle here"),
        (["inspect", "nowhere"], 1, "arllm export RUN --out BUNDLE"),
        (["export", "--out", "o"], 2, "give either RUN or --nir-checkpoint"),
        (["export", "{bundle}", "--out", "{free}"], 1, "no finished run here"),
        (["train", "{bundle}", "--pool", "{bundle}/pool.json", "--out", "{free}"], 1, "queries.jsonl"),
        (["frobnicate"], 2, "No such command"),
    ],
)
def test_failures_say_what_is_wrong(
    tiny_bundle: Path, tmp_path: Path, arguments: list[str], code: int, complaint: str
) -> None:
    result = run(*(a.format(bundle=tiny_bundle, free=tmp_path / "free") for a in arguments))
    assert result.exit_code == code, result.output
    assert complaint in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_inspect_and_doctor(tiny_bundle: Path) -> None:
    shown = run("inspect", str(tiny_bundle)).stdout
    for expected in (
        "cpu-int8",
        "cpu-fp32",
        "encoder, nir, router",
        "sim-frontier",
        "SYNTHETIC",
        "every file verified",
    ):
        assert expected in shown
    header, int8, fp32 = next(
        lines for lines in zip(*(shown.splitlines()[i:] for i in range(3)), strict=False) if lines[0][:7] == "variant"
    )
    for column in ("provider", "precision", "graph", "runs on", "MB", "regret", "centred cosine", "ms at 16"):
        assert column in header
    assert int8.split()[:5] == ["cpu-int8", "CPU", "int8", "authored", "any"]
    assert fp32.split()[:5] == ["cpu-fp32", "CPU", "fp32", "authored", "any"]
    assert "–" not in int8 + fp32
    manifest = json.loads(run("inspect", str(tiny_bundle), "--json").stdout)
    assert manifest["schema_version"] == 3
    for variant in manifest["variants"]:
        assert variant["graph"] == "authored"
        assert variant["parity"]["latency"]["ms"]["16"] > 0
        assert variant["parity"]["bytes"] > 0
    healthy = run("doctor", str(tiny_bundle))
    assert healthy.exit_code == 0
    assert healthy.stdout.count("conforms on") == 2
    report = json.loads(run("doctor", "--json").stdout)
    assert report["healthy"] is True
    assert "CPUExecutionProvider" in report["providers"]


def test_train_export_route_through_the_command_line(outcomes_folder: Path, tmp_path: Path) -> None:
    trained = run(
        *(
            "train",
            str(outcomes_folder),
            "--pool",
            str(outcomes_folder / "pool.json"),
            "--out",
            str(tmp_path / "run"),
        ),
        *("--layers", "1", "--vocab-size", "400", "--max-tokens", "32", "--epochs", "1", "--nir", "ncf", "--json"),
        *("--domains", "dataset", "--embedding-width", "0"),
    )
    assert trained.exit_code == 0, trained.stderr
    metrics = json.loads(trained.stdout)
    assert set(metrics["auc"]) == set(metrics["auc_mean_per_subset"])
    assert "validation" in trained.stderr
    exported = run("export", str(tmp_path / "run"), "--out", str(tmp_path / "bundle"), "--variant", "cpu-fp32")
    assert exported.exit_code == 0, exported.stderr
    decision = json.loads(run("route", str(tmp_path / "bundle"), "--json", "x").stdout)
    assert decision["variant"] == "cpu-fp32"
    assert decision["embedding"] == []
    assert set(decision["domains"]) == {"synthetic_math", "synthetic_language", "synthetic_logic", "synthetic_code"}
    again = run("export", str(tmp_path / "run"), "--out", str(tmp_path / "bundle"))
    assert again.exit_code == 1
    assert "exists already" in again.stderr


def test_a_missing_extra_names_the_pip_command(tmp_path: Path) -> None:
    """In a process where torch can't be imported, as in an install without the extra."""
    (tmp_path / "pool.json").write_text('{"unit": "u", "candidates": [{"name": "a", "cost": 1}]}')
    code = "import sys; sys.modules['torch'] = None; from arllm.cli import main; main()"
    arguments = ["train", str(tmp_path), "--pool", str(tmp_path / "pool.json"), "--out", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert 'pip install "arllm[train]"' in done.stderr
    assert "Traceback" not in done.stderr
