"""Tests of int8_depths.py: on small networks of random weights, in place of a pretrained Gemma."""

from __future__ import annotations

from pathlib import Path

import int8_depths
import pytest
import torch

from arllm.train.backbones import Backbone, nano


def small(*, layers: int) -> Backbone:
    torch.manual_seed(0)
    return nano(
        [f"add {i} and {i * 7}, then say what is left of it" for i in range(200)], vocab_size=300, layers=layers
    )


def test_every_depth_and_target_is_a_row(
    outcomes_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(int8_depths, "gemma3_270m", small)
    monkeypatch.setattr(int8_depths, "CALIBRATION", 24)
    arguments = ["", str(outcomes_folder), "--layers", "1", "--layers", "2", "--queries", "20", "--max-tokens", "24"]
    monkeypatch.setattr("sys.argv", [*arguments, "--target", "auto"])
    int8_depths.main()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:2] for row in rows] == [
        [layers, graph] for layers in "12" for graph in ("float32", "int8, `--target auto`")
    ]
    centred = [float(row[3].strip("*")) for row in rows]
    assert centred[0] == centred[2] == 1.0
    assert all(0.9 < value < 1.0 for value in (centred[1], centred[3]))
    sizes = [float(row[5].split()[0]) for row in rows]
    assert sizes[1] < 0.5 * sizes[0]
