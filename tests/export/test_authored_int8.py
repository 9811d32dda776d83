"""Tests of export/authored_int8.py: closeness to fp32, integers that can't saturate, rows that share no scale.

Outliers are planted as a pretrained Gemma has them: a few channels, far larger than the others, in every token.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from arllm.export import authored, authored_int8, gemma, graphs, targets
from arllm.export.builder import Builder
from arllm.runtime.tokens import TokenSpec
from arllm.train.backbones import FULL, SLIDING, GemmaSpec
from arllm.train.encoder import EncoderSpec, QueryEncoder, pad_batch

VOCABULARY = 400
SPEC = GemmaSpec(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=128,
    num_layers=3,
    num_heads=4,
    num_kv_heads=1,
    head_dim=16,
    window=9,
    layer_types=(SLIDING, FULL, SLIDING),
    query_pre_attn_scalar=16,
)
GROUPED = dataclasses.replace(SPEC, num_kv_heads=2)
LIMITS = (targets.MAX_WEIGHT, targets.EXACT_WEIGHT)


def encoder_of(spec: GemmaSpec) -> QueryEncoder:
    torch.manual_seed(3)
    encoder = QueryEncoder(EncoderSpec(spec, TokenSpec(64, (1,), (2,), 0), ("a", "b", "c"), 5, {}, 16)).eval()
    with torch.no_grad():
        for key, parameter in encoder.backbone.named_parameters():
            if key.endswith(("input_layernorm.weight", "pre_feedforward_layernorm.weight")):
                parameter.normal_(0.0, 0.3)
                parameter[5] = 25.0
            elif "norm" in key:
                parameter.normal_(0.0, 0.3)
            elif key.endswith("proj.weight"):
                parameter.normal_(0.0, parameter.shape[1] ** -0.5)
            if key.endswith(("up_proj.weight", "v_proj.weight")):
                parameter[7] *= 12.0
    return encoder


def views_of(encoder: QueryEncoder, network: gemma.Network, products: Any = None) -> onnx.ModelProto:
    return authored.author_views(network, encoder.token_weight.numpy(), products)


def queries(count: int, seed: int) -> list[NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCABULARY, size=length) for length in rng.integers(1, 40, size=count)]


CALIBRATION, HELD_OUT = queries(120, 0), queries(60, 1)


def open_graph(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def pooled(session: onnxruntime.InferenceSession, rows: list[NDArray[np.int64]]) -> NDArray[np.float32]:
    """Each query alone."""
    answers = [
        session.run(["pooled"], {"input_ids": r[None], "attention_mask": np.ones_like(r)[None]})[0] for r in rows
    ]
    return np.concatenate(answers)


def centred_cosine(got: NDArray[Any], want: NDArray[Any]) -> float:
    a, b = got - want.mean(axis=0), want - want.mean(axis=0)
    return float(((a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).mean())


@dataclasses.dataclass(frozen=True)
class Pair:
    encoder: QueryEncoder
    folder: Path
    max_weight: int
    floating: onnxruntime.InferenceSession
    integer: onnxruntime.InferenceSession


@pytest.fixture(scope="module", params=[(SPEC, LIMITS[0]), (SPEC, LIMITS[1]), (GROUPED, LIMITS[0])])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """An encoder's authored graphs in float32 and int8."""
    spec, max_weight = request.param
    encoder = encoder_of(spec)
    folders = tmp_path_factory.mktemp("float"), tmp_path_factory.mktemp("int8")
    sessions = [
        open_graph(authored.export_authored(encoder, folders[0])),
        open_graph(authored_int8.export_authored_int8(encoder, folders[1], CALIBRATION, max_weight=max_weight)),
    ]
    return Pair(encoder, folders[1], max_weight, *sessions)


def test_what_tells_queries_apart_is_kept(pair: Pair) -> None:
    want, got = pooled(pair.floating, HELD_OUT), pooled(pair.integer, HELD_OUT)
    assert centred_cosine(got, want) > (0.996 if pair.max_weight == targets.EXACT_WEIGHT else 0.992)
    assert np.abs(got - want).max() > 0  # it is the quantized graph that ran


def test_smoothing_and_rounding_earn_their_place(pair: Pair) -> None:
    """Without them, the same graph on the same queries loses at least twice as much."""
    network = gemma.read_network(pair.encoder.backbone, 64)
    weights = {
        (layer.index, name): authored_int8._nearest(getattr(layer, name), pair.max_weight)
        for layer in network.layers
        for name in gemma.PRODUCTS
    }
    model = views_of(pair.encoder, network, authored_int8.Int8Products(weights))
    (pair.folder / "naive").mkdir()
    naive = open_graph(graphs.write(model, pair.folder / "naive" / "encoder.onnx"))
    want = pooled(pair.floating, HELD_OUT)
    lost = [1.0 - centred_cosine(pooled(session, HELD_OUT), want) for session in (pair.integer, naive)]
    assert lost[0] < 0.5 * lost[1]


def test_the_mean_error_of_calibration_is_taken_off(pair: Pair) -> None:
    """How much that is of a real Gemma's error on other queries: tests/benchmarks/int8_depths.py."""
    model = onnx.load(str(pair.folder / "encoder.onnx"))
    (shift,) = (numpy_helper.to_array(t) for t in model.graph.initializer if t.name == "shift")
    error = pooled(pair.integer, CALIBRATION) - pooled(pair.floating, CALIBRATION)
    assert np.abs(error.mean(axis=0)).max() < 0.05 * np.abs(shift).max()
    assert np.abs((error + shift).mean(axis=0)).max() > 0.9 * np.abs(shift).max()


