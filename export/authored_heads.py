"""The end of the authored encoder: the heads on both views of a query, and how familiar its wording is.

Every node here costs a small encoder microseconds of its one query: the three heads are one product, the views are
standardized by the weights as far as that is exact enough, masks are those that pooling has already. Knows nothing
about the backbone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto

from arllm.export.builder import Builder
from arllm.export.gemma import as_array
from arllm.train.encoder import PAIR_FACTOR, PAIRS, QueryEncoder

EVER = np.iinfo(np.int64).max  # where a Slice ends that has no end


def write_heads(b: Builder, encoder: QueryEncoder, views: str) -> None:
    """``query_vector``, (B, Q), of both views side by side, (B, 2 * width): :meth:`QueryEncoder.heads`.

    The scale goes into the weights; the center does not: of what stands far from 0 it would leave few digits.
    """
    body: Any = encoder.body[1]
    heads: list[Any] = [encoder.domain_head, encoder.difficulty_head]
    if encoder.embedding_head is not None:
        heads.append(encoder.embedding_head)
    scaled = (as_array(body.weight).astype(np.float64) / as_array(encoder.scale)).astype(np.float32)
    weight, bias = b.weight("heads.body", scaled), b.weight("heads.body.bias", as_array(body.bias))
    centered = b("Sub", views, b.weight("heads.center", as_array(encoder.center)))
    hidden = b("Relu", b("Gemm", centered, weight, bias, transB=1))
    merged = b.weight("heads.merged", np.concatenate([as_array(head.weight) for head in heads]))
    bias = b.weight("heads.merged.bias", np.concatenate([as_array(head.bias) for head in heads]))
    domains, difficulty, *embedding = b.split(
        b("Gemm", hidden, merged, bias, transB=1), *(head.out_features for head in heads)
    )
    parts = (b("Softmax", domains, axis=-1), b("Sigmoid", difficulty), *embedding)
    b("Concat", *parts, axis=-1, output="query_vector")


def write_familiarity(b: Builder, encoder: QueryEncoder, visible: str) -> None:
    """``familiarity``, (B,), of ``input_ids`` and the mask in float32, (B, S): :meth:`QueryEncoder.familiarity`."""
    ids = "input_ids"
    if encoder.original_ids is not None:
        ids = b("Gather", b.weight("original_ids", encoder.original_ids.cpu().numpy()), ids)
    factor, count = b.constant(PAIR_FACTOR, np.int64), b.constant(PAIRS, np.int64)
    slots = b("Mod", b("Add", b("Mul", _but_last(b, ids), factor), _but_first(b, ids)), count)
    table = b.weight("pair_density", encoder.pair_density.cpu().numpy())
    density = b("Cast", b("Gather", table, slots), to=TensorProto.FLOAT)  # (B, S - 1)
    pair = b("Mul", _but_last(b, visible), _but_first(b, visible))
    total = b("ReduceSum", b("Mul", density, pair), b.shape(1), keepdims=0)  # (B,)
    pairs = b("Max", b("ReduceSum", pair, b.shape(1), keepdims=0), b.constant(1.0, np.float32))
    low, high = encoder.familiar.tolist()
    above = b("Sub", b("Div", total, pairs), b.constant(low, np.float32))
    share = b("Div", above, b.constant(np.float32(high) - np.float32(low), np.float32))
    b("Clip", share, b.constant(0.0, np.float32), b.constant(1.0, np.float32), output="familiarity")


def _but_last(b: Builder, value: str) -> str:
    return b("Slice", value, b.shape(0), b.shape(-1), b.shape(1))


def _but_first(b: Builder, value: str) -> str:
    return b("Slice", value, b.shape(1), b.shape(EVER), b.shape(1))
