"""What the comparisons share at their edges: progress on stderr, and a JSON file with the machine and its load."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from arllm.train.latency import machine as latency_machine
from arllm.train.staging import write_json

ONE_THREAD = os.environ.get("ARLLM_BENCH_CLOCK") == "cpu"  # processor time means something for one thread alone


def note(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def arguments(description: str, size: str, default: int, means: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument(f"--{size}", type=int, default=default, help=means)
    parser.add_argument(
        "--smoke", action="store_true", help="least work of a small shape, to see that all of it runs"
    )
    return parser


def record(out: Path, run: Callable[[], dict[str, Any]]) -> None:
    """Run, and write what it gives with the date, the clock and the machine before and after."""
    machine = latency_machine.describe()
    found = run()
    machine["load_after"] = latency_machine.load_average()
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, {**found, "date": date, "clock": "cpu" if ONE_THREAD else "wall", "machine": machine})


def read(path: Path) -> dict[str, Any] | None:
    """A file of :func:`record`; None where there is none."""
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
