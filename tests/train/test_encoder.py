"""Tests of train/encoder.py: the two views of a query, padding, the query vector's layout, encode_all's order."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from arllm.runtime.tokens import TokenSpec
from arllm.train.backbones import nano_spec
from arllm.train.encoder import EncoderSpec, QueryEncoder, encode_all, pad_batch

SPEC = EncoderSpec(
    backbone=dataclasses.replace(nano_spec(200, layers=2, width=64), window=6),
    tokens=TokenSpec(64, (1,), (2,), 0),
    domains=("code", "dates", "logic"),
    embedding_width=4,
    source={"name": "nano"},
)


@pytest.fixture(scope="module")
def encoder() -> QueryEncoder:
    torch.manual_seed(0)
    return QueryEncoder(SPEC).eval()


def rows(*lengths: int) -> list[NDArray[np.int64]]:
    rng = np.random.default_rng(1)
    return [rng.integers(3, 200, size=length) for length in lengths]


class _Fixed(nn.Module):
    """A backbone whose last hidden state is given."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states
        self.embed_tokens = nn.Embedding(200, 64)

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.states)


def test_pooling_is_the_mean_of_the_unmasked_tokens() -> None:
    states = torch.zeros(2, 3, 64)
    states[0, :, 0] = torch.tensor([1.0, 2.0, 6.0])
    states[1, :, 0] = torch.tensor([1.0, 2.0, 600.0])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    pooled, _ = QueryEncoder(SPEC, _Fixed(states)).views(torch.zeros(2, 3, dtype=torch.int64), mask)
    assert pooled.shape == (2, 64)
    assert pooled[:, 0].tolist() == [3.0, 1.5]


def test_a_row_without_tokens_is_zero_and_not_nan() -> None:
    mask = torch.tensor([[0, 0], [1, 0]])
    pooled, lexical = QueryEncoder(SPEC, _Fixed(torch.ones(2, 2, 64))).views(mask, mask)
    assert pooled[:, 0].tolist() == [0.0, 1.0]
    assert lexical[0].tolist() == [0.0] * 64


def test_the_lexical_view_is_the_weighted_mean_of_the_tables_rows() -> None:
    encoder = QueryEncoder(SPEC, _Fixed(torch.ones(1, 4, 64)))
    encoder.token_weight[7], encoder.token_weight[9], encoder.token_weight[11] = 2.0, 0.5, 0.0
    ids, mask = torch.tensor([[7, 9, 11, 13]]), torch.tensor([[1, 1, 1, 0]])
    table = encoder.backbone.get_parameter("embed_tokens.weight")
    expected = 2.0 * table[7] + 0.5 * table[9]  # the fourth is padding
    expected = expected / expected.norm() * 8.0  # of norm sqrt(64)
    torch.testing.assert_close(encoder.views(ids, mask)[1][0], expected)


def test_the_views_are_standardized_before_the_body(encoder: QueryEncoder) -> None:
    views = torch.randn(3, 128)
    expected = encoder.heads(views).query_vector
    moved = QueryEncoder(SPEC, encoder.backbone).eval()
    moved.load_state_dict(
        {**encoder.state_dict(), "center": torch.full((128,), 5.0), "scale": torch.full((128,), 2.0)}
    )
    torch.testing.assert_close(moved.heads(2.0 * views + 5.0).query_vector, expected, rtol=0, atol=1e-5)


def test_low_precision_states_are_summed_in_float32() -> None:
    states = torch.full((1, 4000, 64), 1.0, dtype=torch.bfloat16)
    mask = torch.ones(1, 4000, dtype=torch.int64)
    pooled, _ = QueryEncoder(SPEC, _Fixed(states)).views(mask, mask)
    assert pooled.dtype == torch.float32
    assert pooled[0, 0] == 1.0


def test_padding_changes_nothing(encoder: QueryEncoder) -> None:
    """Shorter and longer than the window of 6, and padding far past the reach of any real token."""
    some = rows(1, 5, 6, 7, 33, 64)
    ids, mask = pad_batch(some, 0)
    with torch.no_grad():
        batched = encoder(ids, mask).query_vector
        single = torch.cat([encoder(torch.from_numpy(r)[None], torch.ones(1, len(r))).query_vector for r in some])
        other_padding = encoder(torch.where(mask == 1, ids, 77), mask).query_vector
    assert bool(torch.isfinite(batched).all())
    torch.testing.assert_close(batched, single, rtol=0, atol=1e-5)
    torch.testing.assert_close(other_padding, single, rtol=0, atol=1e-5)
    assert (single[:, -4:].std(0) > 1e-3).all()  # the queries do differ


def test_the_query_vector_is_domains_difficulty_embedding(encoder: QueryEncoder) -> None:
    ids, mask = pad_batch(rows(9, 4), 0)
    with torch.no_grad():
        encoded = encoder(ids, mask)
        hidden = encoder.body(torch.cat(encoder.views(ids, mask), dim=-1))
        assert encoder.embedding_head is not None
        embedding = encoder.embedding_head(hidden)
    vector = encoded.query_vector
    assert vector.shape == (2, SPEC.query_width) == (2, 3 + 1 + 4)
    assert encoded.domain_logits.shape == (2, 3)
    assert encoded.difficulty_logit.shape == (2,)
    torch.testing.assert_close(vector[:, :3], encoded.domain_logits.softmax(-1))
    torch.testing.assert_close(vector[:, 3], encoded.difficulty_logit.sigmoid())
    torch.testing.assert_close(vector[:, 4:], embedding)
    torch.testing.assert_close(encoded.domain_logits, encoder.domain_head(hidden))


def test_without_an_embedding() -> None:
    spec = dataclasses.replace(SPEC, embedding_width=0)
    encoder = QueryEncoder(spec).eval()
    assert not any("embedding_head" in name for name in encoder.state_dict())
    assert encode_all(encoder, rows(3)).shape == (1, 4) == (1, spec.query_width)


def test_dropout_acts_on_the_pooled_vector_in_training_alone(encoder: QueryEncoder) -> None:
    ids, mask = pad_batch(rows(9), 0)
    dropping = QueryEncoder(SPEC, encoder.backbone, dropout=0.5)
    with torch.no_grad():
        dropping.train()
        assert not torch.equal(dropping(ids, mask).query_vector, dropping(ids, mask).query_vector)
        dropping.eval()
        assert torch.equal(dropping(ids, mask).query_vector, dropping(ids, mask).query_vector)


def test_encode_all_keeps_the_order(encoder: QueryEncoder) -> None:
    some = rows(30, 2, 17, 64, 1, 17, 40)
    encoder.train()  # encode_all turns dropout off
    vectors = encode_all(encoder, some, batch_size=2)
    assert vectors.dtype == np.float32
    with torch.no_grad():
        single = torch.cat([encoder(torch.from_numpy(r)[None], torch.ones(1, len(r))).query_vector for r in some])
    np.testing.assert_allclose(vectors, single.numpy(), rtol=0, atol=1e-5)


def test_encode_all_of_nothing(encoder: QueryEncoder) -> None:
    assert encode_all(encoder, []).shape == (0, SPEC.query_width)


def test_pad_batch_pads_on_the_right() -> None:
    ids, mask = pad_batch([np.array([5, 6, 7]), np.array([8])], pad_id=9)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert ids.dtype == mask.dtype == torch.int64


def test_the_spec_survives_json() -> None:
    assert EncoderSpec.from_json(json.loads(json.dumps(SPEC.to_json()))) == SPEC
