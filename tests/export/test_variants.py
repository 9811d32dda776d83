"""Tests of export/variants.py and targets.py: which way a graph is written, and integers by target."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from arllm.export import gemma, targets, variants
from arllm.export.targets import TARGETS
from arllm.export.variants import VARIANTS, Material
from arllm.runtime import session
from arllm.runtime.errors import ExportError

QUERIES = [np.random.default_rng(i).integers(3, 300, size=9 + i) for i in range(40)]
PRODUCTS = ("MatMulIntegerToFloat", "MatMulInteger", "DynamicQuantizeMatMul")


@pytest.fixture(autouse=True)
def _any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "instruction_sets", lambda: frozenset({"avx2", "avx512_vnni"}))


def material(encoder: Any, target: str = "auto") -> Material:
    return Material(encoder, QUERIES, TARGETS[target])


def vectors_of(folder: Path) -> NDArray[np.float32]:
    live = onnxruntime.InferenceSession(str(folder / "encoder.onnx"), providers=["CPUExecutionProvider"])
    rows = [
        live.run(["query_vector"], {"input_ids": q[None], "attention_mask": np.ones_like(q)[None]}) for q in QUERIES
    ]
    return np.concatenate([row[0] for row in rows])


def integer_weights(folder: Path) -> list[NDArray[Any]]:
    graph = onnx.load(str(folder / "encoder.onnx")).graph
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    return [values[node.input[1]] for node in graph.node if node.op_type in PRODUCTS]


@pytest.mark.parametrize("supported", [True, False])
@pytest.mark.parametrize("name", ["layerless", "grouped"])
def test_either_way_says_the_same(
    name: str, supported: bool, traced: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The traced fp32 graph of the fixture is the witness of all four."""
    source = traced(name)
    if not supported:
        monkeypatch.setattr(gemma, "supports", lambda backbone: "it is strange")
    witness = vectors_of(source.folder)
    for variant, bound in (("cpu-fp32", 2e-5), ("cpu-int8", 0.1)):
        folder = tmp_path / variant
        folder.mkdir()
        written = VARIANTS[variant].write(material(source.encoder), folder)
        assert written.graph == ("authored" if supported else "traced")
        assert written.instruction_set == "any"
        assert (written.reason == "it is strange") is not supported
        assert sorted(path.name for path in folder.iterdir()) == ["encoder.onnx", "weights.bin"]
        difference = float(np.abs(vectors_of(folder) - witness).max())
        assert difference < bound
        assert (difference > 1e-4) is (variant == "cpu-int8")


@pytest.mark.parametrize(
    ("target", "supported", "needs", "signed", "largest"),
    [
        ("auto", True, "any", True, 64),
        ("avx2", True, "any", True, 64),
        ("avx512_vnni", True, "avx512_vnni", True, 127),
        ("arm64", True, "arm64", True, 127),
        ("auto", False, "any", True, 64),
        ("avx2", False, "any", False, 255),
        ("avx512_vnni", False, "avx512_vnni", True, 127),
        ("arm64", False, "arm64", True, 127),
    ],
)
def test_integers_by_target(
    target: str,
    supported: bool,
    needs: str,
    signed: bool,
    largest: int,
    traced: Callable[[str], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What says "any" can't saturate 16 bits: signed weights of 7 bits, or unsigned ones, which are summed wider."""
    source = traced("nano")
    if not supported:
        monkeypatch.setattr(gemma, "supports", lambda backbone: "it is strange")
        monkeypatch.setattr(variants.graphs, "export_encoder", lambda _, folder: source.folder / "encoder.onnx")
    written = variants.write_int8(material(source.encoder, target), tmp_path)
    assert written.instruction_set == needs
    weights = integer_weights(tmp_path)
    assert len(weights) == (5 if supported else 7) * source.encoder.spec.backbone.num_layers
    assert {weight.dtype for weight in weights} == {np.dtype(np.int8 if signed else np.uint8)}
    peak = max(int(np.abs(weight.astype(np.int32)).max()) for weight in weights)
    assert 0.9 * largest <= peak <= largest
    if needs == "any" and signed:
        assert 2 * 255 * peak < 2**15
    assert np.abs(vectors_of(tmp_path) - vectors_of(source.folder)).max() < 0.1


def test_finer_weights_come_closer(traced: Callable[[str], Any], tmp_path: Path) -> None:
    source = traced("nano")
    errors = []
    for target in ("auto", "avx512_vnni"):
        (tmp_path / target).mkdir()
        variants.write_int8(material(source.encoder, target), tmp_path / target)
        errors.append(np.square(vectors_of(tmp_path / target) - vectors_of(source.folder)).mean())
    assert errors[1] < errors[0]


def test_without_products_any_processor_will_do(traced: Callable[[str], Any], tmp_path: Path) -> None:
    encoder = traced("layerless").encoder
    written = variants.write_int8(Material(encoder, [], TARGETS["arm64"]), tmp_path)
    assert written.instruction_set == "any"
    assert "calibrated" not in written.reason
    assert not integer_weights(tmp_path)


def test_integers_that_can_not_be_verified_here_are_refused(
    traced: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "instruction_sets", lambda: frozenset({"avx2"}))
    encoder = traced("nano").encoder
    for target in ("avx512_vnni", "arm64"):
        with pytest.raises(ExportError, match=f"only with {target}, which this processor lacks"):
            variants.write_int8(material(encoder, target), tmp_path)
    assert not list(tmp_path.iterdir())


def test_each_target_is_right_where_it_says() -> None:
    for target in TARGETS.values():
        exact = target.instruction_set in session.EXACT_SUMS
        assert target.max_weight == (targets.EXACT_WEIGHT if exact else targets.MAX_WEIGHT)
    assert TARGETS["auto"].instruction_set == "any"
