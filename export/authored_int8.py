"""The authored graph in int8: one activation scale per row, smoothed products, weights rounded against real rows.

Knows nothing about variants or bundles. A row's scale is its own largest magnitude, so that a token's result depends
on no neighbour in the batch and on no padding. Four measures keep what tells queries apart, at no cost when the graph
runs but a subtraction:

- smoothing (SmoothQuant, arXiv:2211.10438): channels that dwarf the others are divided by a factor that the weights
  take over. The factors fold into what stands before the product: a norm, the value columns, the up columns;
- weights are rounded one row after the other, each error made up for by the rows still to come (GPTQ,
  arXiv:2210.17323), on rows of real queries;
- the token table has a scale per row and one per column;
- most of what is left is the same for all queries (18 layers of Gemma-3-270M: tests/benchmarks/QUALITY.md): its mean
  over real queries is taken off (bias correction, arXiv:1906.04721).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from arllm.export import graphs
from arllm.export.authored import FloatProducts, author, author_views
from arllm.export.builder import MICROSOFT, Builder
from arllm.export.gemma import Layer, Network, Weights, read_network
from arllm.export.targets import MAX_WEIGHT
from arllm.train.encoder import QueryEncoder

TOP = 127  # largest magnitude of an activation's integer
ZERO = 128  # activations are unsigned: this stands for 0
SMALLEST = 1e-9  # below it a row counts as zeros

SAMPLED_ROWS = 4096  # of every product's input; fewer than its width leave GPTQ guessing
SEARCHED_ROWS = 768  # of them, for choosing smoothing factors
STRENGTHS = (0.0, 0.4, 0.5, 0.6, 0.7, 0.8)  # of smoothing, tried for every product; 0 is none
DAMPING = 0.01  # of GPTQ, as share of the mean curvature
BLOCK = 64  # rows that GPTQ rounds before it updates all later ones

Rows = dict[tuple[int, str], Weights]  # (layer, product) → sampled inputs of the product, (rows, in)


@dataclass(frozen=True)
class Integers:
    """A weight as weight ≈ values * scale."""

    values: NDArray[np.int8]  # (in, out)
    scale: Weights  # (out,)


def export_authored_int8(
    encoder: QueryEncoder,
    folder: Path,
    queries: Sequence[NDArray[np.int64]],
    *,
    max_weight: int = MAX_WEIGHT,
    positions: int | None = None,
) -> Path:
    """Write the int8 counterpart of :func:`arllm.export.authored.export_authored` into ``folder``.

    ``queries`` are tokenized real queries, (L,) int64 each, a hundred or more; an encoder without layers has no
    products and needs none. ``max_weight`` bounds the weights' integers: see :mod:`arllm.export.targets`.

    Raises:
        ValueError: the backbone can't be authored, or there are no queries.
    """
    network = read_network(encoder.backbone, positions or encoder.spec.tokens.max_tokens)
    if network.layers and not len(queries):
        raise ValueError("the int8 encoder is calibrated on queries; none were given")
    if not network.layers:
        return graphs.write(author(network, encoder, products=Int8Products({})), folder / "encoder.onnx")
    rows, exact = sample_rows(network, queries)
    network = smooth(network, rows, max_weight)
    weights = {key: round_weight(_weight(network, key), sample, max_weight) for key, sample in rows.items()}
    products = Int8Products(weights)
    shift = _pooled(network, queries, products).mean(axis=0) - exact.mean(axis=0)
    return graphs.write(author(network, encoder, products=products, shift=shift), folder / "encoder.onnx")


class Int8Products(FloatProducts):
    """Products of unsigned 8-bit rows and signed weights, the sums exact in 32 bits."""

    def __init__(self, weights: dict[tuple[int, str], Integers]) -> None:
        self.weights = weights

    def token_rows(self, b: Builder, ids: str, table: Weights) -> str:
        bare, _, row, column = self.token_parts(b, ids, table)
        rows = b("Mul", bare, b("Gather", b.weight("token_table.scale", row), ids))
        return b("Mul", rows, b.weight("token_table.column", column))

    def token_parts(self, b: Builder, ids: str, table: Weights) -> tuple[str, Weights, Weights, Weights]:
        column = np.maximum(np.abs(table).max(axis=0), SMALLEST).astype(np.float32)
        row = np.maximum(np.abs(table / column).max(axis=1, keepdims=True), SMALLEST).astype(np.float32) / TOP
        values = np.clip(np.rint(table / column / row), -TOP, TOP).astype(np.int8)
        bare = b("Cast", b("Gather", b.weight("token_table.int8", values), ids), to=TensorProto.FLOAT)
        return bare, values.astype(np.float32), row, column

    def qkv(self, b: Builder, rows: str, layer: Layer, widths: tuple[int, int, int]) -> list[str]:
        integers, step = _quantized(b, rows, len(layer.qkv))
        q, k, v = b.split(_by_query(b, self._integer_product(b, integers, layer, "qkv")), *widths)
        return [q, k, b("Mul", v, _by_query(b, step))]  # q and k are normed next, which undoes a row's factor

    def gate_up(self, b: Builder, rows: str, layer: Layer) -> list[str]:
        """Two products of the same integers, flat: here, unlike in float32, splitting one product costs more."""
        integers, step = _quantized(b, rows, len(layer.gate_up))
        half = layer.gate_up.shape[1] // 2
        gate = self._integer_product(b, integers, layer, "gate_up", slice(0, half))
        up = self._integer_product(b, integers, layer, "gate_up", slice(half, None))
        return [b("Mul", gate, step), up]

    def _product(self, b: Builder, rows: str, layer: Layer, name: str) -> str:
        integers, _ = _quantized(b, rows, len(getattr(layer, name)))
        return _by_query(b, self._integer_product(b, integers, layer, name))

    def _integer_product(
        self, b: Builder, integers: str, layer: Layer, name: str, columns: slice | None = None
    ) -> str:
        """integers @ weight, (B * S, out): each row is short of its step."""
        weight, part = self.weights[layer.index, name], columns or slice(None)
        label = f"layers.{layer.index}.{name}" + ("" if columns is None else f".{part.start}")
        values = b.weight(f"{label}.int8", weight.values[:, part])
        scale = b.weight(f"{label}.scale", weight.scale[part])
        step, zero = b.constant(1.0, np.float32), b.constant(ZERO, np.uint8)
        return b("MatMulIntegerToFloat", integers, values, step, scale, zero, domain=MICROSOFT)


def _quantized(b: Builder, rows: str, width: int) -> tuple[str, str]:
    """Integers of every row, (B * S, width), and the step between them, (B * S, 1).

    Flat, because only along the first axis does ONNX Runtime quantize by one step each without another pass.
    """
    flat = b("Reshape", rows, b.shape(-1, width))
    largest = b("ReduceMax", b("Abs", flat), b.shape(-1), keepdims=1)
    step = b("Max", b("Mul", largest, b.constant(1 / TOP, np.float32)), b.constant(SMALLEST, np.float32))
    return b(
        "QuantizeLinear", flat, b("Reshape", step, b.shape(-1)), b.once("zeros", lambda: _zeros(b)), axis=0
    ), step


def _zeros(b: Builder) -> str:
    """``ZERO`` for every row, (B * S,)"""
    rows = b("Reshape", b("Size", "input_ids"), b.shape(1))
    return b("ConstantOfShape", rows, value=numpy_helper.from_array(np.array([ZERO], np.uint8)))


def _by_query(b: Builder, flat: str) -> str:
    """(B * S, n) → (B, S, n)"""
    shape = b.once("shape", lambda: b("Concat", b("Shape", "input_ids"), b.shape(-1), axis=0))
    return b("Reshape", flat, shape)


# --- real rows ----------------------------------------------------------------------------------------------


class _Recording(FloatProducts):
    """Float products that note the names of their inputs."""

    def __init__(self) -> None:
        self.inputs: dict[tuple[int, str], str] = {}

    def _product(self, b: Builder, rows: str, layer: Layer, name: str) -> str:
        self.inputs[layer.index, name] = rows
        return super()._product(b, rows, layer, name)


def sample_rows(network: Network, queries: Sequence[NDArray[np.int64]]) -> tuple[Rows, Weights]:
    """What queries give in float32: inputs of every product, and ``pooled``, (N, width).

    Of the inputs a sample, the first and last token of each query among them.
    """
    used, flat = np.unique(np.concatenate(queries), return_inverse=True)
    remapped = np.split(flat, np.cumsum([len(query) for query in queries])[:-1])
    small = replace(network, table=network.table[used])  # a Gemma's whole table takes a gigabyte to write
    recording = _Recording()
    per_query = max(2, SAMPLED_ROWS // len(queries))
    rng = np.random.default_rng(0)
    found: list[list[Weights]] = []
    pooled = []
    for values in _each(small, remapped, recording, lambda: [*recording.inputs.values(), "pooled"]):
        count = values[0].shape[1]
        inside = rng.permutation(np.arange(1, max(1, count - 1)))[: per_query - 2]
        kept = np.unique([0, *inside, count - 1])
        found.append([value[0][kept] for value in values[:-1]])
        pooled.append(values[-1][0])
    joined = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return dict(zip(recording.inputs, joined, strict=True)), np.stack(pooled)


def _pooled(network: Network, queries: Sequence[NDArray[np.int64]], products: FloatProducts) -> Weights:
    """``pooled`` of queries, (N, width), from the whole table: the steps of its integers depend on all its rows."""
    return np.concatenate([values[0] for values in _each(network, queries, products, lambda: ["pooled"])])


def _each(
    network: Network,
    queries: Sequence[NDArray[np.int64]],
    products: FloatProducts,
    names: Callable[[], list[str]],
) -> Iterator[list[Weights]]:
    """The named values of every query, asked alone; ``names`` is called when the graph is written."""
    model = author_views(network, np.ones(len(network.table), np.float32), products)
    wanted = names()
    del model.graph.output[:]
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in wanted)
    with tempfile.TemporaryDirectory() as scratch:
        session = _session(model, Path(scratch))
        for ids in queries:
            yield session.run(wanted, {"input_ids": ids[None], "attention_mask": np.ones_like(ids)[None]})
        del session


def _session(model: onnx.ModelProto, folder: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    path = graphs.write(model, folder / "encoder.onnx")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


# --- smoothing ----------------------------------------------------------------------------------------------


def smooth(network: Network, rows: Rows, max_weight: int) -> Network:
    """The same network with magnitudes moved from activations into weights; ``rows`` follow in place."""
    layers = []
    for layer in network.layers:
        layer, factors = _smooth_layer(network, layer, rows, max_weight)
        layers.append(layer)
        for name, factor in factors.items():
            rows[layer.index, name] /= factor  # in place: they are the largest part of the memory
    return replace(network, layers=tuple(layers))


def _smooth_layer(network: Network, layer: Layer, rows: Rows, max_weight: int) -> tuple[Layer, dict[str, Weights]]:
    def factors(name: str, weight: Weights, shared: tuple[int, ...]) -> Weights:
        return _factors(rows[layer.index, name], weight, max_weight, shared)

    each = (1, 1, -1)
    groups, dim = network.kv_heads, network.head_dim
    # A value column feeds every head that shares it: one factor for all of them.
    out = factors("out", layer.out, (groups, network.heads // groups, dim))
    values = out.reshape(groups, -1, dim)[:, 0].reshape(-1)
    down = factors("down", layer.down, each)
    qkv = layer.qkv.copy()
    qkv[:, -groups * dim :] /= values
    gate_up = layer.gate_up.copy()
    gate_up[:, len(down) :] /= down
    first, second = factors("qkv", qkv, each), factors("gate_up", gate_up, each)
    smoothed = replace(
        layer,
        input_norm=layer.input_norm / first,
        qkv=qkv * first[:, None],
        out=layer.out * out[:, None],
        pre_feedforward_norm=layer.pre_feedforward_norm / second,
        gate_up=gate_up * second[:, None],
        down=layer.down * down[:, None],
    )
    return smoothed, {"qkv": first, "out": out, "gate_up": second, "down": down}


def _factors(rows: Weights, weight: Weights, max_weight: int, shared: tuple[int, ...]) -> Weights:
    """(in,) by which a product's inputs are divided: of the strengths tried, the one with the least error.

    ``shared`` reshapes the channels to three axes; along the second, all get one factor.
    """
    rows = rows[np.random.default_rng(0).permutation(len(rows))[:SEARCHED_ROWS]]
    largest = np.maximum(np.abs(rows).max(axis=0), SMALLEST)
    heaviest = np.maximum(np.abs(weight).max(axis=1), SMALLEST)
    exact = rows @ weight
    power = np.square(exact).sum(axis=1) + SMALLEST

    def error(factor: Weights) -> float:
        rounded = _nearest(weight * factor[:, None], max_weight)
        difference = _rounded_rows(rows / factor) @ (rounded.values * rounded.scale) - exact
        return float((np.square(difference).sum(axis=1) / power).mean())

    def factor(strength: float) -> Weights:
        if strength == 0.0:
            return np.ones(len(weight), np.float32)
        logarithm = strength * np.log(largest) - (1.0 - strength) * np.log(heaviest)
        apart = logarithm.reshape(shared)
        together = np.broadcast_to(apart.max(axis=1, keepdims=True), apart.shape)
        values: Weights = np.exp(together - together.mean()).reshape(-1).astype(np.float32)
        return values

    return min((factor(strength) for strength in STRENGTHS), key=error)


def _rounded_rows(rows: Weights) -> Weights:
    step = np.maximum(np.abs(rows).max(axis=1, keepdims=True), SMALLEST) / TOP
    values: Weights = np.rint(rows / step) * step
    return values


# --- rounding weights ---------------------------------------------------------------------------------------


def _weight(network: Network, key: tuple[int, str]) -> Weights:
    weight: Weights = getattr(network.layers[key[0]], key[1])
    return weight


def _scale(weight: Weights, max_weight: int) -> Weights:
    scale: Weights = np.maximum(np.abs(weight).max(axis=0), SMALLEST).astype(np.float32) / np.float32(max_weight)
    return scale


def _nearest(weight: Weights, max_weight: int) -> Integers:
    scale = _scale(weight, max_weight)
    return Integers(np.clip(np.rint(weight / scale), -max_weight, max_weight).astype(np.int8), scale)


def round_weight(weight: Weights, rows: Weights, max_weight: int) -> Integers:
    """Integers of a weight, (in, out), that keep ``rows @ weight`` rather than the weight itself.

    Every row counts by its relative error: the norms around the products undo its size.
    """
    size = np.sqrt(np.square(rows @ weight).mean(axis=1, keepdims=True)) + SMALLEST
    scaled = rows / size
    curvature = (scaled.T @ scaled).astype(np.float64)
    curvature += np.eye(len(weight)) * (DAMPING * np.trace(curvature) / len(weight) + SMALLEST)
    order = np.argsort(-np.diag(curvature))  # the channels that matter most are rounded while most can make up
    inverse = np.linalg.inv(curvature[np.ix_(order, order)])
    upper = np.linalg.cholesky(inverse).T.astype(np.float32)
    scale = _scale(weight, max_weight)
    left = weight[order].astype(np.float32)
    values = np.empty(weight.shape, np.int8)
    for start in range(0, len(left), BLOCK):
        stop = min(start + BLOCK, len(left))
        errors = np.empty((stop - start, left.shape[1]), np.float32)
        for i in range(start, stop):
            integers = np.clip(np.rint(left[i] / scale), -max_weight, max_weight)
            values[order[i]] = integers
            errors[i - start] = (left[i] - integers * scale) / upper[i, i]
            left[i + 1 : stop] -= np.outer(upper[i, i + 1 : stop], errors[i - start])
        left[stop:] -= upper[start:stop, stop:].T @ errors
    return Integers(values, scale)
