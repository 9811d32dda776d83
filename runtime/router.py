"""The router: load a bundle, turn text into a :class:`Decision`. The public face of the runtime."""

from __future__ import annotations

import functools
import itertools
import os
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from arllm.runtime import decision as rule
from arllm.runtime import parts
from arllm.runtime.answer import Decision, Encoded, Timing
from arllm.runtime.bundle import Bundle, Variant, open_bundle
from arllm.runtime.cache import Asked, CacheInfo, DecisionCache
from arllm.runtime.calibration import overall, shrunk, standing
from arllm.runtime.devices import cores
from arllm.runtime.encoder import QueryEncoder
from arllm.runtime.errors import InputError, PolicyError, PoolError, QueryError, VariantError
from arllm.runtime.pool import Pool, read_pool_json
from arllm.runtime.quality import Quality
from arllm.runtime.session import Session, pick_variant
from arllm.runtime.tokens import Truncation

Profile = Literal["guest", "latency"]

WINDOW = 1024  # texts of a batch that are held at once
MS = 1e-6  # of a nanosecond


class Router:
    """Routes queries with one variant of one bundle. Thread-safe: all that changes after loading is the cache.

    Use :meth:`load`.
    """

    def __init__(
        self,
        bundle: Bundle,
        variant: str,
        encoder: QueryEncoder | None,
        policies: Mapping[str, Quality],
        pool: Pool | None = None,
        cache: int = 0,
    ) -> None:
        manifest = bundle.manifest
        self.bundle = bundle
        self.variant = variant
        self.pool = bundle.pool if pool is None else pool
        self._pool_overridden = pool is not None
        self._names = self.pool.names
        self._positions = {name: i for i, name in enumerate(self._names)}
        self._vectors = self.pool.vectors()
        self._domains = len(manifest.domains)
        if self._vectors.shape[1] != self._domains:
            raise PoolError(
                f"model vectors have {self._vectors.shape[1]} entries, the bundle expects {self._domains}"
            )
        self._costs = self.pool.costs
        self._normalized = rule.normalize_costs(self._costs, manifest.cost_minimum, manifest.cost_maximum)
        for shared in (self._costs, self._normalized):  # decisions and callers see these very arrays
            shared.setflags(write=False)
        if not np.isfinite(self._normalized).all():
            raise PoolError("a cost is too far outside the bundle's range to be normalized")
        self._encoder = encoder
        self._policies = dict(policies)
        self._bound = {name: quality.bind(self._vectors) for name, quality in self._policies.items()}
        self._calibrations = parts.calibrations(bundle, self._names, self._vectors)
        self._prior = self._standings = None
        if manifest.domain_shares is not None:
            self._prior = self._vectors.astype(np.float64) @ np.array(manifest.domain_shares)
            if manifest.mean_difficulty is not None:
                self._standings = standing(self._prior, manifest.mean_difficulty)
        self._cache = DecisionCache(cache) if cache else None

    @classmethod
    def load(
        cls,
        bundle: str | os.PathLike[str],
        variant: str = "auto",
        threads: int | None = None,
        verify: bool = True,
        pool: Pool | str | os.PathLike[str] | None = None,
        *,
        profile: Profile = "guest",
        cache: int = 0,
    ) -> Router:
        """Load a bundle folder, or one that ships by its name (``"nano"``).

        Args:
            variant: one of the bundle's, or ``auto``: the first of the manifest that this machine can run.
            threads: of a single inference; None = as the profile says.
            verify: compare every file's sha256 with the manifest.
            pool: other costs or candidates (a :class:`Pool`, or a pool.json). Model vectors are taken from the
                bundle where it leaves them out; costs stay on the bundle's scale, so that beta keeps its meaning.
            profile: ``guest``, in somebody else's process: one thread, and where there are more they sleep while they
                wait. ``latency``: the machine is the router's: a thread for each core, waiting awake.
            cache: remember the decisions of so many queries, the least recently used make room; 0 = none. It is
                exact: text, beta, policy and candidates are compared whole. Texts take at most 4 KiB an entry, all
                in all; each decision two float64 arrays of the pool's length.

        Raises:
            BundleError, VariantError, PoolError: nothing is repaired, downloaded or replaced in silence.
            InputError: threads, profile or cache is none of the above.
        """
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
            raise VariantError(f"threads must be a whole number of at least 1, not {threads!r}")
        if profile not in ("guest", "latency"):
            raise InputError(f"profile must be guest or latency, not {profile!r}")
        if isinstance(cache, bool) or not isinstance(cache, int) or cache < 0:
            raise InputError(f"cache must be a whole number of at least 0, not {cache!r}")
        opened = open_bundle(bundle, verify=verify)
        picked = pick_variant(opened.manifest.variants, variant)
        override = None
        if pool is not None:
            given = pool if isinstance(pool, Pool) else read_pool_json(pool)
            override = parts.with_bundle_vectors(given, opened.pool)
        wanted = threads or (1 if profile == "guest" else cores())
        return cls.of(opened, picked, wanted, override, profile=profile, cache=cache)

    @classmethod
    def of(
        cls,
        bundle: Bundle,
        variant: Variant,
        threads: int = 1,
        pool: Pool | None = None,
        *,
        profile: Profile = "guest",
        cache: int = 0,
    ) -> Router:
        """A router of a bundle that is open and a variant that is picked; the pool has model vectors."""
        opener = functools.partial(
            Session, bundle.path, provider=variant.provider, threads=threads, spin=profile == "latency"
        )
        encoder, policies = parts.encoder(bundle, variant, opener), parts.policies(bundle, variant, opener)
        return cls(bundle, variant.name, encoder, policies, pool, cache)

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
        asked = self._ask(beta, policy, candidates)
        encoder = self._require_encoder()
        remembered = self._remembered(text, asked)
        if remembered is not None:
            return remembered
        started = time.perf_counter_ns()
        ids, truncation = encoder.tokenize(text)
        tokenized = time.perf_counter_ns()
        vector, familiarity = encoder.encode(ids)
        encoded = time.perf_counter_ns()
        stages = ((tokenized - started) * MS, (encoded - tokenized) * MS)
        decision = self._decide(vector, familiarity, asked, truncation, stages, encoded)
        if self._cache is not None:
            self._cache.put(asked.key(text), decision)
        return decision

    def route_batch(
        self,
        texts: Iterable[str],
        beta: float = 0.5,
        policy: str | None = None,
        candidates: Collection[str] | None = None,
    ) -> list[Decision]:
        """:meth:`route` for every text, in order; a text's decision does not depend on the others.

        Texts of one length are encoded together where the variant gives the same bits for it.
        """
        if isinstance(texts, (str, bytes)):
            raise QueryError("route_batch takes a list of queries; for one query call route")
        asked = self._ask(beta, policy, candidates)
        self._require_encoder()
        decisions: list[Decision] = []
        rest = iter(texts)
        while window := list(itertools.islice(rest, WINDOW)):
            decisions += self._route_window(window, asked)
        return decisions

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
        asked = self._ask(beta, policy, candidates)
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
        return self._decide(vector[None], certain, asked, None, (0.0, 0.0), time.perf_counter_ns())

    async def aroute(
        self,
        text: str,
        beta: float = 0.5,
        policy: str | None = None,
        candidates: Collection[str] | None = None,
    ) -> Decision:
        """:meth:`route` in a worker thread, for an event loop that must not wait."""
        import asyncio  # an event loop has brought it in; others need not wait for it

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
        return self.refine(name, self._bound[name](query_vectors), query_vectors, familiarity)

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
            quality = self._calibrations[policy](quality, query_vectors)
        if familiarity is not None and self._standings is not None and policy != "hdp-paper":
            difficulty = query_vectors[:, self._domains]
            quality = shrunk(quality, familiarity, overall(self._standings, difficulty))
        return quality

    def quality_of(self, policy: str | None = None) -> Quality:
        """The policy's bare predictor, for model vectors other than the pool's: not calibrated, not shrunk."""
        return self._policies[self._policy(policy)]

    @property
    def prior(self) -> NDArray[np.float64] | None:
        """(M,) overall accuracy of each candidate, toward which strange queries shrink; None in a NIR-only bundle."""
        return self._prior

    def warmup(self, lengths: Sequence[int] | None = None) -> None:
        """Route texts of about these many tokens, so that the first real query pays for no allocation.

        None = short, middling, and the longest that the encoder takes.
        """
        if self._encoder is None or self.bundle.manifest.tokens is None:
            self.route_vector(np.full(self.bundle.manifest.query_width, 0.5, dtype=np.float32))
            return
        most = self.bundle.manifest.tokens.max_tokens
        for length in (8, 64, 256, most) if lengths is None else lengths:
            ids, _ = self.tokenize("warm up " * max(1, min(length, most) // 2))
            vector, familiarity = self._encoder.encode(ids)
            self.predict(vector, familiarity=familiarity)

    def cache_info(self) -> CacheInfo | None:
        """Hits, misses and what is held, or None where the router has no cache."""
        return None if self._cache is None else self._cache.info()

    @property
    def normalized_costs(self) -> NDArray[np.float64]:
        """(M,) float64, in the pool's order, on the bundle's scale."""
        return self._normalized

    @property
    def policies(self) -> tuple[str, ...]:
        return tuple(self._policies)

    def _ask(self, beta: float, policy: str | None, candidates: Collection[str] | None) -> Asked:
        value = rule.check_beta(beta)
        rows = rule.candidate_rows(self._positions, candidates)
        return Asked(value, self._policy(policy), rows)

    def _policy(self, policy: str | None) -> str:
        name = self.bundle.manifest.default_policy if policy is None else policy
        if not isinstance(name, str) or name not in self._policies:
            raise PolicyError(f"no policy {name!r}: the bundle has {', '.join(self._policies)}")
        return name

    def _require_encoder(self) -> QueryEncoder:
        if self._encoder is None:
            raise QueryError("this bundle holds no encoder (NIR alone): call route_vector with a query vector")
        return self._encoder

    def _remembered(self, text: str, asked: Asked) -> Decision | None:
        """What the cache holds of a query; None where it holds nothing, or there is no cache."""
        if self._cache is None or not isinstance(text, str):
            return None
        started = time.perf_counter_ns()
        found = self._cache.get(asked.key(text))
        return None if found is None else found.recalled((time.perf_counter_ns() - started) * MS)

    def _route_window(self, texts: Sequence[str], asked: Asked) -> list[Decision]:
        decisions: dict[int, Decision] = {}
        waiting: list[tuple[int, NDArray[np.int64], Truncation, float]] = []  # and the milliseconds of tokenization
        encoder, cache = self._require_encoder(), self._cache
        for i, text in enumerate(texts):
            remembered = self._remembered(text, asked)
            if remembered is not None:
                decisions[i] = remembered
                continue
            started = time.perf_counter_ns()
            ids, truncation = encoder.tokenize(text)
            waiting.append((i, ids, truncation, (time.perf_counter_ns() - started) * MS))
        started = time.perf_counter_ns()
        for group, (vectors, familiarity) in encoder.encode_groups([row[1] for row in waiting]):
            share = (time.perf_counter_ns() - started) * MS / len(group)
            for at, member in enumerate(group):
                i, _, truncation, tokenized = waiting[member]
                one = slice(at, at + 1)
                stages, now = (tokenized, share), time.perf_counter_ns()
                # A copy: the decision must not hold on to its neighbours.
                decision = self._decide(vectors[one].copy(), familiarity[one], asked, truncation, stages, now)
                decisions[i] = decision
                if cache is not None:
                    cache.put(asked.key(texts[i]), decision)
            started = time.perf_counter_ns()
        return [decisions[i] for i in range(len(texts))]

    def _decide(
        self,
        vector: NDArray[np.float32],
        familiarity: NDArray[np.float32],
        asked: Asked,
        truncation: Truncation | None,
        stages: tuple[float, float],
        scoring_started: int,
    ) -> Decision:
        qualities = self.predict(vector, asked.policy, familiarity)[0]
        names, costs, normalized = self._names, self._costs, self._normalized
        if asked.rows is not None:
            names = tuple([names[i] for i in asked.rows.tolist()])
            qualities, costs, normalized = qualities[asked.rows], costs[asked.rows], normalized[asked.rows]
        utilities = rule.utility(qualities, normalized, asked.beta)
        model = names[int(rule.choose(utilities))]
        shown = vector[0]
        for shared in (qualities, utilities, costs, shown):
            shared.setflags(write=False)
        score = (time.perf_counter_ns() - scoring_started) * MS
        return Decision(
            model=model,
            candidates=names,
            qualities=qualities,
            utilities=utilities,
            costs=costs,
            vector=shown,
            domain_names=self.bundle.manifest.domains,
            familiarity=float(familiarity[0]),
            beta=asked.beta,
            policy=asked.policy,
            variant=self.variant,
            pool_overridden=self._pool_overridden,
            truncation=truncation,
            timing=Timing(stages[0], stages[1], score),
        )
