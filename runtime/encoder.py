"""Text → query vector through the encoder's graph.

Knows nothing about candidates. Each query runs alone, unpadded: a query's vector then can't depend on its
batch neighbours (dynamic int8 shares one activation scale in a batch), and on a CPU it costs nothing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from arllm.runtime.bundle import Graph
from arllm.runtime.session import Session
from arllm.runtime.tokens import TextTokenizer, Truncation


class QueryEncoder:
    """A tokenizer and an encoder session. Thread-safe."""

    def __init__(self, tokenizer: TextTokenizer, session: Session, graph: Graph) -> None:
        self.tokenizer = tokenizer
        self._session = session
        self._mask = np.ones((1, tokenizer.spec.max_tokens), dtype=np.int64)
        names = {tensor.name for tensor in graph.outputs}
        self._outputs = tuple(name for name in ("query_vector", "familiarity") if name in names)

    def tokenize(self, text: str) -> tuple[NDArray[np.int64], Truncation]:
        """Ids (L,) int64 and what was cut."""
        return self.tokenizer.encode(text)

    def encode(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Ids (L,) int64 → query vector (1, Q) float32 and familiarity (1,) float32.

        A graph that says nothing of familiarity is taken to know every query: 1.
        """
        inputs = {"input_ids": ids[None], "attention_mask": self._mask[:, : len(ids)]}
        found = self._session.run_many(self._outputs, inputs)
        return found[0], found[1] if len(found) > 1 else np.ones(1, dtype=np.float32)
