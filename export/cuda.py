"""The encoder's graph for ONNX Runtime's CUDA provider: every node in a type that it runs, in float32 or bfloat16.

Two things differ from :mod:`arllm.export.authored`, whose layers stand here unchanged. Masks are made from tensors
on the device: arithmetic on shapes and an ``If`` would bring the host between two kernels, and a strict session
refuses them. And :func:`lower` puts what lies between two norms into 16 bits. Knows nothing about providers' options,
parity or bundles.

There is no float16: its largest number is 65,504, Gemma's residual stream is known to pass it, and that no product or
gate of all 18 layers does, the residual being float32, has not been shown on real queries.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from arllm.export import authored, gemma, graphs
from arllm.export.builder import MICROSOFT
from arllm.export.cuda_kernels import tensor_types, unsupported
from arllm.runtime.bundle import Bundle, Variant
from arllm.runtime.devices import cuda_devices
from arllm.runtime.errors import ExportError
from arllm.runtime.router import Router
from arllm.runtime.session import CPU, CUDA, why_not
from arllm.train.encoder import QueryEncoder

BFLOAT16 = TensorProto.BFLOAT16


class DeviceLayers(authored.Layers):
    """The layers with masks that need neither the shape of a tensor nor a branch."""

    def _weights(self, layer: gemma.Layer, q: str, k: str) -> str:
        b, net = self.b, self.network
        scores = b("FusedMatMul", q, k, domain=MICROSOFT, transB=1, alpha=net.score_scale)
        # Not an added bias: ONNX Runtime would fuse it into BiasSoftmax, which CUDA lacks in bfloat16.
        hidden = b.constant(authored.MASKED, np.float32)
        return b("Softmax", b("Where", self.bias[layer.sliding], scores, hidden), axis=-1)

    def _mask(self, sliding: bool) -> str:
        """Which keys a query sees: bool, (B, S * H or 1, S), or with groups (B, 1, S * H / G or 1, S)."""
        b, net = self.b, self.network
        group = [1] if net.kv_heads > 1 else []
        seen = b("Cast", b("Unsqueeze", self.visible, b.shape(1, *[2 for _ in group])), to=TensorProto.BOOL)
        if sliding or net.causal:
            keys = b.once("places", self._places)  # (B, S)
            queries = b("Unsqueeze", keys, b.shape(2))
            queries = b("Tile", queries, b.shape(1, 1, net.heads // net.kv_heads))
            queries = b("Reshape", queries, b.shape(0, *group, -1, 1))  # a query stands once for each head of a group
            ahead = b("Sub", queries, b("Unsqueeze", keys, b.shape(1, *[2 for _ in group])))
            if net.causal:
                seen = b("And", seen, b("GreaterOrEqual", ahead, b.constant(0, np.int64)))
            if sliding:
                seen = b("And", seen, b("Less", b("Abs", ahead), b.constant(net.window, np.int64)))
        return seen

    def _places(self) -> str:
        """1, 2, 3 … along the tokens, (B, S) int64, padding counted too."""
        b = self.b
        ones = b("Add", b("Sub", "input_ids", "input_ids"), b.constant(1, np.int64))
        return b("CumSum", ones, b.constant(1, np.int64))


def export_cuda(encoder: QueryEncoder, folder: Path, precision: str) -> Path:
    """Write ``encoder.onnx`` and its weights into ``folder``, in ``fp32`` or ``bf16``.

    Raises:
        ExportError: the backbone can't be authored, or a node has no kernel on the CUDA provider; names it.
    """
    reason = gemma.supports(encoder.backbone)
    if reason is not None:
        raise ExportError(
            f"no CUDA variant of this backbone: {reason}, and a traced graph computes shapes on the CPU; "
            "export its cpu variants"
        )
    model = author_cuda(encoder, precision)
    problems = unsupported(model)
    if problems:
        raise ExportError(f"{len(problems)} nodes have no place on the CUDA provider, the first: {problems[0]}")
    return graphs.write(model, folder / "encoder.onnx")


def author_cuda(encoder: QueryEncoder, precision: str) -> onnx.ModelProto:
    """The graph itself.

    Raises:
        ValueError: the backbone can't be authored, or the precision is unknown.
    """
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision must be fp32 or bf16, not {precision!r}")
    network = gemma.read_network(encoder.backbone, encoder.spec.tokens.max_tokens)
    model = authored.author(network, encoder, layers=DeviceLayers)
    if precision == "bf16":
        lower(model)
    return model


def verified_on(variant: Variant) -> list[str] | None:
    """The card that a CUDA variant's figures come from; [] where none could run it; None of any other variant."""
    if variant.provider != CUDA:
        return None
    return [cuda_devices()[0].name] if why_not(variant) is None else []


