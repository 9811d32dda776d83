"""Query vectors × model vectors → predicted quality: HDP by formula, NIR by its graph.

Knows nothing about cost, beta or text.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from arllm.runtime.errors import BundleSchemaError

if TYPE_CHECKING:  # training fits HDP without an ONNX Runtime
    from arllm.runtime.bundle import Graph
    from arllm.runtime.session import Opener

Array = NDArray[np.float32]
Predict = Callable[[Array], NDArray[np.floating[Any]]]  # query vectors (B, Q) → P(correct) (B, M), in [0, 1]


class Quality(ABC):
    """A policy's prediction of P(correct)."""

    @abstractmethod
    def bind(self, model_vectors: Array) -> Predict:
        """The prediction over one pool, model vectors (M, D); what depends on them alone is computed here, once."""

    def predict(self, query_vectors: Array, model_vectors: Array) -> NDArray[np.floating[Any]]:
        """(B, Q) and (M, D) → (B, M), in [0, 1]: :meth:`bind` for a single use."""
        return self.bind(model_vectors)(query_vectors)


def sigmoid(score: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """``1 / (1 + exp(-score))``."""
    share: NDArray[np.float64] = np.exp(-score)
    share += 1.0
    return np.reciprocal(share, out=share)


def ability(query_vectors: Array, model_vectors: Array) -> NDArray[np.float64]:
    """``sum_d p_d * a_{m,d}``: expected accuracy of each candidate over the query's domains, (B, M) float64."""
    domains = model_vectors.shape[1]
    return query_vectors[:, :domains].astype(np.float64) @ model_vectors.T.astype(np.float64)


def _over_ability(
    model_vectors: Array,
    formula: Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]],
    centre: Sequence[float] = (),
) -> Predict:
    """A formula of ability less ``sum_d p_d * centre_d``, (B, M), and difficulty (B, 1), over one pool.

    The centre is taken off the sums, not off the model vectors: so candidates of one ability keep one quality, to the
    last digit, and the cheaper of them is chosen.
    """
    domains = model_vectors.shape[1]
    columns = np.ascontiguousarray(model_vectors.T, dtype=np.float64)  # (D, M)
    middle = np.array(centre)[:, None] if centre else None  # (D, 1)

    def predict(query_vectors: Array) -> NDArray[np.float64]:
        shares = query_vectors[:, :domains].astype(np.float64)
        able: NDArray[np.float64] = shares @ columns
        if middle is not None:
            able -= shares @ middle
        return formula(able, query_vectors[:, domains, None].astype(np.float64))

    return predict


@dataclass(frozen=True)
class HdpPaper(Quality):
    """HDP exactly as published: ``clip((ability - difficulty + 1) / 2, 0, 1)``.

    Difficulty is the same for every candidate of a query and the clip does not bind, so it moves no decision:
    this policy is the published baseline, kept for comparison. Source: AR-LLM.
    """

    def bind(self, model_vectors: Array) -> Predict:
        return _over_ability(model_vectors, lambda able, hard: np.clip((able - hard + 1.0) / 2.0, 0.0, 1.0))


@dataclass(frozen=True)
class Hdp(Quality):
    """HDP in which difficulty matters: ``sigmoid(slope * (ability - centre) - weight * difficulty + bias)``.

    ``centre`` is the ability of the training pool's mean candidate, ``sum_d p_d * centre_d``: how hard a domain is
    for everybody is in the difficulty already, and counted twice it would saturate the sigmoid in the wrong places.
    With slope > 0 the ranking by ability stays, so at beta 0 the choice is that of ``hdp-paper``. On easy
    queries the sigmoid saturates, candidates come closer, and for beta between 0 and 1 the cheap ones win.
    The three parameters are fitted by :mod:`arllm.train.hdp`.
    """

    slope: float
    weight: float
    bias: float
    centre: tuple[float, ...] = ()  # (D,) mean accuracy per domain of the training pool; empty = 0 everywhere

    @classmethod
    def from_json(cls, data: Mapping[str, Any], domains: int) -> Hdp:
        """Parse what a manifest or a run stores.

        Raises:
            BundleSchemaError: a number is missing or not finite, or ``centre`` has another width than ``domains``.
        """
        try:
            slope, weight, bias = (float(data[key]) for key in ("slope", "weight", "bias"))
            centre = tuple(float(value) for value in data.get("centre", ()))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise BundleSchemaError(f"slope, weight, bias and centre must be numbers ({error!r})") from None
        values = [slope, weight, bias, *centre]
        if not all(math.isfinite(value) for value in values):
            raise BundleSchemaError(f"slope, weight, bias and centre must be finite, not {values}")
        if len(centre) not in (0, domains):
            raise BundleSchemaError(f"centre has {len(centre)} numbers, expected {domains}")
        return cls(slope, weight, bias, centre)

    def to_json(self) -> dict[str, Any]:
        return {"slope": self.slope, "weight": self.weight, "bias": self.bias, "centre": list(self.centre)}

    def bind(self, model_vectors: Array) -> Predict:
        return _over_ability(
            model_vectors,
            lambda able, hard: sigmoid(self.slope * able + (self.bias - self.weight * hard)),
            self.centre,
        )


class Nir(Quality):
    """The Neural Interaction Router's graph: every (query, candidate) pair in one call.

    Its model vectors are made part of the graph, so that ONNX Runtime computes their side of the network once, when
    it opens the graph, and not for every query.
    """

    def __init__(self, opener: Opener, graph: Graph) -> None:
        self._opener, self._graph = opener, graph

    def bind(self, model_vectors: Array) -> Predict:
        session = self._opener(self._graph, constants={"model_vectors": model_vectors})
        return lambda query_vectors: session.run("quality", {"query_vectors": query_vectors})
