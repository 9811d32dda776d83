"""The variants that a bundle can hold: provider, precision, and how the encoder's graph of each is written.

A new variant is a function and a row of ``VARIANTS``. Knows nothing about manifests, parity or publishing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from arllm.export import authored, authored_int8, cuda, gemma, graphs, quantize, targets
from arllm.export.targets import Target
from arllm.runtime.session import CPU, CUDA
from arllm.train.encoder import QueryEncoder


@dataclass(frozen=True, eq=False)
class Material:
    """What variants are written from."""

    encoder: QueryEncoder
    queries: Sequence[NDArray[np.int64]]  # tokenized, for calibrating integers; parity is measured on others
    target: Target


@dataclass(frozen=True)
class Written:
    """How a graph came to be, as the manifest says it."""

    graph: str  # "authored": node by node from the weights; "traced": by torch.onnx.export
    reason: str  # why this way, and what else bears on its figures
    instruction_set: str = "any"


@dataclass(frozen=True)
class VariantSpec:
    """``write`` puts encoder.onnx and its weights into an empty folder."""

    provider: str
    precision: str
    write: Callable[[Material, Path], Written]


def write_fp32(material: Material, folder: Path) -> Written:
    reason = gemma.supports(material.encoder.backbone)
    if reason is None:
        authored.export_authored(material.encoder, folder)
        return Written("authored", _known(material.encoder))
    graphs.export_encoder(material.encoder, folder)
    return Written("traced", reason)


def write_int8(material: Material, folder: Path) -> Written:
    encoder, target = material.encoder, material.target
    reason = gemma.supports(encoder.backbone)
    has_products = encoder.spec.backbone.num_layers > 0
    instruction_set = target.instruction_set if has_products else "any"
    targets.check_verifiable(instruction_set)
    if reason is None:
        authored_int8.export_authored_int8(encoder, folder, material.queries, max_weight=target.max_weight)
        calibrated = f"; integers calibrated on {len(material.queries)} held-out queries, apart from parity's"
        return Written("authored", _known(encoder) + (calibrated if has_products else ""), instruction_set)
    with tempfile.TemporaryDirectory() as scratch:
        quantize.quantize_encoder(graphs.export_encoder(encoder, Path(scratch)), folder, target)
    return Written("traced", reason, instruction_set)


def write_cuda(precision: str) -> Callable[[Material, Path], Written]:
    def write(material: Material, folder: Path) -> Written:
        cuda.export_cuda(material.encoder, folder, precision)
        return Written("authored", f"{_known(material.encoder)}; every node has a kernel of {CUDA}")

    return write


def _known(encoder: QueryEncoder) -> str:
    return f"{type(encoder.backbone).__name__} of {encoder.spec.backbone.num_layers} layers"


VARIANTS = {  # in order of preference for "auto"
    "cpu-int8": VariantSpec(CPU, "int8", write_int8),
    "cpu-fp32": VariantSpec(CPU, "fp32", write_fp32),
    "cuda-bf16": VariantSpec(CUDA, "bf16", write_cuda("bf16")),
    "cuda-fp32": VariantSpec(CUDA, "fp32", write_cuda("fp32")),
}
DEFAULT = ("cpu-int8", "cpu-fp32")  # what is exported unless variants are named
