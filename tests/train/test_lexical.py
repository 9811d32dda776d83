"""Tests of train/lexical.py: idf weights by hand, and a scratch token table that starts from the queries."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from arllm.train.backbones import build_model, nano_spec, token_table
from arllm.train.lexical import idf_weights, init_token_table, token_counts

SMALL = dataclasses.replace(nano_spec(300, layers=2, width=64), window=6)


def test_idf_by_hand() -> None:
    counts = token_counts([np.array([1, 1, 2]), np.array([1]), np.array([3, 1])], 5)
    weights = idf_weights(counts)
    np.testing.assert_allclose(weights[1], np.log(4 / 4) + 1, rtol=1e-6)  # in all three queries
    np.testing.assert_allclose(weights[2], np.log(4 / 2) + 1, rtol=1e-6)
    np.testing.assert_allclose(weights[4], np.log(4 / 1) + 1, rtol=1e-6)  # in none
    assert weights.dtype == np.float32


def test_the_token_table_starts_from_the_queries() -> None:
    rng = np.random.default_rng(0)
    ids = [rng.integers(3, 150, size=length) for length in (5, 9, 14, 30, 2, 40, 7, 33)] * 6
    ids[0] = np.array([1, 1, 1])  # a query may hold nothing but specials
    seen = np.unique(np.concatenate(ids))
    tables = []
    for seed in (0, 0, 1):
        torch.manual_seed(7)
        model = build_model(SMALL)
        before = token_table(model).detach().clone()
        norms = init_token_table(model, token_counts(ids, 300), seed)
        tables.append(token_table(model).detach())
    assert torch.equal(tables[0], tables[1])
    unseen = np.setdiff1d(np.arange(300), seen)
    assert torch.equal(tables[0][unseen], before[unseen])
    assert not norms[unseen].any()
    assert (norms[seen] > 0).all()
    rows = tables[0][seen]
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(seen)), rtol=0, atol=1e-5)
    assert not torch.equal(rows, before[seen])


def test_tokens_of_the_same_queries_start_alike() -> None:
    ids = [np.array(row) for row in ([10, 11, 12], [10, 11, 13], [20, 21, 22], [20, 21, 23])] * 5
    model = build_model(SMALL)
    init_token_table(model, token_counts(ids, 300), 0)
    table = token_table(model).detach()
    assert table[10] @ table[11] > 0.9
    assert (table[10] @ table[20]).abs() < 0.1
