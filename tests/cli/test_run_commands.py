"""``arllm eval RUN`` and ``arllm export --evaluation``: a run is judged before its export, and its card says how."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from arllm import cli

JUDGE = ("--split", "val", "--resamples", "20", "--baseline", "random", "--json")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, list(arguments), catch_exceptions=False)


@pytest.fixture(scope="module")
def judged(tiny_run: Path, outcomes_folder: Path) -> str:
    """What `arllm eval RUN --json` prints."""
    done = run("eval", str(tiny_run), str(outcomes_folder), *JUDGE)
    assert done.exit_code == 0, done.stderr
    return done.stdout


def test_a_run_is_judged_as_its_bundle_is(judged: str, tiny_bundle: Path, outcomes_folder: Path) -> None:
    done = run("eval", str(tiny_bundle), str(outcomes_folder), "--variant", "cpu-fp32", *JUDGE)
    of_run, of_bundle = json.loads(judged), json.loads(done.stdout)
    assert of_run["ours"] == of_bundle["ours"] == ["nir", "hdp", "hdp-paper"]
    ours, theirs = (result["results"]["val"] for result in (of_run, of_bundle))
    assert ours["queries"] == theirs["queries"] > 20
    assert ours["zero"] == theirs["zero"]
    assert ours["oracle"] == theirs["oracle"]
    for policy in of_run["ours"]:
        for figure in ("gap_closed", "accuracy", "auc", "brier"):
            have, want = (result["routers"][policy][figure] for result in (ours, theirs))
            assert have == pytest.approx(want, abs=0.01), (policy, figure)
    assert ours["routers"]["nir"]["brier"] != pytest.approx(ours["routers"]["hdp-paper"]["brier"], abs=0.02)


@pytest.mark.parametrize("more", [("--variant", "cpu-int8"), ("--pool", "{pool}")])
def test_what_goes_with_a_bundle_alone(more: tuple[str, str], tiny_run: Path, outcomes_folder: Path) -> None:
    option, value = more
    done = run(
        "eval", str(tiny_run), str(outcomes_folder), option, value.format(pool=outcomes_folder / "pool.json"), *JUDGE
    )
    assert done.exit_code == 2
    assert "--variant and --pool go with a bundle" in done.stderr


def test_a_damaged_run_is_named(tiny_run: Path, outcomes_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_run, tmp_path / "copy"))
    (copy / "nir.safetensors").unlink()
    done = run("eval", str(copy), str(outcomes_folder), *JUDGE)
    assert done.exit_code == 1
    assert f"{copy}: the run folder is damaged" in done.stderr
    assert done.stdout == ""


def test_what_is_neither_run_nor_bundle(outcomes_folder: Path, tmp_path: Path) -> None:
    done = run("eval", str(tmp_path), str(outcomes_folder), *JUDGE)
    assert done.exit_code == 1
    assert "no bundle here" in done.stderr


def test_the_card_shows_the_evaluation(judged: str, tiny_run: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "eval.json").write_text(judged, encoding="utf-8")
    arguments = ["export", str(tiny_run), "--out", str(tmp_path / "out"), "--variant", "cpu-fp32"]
    done = run(*arguments, "--verify-queries", "10", "--evaluation", str(tmp_path / "eval.json"))
    assert done.exit_code == 0, done.stderr
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    result = json.loads(judged)["results"]["val"]
    assert f"**val**, {result['queries']} queries; best single model `{result['best_single']['name']}`" in card
    for name in ("nir", "hdp", "hdp-paper"):
        assert f"| **{name}** | {100 * result['routers'][name]['gap_closed']:.1f}% | " in card
    assert f"| random | {100 * result['routers']['random']['gap_closed']:.1f}% | " in card
    assert "## Evaluation" not in (tiny_bundle / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("content", ['{"auc": 0.7}', "not json", "[]", ""])
def test_a_wrong_evaluation_is_refused_and_leaves_nothing(content: str, tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "eval.json").write_text(content, encoding="utf-8")
    out = tmp_path / "out"
    done = run("export", str(tiny_run), "--out", str(out), "--evaluation", str(tmp_path / "eval.json"))
    assert done.exit_code == 1
    assert f"{tmp_path / 'eval.json'}: not an evaluation; make one with `arllm eval" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["eval.json"]


def test_an_absent_evaluation_is_refused(tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("export", str(tiny_run), "--out", str(out), "--evaluation", str(tmp_path / "absent.json"))
    assert done.exit_code == 2
    assert "does not exist" in done.stderr
    assert not out.exists()
