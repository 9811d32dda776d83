"""The router: load a bundle, turn text into a :class:`Decision`. The public face of the runtime."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from arllm.runtime import decision as rule
from arllm.runtime.answer import Decision, Encoded, Timing
from arllm.runtime.bundle import MANIFEST, Bundle, Variant, open_bundle
from arllm.runtime.calibration import Calibration, calibrated, overall, shrunk, standing
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


class Router:
    """Routes queries with one variant of one bundle. Thread-safe: nothing changes after loading.

    Use :meth:`load`.
    """

    def __init__(
        self,
        bundle: Bundle,
        variant: str,
        encoder: QueryEncoder | None,
        policies: Mapping[str, Quality],
        pool: Pool | None = None,
    ) -> None:
        manifest = bundle.manifest
        self.bundle = bundle
        self.variant = variant
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
        self._encoder = encoder
        self._policies = dict(policies)
        self._calibrations: dict[str, tuple[Calibration, NDArray[np.float64]]] = {}
        for name, parameters in manifest.policies.items():
            if "calibration" in parameters:
                with _in_manifest(bundle, name):
                    calibration = Calibration.from_json(parameters["calibration"], len(manifest.domains))
                self._calibrations[name] = calibration, calibration.table(self._names)
        self._prior = self._standings = None
        if manifest.domain_shares is not None:
            self._prior = self._vectors.astype(np.float64) @ np.array(manifest.domain_shares)
            if manifest.mean_difficulty is not None:
                self._standings = standing(self._prior, manifest.mean_difficulty)

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
        return cls.of(opened, picked, threads or 1, override)

    @classmethod
    def of(cls, bundle: Bundle, variant: Variant, threads: int = 1, pool: Pool | None = None) -> Router:
        """A router of a bundle that is open and a variant that is picked; the pool has model vectors."""
        encoder, policies = _encoder(bundle, variant, threads), _policies(bundle, variant, threads)
        return cls(bundle, variant.name, encoder, policies, pool)

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
        name = self._policy(policy)
        encoder = self._require_encoder()
        started = time.perf_counter_ns()
        ids, truncation = encoder.tokenize(text)
        tokenized = time.perf_counter_ns()
        vector, familiarity = encoder.encode(ids)
        encoded = time.perf_counter_ns()
        stages = (tokenized - started, encoded - tokenized)
        return self._decide(vector, familiarity, beta, name, mask, truncation, stages, encoded)

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
        familiarity: float = 1.0,
    ) -> Decision:
        """Pick a candidate for a given query vector ``[domain probabilities…, difficulty, embedding…]``, (Q,).

        Raises:
            QueryError: another width than the bundle's, a value that is not finite, a familiarity outside [0, 1].
        """
        beta = rule.check_beta(beta)
        mask = rule.candidate_mask(self._names, candidates)
        name = self._policy(policy)
        if not isinstance(familiarity, (int, float, np.floating)) or not 0.0 <= familiarity <= 1.0:
            raise QueryError(f"familiarity must lie in [0, 1], not {familiarity!r}")
        try:
            vector = np.array(query_vector, dtype=np.float32)  # a copy: the decision keeps it
        except (TypeError, ValueError, OverflowError):
            raise QueryError("the query vector must be a list of numbers") from None
        width = self.bundle.manifest.query_width
        if vector.shape != (width,):
            raise QueryError(f"the query vector has shape {vector.shape}, the bundle expects ({width},)")
        if not np.isfinite(vector).all():
            raise QueryError("the query vector holds a value that is not finite")
        certain = np.array([familiarity], dtype=np.float32)
        return self._decide(vector[None], certain, beta, name, mask, None, (0, 0), time.perf_counter_ns())

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

    def encode(self, text: str) -> Encoded:
        """The query vector of a text, its familiarity, and what was cut."""
        encoder = self._require_encoder()
        ids, truncation = encoder.tokenize(text)
        vector, familiarity = encoder.encode(ids)
        return Encoded(vector[0], float(familiarity[0]), truncation)

    def predict(
        self,
        query_vectors: NDArray[np.float32],
        policy: str | None = None,
        familiarity: NDArray[np.floating[Any]] | None = None,
    ) -> NDArray[np.floating[Any]]:
        """Quality of every candidate of the pool as the decision uses it: (B, Q) float32 → (B, M) in [0, 1].

        Calibrated, and where the familiarity (B,) of the queries is given, shrunk by it; ``hdp-paper`` is left as
        it was published.
        """
        name = self._policy(policy)
        prediction = self._policies[name].predict(query_vectors, self._vectors)
        return self.refine(name, prediction, query_vectors, familiarity)

    def refine(
        self,
        policy: str,
        prediction: NDArray[np.floating[Any]],
        query_vectors: NDArray[np.float32],
        familiarity: NDArray[np.floating[Any]] | None = None,
    ) -> NDArray[np.floating[Any]]:
        """What :meth:`predict` makes of a policy's bare prediction (B, M): calibrated, then shrunk."""
        quality = prediction
        if policy in self._calibrations:
            calibration, table = self._calibrations[policy]
            quality = calibrated(calibration, table, quality, query_vectors, self._vectors)
        if familiarity is not None and self._standings is not None and policy != "hdp-paper":
            difficulty = query_vectors[:, self._vectors.shape[1]]
            quality = shrunk(quality, familiarity, overall(self._standings, difficulty))
        return quality

    def quality_of(self, policy: str | None = None) -> Quality:
        """The policy's bare predictor, for model vectors other than the pool's: not calibrated, not shrunk."""
        return self._policies[self._policy(policy)]

    @property
    def prior(self) -> NDArray[np.float64] | None:
        """(M,) overall accuracy of each candidate, toward which strange queries shrink; None in a NIR-only bundle."""
        return self._prior

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

    def _policy(self, policy: str | None) -> str:
        name = self.bundle.manifest.default_policy if policy is None else policy
        if not isinstance(name, str) or name not in self._policies:
            raise PolicyError(f"no policy {name!r}: the bundle has {', '.join(self._policies)}")
        return name

    def _require_encoder(self) -> QueryEncoder:
        if self._encoder is None:
            raise QueryError("this bundle holds no encoder (NIR alone): call route_vector with a query vector")
        return self._encoder

    def _decide(
        self,
        vector: NDArray[np.float32],
        familiarity: NDArray[np.float32],
        beta: float,
        policy: str,
        mask: NDArray[np.bool_] | None,
        truncation: Truncation | None,
        stages: tuple[int, int],
        scoring_started: int,
    ) -> Decision:
        qualities = self.predict(vector, policy, familiarity)[0]
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
            familiarity=float(familiarity[0]),
            beta=beta,
            policy=policy,
            variant=self.variant,
            pool_overridden=self._pool_overridden,
            truncation=truncation,
            timing=Timing(stages[0] / 1e6, stages[1] / 1e6, score / 1e6),
        )


