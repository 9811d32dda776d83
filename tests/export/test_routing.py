"""Tests of export/routing.py: one graph that decides as the router does, on weights shared with the others."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper

from arllm.export import authored, authored_nir, routing
from arllm.runtime.bundle import Bundle, list_files, open_bundle
from arllm.runtime.conformance import rerun
from arllm.runtime.doctor import examine
from arllm.runtime.errors import ParityError
from arllm.runtime.pool import Candidate
from arllm.runtime.router import Router
from arllm.runtime.tokens import TokenSpec
from arllm.train.backbones import nano_spec
from arllm.train.encoder import EncoderSpec, QueryEncoder
from arllm.train.nir import build_nir
from arllm.train.rebundle import add_candidate

PORT = Path(__file__).resolve().parents[1] / "harness" / "port.py"
VARIANTS = ("cpu-fp32", "cpu-int8")


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return open_bundle(tiny_bundle)


# --- weights ------------------------------------------------------------------------------------------------


def tensors_of(path: Path) -> tuple[set[tuple[int, int]], int]:
    """(offset, length) of the tensors in weights.bin, and the bytes of the largest inside the graph."""
    outside, largest = set(), 0
    for tensor in onnx.load(str(path), load_external_data=False).graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            entry = {item.key: item.value for item in tensor.external_data}
            assert entry["location"] == "weights.bin"
            outside.add((int(entry["offset"]), int(entry["length"])))
        else:
            largest = max(largest, numpy_helper.to_array(tensor).nbytes)
    return outside, largest


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_weight_stands_on_disk_once(tiny_bundle: Path, variant: str) -> None:
    folder = tiny_bundle / variant
    encoder, nir, router = (tensors_of(folder / f"{kind}.onnx") for kind in ("encoder", "nir", "router"))
    assert router[0] == encoder[0] | nir[0]
    assert not encoder[0] & nir[0]
    assert nir[0]
    assert router[1] == max(encoder[1], nir[1]) < routing.INLINE
    ends = sorted((offset, offset + length) for offset, length in router[0])
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))
    unused = (folder / "weights.bin").stat().st_size - sum(length for _, length in router[0])
    assert 0 <= unused < routing.ALIGNMENT * len(router[0])
    assert (folder / "router.onnx").stat().st_size < sum(
        (folder / f"{kind}.onnx").stat().st_size + 16_000 for kind in ("encoder", "nir")
    )


def test_a_graph_says_the_same_with_its_weights_outside(tiny_bundle: Path, tmp_path: Path) -> None:
    outside = tiny_bundle / "cpu-fp32" / "nir.onnx"
    inside = onnx.load(str(outside))  # weights and all
    for tensor in inside.graph.initializer:
        tensor.ClearField("external_data")
        tensor.data_location = TensorProto.DEFAULT
    size = inside.ByteSize()
    onnx.save_model(inside, str(tmp_path / "nir.onnx"))
    domains, width = (inside.graph.input[i].type.tensor_type.shape.dim[1].dim_value for i in (1, 0))
    rng = np.random.default_rng(0)
    inputs = {
        "query_vectors": rng.random((3, width), np.float32),
        "model_vectors": rng.random((5, domains), np.float32),
    }

    def answers(path: Path) -> np.ndarray:
        found: np.ndarray = onnxruntime.InferenceSession(str(path)).run(["quality"], inputs)[0]
        return found

    before = answers(tmp_path / "nir.onnx")
    routing.share_weights(tmp_path / "nir.onnx")
    weights = (tmp_path / "weights.bin").read_bytes()
    assert (tmp_path / "nir.onnx").stat().st_size + len(weights) < size + 10_000
    routing.share_weights(tmp_path / "nir.onnx")  # nothing is left to move
    assert (tmp_path / "weights.bin").read_bytes() == weights
    np.testing.assert_array_equal(answers(tmp_path / "nir.onnx"), before)
    np.testing.assert_array_equal(answers(outside), before)


# --- a port -------------------------------------------------------------------------------------------------


def assert_the_port_conforms(folder: Path, variant: str, exact: bool) -> None:
    """port.py, which can't import arllm's code, says what conformance.jsonl expects."""
    result = subprocess.run(
        [sys.executable, "-I", str(PORT), str(folder), variant], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    rows = [
        json.loads(line) for line in (folder / "conformance.jsonl").read_text(encoding="utf-8").split("\n") if line
    ]
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(found) == len(rows) > 10
    for row, said in zip(rows, found, strict=True):
        expected = row["expected"][variant]
        assert not said["arllm"]
        assert said["quality"] == pytest.approx(expected["quality"], abs=1e-5 if exact else 0.05)
        if exact:
            assert said["choice"] == expected["choice"]
            assert list(said["choice"]) == ["0", "0.25", "0.5", "0.75", "1"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_port_decides_as_conformance_has_it(tiny_bundle: Path, variant: str) -> None:
    assert_the_port_conforms(tiny_bundle, variant, exact=True)


def test_a_port_decides_on_the_bundle_that_ships(tmp_path: Path) -> None:
    shipped = open_bundle("nano")
    shutil.copytree(shipped.path, tmp_path / "nano")
    for variant in shipped.manifest.variants:
        routing.export_router(tmp_path / "nano" / variant, shipped.manifest)
        assert_the_port_conforms(tmp_path / "nano", variant, exact=variant == "cpu-fp32" or _vnni())


def _vnni() -> bool:
    """Integers were recorded on such a processor; another may round an activation to the other side."""
    from arllm.runtime.session import instruction_sets

    return "avx512_vnni" in instruction_sets()


def test_an_added_candidate_needs_no_new_graph(bundle: Bundle, tmp_path: Path) -> None:
    dearer = Candidate("new/one", 3 * bundle.manifest.cost_maximum, tuple([0.9] * len(bundle.manifest.domains)))
    made = add_candidate(bundle, dearer, tmp_path / "more", "Made up.")
    for variant in VARIANTS:
        assert made.manifest.files[f"{variant}/router.onnx"] == bundle.manifest.files[f"{variant}/router.onnx"]
        result = rerun(Router.load(made.path, variant=variant))
        assert result.problems == ()
        assert result.router_graph_difference is not None
    assert_the_port_conforms(made.path, "cpu-int8", exact=True)


# --- bundles ------------------------------------------------------------------------------------------------


def test_a_graph_of_other_rules_is_reported_and_not_published(bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(bundle.path, folder)
    strangers = dataclasses.replace(bundle.manifest, domain_shares=None)  # strange queries are taken at NIR's word
    routing.export_router(folder / "cpu-fp32", strangers)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"files": list_files(folder)}))
    router = Router.load(folder, variant="cpu-fp32")
    result = rerun(router)
    assert result.problems
    assert all("router.onnx, beta " in problem for problem in result.problems)
    assert result.router_graph_difference is not None
    assert result.router_graph_difference > 1e-3
    report, healthy = examine(str(folder))
    assert not healthy
    assert report["variants"]["cpu-fp32"]["verdict"].startswith("does NOT conform")
    with pytest.raises(ParityError, match=r"variant cpu-fp32: router\.onnx, beta 0: quality differs"):
        routing.verify_router(router, ["Zqx vlomp grint"])
    routing.verify_router(Router.load(folder, variant="cpu-int8"), ["Zqx vlomp grint"])


# --- other encoders -----------------------------------------------------------------------------------------


Parts = Callable[[int], Path]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """Count of layers → a folder with the authored graph of such an encoder, grouped heads and all, and NIR's."""
    torch.manual_seed(1)
    nir = tmp_path_factory.mktemp("nir")
    authored_nir.export_nir(build_nir("interaction", 3 + 1 + 8, 3).eval(), nir)

    @functools.cache
    def write(layers: int) -> Path:
        spec = dataclasses.replace(
            nano_spec(300, layers=layers, width=64), num_heads=4, num_kv_heads=2, head_dim=16, window=8
        )
        encoder = QueryEncoder(EncoderSpec(spec, TokenSpec(64, (1,), (2,), 0), ("a", "b", "c"), 8)).eval()
        folder = tmp_path_factory.mktemp("parts")
        authored.export_authored(encoder, folder)
        shutil.copyfile(nir / "nir.onnx", folder / "nir.onnx")
        return folder

    return write


