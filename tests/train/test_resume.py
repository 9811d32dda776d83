"""Tests of killing and resuming: `arllm train` dies by SIGKILL in mid-epoch and ends bit-equal when continued."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from arllm.cli import main

# Runs the command line with the arguments given, and dies by SIGKILL, which nothing can catch or clean up after.
# At "teachers N": in the Nth step of the teachers. At "heads N": in the Nth of the first phase. At "step N": in the
# Nth of the second. At "save N": when the Nth checkpoint is written, but not yet in its place.
KILLED = """
import os, signal, sys
from arllm.cli import main
from arllm.train import fit, heads
where, count, seen = sys.argv[1], int(sys.argv[2]), 0
def hook(original, counts):
    def hooked(*arguments):
        global seen
        seen += counts(*arguments)
        if seen == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)
    return hooked
if where == "step":
    fit.losses = hook(fit.losses, lambda net, *rest: int(net.training))
elif where in ("teachers", "heads"):  # teachers are trained without teachers
    student = where == "heads"
    heads.total_loss = hook(heads.total_loss, lambda parts, options: int((options.teacher_folds > 0) == student))
else:
    class os_of_fit:
        replace = staticmethod(hook(os.replace, lambda *paths: 1))
    fit.os = os_of_fit
main(sys.argv[3:])
"""
TIMEOUT = 300


# --threads 1 sets it for the whole process; it is put back afterwards.
pytestmark = pytest.mark.usefixtures("one_thread")


def arguments(outcomes: Path, out: Path) -> list[str]:
    """10 or so steps an epoch, two epochs, a checkpoint every third step."""
    options = "--layers 1 --vocab-size 300 --max-tokens 16 --epochs 2 --embedding-width 2 --checkpoint-steps 3"
    command = ["train", str(outcomes), "--pool", str(outcomes / "pool.json"), "--out", str(out), *options.split()]
    return [*command, "--batch-size", "32", "--token-dropout", "0.1", "--threads", "1", "--json"]


def train(outcomes: Path, out: Path, *more: str) -> Result:
    return CliRunner().invoke(main, [*arguments(outcomes, out), *more])


@pytest.fixture(scope="module")
def whole(outcomes_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    result = train(outcomes_folder, out)
    assert result.exit_code == 0, result.output
    return out


@pytest.mark.parametrize(("where", "count"), [("step", 8), ("save", 3)])
def test_a_killed_run_continues_bit_equal(
    where: str, count: int, outcomes_folder: Path, whole: Path, tmp_path: Path
) -> None:
    out, partial = tmp_path / "run", tmp_path / "run.partial"
    command = [sys.executable, "-c", KILLED, where, str(count), *arguments(outcomes_folder, out)]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run.partial"]  # nothing half-written under the final name
    saved = torch.load(partial / "checkpoint.pt", weights_only=True)["history"]["step"]
    assert saved == (6 if where == "step" else saved)
    assert saved % 3 == 0 or where == "save"
    assert (partial / "taught.npy").is_file()  # what the teachers said, for who continues

    again = train(outcomes_folder, out)
    assert again.exit_code == 1
    assert "continue it with --resume, or delete it" in again.output
    assert not out.exists()

    resumed = train(outcomes_folder, out, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert f"resumed at step {saved} of " in resumed.stderr
    assert "teachers:" in killed.stderr
    assert "teachers:" not in resumed.stderr  # read, not asked again
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in whole.iterdir())
    for name in ("encoder.safetensors", "nir.safetensors", "tokenizer.json", "metrics.json", "run.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_finished_run_is_not_trained_over(outcomes_folder: Path, whole: Path) -> None:
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    for more in ((), ("--resume",)):
        result = train(outcomes_folder, whole, *more)
        assert result.exit_code == 1
        assert "exists already; choose another --out, or delete it" in result.output
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before
    assert [path.name for path in whole.parent.iterdir()] == [whole.name]


def test_resuming_what_never_began(outcomes_folder: Path, tmp_path: Path) -> None:
    result = train(outcomes_folder, tmp_path / "run", "--resume")
    assert result.exit_code == 1
    assert "start without --resume" in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["teachers", "heads"])
def test_a_run_killed_in_its_first_phase_ends_bit_equal(
    where: str, outcomes_folder: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-c", KILLED, where, "5", *arguments(outcomes_folder, out)]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = sorted(path.name for path in (tmp_path / "run.partial").iterdir())
    assert left == (["taught.npy", "tokenizer.json"] if where == "heads" else ["tokenizer.json"])
    resumed = train(outcomes_folder, out, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert "starting over" in resumed.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    for name in ("encoder.safetensors", "nir.safetensors", "metrics.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize("more", [(), ("--resume",)])
def test_a_run_without_a_checkpoint_starts_over(
    more: tuple[str, ...], outcomes_folder: Path, whole: Path, tmp_path: Path
) -> None:
    """Killed before its first checkpoint, there is nothing to continue: neither answer may send the user round."""
    out, partial = tmp_path / "run", tmp_path / "run.partial"
    partial.mkdir()
    (partial / "tokenizer.json").write_text('{"half": ')
    (partial / "checkpoint.tmp").write_bytes(b"half")
    result = train(outcomes_folder, out, *more)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in whole.iterdir())
    assert (out / "nir.safetensors").read_bytes() == (whole / "nir.safetensors").read_bytes()


def test_bad_data_leaves_nothing_behind(outcomes_folder: Path, tmp_path: Path) -> None:
    """What fails before training begins does not stand in the way of the next attempt."""
    result = train(outcomes_folder, tmp_path / "run", "--domains", str(tmp_path / "absent.json"))
    assert result.exit_code == 1
    assert "absent.json" in result.output
    assert not list(tmp_path.iterdir())