def _encoder(bundle: Bundle, variant: Variant, threads: int) -> QueryEncoder | None:
    manifest = bundle.manifest
    if variant.encoder is None or manifest.tokens is None:
        return None
    tokenizer = TextTokenizer.from_file(bundle.path / "tokenizer.json", manifest.tokens)
    session = Session(bundle.path, variant.encoder, variant.provider, threads)
    width = next(t.dims[-1] for t in variant.encoder.outputs if t.name == "query_vector")
    if isinstance(width, int) and width != manifest.query_width:
        raise BundleIOMismatchError(
            f"{bundle.path / variant.encoder.path}: gives query vectors of {width} entries, the manifest's "
            f"domains, difficulty and embedding make {manifest.query_width}"
        )
    return QueryEncoder(tokenizer, session, variant.encoder)


def _policies(bundle: Bundle, variant: Variant, threads: int) -> dict[str, Quality]:
    found: dict[str, Quality] = {}
    for name, parameters in bundle.manifest.policies.items():
        if name == "nir" and variant.nir is not None:
            found[name] = Nir(Session(bundle.path, variant.nir, variant.provider, threads))
        elif name == "hdp":
            with _in_manifest(bundle, name):
                found[name] = Hdp.from_json(parameters, len(bundle.manifest.domains))
        elif name == "hdp-paper":
            found[name] = HdpPaper()
    return found


@contextlib.contextmanager
def _in_manifest(bundle: Bundle, policy: str) -> Iterator[None]:
    """Names the file and the policy in an error about its parameters."""
    try:
        yield
    except BundleSchemaError as error:
        raise BundleSchemaError(f"{bundle.path / MANIFEST}: policies.{policy}: {error}") from None


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
