"""Tests of export/authored.py and export/gemma.py: the authored graph says what PyTorch and the traced graph say.

PyTorch answers each query alone and unpadded; the graph is asked in padded batches too.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from networks import TINY, VOCABULARY, by_pytorch, open_graph, queries, random_encoder, run
from torch import nn

from arllm.export import authored, gemma, graphs
from arllm.train.backbones import FULL, SLIDING, GemmaSpec, build_model
from arllm.train.encoder import QueryEncoder, pad_batch

TOLERANCE = 2e-5
WINDOWS = (256, 257, 258, 512, 513, 2048)
OUTPUTS = ("query_vector", "familiarity", "pooled")


def encoder_of(spec: GemmaSpec) -> QueryEncoder:
    """Random weights, with the standardization that a trained encoder would have."""
    encoder = random_encoder(spec, spec.num_layers + spec.num_kv_heads)
    with torch.no_grad():
        encoder.center.normal_(0.0, 0.2)
        encoder.scale.uniform_(0.5, 2.0)
    return encoder


def with_layers(count: int, spec: GemmaSpec = TINY) -> GemmaSpec:
    kinds = ((SLIDING, FULL, SLIDING) * 2)[:count]
    return dataclasses.replace(spec, num_layers=count, layer_types=kinds)


@pytest.fixture
def session_of(tmp_path: Path) -> Callable[[QueryEncoder], onnxruntime.InferenceSession]:
    """The views of an encoder, without heads."""

    def write(encoder: QueryEncoder) -> onnxruntime.InferenceSession:
        network = gemma.read_network(encoder.backbone, 2048)
        model = authored.author_views(network, encoder.token_weight.numpy())
        return open_graph(graphs.write(model, tmp_path / "encoder.onnx"))

    return write


def check(session: onnxruntime.InferenceSession, encoder: QueryEncoder, *batches: tuple[int, ...]) -> None:
    for lengths in batches:
        rows = queries(*lengths)
        (got,) = run(session, rows)
        np.testing.assert_allclose(got, by_pytorch(encoder, rows), rtol=0, atol=TOLERANCE, err_msg=f"at {lengths}")


BATCHES = ((1,), (5,), (6,), (7,), (31,), (9, 1), (40, 6, 7, 2), (3, 30))


@pytest.mark.parametrize("layers", [0, 1, 2, 3, 4, 5, 6])
def test_any_number_of_layers(layers: int, session_of: Any) -> None:
    encoder = encoder_of(with_layers(layers))
    check(session_of(encoder), encoder, *BATCHES)


@pytest.mark.parametrize(("heads", "shared"), [(1, 1), (2, 1), (4, 2), (4, 4), (6, 2), (3, 3)])
def test_any_number_of_heads_and_key_value_heads(heads: int, shared: int, session_of: Any) -> None:
    encoder = encoder_of(dataclasses.replace(TINY, num_heads=heads, num_kv_heads=shared))
    check(session_of(encoder), encoder, *BATCHES)


@pytest.mark.parametrize("shared", [1, 2])
def test_a_causal_backbone(shared: int, session_of: Any) -> None:
    spec = dataclasses.replace(TINY, num_kv_heads=shared)
    encoder = encoder_of(dataclasses.replace(spec, causal=True))
    check(session_of(encoder), encoder, *BATCHES)
    rows = queries(31)
    assert np.abs(by_pytorch(encoder, rows) - by_pytorch(encoder_of(spec), rows)).max() > 1e-2


@pytest.mark.parametrize("shared", [1, 2])
def test_the_window_at_its_edges(shared: int, session_of: Any) -> None:
    spec = dataclasses.replace(with_layers(2), num_heads=2, num_kv_heads=shared, window=257)
    encoder = encoder_of(spec)
    session = session_of(encoder)
    check(session, encoder, *[(length,) for length in WINDOWS], (513, 258, 257, 30))
    rows = queries(258)
    narrower = encoder_of(dataclasses.replace(spec, window=256))
    assert np.abs(by_pytorch(narrower, rows) - run(session, rows)[0]).max() > 2 * TOLERANCE  # one token shows


@pytest.mark.parametrize("window", [1, 2, 7])
def test_small_windows(window: int, session_of: Any) -> None:
    encoder = encoder_of(dataclasses.replace(TINY, window=window))
    check(session_of(encoder), encoder, *[(n,) for n in (1, 2, 3, 6, 7, 8, 13, 14, 15, 60)], (20, 3, 8))


def test_the_window_of_the_live_model_is_taken() -> None:
    """transformers halves it whenever a configuration is constructed; the model's own number counts."""
    assert gemma.read_network(build_model(TINY), 8).window == TINY.window
    again = copy.deepcopy(build_model(TINY))
    assert gemma.read_network(again, 8).window == TINY.window


