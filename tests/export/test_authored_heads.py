"""Tests of export/authored_heads.py: heads and familiarity say what PyTorch says, for any widths and any mask."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import TINY, VOCABULARY, open_graph, queries
from numpy.typing import NDArray

from arllm.export import authored
from arllm.runtime.tokens import TokenSpec
from arllm.train.encoder import EncoderSpec, QueryEncoder, pad_batch

LAYERLESS = dataclasses.replace(TINY, num_layers=0, layer_types=())


def encoder_of(embedding: int = 5, domains: int = 3) -> QueryEncoder:
    """Statistics as of a trained encoder: views far from 0 that vary little, some pairs known and some not."""
    torch.manual_seed(embedding)
    names = tuple(f"domain {i}" for i in range(domains))
    encoder = QueryEncoder(EncoderSpec(LAYERLESS, TokenSpec(2048, (1,), (2,), 0), names, embedding, {}, 16))
    with torch.no_grad():
        encoder.center.normal_(0.0, 5.0)
        encoder.scale.uniform_(0.05, 2.0)
        encoder.pair_density.random_(0, 250)
        encoder.familiar.copy_(torch.tensor([20.0, 230.0]))
    return encoder.eval()


def asked(encoder: QueryEncoder, ids: Any, mask: Any, folder: Path) -> tuple[NDArray[Any], ...]:
    """(query vector, familiarity) by the graph, then by PyTorch."""
    session = open_graph(authored.export_authored(encoder, folder))
    feed = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    with torch.inference_mode():
        want = encoder(ids, mask).query_vector.numpy(), encoder.familiarity(ids, mask).numpy()
    return (*session.run(["query_vector", "familiarity"], feed), *want)


@pytest.mark.parametrize("embedding", [0, 1, 5])
@pytest.mark.parametrize("domains", [1, 3])
def test_heads_of_any_width(embedding: int, domains: int, tmp_path: Path) -> None:
    encoder = encoder_of(embedding, domains)
    vector, _, want, _ = asked(encoder, *pad_batch(queries(1, 9, 30), 0), tmp_path)
    assert vector.shape == (3, domains + 1 + embedding)
    np.testing.assert_allclose(vector, want, rtol=1e-5, atol=1e-5)
    assert want.std(axis=0)[domains:].min() > 1e-3


def test_familiarity_counts_pairs_that_are_shown(tmp_path: Path) -> None:
    """Padding on the right, on the left, a hole that parts neighbours, one token, none."""
    ids = torch.from_numpy(np.stack(queries(*[12] * 6)))
    mask = torch.ones_like(ids)
    mask[1, 7:], mask[2, :4], mask[3, 5], mask[4, 1:], mask[5] = 0, 0, 0, 0, 0
    _, familiarity, _, want = asked(encoder_of(), ids, mask, tmp_path)
    np.testing.assert_allclose(familiarity, want, rtol=0, atol=1e-6)
    assert familiarity[4] == familiarity[5] == 0.0  # no pair is known
    assert len({round(float(value), 4) for value in familiarity[:4]}) == 4
    assert familiarity[:4].min() > 0.0
    assert familiarity[:4].max() < 1.0


def test_a_trimmed_vocabulary_is_known_by_its_original_ids(tmp_path: Path) -> None:
    encoder, batch = encoder_of(), pad_batch(queries(20, 11), 0)
    before = asked(encoder, *batch, tmp_path)[1]
    encoder.original_ids = torch.randperm(VOCABULARY)
    _, familiarity, _, want = asked(encoder, *batch, tmp_path)
    np.testing.assert_allclose(familiarity, want, rtol=0, atol=1e-6)
    assert np.abs(familiarity - before).max() > 1e-3


def test_the_center_is_not_folded_into_the_weights(tmp_path: Path) -> None:
    """A view that stands a thousand times its spread from 0 keeps its digits."""
    encoder, batch = encoder_of(), pad_batch(queries(25, 6), 0)
    with torch.inference_mode():
        views = torch.cat(encoder.views(*batch), dim=-1)
        encoder.center.copy_(views.mean(dim=0))
        encoder.scale.fill_(float(views.abs().mean()) / 1000)
    vector, _, want, _ = asked(encoder, *batch, tmp_path)
    spread = np.abs(want[0] - want[1]).max()
    assert np.abs(vector - want).max() < 1e-3 * spread
