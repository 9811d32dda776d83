"""Tests of train/rundir.py: a run survives writing and reading bit by bit; damage is told by the folder's name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from arllm.runtime.errors import RunError
from arllm.train.rundir import RUN_VERSION, Run, read_run, versions, write_run
from arllm.train.staging import write_json

FILES = (
    "encoder.safetensors",
    "heldout.jsonl.gz",
    "metrics.json",
    "nir.safetensors",
    "pool.json",
    "run.json",
    "tokenizer.json",
)


@pytest.fixture
def copy(tiny_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run, tmp_path / "copy"))


def refusal(folder: Path) -> str:
    with pytest.raises(RunError) as caught:
        read_run(folder)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_folder_holds_these_files_alone(tiny_run: Path) -> None:
    assert sorted(path.name for path in tiny_run.iterdir()) == sorted(FILES)


def test_round_trip_is_bit_equal(tiny_run: Path, tmp_path: Path) -> None:
    first = read_run(tiny_run)
    write_run(first, tmp_path)
    second = read_run(tmp_path)
    for name in ("encoder.safetensors", "nir.safetensors", "tokenizer.json", "pool.json", "metrics.json", "run.json"):
        assert (tmp_path / name).read_bytes() == (tiny_run / name).read_bytes(), name
    for a, b in ((first.encoder, second.encoder), (first.nir, second.nir)):
        assert a.state_dict().keys() == b.state_dict().keys()
        assert all(torch.equal(tensor, b.state_dict()[name]) for name, tensor in a.state_dict().items())
    assert second.encoder.spec == first.encoder.spec
    assert (second.hdp, second.pool, second.options) == (first.hdp, first.pool, first.options)
    assert (second.source, second.metrics) == (first.source, first.metrics)
    assert second.calibration.to_json() == first.calibration.to_json()
    assert second.domain_shares == first.domain_shares
    assert second.mean_difficulty == first.mean_difficulty
    assert second.heldout.queries == first.heldout.queries
    np.testing.assert_array_equal(second.heldout.correct, first.heldout.correct)


def test_a_run_says_how_its_training_queries_fall_into_domains(tiny_run: Path) -> None:
    run = read_run(tiny_run)
    assert len(run.domain_shares) == len(run.encoder.spec.domains) > 1
    assert sum(run.domain_shares) == pytest.approx(1.0)
    counts = np.array(run.domain_shares) * run.source["training_queries"]
    np.testing.assert_allclose(counts, counts.round(), atol=1e-9)  # every synthetic query is in a domain
    assert set(run.calibration.offsets) == set(run.pool.names)
    accuracy = run.pool.vectors() @ np.array(run.domain_shares)
    assert run.mean_difficulty == pytest.approx(
        1 - accuracy.mean(), abs=0.02
    )  # nothing is missing: one table, two means


def test_a_run_is_read_ready_for_use(tiny_run: Path) -> None:
    run = read_run(str(tiny_run))
    assert not run.encoder.training
    assert not run.nir.training
    assert run.encoder.backbone.config.sliding_window == run.encoder.spec.backbone.window
    ids, _ = run.text_tokenizer().encode("What is 17 + 25?")
    assert (ids[0], ids[-1]) == (1, 2)
    assert len(run.heldout.queries) == len(run.heldout.correct) > 0
    assert run.heldout.correct.shape[1] == len(run.pool)


def test_outcomes_that_were_not_evaluated_stay_so(tiny_run: Path, tmp_path: Path) -> None:
    run = read_run(tiny_run)
    correct = run.heldout.correct.copy()
    correct[0, 0], correct[1] = 0.25, np.nan
    write_run(_with_outcomes(run, correct), tmp_path)
    np.testing.assert_array_equal(read_run(tmp_path).heldout.correct, correct)


def _with_outcomes(run: Run, correct: np.ndarray) -> Run:
    import dataclasses

    return dataclasses.replace(run, heldout=dataclasses.replace(run.heldout, correct=correct))


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(name: str, copy: Path) -> None:
    (copy / name).unlink()
    refusal(copy)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_a_damaged_file(name: str, damage: str, copy: Path) -> None:
    data = (copy / name).read_bytes()
    damaged = {"cut": data[: len(data) // 2], "garbage": b"\x00\xff not what it was", "empty": b""}
    (copy / name).write_bytes(damaged[damage])
    refusal(copy)


@pytest.mark.parametrize(
    "changes",
    [
        {"run_version": "1"},
        {"encoder": {}},
        {"nir": {"shape": "transformer"}},
        {"hdp": {"slope": "steep", "weight": 1, "bias": 0}},
        {"hdp": {}},
        {"calibration": {}},
        {"calibration": {"ability": 1.0, "scale": 1.0, "default": [0.0], "offsets": {}}},  # of no domain
        {"domain_shares": None},
        {"domain_shares": ["many"]},
        {"mean_difficulty": "hard"},
        {"options": {"epochs": 1, "from_the_future": True}},
    ],
)
def test_unusable_entries_of_run_json(changes: dict[str, Any], copy: Path) -> None:
    change(copy / "run.json", **changes)
    refusal(copy)


def test_unusable_tokens(copy: Path) -> None:
    encoder = json.loads((copy / "run.json").read_text())["encoder"]
    change(copy / "run.json", encoder={**encoder, "tokens": {}})
    refusal(copy)


def test_weights_of_another_encoder(copy: Path) -> None:
    shutil.copyfile(copy / "nir.safetensors", copy / "encoder.safetensors")
    refusal(copy)


def test_run_json_that_is_no_object(copy: Path) -> None:
    (copy / "run.json").write_text("[1, 2]")
    refusal(copy)


def test_a_newer_run_asks_for_an_upgrade(copy: Path) -> None:
    change(copy / "run.json", run_version=RUN_VERSION + 1)
    assert "pip install --upgrade arllm" in refusal(copy)


def test_an_older_run_is_to_be_trained_again(copy: Path) -> None:
    assert RUN_VERSION == 2
    change(copy / "run.json", run_version=1)
    assert "from an older arllm" in refusal(copy)
    assert "train again" in refusal(copy)


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    assert "arllm train" in refusal(tmp_path)
    assert "arllm train" in refusal(tmp_path / "absent")


def test_json_never_holds_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"auc": float("nan")})


def test_versions_leave_out_what_is_not_installed() -> None:
    assert set(versions("numpy", "no-such-distribution")) == {"numpy"}
