"""Shared fixtures: a tiny run and bundle, trained once a session on synthetic outcomes, and the real data's place."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """../shared/data, the real outcomes; tests that need them skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"the real outcomes are not on this machine: {SHARED} is absent")
    return SHARED


@pytest.fixture(scope="session")
def outcomes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 500 SYNTHETIC queries with pool.json."""
    from arllm.train.synthetic import write

    folder = tmp_path_factory.mktemp("data") / "outcomes"
    write(folder, n_queries=500, seed=3)
    return folder


@pytest.fixture(scope="session")
def tiny_run(outcomes_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder: nano with 2 layers, a vocabulary of 1,500 and 48 tokens, trained for a few seconds."""
    from arllm.train.options import TrainOptions
    from arllm.train.outcomes import read_outcomes
    from arllm.train.pipeline import train
    from arllm.train.pools import read_pool

    options = TrainOptions(
        layers=2, vocab_size=1500, max_tokens=48, epochs=3, lr=2e-3, embedding_width=8, min_domain_queries=20
    )
    out = tmp_path_factory.mktemp("runs") / "tiny"
    pool = read_pool(outcomes_folder / "pool.json")
    train(read_outcomes(outcomes_folder), pool, options, out, progress=lambda message: None)
    return out


@pytest.fixture(scope="session")
def tiny_bundle(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of ``tiny_run`` with both variants. Read-only: copy it before changing a file."""
    from arllm.export.bundle import export_run
    from arllm.train.rundir import read_run

    out = tmp_path_factory.mktemp("bundles") / "tiny"
    export_run(read_run(tiny_run), out, progress=lambda message: None)
    return out


@pytest.fixture(scope="session")
def repository_files() -> list[str]:
    """Every file that git tracks or would track, as paths from the root."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sorted({name for name in listed.split("\0") if name and (ROOT / name).is_file()})


@pytest.fixture(scope="session")
def wheel_path(repository_files: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: nothing of an earlier build can slip in, nothing is left behind."""
    pytest.importorskip("build", reason="the extra dev brings build")
    source = tmp_path_factory.mktemp("source") / "arllm"
    for name in repository_files:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    result = subprocess.run(command, cwd=out, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """PyTorch on one thread: with tiny tensors, a second one waits more than it works."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