def stand_in(bundle: Bundle, name: str, folder: Path) -> Router:
    """A router of a CUDA variant that this machine can't run, its graph emulated on the CPU in the empty ``folder``.

    Its figures show what the graph and its type do, not what a card's kernels do.
    """
    variant = bundle.manifest.variants[name]
    if variant.encoder is None:
        raise ExportError(f"variant {name} has no encoder to emulate")
    model = onnx.load(str(bundle.path / variant.encoder.path))
    emulate(model)
    (folder / variant.encoder.path).parent.mkdir(parents=True)
    graphs.write(model, folder / variant.encoder.path)
    for path in ("tokenizer.json", *([variant.nir.path] if variant.nir is not None else [])):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.path / path, folder / path)
    on_cpu = dataclasses.replace(variant, provider=CPU)
    manifest = dataclasses.replace(bundle.manifest, variants={name: on_cpu})
    return Router.of(dataclasses.replace(bundle, path=folder, manifest=manifest), on_cpu)


# --- 16 bits ------------------------------------------------------------------------------------------------


TOKEN_TABLE = "token_table"
FOLLOWING = frozenset(
    ("MatMul", "FusedMatMul", "Split", "Reshape", "Transpose", "RotaryEmbedding", "Gelu", "Mul", "Where", "Softmax")
)
PER_HEAD = ("q_norm", "k_norm")


def lower(model: onnx.ModelProto) -> None:
    """Put the token table, the layers' products and what follows them up to the next norm into bfloat16, in place.

    Norms over the width, the residual stream, pooling, heads and familiarity stay in float32: what is added up over
    the layers keeps its digits, and only what a norm rescales has few.
    """
    graph = model.graph
    types = tensor_types(model)
    weights = {t.name: t for t in graph.initializer if t.data_type == TensorProto.FLOAT}
    nodes: list[onnx.NodeProto] = []
    made_low: set[str] = set()
    flowing: set[str] = set()
    casts: dict[str, str] = {}

    def cast(name: str, code: int) -> str:
        if name not in casts:
            casts[name] = f"{name}/{'bf16' if code == BFLOAT16 else 'fp32'}"
            if code == BFLOAT16 and name in weights:
                graph.initializer.append(_rounded(weights[name], casts[name]))
            else:
                nodes.append(helper.make_node("Cast", [name], [casts[name]], name=casts[name], to=code))
        return casts[name]

    for node in list(graph.node):
        low = _is_low(node, flowing)
        inputs = [
            cast(name, BFLOAT16 if low else TensorProto.FLOAT)
            if types.get(name) == TensorProto.FLOAT and low != (name in made_low)
            else name
            for name in node.input
        ]
        del node.input[:]
        node.input.extend(inputs)
        nodes.append(node)
        if low:
            made_low.update(node.output)
            if node.op_type != "Gather":  # its rows begin the residual stream
                flowing.update(node.output)
    del graph.node[:]
    graph.node.extend(nodes)
    _drop_unused(graph)


def _is_low(node: onnx.NodeProto, flowing: set[str]) -> bool:
    """``flowing`` holds the values that come from a product, with no norm over the width between."""
    if node.op_type == "Gather":
        return bool(node.input[0] == TOKEN_TABLE)
    if node.op_type == "MatMul" and node.input[1].startswith("layers."):
        return True
    if not flowing & set(node.input):
        return False
    if node.op_type == "SimplifiedLayerNormalization":
        return bool(node.input[1].endswith(PER_HEAD))
    return node.op_type in FOLLOWING


def emulate(model: onnx.ModelProto) -> None:
    """Make all of a lowered graph float32, in place, each value rounded where it was bfloat16.

    So the CPU, which has few kernels of that type, can show the type's error: kernels of the CUDA provider sum in
    float32 and round their result, as is done here; the few that round in between too err a little more.
    """
    graph = model.graph
    types = tensor_types(model)
    for tensor in graph.initializer:
        if tensor.data_type == BFLOAT16:
            bits = np.frombuffer(tensor.raw_data, dtype=np.uint16).astype(np.uint32) << 16
            tensor.CopyFrom(numpy_helper.from_array(bits.view(np.float32).reshape(tuple(tensor.dims)), tensor.name))
    nodes = []
    for node in graph.node:
        nodes.append(node)
        for i, name in enumerate(node.output):
            if types.get(name) != BFLOAT16:
                continue
            exact, short = f"{name}/exact", f"{name}/rounded"
            node.output[i] = exact
            if node.op_type == "Cast":
                node.attribute[0].i = TensorProto.FLOAT
            nodes.append(helper.make_node("Cast", [exact], [short], name=short, to=BFLOAT16))
            nodes.append(helper.make_node("Cast", [short], [name], name=f"{name}/back", to=TensorProto.FLOAT))
    fresh = list(nodes)
    del graph.node[:]
    graph.node.extend(fresh)


def _rounded(tensor: onnx.TensorProto, name: str) -> onnx.TensorProto:
    """float32 → bfloat16, to the nearest, a tie to the even one."""
    bits = np.ascontiguousarray(numpy_helper.to_array(tensor)).view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    raw = nearest.astype("<u2").tobytes()
    return onnx.TensorProto(name=name, data_type=BFLOAT16, dims=tensor.dims, raw_data=raw)


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Take out nodes and constants that nothing reads any more."""
    while True:
        read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
        idle = [node for node in graph.node if not read & set(node.output)]
        for node in idle:
            graph.node.remove(node)
        if not idle:
            break
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    if len(kept) < len(graph.initializer):
        del graph.initializer[:]
        graph.initializer.extend(kept)
