"""Tests of tests/benchmarks/environments.py: made once, and a failure names pip's error. Offline."""

from __future__ import annotations

from pathlib import Path

import pytest
from environments import InstallError, environment


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARLLM_BENCH_CACHE", str(tmp_path))


def test_an_environment_is_made_once_for_the_same_requirements(tmp_path: Path) -> None:
    notes: list[str] = []
    python = environment("pip-alone", ("pip",), notes.append)  # already satisfied: nothing is fetched
    assert python.is_file()
    assert tmp_path in python.parents
    assert environment("pip-alone", ("pip",), notes.append) == python
    assert len(notes) == 1
    environment("pip-alone", ("pip>=1",), notes.append)
    assert len(notes) == 2


def test_a_failure_names_the_error_and_is_not_kept(tmp_path: Path) -> None:
    missing = f"{tmp_path}/no-such-wheel.whl"
    for _ in range(2):
        with pytest.raises(InstallError, match=r"not installed: .*no-such-wheel"):
            environment("broken", (missing,), lambda note: None)
