"""The lean install: a wheel in a fresh virtual environment without torch routes with the shipped bundle.

Builds the wheel, installs ``arllm[cpu]`` beside nothing else, and uses it as a new user would.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "transformers", "pandas", "onnx", "sklearn", "scipy", "optimum")


@pytest.fixture(scope="module")
def lean_python(wheel_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lean")
    _run(sys.executable, "-m", "venv", str(folder / "venv"))
    python = folder / "venv" / "bin" / "python"
    pip = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(ROOT / "constraints.txt"))
    _run(str(python), *pip, f"arllm[cpu] @ file://{wheel_path}")
    return python


def _run(*command: str, cwd: Path | None = None, stdin: str | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, input=stdin)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def test_nothing_heavy_is_installed(lean_python: Path) -> None:
    code = f"import importlib.util as u; print([m for m in {HEAVY!r} if u.find_spec(m)])"
    assert _run(str(lean_python), "-c", code).strip() == "[]"


def test_the_shipped_bundle_routes_at_once(lean_python: Path, tmp_path: Path) -> None:
    arllm = str(lean_python.parent / "arllm")
    decision = json.loads(_run(arllm, "route", "nano", "--json", "What is 17 * 23?", cwd=tmp_path))
    assert decision["model"] in decision["quality"]
    assert decision["variant"] == "cpu-int8"
    assert "conforms on" in _run(arllm, "doctor", "nano", cwd=tmp_path)


def test_the_shipped_bundle_is_measured_without_any_extra(lean_python: Path, tmp_path: Path) -> None:
    arllm = str(lean_python.parent / "arllm")
    quick = ("--rounds", "1", "--tokens", "8", "--callers", "1", "--json")
    report = json.loads(_run(arllm, "bench", "nano", *quick, cwd=tmp_path))
    assert report["tokens"][0]["latency"]["p50"] > 0
    assert report["cold"][0]["processes"] == 1


def test_the_readme_example_runs_as_printed(lean_python: Path, tmp_path: Path) -> None:
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    script = tmp_path / "example.py"
    script.write_text(block.group(1), encoding="utf-8")
    assert len(_run(str(lean_python), str(script), cwd=tmp_path).splitlines()) >= 1


def test_training_says_which_extra_it_needs(lean_python: Path, tmp_path: Path) -> None:
    (tmp_path / "pool.json").write_text('{"unit": "u", "candidates": [{"name": "a", "cost": 1}]}')
    arllm = str(lean_python.parent / "arllm")
    done = subprocess.run(
        [arllm, "train", str(tmp_path), "--pool", str(tmp_path / "pool.json"), "--out", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert 'pip install "arllm[train]"' in done.stderr
