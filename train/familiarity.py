"""What wording training has seen: the table and the two marks of the encoder's familiarity.

A density model in its simplest form: how many training queries hold each pair of neighbouring tokens, by its log.
A word that training never saw falls apart into common tokens, but into uncommon pairs. That told held-out subjects
from known ones better than distances between query vectors, which learn to ignore what is of no use in training; what
was tried stands in tests/benchmarks/QUALITY.md. Knows nothing about outcomes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from arllm.train.encoder import PAIRS, QueryEncoder, by_length, pair_slots

STEPS = 16  # of a byte, for each unit of log(1 + queries): room for millions of queries
MARKS = (0.05, 0.25)  # quantiles of validation's wording where familiarity is 0, and where it is 1
LEAST_SLOPE = 1.0  # between the marks: validation queries that are all alike (templates) would make a step


def fit_familiarity(
    encoder: QueryEncoder, train: Sequence[NDArray[np.int64]], val: Sequence[NDArray[np.int64]]
) -> None:
    """Set ``pair_density`` from the training queries' tokens and ``familiar`` from those of validation, in place."""
    counts = np.zeros(PAIRS, dtype=np.int64)
    for row in train:
        counts[np.unique(pair_slots(row[:-1], row[1:]))] += 1
    density = np.minimum(np.round(STEPS * np.log1p(counts)), 255).astype(np.uint8)
    encoder.pair_density.copy_(torch.from_numpy(density))
    low, high = np.quantile(wordings(encoder, val), MARKS)
    encoder.familiar.copy_(torch.tensor([min(low, high - LEAST_SLOPE), high]))


@torch.inference_mode()
def wordings(encoder: QueryEncoder, rows: Sequence[NDArray[np.int64]]) -> NDArray[np.float32]:
    """:meth:`QueryEncoder.wording` of tokenized queries, (N,) float32."""
    return by_length(encoder, rows, lambda ids, mask: encoder.wording(ids, mask)[:, None], 1)[:, 0]
