"""Gemma3 encoder → ONNX, written node by node: merged products, fused norms, shared key/value heads without copies.

The backbone and both views of a query stand here; what follows them is :mod:`arllm.export.authored_heads`. Knows
nothing about variants, parity or bundles, and of int8 no more than that a product may be written otherwise: see
:mod:`arllm.export.authored_int8`. The traced export of :mod:`arllm.export.graphs` is the independent witness of this
graph, and the way for backbones unknown here.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from arllm.export import authored_heads, graphs
from arllm.export.builder import IR_VERSION, MICROSOFT, Builder
from arllm.export.gemma import Layer, Network, Weights, read_network
from arllm.train.encoder import QueryEncoder

LONGEST_SUM = 128
TINY = 1e-12  # added to a mean square: the square of what QueryEncoder holds a norm above
MASKED = -1e9  # finite: a row that sees no token must not become NaN, which pooling can't mask


def export_authored(encoder: QueryEncoder, folder: Path, *, positions: int | None = None) -> Path:
    """Write ``encoder.onnx`` and its weights into ``folder``, with the names of :func:`graphs.export_encoder`.

    Queries of more than ``positions`` tokens (by default the encoder's budget) are refused by ONNX Runtime: the
    rotary tables end there.

    Raises:
        ValueError: the backbone can't be authored; :func:`supports` says why.
    """
    network = read_network(encoder.backbone, positions or encoder.spec.tokens.max_tokens)
    return graphs.write(author(network, encoder), folder / "encoder.onnx")


class FloatProducts:
    """How products with weights and the lookup of token rows are written: here in float32.

    After ``out`` and ``down`` a norm follows that undoes any factor per row, and ``up`` reaches one through ``down``:
    a subclass may leave out such a factor there.
    """

    def token_rows(self, b: Builder, ids: str, table: Weights) -> str:
        """(B, S) ids → (B, S, width)"""
        return b("Gather", b.weight("token_table", table), ids)

    def token_parts(self, b: Builder, ids: str, table: Weights) -> tuple[str, Weights, Weights, Weights]:
        """The same short of factors: ``bare[id] * row[id] * column`` is a token's row.

        Returns bare[ids], (B, S, width), then bare (vocabulary, width), row (vocabulary, 1) and column (width,).
        """
        ones = np.ones((len(table), 1), np.float32)
        return self.token_rows(b, ids, table), table, ones, np.ones(table.shape[1], np.float32)

    def qkv(self, b: Builder, rows: str, layer: Layer, widths: tuple[int, int, int]) -> list[str]:
        """Queries, keys and values of normed rows, each (B, S, its width)."""
        return b.split(self._product(b, rows, layer, "qkv"), *widths)

    def gate_up(self, b: Builder, rows: str, layer: Layer) -> list[str]:
        """Gate and up of normed rows, (B, S, intermediate) each."""
        half = layer.gate_up.shape[1] // 2
        return b.split(self._product(b, rows, layer, "gate_up"), half, half)

    def out(self, b: Builder, rows: str, layer: Layer) -> str:
        return self._product(b, rows, layer, "out")

    def down(self, b: Builder, rows: str, layer: Layer) -> str:
        return self._product(b, rows, layer, "down")

    def _product(self, b: Builder, rows: str, layer: Layer, name: str) -> str:
        return b("MatMul", rows, b.weight(f"layers.{layer.index}.{name}", getattr(layer, name)))


def author(
    network: Network,
    encoder: QueryEncoder,
    *,
    products: FloatProducts | None = None,
    layers: type[Layers] | None = None,
    shift: Weights | None = None,
) -> onnx.ModelProto:
    """The graph of an encoder: ``input_ids``, ``attention_mask`` → ``query_vector``, ``familiarity``, ``pooled``.

    ``products`` write what has weights, by default in float32; ``layers`` the rest. ``shift``, (width,), is taken off
    ``pooled``.
    """
    b = Builder()
    visible = _write_views(b, network, encoder.token_weight.detach().cpu().numpy(), products, layers, shift)
    authored_heads.write_heads(b, encoder, "views")
    authored_heads.write_familiarity(b, encoder, visible)
    width = encoder.spec.query_width
    return _model(b, {"query_vector": (width,), "familiarity": (), "pooled": (network.width,)})


def author_views(
    network: Network,
    token_weight: Weights,
    products: FloatProducts | None = None,
    layers: type[Layers] | None = None,
) -> onnx.ModelProto:
    """The graph without heads: ids and mask → ``pooled``, (batch, width), and ``views``, (batch, 2 * width)."""
    b = Builder()
    _write_views(b, network, token_weight, products, layers)
    return _model(b, {"pooled": (network.width,), "views": (2 * network.width,)})


def _model(b: Builder, outputs: dict[str, tuple[int, ...]]) -> onnx.ModelProto:
    """Ids and mask → the outputs, each (batch, …) float32."""
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        b.nodes,
        "encoder",
        [info(name, TensorProto.INT64, ["batch", "tokens"]) for name in ("input_ids", "attention_mask")],
        [info(name, TensorProto.FLOAT, ["batch", *dims]) for name, dims in outputs.items()],
        b.initializers,
    )
    opsets = [helper.make_opsetid("", graphs.OPSET), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="arllm")


def _write_views(
    b: Builder,
    network: Network,
    token_weight: Weights,
    products: FloatProducts | None,
    layers: type[Layers] | None,
    shift: Weights | None = None,
) -> str:
    """``pooled`` and ``views``, as :meth:`QueryEncoder.views` defines them; returns the mask in float32, (B, S)."""
    products = products or FloatProducts()
    visible = b("Cast", "attention_mask", to=TensorProto.FLOAT)  # (B, S)
    if network.layers:
        rows = products.token_rows(b, "input_ids", network.table)  # (B, S, width)
        hidden = (layers or Layers)(b, network, visible, products).write(rows)
        summed, weighted = _sums(b, rows, hidden, visible, token_weight)
    else:
        summed, weighted = _sums_without_layers(b, network, visible, token_weight, products)
    count = b("ReduceSum", visible, b.shape(-1), keepdims=1)  # (B, 1)
    divisor = b("Max", count, b.constant(1.0, np.float32))
    if shift is None:
        pooled = b("Div", summed, divisor, output="pooled")
    else:
        pooled = b("Sub", b("Div", summed, divisor), b.weight("shift", shift), output="pooled")
    flat = b.weight("flat_norm", np.ones(network.width, np.float32))
    lexical = b("SimplifiedLayerNormalization", weighted, flat, axis=-1, epsilon=TINY)
    b("Concat", pooled, lexical, axis=-1, output="views")
    return visible


def _sums(b: Builder, rows: str, hidden: str, visible: str, token_weight: Weights) -> tuple[str, str]:
    """The tokens' last hidden states, summed, and the weighted sum of their rows, (B, width) each."""
    weight = b("Mul", b("Gather", b.weight("token_weight", token_weight), "input_ids"), visible)
    # Both rows for either product: a single one takes another kernel, whose sums depend on the padding.
    both = b("Concat", b("Unsqueeze", visible, b.shape(1)), b("Unsqueeze", weight, b.shape(1)), axis=1)  # (B, 2, S)
    first, second = b.constant(0, np.int64), b.constant(1, np.int64)
    return b("Gather", b("MatMul", both, hidden), first, axis=1), b("Gather", b("MatMul", both, rows), second, axis=1)


def _sums_without_layers(
    b: Builder, network: Network, visible: str, token_weight: Weights, products: FloatProducts
) -> tuple[str, str]:
    """:func:`_sums` of a network without layers.

    There a token's hidden state is its own row, normed: both sums are of the same rows, each with a weight per token
    and a factor per column, and nothing is done row by row.
    """
    bare, values, row, column = products.token_parts(b, "input_ids", network.table)
    square = np.square(values * column, dtype=np.float32).mean(axis=1, keepdims=True) * np.square(row)
    weights = np.concatenate([row / np.sqrt(square + np.float32(network.eps)), row * token_weight[:, None]], axis=1)
    each = b("Gather", b.weight("token_weights", weights), "input_ids")  # (B, S, 2)
    shown = b("Mul", each, b("Unsqueeze", visible, b.shape(2)))
    sums = b("FusedMatMul", shown, bare, domain=MICROSOFT, transA=1)  # (B, 2, width)
    sums = b("Mul", sums, b.weight("columns", np.stack([network.final_norm * column, column])))
    first, second = b.constant(0, np.int64), b.constant(1, np.int64)
    return b("Gather", sums, first, axis=1), b("Gather", sums, second, axis=1)


class Layers:
    """Writes the layers of one network. In the comments H = heads, G = key/value heads, D = head_dim."""

    def __init__(self, b: Builder, network: Network, visible: str, products: FloatProducts) -> None:
        self.b, self.network, self.visible, self.products = b, network, visible, products
        self.rotary = {
            sliding: [
                b.weight(f"rotary.{'local' if sliding else 'global'}.{n}", t)
                for n, t in zip(("cos", "sin"), p, strict=True)
            ]
            for sliding, p in network.rotary.items()
        }
        self.plain: dict[bool, str] = {}  # sliding? → every token sees every token
        self.bias = {sliding: self._mask(sliding) for sliding in network.rotary}

    def write(self, rows: str) -> str:
        """Token rows (B, S, width) → the normed last hidden states (B, S, width)."""
        hidden = rows
        for layer in self.network.layers:
            scope = f"layers.{layer.index}"
            attended = self._attention(layer, self._norm(hidden, f"{scope}.input_norm", layer.input_norm))
            attended = self._norm(attended, f"{scope}.post_attention_norm", layer.post_attention_norm)
            hidden = self.b("Add", hidden, attended)
            normed = self._norm(hidden, f"{scope}.pre_feedforward_norm", layer.pre_feedforward_norm)
            fed = self._norm(
                self._feedforward(layer, normed), f"{scope}.post_feedforward_norm", layer.post_feedforward_norm
            )
            hidden = self.b("Add", hidden, fed)
        return self._norm(hidden, "final_norm", self.network.final_norm)

    def _norm(self, value: str, name: str, weight: Weights) -> str:
        scale = self.b.weight(name, weight)
        return self.b("SimplifiedLayerNormalization", value, scale, axis=-1, epsilon=self.network.eps)

    def _feedforward(self, layer: Layer, normed: str) -> str:
        b = self.b
        gate, up = self.products.gate_up(b, normed, layer)
        return self.products.down(b, b("Mul", b("Gelu", gate, approximate="tanh"), up), layer)

    def _attention(self, layer: Layer, normed: str) -> str:
        """Grouped heads side by side: the group's queries stand below each other and share one product.

        With one key/value head that is a mere reshape, (B, S, H * D) → (B, S * H, D); with several, queries, keys
        and values are transposed to (B, G, ...) first.
        """
        b, net = self.b, self.network
        groups, dim = net.kv_heads, net.head_dim
        q, k, v = self.products.qkv(b, normed, layer, (net.heads * dim, groups * dim, groups * dim))
        q = self._positioned(layer, "q_norm", q, net.heads)
        k = self._positioned(layer, "k_norm", k, groups)
        if groups == 1:
            q = b("Reshape", q, b.shape(0, -1, dim))  # (B, S * H, D)
        else:
            q = b("Reshape", self._by_group(q), b.shape(0, groups, -1, dim))  # (B, G, S * H / G, D)
            k, v = self._by_group(k), self._by_group(v)  # (B, G, S, D)
        mixed = b("MatMul", self._weights(layer, q, k), v)
        if groups > 1:
            mixed = b("Reshape", mixed, b.shape(0, groups, -1, net.heads // groups * dim))
            mixed = b("Transpose", mixed, perm=[0, 2, 1, 3])
        return self.products.out(b, b("Reshape", mixed, b.shape(0, -1, net.heads * dim)), layer)

    def _positioned(self, layer: Layer, name: str, value: str, heads: int) -> str:
        """Normed per head and turned by position, (B, S, heads * D)."""
        b, dim = self.b, self.network.head_dim
        if heads > 1:
            value = b("Reshape", value, b.shape(0, -1, heads, dim))
        value = self._norm(value, f"layers.{layer.index}.{name}", getattr(layer, name))
        if heads > 1:
            value = b("Reshape", value, b.shape(0, -1, heads * dim))
        start = b.shape(0)  # of the positions, which count from there
        return b("RotaryEmbedding", value, start, *self.rotary[layer.sliding], domain=MICROSOFT)

    def _by_group(self, value: str) -> str:
        """(B, S, G * n) → (B, G, S, n)"""
        return self.b(
            "Transpose", self.b("Reshape", value, self.b.shape(0, 0, self.network.kv_heads, -1)), perm=[0, 2, 1, 3]
        )

    def _weights(self, layer: Layer, q: str, k: str) -> str:
        """Attention weights, (B, S * H, S) or (B, G, S * H / G, S); the mask is skipped where it hides nothing."""
        b, net = self.b, self.network

        def scores() -> str:
            return _scores(b, q, k, net)

        def masked() -> str:
            tokens = b("Shape", "input_ids", start=1)
            group = [0, net.kv_heads] if net.kv_heads > 1 else [0]
            each = b("Concat", b.shape(*group, -1, net.heads // net.kv_heads), tokens, axis=0)
            apart = b("Reshape", scores(), each)  # ([B or B, G], S, H / G, S): the mask is the same for all heads
            softmax = b("Softmax", b("Add", apart, self.bias[layer.sliding]), axis=-1)
            return b("Reshape", softmax, b("Concat", b.shape(*group, -1), tokens, axis=0))

        if net.causal:
            return masked()
        return b.branches(self.plain[layer.sliding], lambda: b("Softmax", scores(), axis=-1), masked)

    def _mask(self, sliding: bool) -> str:
        """What is added to the scores: 0 or ``MASKED``, broadcast to (B, S, H, S) or (B, G, S, H / G, S)."""
        b, net = self.b, self.network
        tokens = b("Squeeze", b("Shape", "input_ids", start=1))
        window = b.constant(net.window, np.int64)

        def bias() -> str:
            seen = b("Unsqueeze", b("Cast", self.visible, to=TensorProto.BOOL), b.shape(*range(1, self._rank - 1)))
            if sliding or net.causal:
                place = b("Range", b.constant(0, np.int64), tokens, b.constant(1, np.int64))
                ahead = b("Sub", b("Unsqueeze", place, b.shape(1, 2)), place)  # (S, 1, S): query - key
                if net.causal:
                    seen = b("And", seen, b("GreaterOrEqual", ahead, b.constant(0, np.int64)))
                if sliding:
                    seen = b("And", seen, b("Less", b("Abs", ahead), window))
            return b("Where", seen, b.constant(0.0, np.float32), b.constant(MASKED, np.float32))

        if net.causal:
            return bias()
        plain = b("Cast", b("ReduceMin", self.visible, keepdims=0), to=TensorProto.BOOL)
        if sliding:
            plain = b("And", plain, b("LessOrEqual", tokens, window))
        self.plain[sliding] = plain
        return b.branches(plain, lambda: b("Identity", b.constant(0.0, np.float32)), bias)

    @property
    def _rank(self) -> int:
        return 4 if self.network.kv_heads == 1 else 5


def _scores(b: Builder, q: str, k: str, net: Network) -> str:
    """Scaled products of queries and keys, summed over at most ``LONGEST_SUM`` products at a time.

    Longer sums ONNX Runtime cuts where the number of tokens has it, so that they would depend on the padding.
    """
    parts = range(0, net.head_dim, LONGEST_SUM)
    widths = [min(LONGEST_SUM, net.head_dim - start) for start in parts]
    sides = zip(b.split(q, *widths), b.split(k, *widths), strict=True) if len(widths) > 1 else [(q, k)]
    products = [b("FusedMatMul", *side, domain=MICROSOFT, transB=1, alpha=net.score_scale) for side in sides]
    return functools.reduce(lambda one, other: b("Add", one, other), products)
