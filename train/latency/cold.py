"""Cold starts: fresh processes that load a bundle and decide once, interleaved subject by subject. Free of torch."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from arllm.runtime.errors import ArllmError
from arllm.train.latency.report import ColdRow
from arllm.train.latency.rounds import Bound, turned
from arllm.train.latency.stats import ratio

CODE = "from arllm.train.latency.child import main; main()"
LEAST = 3  # counted processes of each subject, where only time bounds them
MOST = 20


@dataclass(frozen=True)
class Start:
    """One process: seconds of each part in order, of the whole, and the peak of its memory in bytes."""

    parts: dict[str, float]
    whole: float
    peak_bytes: int


@dataclass(frozen=True)
class ColdSubject:
    """What a process loads, and the text that it routes first."""

    label: str
    bundle: str
    variant: str
    threads: int
    text: str


def start(subject: ColdSubject) -> Start:
    """Run one fresh process; ``whole`` lasts from before its start until its decision arrives here.

    Raises:
        ArllmError: the process failed; holds the end of what it said.
    """
    command = [sys.executable, "-c", CODE, subject.bundle, subject.variant, str(subject.threads), subject.text]
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        whole = time.perf_counter() - began
        _, said = process.communicate()
    if process.returncode or not line:
        last = said.strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
        raise ArllmError(f"{subject.label}: a fresh process could not load the bundle and route: {last[0]}")
    told = json.loads(line)
    return Start({"interpreter": max(0.0, whole - told["total"]), **told["parts"]}, whole, told["peak_bytes"])


def cold_starts(subjects: Sequence[ColdSubject], bound: Bound) -> list[ColdRow]:
    """One uncounted process each, which fills the page cache, then one each a round, the first one turning."""
    for subject in subjects:
        start(subject)
    found: dict[str, list[Start]] = {subject.label: [] for subject in subjects}
    began = time.perf_counter()
    number = 0
    while not _enough(number, bound, time.perf_counter() - began):
        for subject in turned(subjects, number):
            found[subject.label].append(start(subject))
        number += 1
    first = found[subjects[0].label]
    return [
        summary(
            label,
            starts,
            None if starts is first else [a.whole / b.whole for a, b in zip(first, starts, strict=True)],
        )
        for label, starts in found.items()
    ]


def summary(label: str, starts: Sequence[Start], faster: Sequence[float] | None) -> ColdRow:
    """Medians over a subject's processes; the largest of their memory peaks, in MB of 1,000,000 bytes."""
    return ColdRow(
        subject=label,
        processes=len(starts),
        parts={name: 1e3 * median(s.parts[name] for s in starts) for name in starts[0].parts},
        whole_ms=1e3 * median(s.whole for s in starts),
        slowest_ms=1e3 * max(s.whole for s in starts),
        peak_mb=max(s.peak_bytes for s in starts) / 1e6,
        faster=None if faster is None else ratio(faster),
    )


def _enough(number: int, bound: Bound, elapsed: float) -> bool:
    if bound.rounds is not None:
        return number >= min(MOST, bound.rounds)
    return number >= MOST or (number >= LEAST and elapsed * (number + 1) > bound.seconds * number)
