"""What token statistics of the training queries tell: idf weights of the tokens, and a start for a scratch table.

Knows nothing about outcomes or networks beyond the token table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfTransformer
from torch import nn

from arllm.train.backbones import token_table


def token_counts(ids: Sequence[NDArray[np.int64]], vocabulary: int) -> Any:
    """(queries, vocabulary) sparse float32 counts."""
    rows = np.repeat(np.arange(len(ids)), [len(row) for row in ids])
    return csr_matrix((np.ones(len(rows), np.float32), (rows, np.concatenate(ids))), (len(ids), vocabulary))


def idf_weights(counts: Any) -> NDArray[np.float32]:
    """Inverse document frequency, ``log((1 + N) / (1 + df)) + 1``, of every token, (vocabulary,).

    A token of no training query has the largest. Source: Spärck Jones 1972, smoothed as scikit-learn does.
    """
    frequency = np.asarray((counts > 0).sum(axis=0)).ravel()
    weights: NDArray[np.float32] = (np.log((1 + counts.shape[0]) / (1 + frequency)) + 1).astype(np.float32)
    return weights


def init_token_table(model: nn.Module, counts: Any, seed: int) -> NDArray[np.float32]:
    """Start a scratch token table from latent semantic analysis of the training queries instead of noise.

    The right singular vectors of the tf-idf matrix (queries × tokens), a row a token, each of norm 1. Tokens
    that occur in the same queries start out alike, which a few thousand queries can't teach a table otherwise.
    Source: Deerwester et al. 1990, "Indexing by LSA".

    Returns:
        The norms that the rows had, (vocabulary,): row * norm is the singular vector. 0 where a token occurs in
        no query; its row stays random.
    """
    table = token_table(model)
    weighted = TfidfTransformer(sublinear_tf=True).fit_transform(counts)
    rank = min(table.shape[1], min(weighted.shape) - 1)
    svd = TruncatedSVD(rank, random_state=seed).fit(weighted)
    # Past the rank of the data the singular vectors are noise, on tokens of no query too.
    real = svd.singular_values_ > 1e-5 * svd.singular_values_[0]
    factors = np.where(real[:, None], svd.components_, 0.0).T  # (vocabulary, rank)
    occurs = np.asarray(counts.sum(axis=0)).ravel() > 0
    norms = np.where(occurs, np.linalg.norm(factors, axis=1), 0.0)
    norms[norms <= 1e-8] = 0.0
    seen = torch.from_numpy(norms > 0)
    with torch.no_grad():
        start = torch.from_numpy((factors / np.maximum(norms, 1e-8)[:, None]).astype(np.float32))
        table[seen] = 0.0  # beyond the rank of the data
        table[seen, :rank] = start[seen]
    return norms.astype(np.float32)
