"""The router: load a bundle, turn text into a :class:`Decision`. The public face of the runtime."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from arllm.runtime import decision as rule
from arllm.runtime.bundle import MANIFEST, Bundle, Variant, open_bundle
from arllm.runtime.encoder import QueryEncoder
from arllm.runtime.errors import (
    BundleIOMismatchError,
    BundleSchemaError,
    CandidateError,
    PolicyError,
    PoolError,
    QueryError,
    VariantError,
)
from arllm.runtime.pool import Candidate, Pool, read_pool_json
from arllm.runtime.quality import Hdp, HdpPaper, Nir, Quality
from arllm.runtime.session import Session, pick_variant
from arllm.runtime.tokens import TextTokenizer, Truncation


@dataclass(frozen=True)
class QueryVector:
    """What the encoder says of a query."""

    domains: Mapping[str, float]  # probabilities, sum 1
    difficulty: float  # in [0, 1]
    embedding: tuple[float, ...]  # learned; empty where the bundle has none


@dataclass(frozen=True)
class Timing:
    """Milliseconds spent on a decision, by stage."""

    tokenize_ms: float
    encode_ms: float
    score_ms: float

    @property
    def total_ms(self) -> float:
        return self.tokenize_ms + self.encode_ms + self.score_ms


@dataclass(frozen=True, eq=False)
class Decision:
    """Which candidate answers the query, and why.

    The arrays cover the candidates that were allowed, in tie-break order (cost, name); ``quality``,
    ``utility`` and ``cost`` give them by name.
    """

    model: str
    candidates: tuple[str, ...]
    qualities: NDArray[np.floating[Any]]  # (M,) in [0, 1]
    utilities: NDArray[np.float64]  # (M,)
    costs: NDArray[np.float64]  # (M,) in the pool's unit
    vector: NDArray[np.float32]  # (Q,)
    domain_names: tuple[str, ...]
    beta: float
    policy: str
    variant: str
    pool_overridden: bool
    truncation: Truncation | None  # None where the caller gave a query vector
    timing: Timing

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
            "domains": dict(query.domains),
            "difficulty": query.difficulty,
            "embedding": list(query.embedding),
            "truncated": bool(cut and cut.truncated),
            "bytes_dropped": cut.bytes_dropped if cut else 0,
            "tokens_dropped": cut.tokens_dropped if cut else 0,
            "timing_ms": {
                "tokenize": self.timing.tokenize_ms,
                "encode": self.timing.encode_ms,
                "score": self.timing.score_ms,
                "total": self.timing.total_ms,
            },
        }


class Router:
    """Routes queries with one variant of one bundle. Thread-safe: nothing changes after loading.

    Use :meth:`load`.
    """

    def __init__(self, bundle: Bundle, variant: Variant, threads: int, pool: Pool | None) -> None:
        manifest = bundle.manifest
        self.bundle = bundle
        self.variant = variant.name
        self.pool = bundle.pool if pool is None else pool
        self._pool_overridden = pool is not None
        self._names = self.pool.names
        self._vectors = self.pool.vectors()
        if self._vectors.shape[1] != len(manifest.domains):
            raise PoolError(
                f"model vectors have {self._vectors.shape[1]} entries, the bundle expects {len(manifest.domains)}"
            )
        self._costs = self.pool.costs
        self._normalized = rule.normalize_costs(self._costs, manifest.cost_minimum, manifest.cost_maximum)
        for shared in (self._costs, self._normalized):  # decisions and callers see these very arrays
            shared.setflags(write=False)
        if not np.isfinite(self._normalized).all():
            raise PoolError("a cost is too far outside the bundle's range to be normalized")
        self._encoder: QueryEncoder | None = None
        if variant.encoder is not None and manifest.tokens is not None:
            tokenizer = TextTokenizer.from_file(bundle.path / "tokenizer.json", manifest.tokens)
            session = Session(bundle.path, variant.encoder, variant.provider, threads)
            width = next(t.dims[-1] for t in variant.encoder.outputs if t.name == "query_vector")
            if isinstance(width, int) and width != manifest.query_width:
                raise BundleIOMismatchError(
                    f"{bundle.path / variant.encoder.path}: gives query vectors of {width} entries, the manifest's "
                    f"domains, difficulty and embedding make {manifest.query_width}"
                )
            self._encoder = QueryEncoder(tokenizer, session)
        self._policies: dict[str, Quality] = {}
        for name, parameters in manifest.policies.items():
            if name == "nir" and variant.nir is not None:
                self._policies[name] = Nir(Session(bundle.path, variant.nir, variant.provider, threads))
            elif name == "hdp":
                try:
                    self._policies[name] = Hdp.from_json(parameters)
                except BundleSchemaError as error:
                    raise BundleSchemaError(f"{bundle.path / MANIFEST}: {error}") from None
            elif name == "hdp-paper":
                self._policies[name] = HdpPaper()

    @classmethod
    def load(
        cls,
        bundle: str | os.PathLike[str],
        variant: str = "auto",
        threads: int | None = None,
        verify: bool = True,
        pool: Pool | str | os.PathLike[str] | None = None,
    ) -> Router:
        """Load a bundle folder, or one that ships by its name (``"nano"``).

        Args:
            variant: one of the bundle's, or ``auto``: the first of the manifest that this machine can run.
            threads: of a single inference; None = 1, so that the host keeps its other cores.
            verify: compare every file's sha256 with the manifest.
            pool: other costs or candidates (a :class:`Pool`, or a pool.json). Model vectors are taken from the
                bundle where it leaves them out; costs stay on the bundle's scale, so that beta keeps its meaning.

        Raises:
            BundleError, VariantError, PoolError: nothing is repaired, downloaded or replaced in silence.
        """
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
            raise VariantError(f"threads must be a whole number of at least 1, not {threads!r}")
        opened = open_bundle(bundle, verify=verify)
        picked = pick_variant(opened.manifest.variants, variant)
        override = None
        if pool is not None:
            given = pool if isinstance(pool, Pool) else read_pool_json(pool)
            override = _with_bundle_vectors(given, opened.pool)
        return cls(opened, picked, threads or 1, override)

    def route(
        self,
        text: str,
        beta: float = 0.5,
        policy: str | None = None,
        candidates: Collection[str] | None = None,
    ) -> Decision:
        """Pick a candidate for a query.

        Args:
            beta: 0 = quality alone, 1 = cost alone.
            policy: ``nir``, ``hdp`` or ``hdp-paper``; None = the bundle's default.
            candidates: names to choose among; None = the whole pool.

        Raises:
            QueryError, BetaError, PolicyError, CandidateError: all are also ValueErrors.
        """
        beta = rule.check_beta(beta)
        mask = rule.candidate_mask(self._names, candidates)
        quality, name = self._policy(policy)
        encoder = self._require_encoder()
        started = time.perf_counter_ns()
        ids, truncation = encoder.tokenize(text)
        tokenized = time.perf_counter_ns()
        vector = encoder.encode(ids)
        encoded = time.perf_counter_ns()
        stages = (tokenized - started, encoded - tokenized)
        return self._decide(vector, beta, quality, name, mask, truncation, stages, encoded)

    def route_batch(
        self,
        texts: Iterable[str],
        beta: float = 0.5,
        policy: str | None = None,
        candidates: Collection[str] | None = None,
    ) -> list[Decision]:
        """:meth:`route` for every text, in order; a text's decision does not depend on the others."""
        if isinstance(texts, (str, bytes)):
            raise QueryError("route_batch takes a list of queries; for one query call route")
        return [self.route(text, beta, policy, candidates) for text in texts]

    def route_vector(
        self,
        query_vector: ArrayLike,
        beta: float = 0.5,
        policy: str | None = None,
        candidates: Collection[str] | None = None,
    ) -> Decision:
        """Pick a candidate for a given query vector ``[domain probabilities…, difficulty, embedding…]``, (Q,).

        Raises:
            QueryError: another width than the bundle's, or a value that is not finite.
        """
        beta = rule.check_beta(beta)
        mask = rule.candidate_mask(self._names, candidates)
        quality, name = self._policy(policy)
        try:
            vector = np.array(query_vector, dtype=np.float32)  # a copy: the decision keeps it
        except (TypeError, ValueError, OverflowError):
            raise QueryError("the query vector must be a list of numbers") from None
        width = self.bundle.manifest.query_width
        if vector.shape != (width,):
            raise QueryError(f"the query vector has shape {vector.shape}, the bundle expects ({width},)")
        if not np.isfinite(vector).all():
            raise QueryError("the query vector holds a value that is not finite")
        return self._decide(vector[None], beta, quality, name, mask, None, (0, 0), time.perf_counter_ns())

    async def aroute(
        self,
        text: str,
        beta: float = 0.5,
        policy: str | None = None,
        candidates: Collection[str] | None = None,
    ) -> Decision:
        """:meth:`route` in a worker thread, for an event loop that must not wait."""
        return await asyncio.to_thread(self.route, text, beta, policy, candidates)

    def tokenize(self, text: str) -> tuple[NDArray[np.int64], Truncation]:
        """The token ids of a text, (L,) int64, and what was cut."""
        return self._require_encoder().tokenize(text)

    def encode(self, text: str) -> tuple[NDArray[np.float32], Truncation]:
        """The query vector of a text, (Q,) float32, and what was cut."""
        encoder = self._require_encoder()
        ids, truncation = encoder.tokenize(text)
        return encoder.encode(ids)[0], truncation

    def predict(self, query_vectors: NDArray[np.float32], policy: str | None = None) -> NDArray[np.floating[Any]]:
        """Predicted quality of every candidate of the pool: (B, Q) float32 → (B, M) in [0, 1]."""
        return self.quality_of(policy).predict(query_vectors, self._vectors)

    def quality_of(self, policy: str | None = None) -> Quality:
        """The policy's predictor, for model vectors other than the pool's."""
        return self._policy(policy)[0]

    def warmup(self, lengths: Sequence[int] = (8, 64, 256)) -> None:
        """Route texts of about these many tokens, so that the first real query pays for no allocation."""
        if self._encoder is None:
            self.route_vector(np.full(self.bundle.manifest.query_width, 0.5, dtype=np.float32))
            return
        for length in lengths:
            self.route("warm up " * max(1, length // 2))

    @property
    def normalized_costs(self) -> NDArray[np.float64]:
        """(M,) float64, in the pool's order, on the bundle's scale."""
        return self._normalized

    @property
    def policies(self) -> tuple[str, ...]:
        return tuple(self._policies)

    def _policy(self, policy: str | None) -> tuple[Quality, str]:
        name = self.bundle.manifest.default_policy if policy is None else policy
        try:
            return self._policies[name], name
        except (KeyError, TypeError):
            raise PolicyError(f"no policy {name!r}: the bundle has {', '.join(self._policies)}") from None

    def _require_encoder(self) -> QueryEncoder:
        if self._encoder is None:
            raise QueryError("this bundle holds no encoder (NIR alone): call route_vector with a query vector")
        return self._encoder

    def _decide(
        self,
        vector: NDArray[np.float32],
        beta: float,
        quality: Quality,
        policy: str,
        mask: NDArray[np.bool_] | None,
        truncation: Truncation | None,
        stages: tuple[int, int],
        scoring_started: int,
    ) -> Decision:
        qualities = quality.predict(vector, self._vectors)[0]
        utilities = rule.utility(qualities, self._normalized, beta)
        names, costs = self._names, self._costs
        model = names[int(rule.choose(utilities, mask))]
        if mask is not None:
            names = tuple(name for name, keep in zip(names, mask, strict=True) if keep)
            qualities, utilities, costs = qualities[mask], utilities[mask], costs[mask]
        score = time.perf_counter_ns() - scoring_started
        return Decision(
            model=model,
            candidates=names,
            qualities=qualities,
            utilities=utilities,
            costs=costs,
            vector=vector[0],
            domain_names=self.bundle.manifest.domains,
            beta=beta,
            policy=policy,
            variant=self.variant,
            pool_overridden=self._pool_overridden,
            truncation=truncation,
            timing=Timing(stages[0] / 1e6, stages[1] / 1e6, score / 1e6),
        )


def _with_bundle_vectors(given: Pool, bundled: Pool) -> Pool:
    if given.unit != bundled.unit and "unspecified" not in (given.unit, bundled.unit):
        raise PoolError(
            f"the pool override's costs are in {given.unit!r}, the bundle's in {bundled.unit!r}: "
            "beta would lose its meaning; convert them"
        )
    known = {candidate.name: candidate for candidate in bundled.candidates}
    rows = []
    for candidate in given.candidates:
        vector = candidate.vector
        if vector is None:
            if candidate.name not in known:
                raise CandidateError(
                    f"candidate {candidate.name!r} of the pool override has no model vector and is not in the "
                    f"bundle ({', '.join(known)})"
                )
            vector = known[candidate.name].vector
        rows.append(Candidate(candidate.name, candidate.cost, vector, candidate.metadata))
    return Pool(tuple(rows), given.unit)
