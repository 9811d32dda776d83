"""Tests of export/cuda.py and export/cuda_kernels.py: what the CPU can show of graphs that are made for CUDA.

Their parity in float32, the error of bfloat16 emulated, and that every node has a kernel of the provider.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from networks import TINY, by_pytorch, open_graph, queries, random_encoder, run
from onnx import TensorProto, helper, numpy_helper

from arllm.export import authored, cuda, gemma, graphs
from arllm.export.cuda_kernels import MICROSOFT, tensor_types, unsupported
from arllm.runtime.errors import ExportError
from arllm.train.backbones import FULL, SLIDING
from arllm.train.encoder import QueryEncoder

TOLERANCE = 2e-5
ROUNDING = 2.0**-8  # of bfloat16, relative
SHAPES = {
    "shared": TINY,
    "grouped": dataclasses.replace(
        TINY, num_layers=2, num_kv_heads=2, window=7, layer_types=(SLIDING, FULL), rope_factor=1.0
    ),
    "layerless": dataclasses.replace(TINY, num_layers=0, num_heads=1, window=7, layer_types=(), rope_factor=1.0),
}


def encoder_of(shape: str, *, causal: bool = False) -> QueryEncoder:
    encoder = random_encoder(dataclasses.replace(SHAPES[shape], causal=causal), len(shape), domains=("a", "b"))
    with torch.no_grad():
        encoder.pair_density.random_(0, 20)
        encoder.familiar.copy_(torch.tensor([6.0, 13.0]))
    return encoder


def views_of(encoder: QueryEncoder) -> onnx.ModelProto:
    """The graph without heads."""
    network = gemma.read_network(encoder.backbone, 2048)
    return authored.author_views(network, encoder.token_weight.numpy(), layers=cuda.DeviceLayers)


def opened(model: onnx.ModelProto, folder: Path) -> onnxruntime.InferenceSession:
    return open_graph(graphs.write(model, folder / "encoder.onnx"))


@pytest.fixture(scope="module")
def whole() -> Callable[[str], onnx.ModelProto]:
    """Precision → the whole graph of the grouped encoder, made once."""
    fp32 = cuda.author_cuda(encoder_of("grouped"), "fp32")
    bf16 = onnx.ModelProto()
    bf16.CopyFrom(fp32)
    cuda.lower(bf16)

    def give(precision: str) -> onnx.ModelProto:
        model = onnx.ModelProto()
        model.CopyFrom({"fp32": fp32, "bf16": bf16}[precision])
        return model

    return give


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", ["shared", "grouped", "layerless"])
def test_float32_says_what_pytorch_says(shape: str, causal: bool, tmp_path: Path) -> None:
    """Alone and padded, at the window's edges: masks are written anew here."""
    encoder = encoder_of(shape, causal=causal)
    session = opened(views_of(encoder), tmp_path)
    for lengths in ((1,), (5,), (6,), (7,), (8,), (14,), (60,), (40, 6, 7, 2), (3, 30)):
        rows = queries(*lengths)
        (got,) = run(session, rows)
        np.testing.assert_allclose(got, by_pytorch(encoder, rows), rtol=0, atol=TOLERANCE, err_msg=f"at {lengths}")


def test_the_heads_and_familiarity_say_what_pytorch_says(whole: Any, tmp_path: Path) -> None:
    encoder, rows = encoder_of("grouped"), queries(9, 30, 2)
    vector, familiarity = run(opened(whole("fp32"), tmp_path), rows, ("query_vector", "familiarity"))
    for i, row in enumerate(rows):
        ids = torch.from_numpy(row)[None]
        with torch.inference_mode():
            want = encoder(ids, torch.ones_like(ids)).query_vector[0].numpy()
            known = encoder.familiarity(ids, torch.ones_like(ids))[0].item()
        np.testing.assert_allclose(vector[i], want, rtol=0, atol=TOLERANCE)
        assert familiarity[i] == pytest.approx(known, abs=1e-6)
    assert len(set(familiarity.tolist())) == 3


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_node_has_a_kernel(precision: str, whole: Any) -> None:
    model = whole(precision)
    assert unsupported(model) == []
    assert {node.op_type for node in model.graph.node} & {"If", "Shape", "GatherND"} == set()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", ["shared", "grouped", "layerless"])
