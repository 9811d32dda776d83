"""Tests of export/quantize.py: 7-bit weights that can't saturate, what is integer and what is not, and closeness."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from arllm.export import quantize, targets
from arllm.train.encoder import PAIRS

Graph = tuple[onnx.GraphProto, dict[str, NDArray[Any]]]


@pytest.fixture(scope="module", params=["nano", "grouped"])
def pair(
    request: pytest.FixtureRequest, traced: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Path]:
    """A traced fp32 encoder and the folder of its int8 counterpart."""
    source = traced(request.param)
    folder = tmp_path_factory.mktemp("int8")
    quantize.quantize_encoder(source.folder / "encoder.onnx", folder)
    return source, folder


def read(folder: Path) -> Graph:
    graph = onnx.load(str(folder / "encoder.onnx")).graph
    return graph, {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


def producers(graph: onnx.GraphProto, names: tuple[str, ...]) -> list[onnx.NodeProto]:
    return [node for node in graph.node if node.op_type in names]


def test_no_integer_weight_can_saturate_16_bits(pair: tuple[Any, Path]) -> None:
    """x86 without VNNI adds two products of an unsigned 8-bit activation and a weight in signed 16 bits.

    With weights in [-64, 64] that is at most 2 * 255 * 64 = 32,640 < 2**15; with [-127, 127] it would saturate, and
    the same bundle would decide otherwise on an older processor.
    """
    assert 2 * 255 * targets.MAX_WEIGHT < 2**15
    graph, values = read(pair[1])
    weights = [values[node.input[1]] for node in producers(graph, ("MatMulInteger", "DynamicQuantizeMatMul"))]
    assert weights
    for weight in weights:
        assert weight.dtype == np.int8
        assert np.abs(weight.astype(np.int32)).max() <= targets.MAX_WEIGHT
        assert np.abs(weight.astype(np.int32)).max() > 32  # the 7 bits are used
    zero_points = [values[node.input[3]] for node in producers(graph, ("MatMulInteger",)) if len(node.input) > 3]
    assert all(not zero_point.any() for zero_point in zero_points)


def test_every_product_with_a_weight_inside_the_layers_is_integer(pair: tuple[Any, Path]) -> None:
    source, folder = pair
    graph, values = read(folder)
    layers = source.encoder.spec.backbone.num_layers
    integer = producers(graph, ("MatMulInteger", "DynamicQuantizeMatMul"))
    assert len(integer) == 7 * layers  # q, k, v, o, gate, up, down
    shapes = sorted(values[node.input[1]].shape for node in integer)
    linear = [m.weight.T.shape for n, m in source.encoder.backbone.named_modules() if n.endswith("_proj")]
    assert shapes == sorted(tuple(shape) for shape in linear)
    floating = [
        values[name] for node in producers(graph, ("MatMul", "Gemm")) for name in node.input if name in values
    ]
    heads = [
        source.encoder.body[1],
        source.encoder.domain_head,
        source.encoder.difficulty_head,
        source.encoder.embedding_head,
    ]
    # attention and rotary tables beside, which are no matrices of weights
    assert sorted(v.shape for v in floating if v.ndim == 2) == sorted(tuple(head.weight.T.shape) for head in heads)


def test_the_heads_stay_floating(pair: tuple[Any, Path]) -> None:
    source, folder = pair
    _, values = read(folder)
    for name in ("body.1", "domain_head", "difficulty_head", "embedding_head"):
        weight = source.encoder.get_submodule(name).weight.detach().numpy()
        same = [v for v in values.values() if v.dtype == np.float32 and v.shape in (weight.shape, weight.T.shape)]
        assert any(np.array_equal(v, weight) or np.array_equal(v, weight.T) for v in same), name


def test_the_token_table_is_int8_rows(pair: tuple[Any, Path]) -> None:
    source, folder = pair
    _, values = read(folder)
    table = source.encoder.backbone.embed_tokens.weight.detach().numpy()
    (rows,) = [v for v in values.values() if v.dtype == np.int8 and v.shape == table.shape]
    (scale,) = [v for n, v in values.items() if n.endswith("_scale") and v.shape == (len(table), 1)]
    assert not any(v.dtype == np.float32 and v.shape == table.shape for v in values.values())
    assert np.abs(rows.astype(np.int32)).max() == 127
    assert (np.abs(rows * scale - table) <= 0.5001 * scale).all()
    assert not (rows[0] * scale[0]).any()  # the padding row is zero, and stays so


def test_the_output_is_close_to_fp32(pair: tuple[Any, Path]) -> None:
    source, folder = pair
    rng = np.random.default_rng(0)
    rows = [rng.integers(3, 300, size=length) for length in rng.integers(2, 90, size=30)]
    outputs = []
    for place in (source.folder, folder):
        live = onnxruntime.InferenceSession(str(place / "encoder.onnx"), providers=["CPUExecutionProvider"])
        answers = [live.run(None, {"input_ids": r[None], "attention_mask": np.ones_like(r)[None]}) for r in rows]
        outputs.append([np.concatenate(parts) for parts in zip(*answers, strict=True)])
    (vectors, familiarity, pooled), (vectors8, familiarity8, pooled8) = outputs
    np.testing.assert_array_equal(familiarity8, familiarity)  # whole numbers, counted alike
    assert familiarity.std() > 0.05
    assert np.abs(vectors8 - vectors).max() < 0.1
    centred, centred8 = pooled - pooled.mean(0), pooled8 - pooled.mean(0)
    cosine = (centred * centred8).sum(1) / np.linalg.norm(centred, axis=1) / np.linalg.norm(centred8, axis=1)
    assert cosine.mean() > 0.97
    assert np.abs(pooled8 - pooled).max() > 0  # it is the quantized graph that ran


def test_the_files(pair: tuple[Any, Path]) -> None:
    source, folder = pair
    assert sorted(path.name for path in folder.iterdir()) == ["encoder.onnx", "weights.bin"]
    small, large = ((place / "weights.bin").stat().st_size - PAIRS for place in (folder, source.folder))
    assert small < 0.4 * large  # the bytes of the pairs of tokens aside, which are the same
    before = onnx.load(str(source.folder / "encoder.onnx"), load_external_data=False).graph
    after = onnx.load(str(folder / "encoder.onnx"), load_external_data=False).graph
    assert [v.SerializeToString() for v in after.input] == [v.SerializeToString() for v in before.input]
    assert [v.name for v in after.output] == [v.name for v in before.output]


def test_an_encoder_without_layers_has_only_its_table_rounded(traced: Callable[[str], Any], tmp_path: Path) -> None:
    source = traced("layerless")
    quantize.quantize_encoder(source.folder / "encoder.onnx", tmp_path)
    graph, values = read(tmp_path)
    assert not producers(graph, ("MatMulInteger", "DynamicQuantizeMatMul", "DynamicQuantizeLinear"))
    table = source.encoder.backbone.embed_tokens.weight.detach().numpy()
    assert [v.shape for v in values.values() if v.dtype == np.int8] == [table.shape]
    ids = np.random.default_rng(0).integers(3, 300, size=(1, 40))
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    outputs = []
    for place in (source.folder, tmp_path):
        live = onnxruntime.InferenceSession(str(place / "encoder.onnx"), providers=["CPUExecutionProvider"])
        outputs.append(live.run(["query_vector", "familiarity"], feed))
    (vector, familiarity), (vector8, familiarity8) = outputs
    assert 0 < np.abs(vector8 - vector).max() < 0.02
    np.testing.assert_array_equal(familiarity8, familiarity)


def test_a_graph_without_a_token_table_is_refused() -> None:
    model = onnx.ModelProto()
    model.graph.initializer.append(numpy_helper.from_array(np.ones((2, 2), np.float32), "table"))
    assert model.graph.initializer[0].data_type == TensorProto.FLOAT
    with pytest.raises(ValueError, match="found 0"):
        quantize._quantize_token_table(model)
