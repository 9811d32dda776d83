"""A process that runs something from another virtual environment and reports how long it took: both ends of the pipe.

One JSON object a line. The worker says ``{"ready": true, …}`` or ``{"error": …}`` first; then ``{"arm": name,
"queries": […]}`` is answered by ``{"ms": […], "answers": […]}``. Standard library alone, so that any environment can
import it; what a peer prints itself goes to stderr.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def clock() -> int:
    """Nanoseconds: of the wall, or with ``ARLLM_BENCH_CLOCK=cpu`` of this process on its processors.

    On a machine that others use too, a single thread's processor time is what the wall would show on a quiet one.
    """
    return time.process_time_ns() if os.environ.get("ARLLM_BENCH_CLOCK") == "cpu" else time.perf_counter_ns()


class WorkerError(Exception):
    """The worker could not do what it was asked; the message is for a row of the table."""


def serve(start: Callable[[], tuple[Mapping[str, Callable[[Any], Any]], Mapping[str, Any]]]) -> None:
    """The worker's end: ``start`` returns arms by name (query → answer) and what to say of oneself."""
    wire = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # peers print; stdout is the wire

    def send(message: Mapping[str, Any]) -> None:
        wire.write(json.dumps(message) + "\n")
        wire.flush()

    try:
        arms, about = start()
    except BaseException as error:  # a peer may even call sys.exit
        send({"error": f"{type(error).__name__}: {error}"})
        raise
    send({"ready": True, **about})
    for line in sys.stdin:
        asked = json.loads(line)
        ms, answers = [], []
        try:
            for query in asked["queries"]:
                started = clock()
                answer = arms[asked["arm"]](query)
                ms.append((clock() - started) / 1e6)
                answers.append(answer if isinstance(answer, (str, int, float)) else None)
        except Exception as error:
            send({"error": f"{type(error).__name__}: {error}"})
            continue
        send({"ms": ms, "answers": answers})


class Worker:
    """The other end: starts the process and waits until it is ready.

    Raises:
        WorkerError: it stopped, or reported an error; the end of its stderr is in the message.
    """

    def __init__(self, command: Sequence[str | Path], log: Path, env: Mapping[str, str] | None = None) -> None:
        self._log = log
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                encoding="utf-8",
                env={**os.environ, **(env or {})},
            )
        try:
            self.about = self._read()
        except WorkerError:
            self.close()
            raise

    def run(self, arm: str, queries: Sequence[Any]) -> tuple[list[float], list[Any]]:
        """Milliseconds and answers of every query, in order."""
        pipe = self._process.stdin
        assert pipe is not None
        try:
            pipe.write(json.dumps({"arm": arm, "queries": list(queries)}) + "\n")
            pipe.flush()
        except BrokenPipeError:
            raise WorkerError(self._last_words()) from None
        answer = self._read()
        return answer["ms"], answer["answers"]

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> dict[str, Any]:
        pipe = self._process.stdout
        assert pipe is not None
        line = pipe.readline()
        if not line:
            raise WorkerError(self._last_words())
        message: dict[str, Any] = json.loads(line)
        if "error" in message:
            raise WorkerError(" ".join(str(message["error"]).split())[:300])
        return message

    def _last_words(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
        words = [line.strip() for line in lines if line.strip()]
        return f"the process ended: {words[-1][:300] if words else 'no word on stderr'}"
