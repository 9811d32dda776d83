"""Text → query vector through the encoder's graph.

Knows nothing about candidates. A query's vector may not depend on who else is asked about: queries run alone and
unpadded, or with others of exactly their length where the graph gives the same bits for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from arllm.runtime.bundle import Graph
from arllm.runtime.session import Session
from arllm.runtime.tokens import TextTokenizer, Truncation

Ids = NDArray[np.int64]
Vectors = tuple[NDArray[np.float32], NDArray[np.float32]]  # query vectors (B, Q), familiarity (B,)

TOGETHER = (32, 16, 8, 4, 2)  # queries of one length that run at once
TOKENS_TOGETHER = 2048  # and their tokens, at most: the memory that a batch may take


class QueryEncoder:
    """A tokenizer and an encoder session. Thread-safe."""

    def __init__(
        self, tokenizer: TextTokenizer, session: Session, graph: Graph, batch_invariant: bool = False
    ) -> None:
        """``batch_invariant``: where it was exported, the graph gave a query the same bits in a batch and alone."""
        self.tokenizer = tokenizer
        self._session = session
        self._mask = np.ones((1, tokenizer.spec.max_tokens), dtype=np.int64)
        names = {tensor.name for tensor in graph.outputs}
        self._outputs = tuple(name for name in ("query_vector", "familiarity") if name in names)
        self._batch_invariant = batch_invariant
        self._seen: set[int] = set()  # batch sizes at which this processor has kept that promise

    def tokenize(self, text: str) -> tuple[Ids, Truncation]:
        """Ids (L,) int64 and what was cut."""
        return self.tokenizer.encode(text)

    def encode(self, ids: Ids) -> Vectors:
        """Ids (L,) int64 → query vector (1, Q) float32 and familiarity (1,) float32.

        A graph that says nothing of familiarity is taken to know every query: 1.
        """
        return self._run(ids[None], self._mask[:, : len(ids)])

    def encode_groups(self, rows: Sequence[Ids]) -> Iterator[tuple[list[int], Vectors]]:
        """The same for many queries, grouped by length where that changes no bit: (indices into rows, their vectors).

        How a kernel adds up depends on the processor too. So the first batch of each size is run singly as well, and
        where one bit differs, queries run singly from then on.
        """
        for group in _groups(rows) if self._batch_invariant else ([i] for i in range(len(rows))):
            ids = np.stack([rows[i] for i in group])
            if len(group) == 1 or not self._batch_invariant:
                found = self._singly(ids)
            else:
                found = self._run(ids, np.ones_like(ids))
                if len(group) not in self._seen:
                    alone = self._singly(ids)
                    if all(a.tobytes() == b.tobytes() for a, b in zip(found, alone, strict=True)):
                        self._seen.add(len(group))
                    else:
                        self._batch_invariant, found = False, alone
            yield group, found

    def _singly(self, ids: Ids) -> Vectors:
        vectors, familiarity = zip(*(self.encode(row) for row in ids), strict=True)
        return np.concatenate(vectors), np.concatenate(familiarity)

    def _run(self, ids: Ids, mask: Ids) -> Vectors:
        found = self._session.run_many(self._outputs, {"input_ids": ids, "attention_mask": mask})
        return found[0], found[1] if len(found) > 1 else np.ones(len(ids), dtype=np.float32)


def _groups(rows: Sequence[Ids]) -> Iterator[list[int]]:
    """Indices of rows of equal length, as many together as TOGETHER and TOKENS_TOGETHER allow."""
    by_length: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        by_length.setdefault(len(row), []).append(i)
    for length, members in by_length.items():
        at = 0
        while at < len(members):
            left, most = len(members) - at, TOKENS_TOGETHER // length
            size = next((size for size in TOGETHER if size <= min(left, most)), 1)
            yield members[at : at + size]
            at += size
