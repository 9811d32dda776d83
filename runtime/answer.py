"""What a routing call returns: the decision and its reason, as plain values. Knows nothing about how it was made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from arllm.runtime.tokens import Truncation

UNFAMILIAR = 0.5  # a decision's reason says so below this familiarity


@dataclass(frozen=True)
class QueryVector:
    """What the encoder says of a query."""

    domains: Mapping[str, float]  # probabilities, sum 1
    difficulty: float  # in [0, 1]
    embedding: tuple[float, ...]  # learned; empty where the bundle has none


class Encoded(NamedTuple):
    """A text as the encoder sees it."""

    vector: NDArray[np.float32]  # (Q,)
    familiarity: float  # in [0, 1]
    truncation: Truncation


@dataclass(frozen=True)
class Timing:
    """Milliseconds spent on a decision, by stage.

    Of queries that were encoded together each has its share. Of a decision out of the cache the look-up is all.
    """

    tokenize_ms: float
    encode_ms: float
    score_ms: float
    lookup_ms: float = 0.0

    @property
    def total_ms(self) -> float:
        return self.tokenize_ms + self.encode_ms + self.score_ms + self.lookup_ms


@dataclass(frozen=True, eq=False)
class Decision:
    """Which candidate answers the query, and why.

    The arrays cover the candidates that were allowed, in tie-break order (cost, name); ``quality``,
    ``utility`` and ``cost`` give them by name. They are read-only: decisions out of the cache share them.
    """

    model: str
    candidates: tuple[str, ...]
    qualities: NDArray[np.floating[Any]]  # (M,) in [0, 1]
    utilities: NDArray[np.float64]  # (M,)
    costs: NDArray[np.float64]  # (M,) in the pool's unit
    vector: NDArray[np.float32]  # (Q,)
    domain_names: tuple[str, ...]
    familiarity: float  # in [0, 1]: 0 = unlike anything in training, routed by overall accuracy alone
    beta: float
    policy: str
    variant: str
    pool_overridden: bool
    truncation: Truncation | None  # None where the caller gave a query vector
    timing: Timing
    cached: bool = False  # the same question was asked before, and the router's cache remembered the answer

    def recalled(self, lookup_ms: float) -> Decision:
        """This decision as the cache gives it: nothing was tokenized, encoded or scored for it."""
        return replace(self, timing=Timing(0.0, 0.0, 0.0, lookup_ms), cached=True)

    @property
    def quality(self) -> dict[str, float]:
        return dict(zip(self.candidates, self.qualities.tolist(), strict=True))

    @property
    def utility(self) -> dict[str, float]:
        return dict(zip(self.candidates, self.utilities.tolist(), strict=True))

    @property
    def cost(self) -> dict[str, float]:
        return dict(zip(self.candidates, self.costs.tolist(), strict=True))

    @property
    def query_vector(self) -> QueryVector:
        values = self.vector.tolist()
        width = len(self.domain_names)
        return QueryVector(
            dict(zip(self.domain_names, values[:width], strict=True)),
            values[width],
            tuple(values[width + 1 :]),
        )

    @property
    def reason(self) -> str:
        """Why this candidate, in a few words that don't repeat the query."""
        if len(self.candidates) == 1:
            return "the only candidate allowed"
        best = self.candidates[int(np.argmax(self.qualities))]
        unsure = self.familiarity < UNFAMILIAR and self.policy != "hdp-paper"  # which stays as it was published
        doubt = ", unfamiliar query: overall accuracy decides" if unsure else ""
        if best == self.model:
            return f"highest predicted quality{doubt}"
        at = self.candidates.index(self.model)
        if at == 0:
            return f"cheapest; no other is predicted better by what it costs more{doubt}"
        return f"best balance of predicted quality and cost{doubt}"

    def to_dict(self) -> dict[str, Any]:
        """The decision as plain JSON types."""
        query = self.query_vector
        cut = self.truncation
        return {
            "model": self.model,
            "quality": self.quality,
            "utility": self.utility,
            "cost": self.cost,
            "beta": self.beta,
            "policy": self.policy,
            "variant": self.variant,
            "pool_overridden": self.pool_overridden,
            "cached": self.cached,
            "domains": dict(query.domains),
            "difficulty": query.difficulty,
            "embedding": list(query.embedding),
            "familiarity": self.familiarity,
            "reason": self.reason,
            "truncated": bool(cut and cut.truncated),
            "bytes_dropped": cut.bytes_dropped if cut else 0,
            "tokens_dropped": cut.tokens_dropped if cut else 0,
            "timing_ms": {
                "tokenize": self.timing.tokenize_ms,
                "encode": self.timing.encode_ms,
                "score": self.timing.score_ms,
                "lookup": self.timing.lookup_ms,
                "total": self.timing.total_ms,
            },
        }
