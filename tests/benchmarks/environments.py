"""Virtual environments of what the benchmarks compare with: made on demand in a cache folder, outside the repository.

``ARLLM_BENCH_CACHE`` moves the folder; the graphs that the benchmarks export lie there too.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

INSTALL_SECONDS = 1200  # of one environment


class InstallError(Exception):
    """An environment could not be made; the message is for a row of the table."""


def cache_folder() -> Path:
    folder = os.environ.get("ARLLM_BENCH_CACHE")
    return Path(folder) if folder else Path.home() / ".cache/arllm/benchmarks"


def environment(name: str, requirements: Sequence[str], note: Callable[[str], None]) -> Path:
    """The Python of an environment with these requirements; one that was made before is used again.

    Raises:
        InstallError: pip failed or took too long; its last word is in the message, its output in a file.
    """
    mark = hashlib.sha256("\n".join((sys.version, *requirements)).encode()).hexdigest()
    folder = cache_folder() / "environments" / name
    python = folder / "bin/python"
    if (folder / "finished").is_file() and (folder / "finished").read_text() == mark:
        return python
    note(f"making the environment {name}: pip install {' '.join(requirements)}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log = folder.with_suffix(".log")
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", *requirements]
    with log.open("w", encoding="utf-8") as output:
        for command in ([sys.executable, "-m", "venv", str(folder)], pip):
            try:
                done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, timeout=INSTALL_SECONDS)
            except subprocess.TimeoutExpired:
                raise InstallError(f"not installed within {INSTALL_SECONDS} s (see {log})") from None
            if done.returncode:
                raise InstallError(f"not installed: {_last_error(log)} (see {log})")
    (folder / "finished").write_text(mark)
    return python


def _last_error(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["no word from pip"])[-1][:300]
