"""PyTorch → ONNX by tracing: the encoder with pooling and heads inside; and how any graph is written to files.

Knows nothing about variants, parity or bundles. Batch and length are dynamic, outputs are named.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from arllm.train.encoder import QueryEncoder

OPSET = 20
INLINE = 1024  # bytes; a smaller tensor stays in its graph
WEIGHTS = "weights.bin"  # ONNX Runtime maps external data into memory instead of copying it


class _EncoderGraph(nn.Module):
    """(ids, mask) → (query vector, familiarity, pooled): of the last, parity's centred cosine is taken."""

    def __init__(self, encoder: QueryEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        views = self.encoder.views(input_ids, attention_mask)
        query_vector = self.encoder.heads(torch.cat(views, dim=-1)).query_vector
        return query_vector, self.encoder.familiarity(input_ids, attention_mask), views[0]


def export_encoder(encoder: QueryEncoder, folder: Path) -> Path:
    """Write ``encoder.onnx`` and its weights into ``folder``.

    Inputs ``input_ids`` and ``attention_mask``, (batch, tokens) int64; outputs ``query_vector``, (batch, Q),
    ``familiarity``, (batch,), and ``pooled``, (batch, width), all float32.
    """
    ids = torch.ones((2, 11), dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    dims = {0: "batch", 1: "tokens"}
    model = trace(
        _EncoderGraph(encoder).eval(),
        (ids, mask),
        {"input_ids": dims, "attention_mask": dims},
        ["query_vector", "familiarity", "pooled"],
    )
    return save(model, folder / "encoder.onnx")


def save(model: onnx.ModelProto, path: Path) -> Path:
    """:func:`write` a graph of ONNX's own operators, and check it."""
    write(model, path)
    onnx.checker.check_model(str(path))
    return path


def write(model: onnx.ModelProto, path: Path) -> Path:
    """Write a graph with its large tensors in ``weights.bin`` beside it.

    ONNX's own checker doesn't know ONNX Runtime's operators; opening a session checks them.
    """
    (path.parent / WEIGHTS).unlink(missing_ok=True)  # onnx appends to an existing file
    onnx.save_model(
        model,
        str(path),
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location=WEIGHTS,
        size_threshold=INLINE,
    )
    return path


def trace(
    module: nn.Module, arguments: tuple[Tensor, ...], dims: dict[str, dict[int, str]], outputs: list[str]
) -> onnx.ModelProto:
    """A module's graph: ``dims`` names its inputs in order, and the axes of each that are dynamic."""
    with _quiet(), torch.inference_mode(False), torch.no_grad():
        program = torch.onnx.export(
            module,
            arguments,
            dynamo=True,
            dynamic_shapes=dims,
            input_names=list(dims),
            output_names=outputs,
            opset_version=OPSET,
            verbose=False,
        )
    if program is None:  # only where torch.onnx.export is given a file
        raise RuntimeError("torch.onnx.export returned no program")
    model = program.model_proto
    for node in model.graph.node:  # the traced Python source of every node: half of the file, of use to nobody
        del node.metadata_props[:]
        node.doc_string = ""
    del model.graph.value_info[:]
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints and warns about what the caller can't change; stdout belongs to results."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
