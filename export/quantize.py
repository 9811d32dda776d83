"""Traced fp32 graph → int8 graph: dynamic int8 products by optimum's presets, and a per-row int8 token table.

The way of backbones that can't be authored; the others' int8 is :mod:`arllm.export.authored_int8`.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from arllm.export.graphs import save
from arllm.export.targets import TARGETS, Target


def quantize_encoder(source: Path, folder: Path, target: Target = TARGETS["auto"]) -> Path:
    """Write the int8 counterpart of an encoder graph into ``folder``."""
    products = _layer_products(onnx.load(str(source), load_external_data=False).graph)
    model = _quantize_products(source, products, target) if products else onnx.load(str(source))
    _quantize_token_table(model)
    del model.graph.value_info[:]
    return save(model, folder / "encoder.onnx")


def _quantize_products(source: Path, products: list[str], target: Target) -> onnx.ModelProto:
    """The graph with the named products in dynamic int8, by optimum."""
    from optimum.onnxruntime import AutoQuantizationConfig, ORTQuantizer

    config = getattr(AutoQuantizationConfig, target.preset)(
        is_static=False,
        per_channel=True,
        operators_to_quantize=["MatMul"],
        nodes_to_quantize=products,
    )
    config.reduce_range = target.reduce_range
    logging.getLogger("optimum").setLevel(logging.ERROR)  # it misses a transformers config that nobody needs here
    with tempfile.TemporaryDirectory() as scratch:
        quantizer = ORTQuantizer.from_pretrained(source.parent, file_name=source.name)
        quantizer.quantize(config, save_dir=scratch, file_suffix="", use_external_data_format=True)
        return onnx.load(str(Path(scratch) / source.name))


def _layer_products(graph: onnx.GraphProto) -> list[str]:
    """Names of the products with a weight inside the layers; none where there is no layer.

    Products of two activations (attention) and the heads stay fp32: the first have no weight to save, the
    others work on one pooled row, cost nothing and decide everything. The heads are traced as Gemm.
    """
    weights = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2}
    return [node.name for node in graph.node if node.op_type == "MatMul" and node.input[1] in weights]


def _quantize_token_table(model: onnx.ModelProto) -> None:
    """Replace ``Gather(table, ids)`` by int8 rows, each with a float32 scale: x ≈ row * scale."""
    graph = model.graph
    tables = {t.name: t for t in graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) == 2}
    lookups = [node for node in graph.node if node.op_type == "Gather" and node.input[0] in tables]
    if len(lookups) != 1:
        raise ValueError(f"expected one lookup of a token table, found {len(lookups)}")
    node = lookups[0]
    name, ids, output = node.input[0], node.input[1], node.output[0]
    table = numpy_helper.to_array(tables[name])
    scale = np.maximum(np.abs(table).max(axis=1, keepdims=True), 1e-12).astype(np.float32) / 127.0
    rows = np.clip(np.rint(table / scale), -127, 127).astype(np.int8)
    graph.initializer.remove(tables[name])
    graph.initializer.append(numpy_helper.from_array(rows, f"{name}_int8"))
    graph.initializer.append(numpy_helper.from_array(scale, f"{name}_scale"))
    replacement = [
        helper.make_node("Gather", [f"{name}_int8", ids], [f"{output}_int8"]),
        helper.make_node("Cast", [f"{output}_int8"], [f"{output}_float"], to=TensorProto.FLOAT),
        helper.make_node("Gather", [f"{name}_scale", ids], [f"{output}_scale"]),
        helper.make_node("Mul", [f"{output}_float", f"{output}_scale"], [output]),
    ]
    position = list(graph.node).index(node)
    graph.node.remove(node)
    for offset, new in enumerate(replacement):
        graph.node.insert(position + offset, new)
