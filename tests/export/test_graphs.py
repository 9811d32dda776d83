"""Tests of export/graphs.py: the traced graphs say what PyTorch says, over batches, lengths, padding and shapes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from networks import dims
from numpy.typing import NDArray

from arllm.export import graphs
from arllm.train.encoder import PAIRS, QueryEncoder, pad_batch

OUTPUTS = ("query_vector", "familiarity", "pooled")
LENGTHS = (1, 8, 33, 154, 256, 258, 512, 700)  # around the window of 257 and far past it


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def batch(size: int, length: int) -> list[NDArray[np.int64]]:
    """The first query is ``length`` long, the others shorter, down to a single token."""
    rng = np.random.default_rng(length)
    lengths = [length, *(max(1, length * k // size - k) for k in range(size - 1))]
    return [rng.integers(3, 300, size=n) for n in lengths]


def by_pytorch(encoder: QueryEncoder, rows: list[NDArray[np.int64]]) -> tuple[NDArray[Any], ...]:
    """(query vectors, familiarity, pooled), each query alone and unpadded."""
    vectors, familiarity, pooled = [], [], []
    with torch.no_grad():
        for row in rows:
            ids = torch.from_numpy(row)[None]
            mask = torch.ones_like(ids)
            views = encoder.views(ids, mask)
            familiarity.append(encoder.familiarity(ids, mask))
            pooled.append(views[0])
            vectors.append(encoder.heads(torch.cat(views, dim=-1)).query_vector)
    return torch.cat(vectors).numpy(), torch.cat(familiarity).numpy(), torch.cat(pooled).numpy()


@pytest.mark.parametrize("name", ["nano", "layerless", "gemma3-270m", "grouped"])
def test_the_encoder_over_batches_and_lengths(name: str, traced: Callable[[str], Any]) -> None:
    encoder, folder = traced(name).encoder, traced(name).folder
    live = session(folder / "encoder.onnx")
    spread = []
    for size in (1, 3, 5):
        for length in LENGTHS:
            rows = batch(size, length)
            ids, mask = (tensor.numpy() for tensor in pad_batch(rows, 0))
            got = live.run(OUTPUTS, {"input_ids": ids, "attention_mask": mask})
            want = by_pytorch(encoder, rows)
            for name_of, one, other in zip(OUTPUTS, got, want, strict=True):
                where = f"{name_of}, batch {size}, length {length}"
                np.testing.assert_allclose(one, other, rtol=0, atol=1e-4, err_msg=where)
            spread.append(np.column_stack(want[:2]))
    assert np.concatenate(spread).std(axis=0).min() > 1e-3  # the queries differ in every entry


def test_padded_pytorch_batches_agree_too(traced: Callable[[str], Any]) -> None:
    encoder = traced("nano").encoder
    rows = batch(5, 700)
    with torch.no_grad():
        padded = encoder(*pad_batch(rows, 0)).query_vector.numpy()
    np.testing.assert_allclose(padded, by_pytorch(encoder, rows)[0], rtol=0, atol=1e-5)


def test_the_window_is_in_the_graph(traced: Callable[[str], Any]) -> None:
    """With another window PyTorch says something else at 258 tokens and more: the parity above is not vacuous."""
    encoder: Any = traced("nano").encoder
    config = encoder.backbone.config
    short, long = batch(1, 60), batch(1, 512)
    before = by_pytorch(encoder, short)[2], by_pytorch(encoder, long)[2]
    window = config.sliding_window
    try:
        config.sliding_window = 129
        after = by_pytorch(encoder, short)[2], by_pytorch(encoder, long)[2]
    finally:
        config.sliding_window = window
    np.testing.assert_allclose(after[0], before[0], rtol=0, atol=1e-6)
    assert np.abs(after[1] - before[1]).max() > 1e-3


def test_names_and_dims_of_the_encoder(traced: Callable[[str], Any]) -> None:
    graph = onnx.load(str(traced("nano").folder / "encoder.onnx"), load_external_data=False).graph
    integer, real = onnx.TensorProto.INT64, onnx.TensorProto.FLOAT
    assert dims(graph.input) == {
        "input_ids": (integer, ["batch", "tokens"]),
        "attention_mask": (integer, ["batch", "tokens"]),
    }
    assert dims(graph.output) == {
        "query_vector": (real, ["batch", 12]),
        "familiarity": (real, ["batch"]),
        "pooled": (real, ["batch", 256]),
    }


def test_files_of_the_encoder(traced: Callable[[str], Any]) -> None:
    folder = traced("nano").folder
    assert sorted(path.name for path in folder.iterdir()) == ["encoder.onnx", "weights.bin"]
    parameters = sum(p.numel() for p in traced("nano").encoder.parameters())
    once = 4 * parameters + PAIRS  # each weight and the byte of each pair of tokens
    assert (folder / "weights.bin").stat().st_size == pytest.approx(once, rel=0.01)
    assert (folder / "encoder.onnx").stat().st_size < 1_000_000
    model = onnx.load(str(folder / "encoder.onnx"), load_external_data=False)
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)  # no traced source paths
    assert str(Path(graphs.__file__).parent).encode() not in (folder / "encoder.onnx").read_bytes()


def test_writing_again_replaces_the_weights(traced: Callable[[str], Any], tmp_path: Path) -> None:
    model = onnx.load(str(traced("grouped").folder / "encoder.onnx"))
    sizes = []
    for _ in range(2):
        graphs.save(onnx.ModelProto.FromString(model.SerializeToString()), tmp_path / "encoder.onnx")
        sizes.append((tmp_path / "weights.bin").stat().st_size)
    assert sizes[0] == sizes[1]
