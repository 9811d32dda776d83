"""A live Gemma3TextModel → its weights as an authored graph multiplies them: merged, transposed, scales folded in.

Knows nothing about ONNX, heads or integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from arllm.train.backbones import FULL, SLIDING

Weights = NDArray[np.float32]

PRODUCTS = ("qkv", "out", "gate_up", "down")  # the fields of a Layer that are multiplied by rows


@dataclass(frozen=True)
class Layer:
    """One layer. Products are (in, out): rows @ weight. Norms hold Gemma's ``1 + weight``."""

    index: int
    sliding: bool
    input_norm: Weights  # (width,)
    qkv: Weights  # (width, (heads + 2 * kv_heads) * head_dim)
    q_norm: Weights  # (head_dim,)
    k_norm: Weights  # (head_dim,)
    out: Weights  # (heads * head_dim, width)
    post_attention_norm: Weights  # (width,)
    pre_feedforward_norm: Weights  # (width,)
    gate_up: Weights  # (width, 2 * intermediate)
    down: Weights  # (intermediate, width)
    post_feedforward_norm: Weights  # (width,)


@dataclass(frozen=True)
class Network:
    """Everything of a backbone that its graph needs."""

    table: Weights  # (vocabulary, width), Gemma's embedding scale multiplied in
    layers: tuple[Layer, ...]
    final_norm: Weights  # (width,)
    heads: int
    kv_heads: int
    head_dim: int
    score_scale: float
    eps: float
    window: int  # in a sliding layer i sees j where abs(i - j) < window; if causal, where 0 <= i - j < window
    causal: bool
    rotary: dict[bool, tuple[Weights, Weights]]  # sliding? → cos and sin, (positions, head_dim / 2)

    @property
    def width(self) -> int:
        return int(self.table.shape[1])


def supports(backbone: nn.Module) -> str | None:
    """Why a backbone can't be read into a :class:`Network`, or None where it can."""
    config: Any = getattr(backbone, "config", None)
    if type(backbone).__name__ != "Gemma3TextModel" or config is None:
        return f"{type(backbone).__name__} is not a Gemma3TextModel"
    if config.hidden_activation not in ("gelu_pytorch_tanh", "gelu_new"):
        return f"its activation is {config.hidden_activation}, not the tanh Gelu"
    if getattr(config, "attention_bias", False):
        return "its attention has biases"
    if getattr(config, "attn_logit_softcapping", None):
        return "its attention is soft-capped"
    heads, shared, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    if heads % shared or dim % 2:
        return f"{heads} heads of {dim} can't share {shared} key/value heads evenly, in halves"
    unknown = set(config.layer_types) - {SLIDING, FULL}
    if unknown:
        return f"it has layers of type {', '.join(sorted(unknown))}"
    moving = {"dynamic", "longrope"} & _rotary_types(backbone)
    if moving:
        return f"its rotary frequencies change with the length ({', '.join(sorted(moving))})"
    return None


def read_network(backbone: nn.Module, positions: int) -> Network:
    """The weights of a Gemma3TextModel, with rotary tables for ``positions`` tokens.

    Raises:
        ValueError: the backbone can't be read; :func:`supports` says why.
    """
    reason = supports(backbone)
    if reason is not None:
        raise ValueError(f"the encoder's graph can't be authored: {reason}")
    model: Any = backbone
    config = model.config
    embedding = model.embed_tokens
    kinds = config.layer_types[: len(model.layers)]
    return Network(
        table=as_array(embedding.weight) * np.float32(embedding.embed_scale.item()),
        layers=tuple(_read_layer(i, layer, kinds[i]) for i, layer in enumerate(model.layers)),
        final_norm=_norm(model.norm),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        score_scale=float(config.query_pre_attn_scalar) ** -0.5,
        eps=float(model.norm.eps),
        window=int(config.sliding_window),
        causal=not config.use_bidirectional_attention,
        rotary={kind == SLIDING: _rotary(model, kind, positions) for kind in sorted(set(kinds))},
    )


def _rotary_types(backbone: nn.Module) -> set[str]:
    found: set[str] = set()
    for name in ("rotary_emb", "rotary_emb_local"):
        kind = getattr(getattr(backbone, name, None), "rope_type", "default")
        found |= set(kind.values()) if isinstance(kind, dict) else {str(kind)}  # transformers 5: by layer type
    return found


def _read_layer(index: int, layer: Any, kind: str) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return Layer(
        index=index,
        sliding=kind == SLIDING,
        input_norm=_norm(layer.input_layernorm),
        qkv=_merged(attention.q_proj, attention.k_proj, attention.v_proj),
        q_norm=_norm(attention.q_norm),
        k_norm=_norm(attention.k_norm),
        out=_merged(attention.o_proj),
        post_attention_norm=_norm(layer.post_attention_layernorm),
        pre_feedforward_norm=_norm(layer.pre_feedforward_layernorm),
        gate_up=_merged(mlp.gate_proj, mlp.up_proj),
        down=_merged(mlp.down_proj),
        post_feedforward_norm=_norm(layer.post_feedforward_layernorm),
    )


def as_array(tensor: Tensor) -> Weights:
    """A parameter in float32, on the host."""
    array: Weights = tensor.detach().to("cpu", torch.float32).numpy()
    return array


def _norm(norm: Any) -> Weights:
    return np.float32(1.0) + as_array(norm.weight)


def _merged(*linears: nn.Linear) -> Weights:
    return np.ascontiguousarray(np.concatenate([as_array(linear.weight) for linear in linears]).T)


def _rotary(model: Any, kind: str, positions: int) -> tuple[Weights, Weights]:
    """cos and sin as the live model computes them; both halves of a row are equal, the graph takes one."""
    hidden, index = torch.zeros(1, 1, 1), torch.arange(positions)[None]
    with torch.no_grad():
        if hasattr(model, "rotary_emb_local"):
            tables = (model.rotary_emb_local if kind == SLIDING else model.rotary_emb)(hidden, index)
        else:
            tables = model.rotary_emb(hidden, index, kind)  # transformers 5
    cos, sin = (np.ascontiguousarray(as_array(table[0])[:, : table.shape[-1] // 2]) for table in tables)
    return cos, sin