def test_every_node_of_any_shape_has_a_kernel(shape: str, causal: bool) -> None:
    model = views_of(encoder_of(shape, causal=causal))
    assert unsupported(model) == []
    cuda.lower(model)
    assert unsupported(model) == []


def test_products_are_bfloat16_and_the_residual_is_not(whole: Any) -> None:
    model = whole("bf16")
    types = tensor_types(model)
    nodes = list(model.graph.node)
    heads = nodes[[node.name for node in nodes].index("views") :]
    assert {"Softmax", "Clip"} <= {node.op_type for node in heads}
    layers = [node for node in model.graph.node if any(name.startswith("layers.") for name in node.input)]
    products = [node for node in layers if node.op_type == "MatMul"]
    norms = [node for node in layers if node.op_type == "SimplifiedLayerNormalization"]
    assert len(products) == 2 * 4
    assert len(norms) == 2 * 6
    for node in products:
        assert {types[name] for name in (*node.input, *node.output)} == {TensorProto.BFLOAT16}
    for node in norms:
        low = "q_norm" in node.input[1] or "k_norm" in node.input[1]
        assert types[node.output[0]] == (TensorProto.BFLOAT16 if low else TensorProto.FLOAT)
    assert all(types[name] != TensorProto.BFLOAT16 for node in heads for name in node.output)
    assert all(types[node.output[0]] == TensorProto.FLOAT for node in model.graph.node if node.op_type == "Add"
               and types[node.output[0]] != TensorProto.INT64)  # fmt: skip
    assert {types[name] for name in ("query_vector", "familiarity", "pooled")} == {TensorProto.FLOAT}


def test_bfloat16_weighs_half(whole: Any) -> None:
    def weights(model: onnx.ModelProto) -> int:
        return sum(
            len(t.raw_data) for t in model.graph.initializer if not t.name.startswith(("heads.", "pair_density"))
        )

    assert 0.5 < weights(whole("bf16")) / weights(whole("fp32")) < 0.6


@pytest.mark.parametrize("shape", ["shared", "grouped", "layerless"])
def test_the_error_of_bfloat16(shape: str, tmp_path: Path) -> None:
    """There, and no larger than roundings of its size through a few layers make it."""
    encoder, rows = encoder_of(shape), queries(40, 6, 7, 2)
    model = views_of(encoder)
    cuda.lower(model)
    cuda.emulate(model)
    assert {t.data_type for t in model.graph.initializer} <= {TensorProto.FLOAT, TensorProto.INT64}
    (got,) = run(opened(model, tmp_path), rows)
    want = by_pytorch(encoder, rows)
    error = np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)
    assert (error > ROUNDING / 100).all()
    assert (error < 4 * ROUNDING).all()


def test_rounding_is_pytorchs() -> None:
    rng = np.random.default_rng(0)
    ties = (np.arange(64, dtype=np.uint32) << 15 | 0x3F800000).view(np.float32)
    values = np.concatenate([rng.normal(0, 10.0 ** rng.integers(-9, 9, 500)), [0.0, -0.0], ties]).astype(np.float32)
    tensor = cuda._rounded(numpy_helper.from_array(values, "x"), "y")
    got = torch.frombuffer(bytearray(tensor.raw_data), dtype=torch.bfloat16)
    assert tensor.data_type == TensorProto.BFLOAT16
    assert torch.equal(got, torch.from_numpy(values).to(torch.bfloat16))


def model_of(*nodes: onnx.NodeProto, opset: int = 20, **inputs: int) -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(name, kind, [2, None]) for name, kind in inputs.items()]
    one = numpy_helper.from_array(np.array([1], np.int64), "one")
    graph = helper.make_graph(list(nodes), "g", values, [], [one])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT, 1)])