@pytest.mark.parametrize("name", ["layerless", "nano", "gemma3-270m", "grouped"])
def test_the_traced_graph_is_the_witness(name: str, traced: Callable[[str], Any], tmp_path: Path) -> None:
    source = traced(name)
    witness = open_graph(source.folder / "encoder.onnx")
    session = open_graph(authored.export_authored(source.encoder, tmp_path, positions=700))
    for lengths in ((1,), (8,), (154,), (258,), (512,), (700, 33), (40, 9, 3, 1)):
        rows = queries(*lengths)
        for got, want, what in zip(run(session, rows, OUTPUTS), run(witness, rows, OUTPUTS), OUTPUTS, strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE, err_msg=f"{what} at lengths {lengths}")
    for side in ("get_inputs", "get_outputs"):
        described = [[(t.name, t.type, t.shape) for t in getattr(s, side)()] for s in (session, witness)]
        assert described[0] == described[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder.onnx", "weights.bin"]
    sizes = [(folder / "weights.bin").stat().st_size for folder in (tmp_path, source.folder)]
    spec = source.encoder.spec.backbone
    tables = 4 * 4 * 700 * spec.head_dim // 2 if spec.num_layers else 0
    assert sizes[0] - tables == pytest.approx(sizes[1], rel=0.02)  # each weight once


# --- padding ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [1, 4])
def test_what_stands_under_the_mask_is_not_read(shared: int, session_of: Any) -> None:
    session = session_of(encoder_of(dataclasses.replace(TINY, num_kv_heads=shared)))
    (long, short) = queries(30, 8)
    ids, mask = (tensor.numpy() for tensor in pad_batch([long, short], 0))
    before = session.run(None, {"input_ids": ids, "attention_mask": mask})
    ids[1, 8:] = np.random.default_rng(1).integers(3, VOCABULARY, size=22)
    after = session.run(None, {"input_ids": ids, "attention_mask": mask})
    for one, other in zip(before, after, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)
    mask[1, 8:] = 1
    assert np.abs(session.run(None, {"input_ids": ids, "attention_mask": mask})[0][1] - before[0][1]).max() > 1e-2


def test_padding_on_the_left_and_inside(session_of: Any) -> None:
    encoder = encoder_of(TINY)
    session = session_of(encoder)
    ids = torch.from_numpy(np.stack(queries(20, 20)))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    mask[1, 7:12] = 0
    with torch.inference_mode():
        want = torch.cat(encoder.views(ids, mask), dim=-1).numpy()
    (got,) = session.run(["views"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)


def test_a_query_without_any_token_is_finite(session_of: Any) -> None:
    session = session_of(encoder_of(TINY))
    ids = np.stack(queries(20, 20))
    mask = np.ones_like(ids)
    mask[0] = 0
    pooled, views = session.run(["pooled", "views"], {"input_ids": ids, "attention_mask": mask})
    assert not pooled[0].any()
    assert np.isfinite(views).all()


# --- the graph's shape --------------------------------------------------------------------------------------


def every_node(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from every_node(attribute.g)


def graph_of(spec: GemmaSpec) -> onnx.GraphProto:
    encoder = encoder_of(spec)
    return authored.author_views(gemma.read_network(encoder.backbone, 64), encoder.token_weight.numpy()).graph


def test_four_products_a_layer_and_no_transpose_with_one_key_value_head() -> None:
    graph = graph_of(TINY)
    weights = {tensor.name for tensor in graph.initializer}
    products = [n for n in graph.node if n.op_type == "MatMul" and n.input[1] in weights]
    assert len(products) == 4 * TINY.num_layers  # q with k and v, o, gate with up, down
    assert not any(node.op_type == "Transpose" for node in every_node(graph))


def test_the_mask_is_computed_only_where_it_hides_something() -> None:
    graph = graph_of(TINY)
    assert not any(node.op_type in ("Where", "Range") for node in graph.node)
    assert any(node.op_type == "Where" for node in every_node(graph))


def test_more_tokens_than_positions_are_refused(tmp_path: Path) -> None:
    session = open_graph(authored.export_authored(encoder_of(TINY), tmp_path, positions=12))
    run(session, queries(12), OUTPUTS)
    with pytest.raises(Exception, match="RotaryEmbedding"):
        run(session, queries(13), OUTPUTS)


# --- what can't be authored ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hidden_activation": "gelu"}, "activation is gelu"),
        ({"attention_bias": True}, "biases"),
        ({"attn_logit_softcapping": 50.0}, "soft-capped"),
        ({"num_key_value_heads": 3}, "4 heads of 8 can't share 3"),
        ({"layer_types": [SLIDING, "chunked_attention", FULL]}, "layers of type chunked_attention"),
    ],
)
def test_what_is_not_supported_is_said(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    encoder = encoder_of(TINY)
    assert gemma.supports(encoder.backbone) is None
    config: Any = encoder.backbone.config
    for key, value in change.items():
        setattr(config, key, value)
    assert reason in str(gemma.supports(encoder.backbone))
    with pytest.raises(ValueError, match=reason):
        authored.export_authored(encoder, tmp_path)
    assert not list(tmp_path.iterdir())


def test_rotary_frequencies_that_depend_on_the_length_are_not_supported() -> None:
    backbone: Any = build_model(TINY)
    rotary = backbone.rotary_emb
    rotary.rope_type = {FULL: "dynamic"} if isinstance(rotary.rope_type, dict) else "dynamic"
    assert "change with the length (dynamic)" in str(gemma.supports(backbone))


def test_another_network_is_not_supported() -> None:
    assert gemma.supports(nn.Linear(2, 2)) == "Linear is not a Gemma3TextModel"
