"""Small Gemma3 encoders of random weights, and their graphs in ONNX Runtime. Of the tests of authored graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import nn

from arllm.runtime.tokens import TokenSpec
from arllm.train.backbones import FULL, SLIDING, GemmaSpec
from arllm.train.encoder import EncoderSpec, QueryEncoder, pad_batch

VOCABULARY = 90
TINY = GemmaSpec(
    vocab_size=VOCABULARY,
    hidden_size=24,
    intermediate_size=40,
    num_layers=3,
    num_heads=4,
    num_kv_heads=1,
    head_dim=8,
    window=6,
    layer_types=(SLIDING, SLIDING, FULL),
    query_pre_attn_scalar=10,
    rope_factor=4.0,
)


def random_encoder(
    spec: GemmaSpec, seed: int, backbone: nn.Module | None = None, domains: tuple[str, ...] = ("a", "b", "c")
) -> QueryEncoder:
    """Random weights; norms and token weights that a trained encoder would have."""
    torch.manual_seed(seed)
    encoder = QueryEncoder(EncoderSpec(spec, TokenSpec(2048, (1,), (2,), 0), domains, 5, {}, 16), backbone)
    with torch.no_grad():
        for key, parameter in encoder.named_parameters():
            if "norm" in key:
                parameter.normal_(0.0, 0.3)
            elif "layers" in key:
                parameter.normal_(0.0, 0.25)  # scores that prefer some tokens: a wrong mask must show
        encoder.token_weight.uniform_(0.0, 3.0)
    return encoder.eval()


def open_graph(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(
    session: onnxruntime.InferenceSession, rows: list[NDArray[np.int64]], outputs: tuple[str, ...] = ("views",)
) -> list[NDArray[Any]]:
    """Outputs of tokenized queries in one padded batch."""
    ids, mask = (tensor.numpy() for tensor in pad_batch(rows, 0))
    values: list[NDArray[Any]] = session.run(outputs, {"input_ids": ids, "attention_mask": mask})
    return values


def queries(*lengths: int) -> list[NDArray[np.int64]]:
    rng = np.random.default_rng(sum(lengths))
    return [rng.integers(3, VOCABULARY, size=length) for length in lengths]


@torch.inference_mode()
def by_pytorch(encoder: QueryEncoder, rows: list[NDArray[np.int64]]) -> NDArray[Any]:
    """Both views, (N, 2 * width), each query alone."""
    views = []
    for row in rows:
        ids = torch.from_numpy(row)[None]
        views.append(torch.cat(encoder.views(ids, torch.ones_like(ids)), dim=-1))
    return torch.cat(views).numpy()


def dims(values: Any) -> dict[str, tuple[int, list[str | int]]]:
    """Name → element type and dims of a graph's inputs or outputs."""
    return {
        value.name: (
            value.type.tensor_type.elem_type,
            [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim],
        )
        for value in values
    }
