"""Tests of gateways/log.py: whole lines, rotation, and drops that are counted."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from arllm.runtime.errors import InputError
from arllm.runtime.gateways.log import DecisionLog


def lines(path: Path) -> list[int]:
    return [json.loads(line)["n"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_it_rotates_and_keeps_so_many(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    log = DecisionLog(path, max_bytes=30, files=2, max_queue=1000)
    for n in range(10, 22):
        log.write({"n": n})  # 10 bytes each
    log.close()
    assert lines(path) == [19, 20, 21]
    assert lines(tmp_path / "d.jsonl.1") == [16, 17, 18]
    assert lines(tmp_path / "d.jsonl.2") == [13, 14, 15]
    assert len(list(tmp_path.iterdir())) == 3
    assert log.dropped == 0


def test_no_older_files_where_none_are_kept(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path / "d.jsonl", max_bytes=10, files=0, max_queue=10)
    for n in range(10, 13):
        log.write({"n": n})
    log.close()
    assert [path.name for path in tmp_path.iterdir()] == ["d.jsonl"]
    assert lines(tmp_path / "d.jsonl") == [12]


def test_it_appends(tmp_path: Path) -> None:
    for n in (10, 11):
        log = DecisionLog(tmp_path / "d.jsonl", 1000, 1, 10)
        log.write({"n": n})
        log.close()
    assert lines(tmp_path / "d.jsonl") == [10, 11]


def test_a_full_queue_drops_and_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    busy, go, told = threading.Event(), threading.Event(), []
    append = DecisionLog._append

    def slow(log: DecisionLog, line: bytes) -> None:
        busy.set()
        go.wait(20)
        append(log, line)

    monkeypatch.setattr(DecisionLog, "_append", slow)
    log = DecisionLog(tmp_path / "d.jsonl", 1000, 1, max_queue=2, on_drop=lambda: told.append(1))
    log.write({"n": 0})
    assert busy.wait(20)
    for n in range(1, 7):
        log.write({"n": n})
    assert log.dropped == len(told) == 4
    assert "4 records dropped (its queue is full)" in caplog.text
    go.set()
    log.close()
    assert lines(tmp_path / "d.jsonl") == [0, 1, 2]


def test_a_disk_that_fails_drops_and_recovers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append, failing = DecisionLog._append, [True]

    def full(log: DecisionLog, line: bytes) -> None:
        if failing.pop() if failing else False:
            raise OSError(28, "No space left on device")
        append(log, line)

    monkeypatch.setattr(DecisionLog, "_append", full)
    log = DecisionLog(tmp_path / "d.jsonl", 1000, 1, 10)
    log.write({"n": 1})
    log.write({"n": 2})
    log.close()
    assert log.dropped == 1
    assert lines(tmp_path / "d.jsonl") == [2]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere/d\.jsonl can't be written: No such file"):
        DecisionLog(tmp_path / "nowhere" / "d.jsonl", 1000, 1, 10)