def test_smoothing_alone_changes_nothing(pair: Pair, tmp_path: Path) -> None:
    network = gemma.read_network(pair.encoder.backbone, 64)
    rows, _ = authored_int8.sample_rows(network, CALIBRATION)
    moved = {key: values.copy() for key, values in rows.items()}
    smoothed = authored_int8.smooth(network, moved, pair.max_weight)
    session = open_graph(graphs.write(views_of(pair.encoder, smoothed), tmp_path / "encoder.onnx"))
    np.testing.assert_allclose(pooled(session, HELD_OUT), pooled(pair.floating, HELD_OUT), rtol=0, atol=5e-5)
    again, _ = authored_int8.sample_rows(smoothed, CALIBRATION)
    for key, values in moved.items():
        np.testing.assert_allclose(again[key], values, rtol=1e-3, atol=1e-4 * np.abs(values).max())
        flatness = [np.abs(r).max(axis=1) / np.sqrt(np.square(r).mean(axis=1)) for r in (values, rows[key])]
        assert np.median(flatness[0]) <= np.median(flatness[1]) * 1.001
    peaks = [np.median(np.abs(r).max(axis=1) / np.abs(r).mean(axis=1)) for r in (moved[0, "qkv"], rows[0, "qkv"])]
    assert peaks[0] < 0.5 * peaks[1]  # the planted channel


# --- batch invariance ---------------------------------------------------------------------------------------


def test_no_row_depends_on_its_neighbours(pair: Pair) -> None:
    """The same query alone, padded, and beside queries of other lengths and sizes.

    What is left is float32's rounding (attention over padded lengths sums in another order), which may move an
    activation across a rounding edge: by less than one step in a few entries.
    """
    rng = np.random.default_rng(5)
    for _ in range(10):
        batch = [HELD_OUT[i] for i in rng.permutation(len(HELD_OUT))[: rng.integers(2, 7)]]
        ids, mask = (tensor.numpy() for tensor in pad_batch(batch, 0))
        (together,) = pair.integer.run(["pooled"], {"input_ids": ids, "attention_mask": mask})
        alone = pooled(pair.integer, batch)
        quantized_away = np.abs(alone - pooled(pair.floating, batch)).mean()
        assert np.abs(together - alone).mean() < 0.1 * quantized_away


def test_threads_change_nothing(pair: Pair) -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    path = str(pair.folder / "encoder.onnx")
    other = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(pooled(other, HELD_OUT), pooled(pair.integer, HELD_OUT), rtol=0, atol=1e-6)


# --- integers -----------------------------------------------------------------------------------------------


def integer_weights(pair: Pair) -> list[NDArray[np.int8]]:
    graph = onnx.load(str(pair.folder / "encoder.onnx")).graph
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    return [values[node.input[1]] for node in graph.node if node.op_type == "MatMulIntegerToFloat"]


def test_every_product_with_a_weight_is_integer_and_in_its_bounds(pair: Pair) -> None:
    weights = integer_weights(pair)
    assert len(weights) == 5 * SPEC.num_layers  # q with k and v, o, gate, up, down
    for weight in weights:
        assert weight.dtype == np.int8
        assert np.abs(weight.astype(np.int32)).max() == pair.max_weight  # used to its bound, and not past it
    assert 2 * 255 * targets.MAX_WEIGHT < 2**15  # what x86 without VNNI adds in signed 16 bits


def test_the_token_table_is_close(pair: Pair) -> None:
    table = gemma.read_network(pair.encoder.backbone, 8).table
    table[:, 3] *= 40.0  # a channel that would take all the range of a row
    builder = Builder()
    output = authored_int8.Int8Products({}).token_rows(builder, "ids", table)
    graph = onnx.helper.make_graph(
        builder.nodes,
        "table",
        [onnx.helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["batch", "tokens"])],
        [onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None)],
        builder.initializers,
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (rows,) = session.run(None, {"ids": np.arange(VOCABULARY)[None]})
    column = np.abs(table).max(axis=0)
    assert (np.abs(rows[0] - table) <= 0.51 / 127 * column).all()
    assert not rows[0, 0].any()  # the padding row is zero, and stays so


def test_rounding_against_rows_beats_rounding_to_the_nearest() -> None:
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(12, 48)).astype(np.float32)  # correlated inputs: errors can make up for each other
    rows = (rng.normal(size=(500, 12)) @ mixed + 0.1 * rng.normal(size=(500, 48))).astype(np.float32)
    weight = rng.normal(size=(48, 20)).astype(np.float32)
    exact = rows @ weight
    errors = []
    for integers in (authored_int8.round_weight(weight, rows, 7), authored_int8._nearest(weight, 7)):
        assert np.abs(integers.values.astype(int)).max() <= 7
        errors.append(np.square(rows @ (integers.values * integers.scale) - exact).mean())
    assert errors[0] < 0.3 * errors[1]


def test_a_weight_that_no_row_reaches_is_rounded_to_the_nearest() -> None:
    weight = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    integers = authored_int8.round_weight(weight, np.zeros((5, 9), np.float32), 64)
    np.testing.assert_array_equal(integers.values, authored_int8._nearest(weight, 64).values)


def test_without_queries_there_is_nothing_to_calibrate_on(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="calibrated on queries"):
        authored_int8.export_authored_int8(encoder_of(SPEC), tmp_path, [])
    assert not list(tmp_path.iterdir())
