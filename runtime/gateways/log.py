"""The decision log: JSON Lines, rotating, written by a thread of its own.

A full queue or disk drops records, and counts them; no request ever waits for the log.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from arllm.runtime.errors import InputError

_LOGGER = logging.getLogger("arllm.gateway")


class DecisionLog:
    """Appends records to ``path``; beyond ``max_bytes`` it becomes ``path.1``, and so on up to ``path.<files>``.

    Raises:
        InputError: the file can't be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        max_bytes: int,
        files: int,
        max_queue: int,
        on_drop: Callable[[], object] = lambda: None,
    ) -> None:
        self._path, self._max_bytes, self._files = Path(path), max_bytes, files
        self._records: queue.Queue[Mapping[str, Any] | None] = queue.Queue(max_queue)
        self._on_drop = on_drop
        self.dropped = 0
        try:
            self._file: BinaryIO | None = self._path.open("ab")
        except OSError as error:
            raise InputError(f"the decision log {self._path} can't be written: {error.strerror}") from None
        self._thread = threading.Thread(target=self._work, name="arllm-log", daemon=True)
        self._thread.start()

    def write(self, record: Mapping[str, Any]) -> None:
        """Queue a record; never waits."""
        try:
            self._records.put_nowait(record)
        except queue.Full:
            self._drop("its queue is full")

    def close(self, seconds: float = 5.0) -> None:
        """Write what is queued, for ``seconds`` at most."""
        try:
            self._records.put(None, timeout=seconds)
        except queue.Full:
            return
        self._thread.join(seconds)

    def _drop(self, why: str) -> None:
        self.dropped += 1
        self._on_drop()
        if self.dropped & (self.dropped - 1) == 0:  # 1, 2, 4, 8, …: a full disk must not fill another log
            _LOGGER.warning("decision log %s: %d records dropped (%s)", self._path, self.dropped, why)

    def _work(self) -> None:
        while (record := self._records.get()) is not None:
            try:
                self._append(json.dumps(record, ensure_ascii=True).encode() + b"\n")
            except (OSError, ValueError, TypeError) as error:
                self._drop(str(error))
            if self._records.empty() and self._file is not None:
                try:
                    self._file.flush()
                except OSError as error:
                    self._drop(str(error))
        if self._file is not None:
            self._file.close()

    def _append(self, line: bytes) -> None:
        if self._file is None:
            self._file = self._path.open("ab")
        if self._file.tell() and self._file.tell() + len(line) > self._max_bytes:
            self._file.close()
            self._file = None
            self._rotate()
            self._file = self._path.open("ab")
        self._file.write(line)

    def _rotate(self) -> None:
        if self._files == 0:
            self._path.unlink()
            return
        for number in range(self._files, 1, -1):
            older = self._numbered(number - 1)
            if older.exists():
                os.replace(older, self._numbered(number))
        os.replace(self._path, self._numbered(1))

    def _numbered(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")
