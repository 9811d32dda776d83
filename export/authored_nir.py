"""NIR → ONNX, written node by node: every (query, candidate) pair in one graph, for both published shapes.

What model vectors alone decide stands apart from what a query decides: the runtime makes them a constant of the
graph (:mod:`arllm.runtime.constants`), and ONNX Runtime then computes their side once. Pairs are rows of one matrix,
so that each layer is a single product with its bias and Relu. Knows nothing about encoders, variants or bundles.

In the comments B = queries, M = candidates, H = a projection's width.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper
from torch import nn

from arllm.export import graphs
from arllm.export.builder import IR_VERSION, Builder
from arllm.export.gemma import as_array
from arllm.train.nir import InteractionNir, NcfNir, Nir

SHORTEST = 1e-8  # length of a projection in a cosine, as in torch.nn.functional.cosine_similarity


def export_nir(nir: Nir, folder: Path) -> Path:
    """Write ``nir.onnx`` into ``folder``, weights inside.

    Inputs ``query_vectors`` (batch, Q) and ``model_vectors`` (candidates, D) float32; output ``quality``,
    (batch, candidates) float32 in [0, 1].
    """
    path = folder / "nir.onnx"
    onnx.save_model(author_nir(nir), str(path))
    onnx.checker.check_model(str(path))
    return path


def author_nir(nir: Nir) -> onnx.ModelProto:
    """The graph itself. Raises ValueError: a network of another shape than the two."""
    b = Builder()
    if isinstance(nir, InteractionNir):
        logits = _interaction(b, nir)
    elif isinstance(nir, NcfNir):
        logits = _ncf(b, nir)
    else:
        raise ValueError(f"no graph is known for a {type(nir).__name__}")
    b("Sigmoid", logits, output="quality")
    info, real = helper.make_tensor_value_info, TensorProto.FLOAT
    graph = helper.make_graph(
        b.nodes,
        "nir",
        [
            info("query_vectors", real, ["batch", nir.query_width]),
            info("model_vectors", real, ["candidates", nir.model_width]),
        ],
        [info("quality", real, ["batch", "candidates"])],
        b.initializers,
    )
    opsets = [helper.make_opsetid("", graphs.OPSET)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="arllm")


def _interaction(b: Builder, nir: InteractionNir) -> str:
    """Logits, (B, M), of :meth:`InteractionNir.all_pairs`."""
    first, second, last = (layer for layer in nir.fc_layers if isinstance(layer, nn.Linear))
    q_proj = nir.q_proj[0]
    assert isinstance(q_proj, nn.Linear)
    width = q_proj.out_features  # H
    q = b("Relu", _linear(b, "query_vectors", q_proj, "q_proj"))  # (B, H)
    m = b("Relu", _linear(b, "model_vectors", nir.m_proj[0], "m_proj"))  # (M, H)
    length = b("Max", b("ReduceL2", m, b.shape(-1), keepdims=1), b.constant(SHORTEST, np.float32))
    # LpNormalization leaves a row of zeros as it is, so that the query's side needs no bound.
    cosine = b("MatMul", b("LpNormalization", q, axis=-1, p=2), b("Transpose", b("Div", m, length), perm=[1, 0]))
    each = b("Unsqueeze", q, b.shape(1))
    both = b(
        "Concat", b("Mul", each, m), b("Abs", b("Sub", each, m)), b("Unsqueeze", cosine, b.shape(2)), axis=-1
    )  # (B, M, 2 * H + 1)
    weight = as_array(first.weight)
    pairs = b("Reshape", both, b.shape(-1, 2 * width + 1))
    apart = b("Reshape", _apart(b, first, q, m, width), b.shape(-1, first.out_features))
    hidden = b("Relu", b("Gemm", pairs, b.weight("first.both", weight[:, 2 * width :]), apart, transB=1))
    return _last_layers(b, hidden, second, last)


def _ncf(b: Builder, nir: NcfNir) -> str:
    """Logits, (B, M), of :meth:`NcfNir.all_pairs`."""
    first, second = nir.fc_layers
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    last, width = nir.output_layer, nir.q_proj_mlp.out_features
    q = b("Relu", _linear(b, "query_vectors", nir.q_proj_mlp, "q_proj_mlp"))
    m = b("Relu", _linear(b, "model_vectors", nir.m_proj_mlp, "m_proj_mlp"))
    hidden = b("Relu", b("Reshape", _apart(b, first, q, m, width), b.shape(-1, first.out_features)))
    of_product = b.weight("last.product", as_array(last.weight)[:, second.out_features :])  # (1, H)
    of_query = b("Mul", _linear(b, "query_vectors", nir.q_proj_mf, "q_proj_mf"), of_product)
    of_model = b("Transpose", _linear(b, "model_vectors", nir.m_proj_mf, "m_proj_mf"), perm=[1, 0])
    return b("Add", _last_layers(b, hidden, second, last), b("MatMul", of_query, of_model))


def _apart(b: Builder, layer: nn.Linear, q: str, m: str, width: int) -> str:
    """What the first layer makes of q (B, H) and of m (M, H) themselves, (B, M, out)."""
    weight = as_array(layer.weight)
    of_q = b("Gemm", q, b.weight("first.q", weight[:, :width]), transB=1)
    of_m = b("Gemm", m, b.weight("first.m", weight[:, width : 2 * width]), _bias(b, layer, "first"), transB=1)
    return b("Add", b("Unsqueeze", of_q, b.shape(1)), of_m)


def _last_layers(b: Builder, hidden: str, second: nn.Linear, last: nn.Linear) -> str:
    """Hidden rows of pairs, (B * M, hidden) → (B, M); of the last layer's inputs those that are hidden rows."""
    hidden = b("Relu", _linear(b, hidden, second, "second"))
    weight = b.weight("last", as_array(last.weight)[:, : second.out_features])
    pairs = b("Gemm", hidden, weight, _bias(b, last, "last"), transB=1)
    candidates = b("Shape", "model_vectors", start=0, end=1)
    return b("Reshape", pairs, b("Concat", b.shape(-1), candidates, axis=0))


def _linear(b: Builder, rows: str, layer: nn.Module, name: str) -> str:
    assert isinstance(layer, nn.Linear)
    return b("Gemm", rows, b.weight(name, as_array(layer.weight)), _bias(b, layer, name), transB=1)


def _bias(b: Builder, layer: nn.Linear, name: str) -> str:
    return b.weight(f"{name}.bias", as_array(layer.bias))