def joined(parts: Path, folder: Path, **policy: Any) -> onnxruntime.InferenceSession:
    rules: Any = SimpleNamespace(
        domains=("a", "b", "c"),
        embedding_width=8,
        domain_shares=(0.5, 0.3, 0.2),
        mean_difficulty=0.4,
        policies={"nir": policy},
    )
    shutil.copytree(parts, folder)
    path = routing.export_router(folder, rules)
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


CALIBRATION = {"ability": 0.3, "scale": 1.4, "default": [0.1, 0.2, 0.0, -0.2], "offsets": {}}


@pytest.mark.parametrize("layers", [0, 2])
def test_neighbours_and_padding_change_no_choice_of_an_authored_graph(
    parts: Parts, tmp_path: Path, layers: int
) -> None:
    session = joined(parts(layers), tmp_path / "joined", calibration=CALIBRATION)
    rng = np.random.default_rng(2)
    count = 12
    pool = {
        "model_vectors": rng.random((count, 3), np.float32),
        "offsets": rng.normal(0, 0.3, (count, 4)),
        "costs": np.sort(rng.random(count)),
        "cost_bounds": np.array([0.0, 1.0]),
        "candidate_mask": rng.random(count) < 0.8,
    }
    rows = [rng.integers(3, 300, length) for length in (1, 5, 17, 40)]
    ids, mask = np.zeros((2, len(rows), 47), dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    betas = np.array([0.0, 0.1, 0.4, 0.9])
    together = session.run(None, {"input_ids": ids, "attention_mask": mask, "beta": betas} | pool)
    for i, row in enumerate(rows):
        one = {"input_ids": row[None], "attention_mask": np.ones_like(row)[None], "beta": betas[i : i + 1]}
        alone = session.run(None, one | pool)
        np.testing.assert_allclose(together[0][i], alone[0][0], rtol=0, atol=1e-5)
        best = np.sort(alone[1][0][pool["candidate_mask"]])
        assert best[-1] - best[-2] > 1e-4, "a near tie would prove nothing"
        assert together[2][i] == alone[2][0]


def test_a_policy_without_calibration_takes_offsets_and_ignores_them(parts: Parts, tmp_path: Path) -> None:
    session = joined(parts(0), tmp_path / "joined")
    inputs = {
        "input_ids": np.array([[1, 7, 9, 2]]),
        "attention_mask": np.ones((1, 4), dtype=np.int64),
        "model_vectors": np.full((2, 3), 0.5, dtype=np.float32),
        "costs": np.array([0.0, 1.0]),
        "cost_bounds": np.array([0.0, 1.0]),
        "candidate_mask": np.ones(2, dtype=bool),
        "beta": np.array([0.5]),
    }
    plain, moved = (session.run(["quality"], inputs | {"offsets": np.full((2, 4), o)})[0] for o in (0.0, 3.0))
    np.testing.assert_array_equal(plain, moved)


def test_graphs_of_two_operator_versions_or_with_a_name_in_common_are_not_joined(tiny_bundle: Path) -> None:
    folder = tiny_bundle / "cpu-fp32"
    rules = open_bundle(tiny_bundle).manifest
    encoder, nir = (onnx.load(str(folder / f"{k}.onnx"), load_external_data=False) for k in ("encoder", "nir"))
    older = onnx.ModelProto()
    older.CopyFrom(nir)
    older.opset_import[0].version = 18
    with pytest.raises(ValueError, match=r"they use ai\.onnx 18 and 20"):
        routing.join(encoder, older, rules)
    encoder.graph.initializer.append(onnx.helper.make_tensor("costs", TensorProto.FLOAT, [1], [1.0]))
    with pytest.raises(ValueError, match="both name a value 'costs'"):
        routing.join(encoder, nir, rules)
