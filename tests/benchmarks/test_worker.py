"""Tests of tests/benchmarks/worker.py: answers come back over the pipe, and failures as one line."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from worker import Worker, WorkerError

HERE = str(Path(__file__).parent)

TALKATIVE = """
from worker import serve
def start():
    print("loading")
    def shout(text):
        print("noise")
        return text.upper()
    def fail(text):
        raise RuntimeError("no such luck")
    return {"shout": shout, "fail": fail}, {"versions": {"x": "1"}}
serve(start)
"""


def worker(tmp_path: Path, source: str) -> Worker:
    script = tmp_path / "script.py"
    script.write_text(source, encoding="utf-8")
    path = os.pathsep.join([HERE, *filter(None, [os.environ.get("PYTHONPATH")])])
    return Worker([sys.executable, script], tmp_path / "log", {"PYTHONPATH": path})


def test_what_a_peer_prints_stays_out_of_the_answers(tmp_path: Path) -> None:
    with worker(tmp_path, TALKATIVE) as one:
        assert one.about["versions"] == {"x": "1"}
        ms, answers = one.run("shout", ["α", "two\nlines"])
        assert answers == ["Α", "TWO\nLINES"]
        assert len(ms) == 2
        assert all(value > 0 for value in ms)
        with pytest.raises(WorkerError, match="RuntimeError: no such luck"):
            one.run("fail", ["x"])
        assert one.run("shout", ["still there"])[1] == ["STILL THERE"]


def test_a_peer_that_can_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"ModuleNotFoundError: No module named 'not_there'"):
        worker(tmp_path, "from worker import serve\ndef start():\n    import not_there\nserve(start)\n")
    with pytest.raises(WorkerError, match=r"the process ended: .*SyntaxError"):
        worker(tmp_path, "def (:\n")