FLOAT, BF16, BOOL = TensorProto.FLOAT, TensorProto.BFLOAT16, TensorProto.BOOL
INT64, UINT8 = TensorProto.INT64, TensorProto.UINT8


@pytest.mark.parametrize(
    ("model", "wanted"),
    [
        (model_of(helper.make_node("BitwiseXor", ["x", "x"], ["y"]), x=INT64), "y (BitwiseXor): no such kernel"),
        (model_of(helper.make_node("GatherND", ["x", "i"], ["y"]), x=UINT8, i=INT64), "no kernel for uint8"),
        (model_of(helper.make_node("ReduceMean", ["x", "one"], ["y"]), x=BF16), "no kernel for bfloat16"),
        (model_of(helper.make_node("MatMul", ["x", "w"], ["y"]), x=FLOAT, w=BF16), "reads float and bfloat16"),
        (model_of(helper.make_node("Gather", ["x", "i"], ["y"]), x=FLOAT, i=FLOAT), "i is float, not an index"),
        (model_of(helper.make_node("And", ["c", "x"], ["y"]), c=BOOL, x=FLOAT), "x is float, not bool"),
        (model_of(helper.make_node("Reshape", ["x", "one"], ["y"]), x=FLOAT, opset=23), "kernel of opset 23"),
        (model_of(helper.make_node("Relu", ["z"], ["y"])), "the type of z is not known"),
    ],
)
def test_a_node_without_a_kernel_is_named_with_the_reason(model: onnx.ModelProto, wanted: str) -> None:
    (problem,) = unsupported(model)
    assert wanted in problem


def test_arithmetic_on_shapes_is_named() -> None:
    """And what reads its result from host memory anyway is not."""
    shape = helper.make_node("Shape", ["x"], ["s"])
    sums = [helper.make_node("Add", ["s", "one"], ["t"]), helper.make_node("Mul", ["t", "t"], ["u"])]
    used = helper.make_node("Reshape", ["x", "u"], ["y"])
    assert unsupported(model_of(shape, helper.make_node("Reshape", ["x", "s"], ["y"]), x=FLOAT)) == []
    problems = unsupported(model_of(shape, *sums, used, x=FLOAT))
    assert [problem.partition(":")[0] for problem in problems] == ["t (Add)", "u (Mul)"]
    assert all("moves it to the CPU" in problem for problem in problems)


def test_the_first_cause_alone_is_named() -> None:
    model = model_of(helper.make_node("If", ["x"], ["a"]), helper.make_node("Relu", ["a"], ["y"]), x=TensorProto.BOOL)
    assert unsupported(model) == ["a (If): no such kernel is known"]


def test_a_written_folder_is_the_graph(whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "author_cuda", lambda encoder, precision: whole(precision))
    path = cuda.export_cuda(encoder_of("grouped"), tmp_path, "bf16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["encoder.onnx", "weights.bin"]
    assert unsupported(onnx.load(str(path))) == []


def test_a_graph_with_a_node_that_cuda_lacks_is_refused(
    whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = whole("fp32")
    model.graph.node.append(helper.make_node("BitwiseXor", ["input_ids", "input_ids"], ["z"], name="hash"))
    monkeypatch.setattr(cuda, "author_cuda", lambda encoder, precision: model)
    with pytest.raises(ExportError, match=r"1 nodes have no place .* hash \(BitwiseXor\): no such kernel"):
        cuda.export_cuda(encoder_of("grouped"), tmp_path, "fp32")
    assert not list(tmp_path.iterdir())


def test_an_unknown_backbone_or_precision_is_refused(tmp_path: Path) -> None:
    encoder = encoder_of("shared")
    with pytest.raises(ValueError, match="precision must be fp32 or bf16, not 'fp16'"):
        cuda.author_cuda(encoder, "fp16")
    backbone: Any = encoder.backbone
    backbone.config.attn_logit_softcapping = 50.0
    with pytest.raises(ExportError, match="no CUDA variant of this backbone: its attention is soft-capped"):
        cuda.export_cuda(encoder, tmp_path, "fp32")
    assert not list(tmp_path.iterdir())
