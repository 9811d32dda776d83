"""The shared piece of every gateway: a request in, a verdict out, in time, whatever happens.

An adapter reads requests and writes answers; it decides nothing. What it calls:

    gateway = Gateway(GatewayConfig.from_file("arllm.toml"))
    verdict = await gateway.handle(body, headers)      # never raises for a request's or the router's sake
    verdict.model, verdict.changed, verdict.headers()
    gateway.close()
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from arllm.runtime.answer import Decision
from arllm.runtime.errors import MissingExtraError
from arllm.runtime.gateways import spans, verdict
from arllm.runtime.gateways.asks import Asks, client_asks, parse_alias
from arllm.runtime.gateways.calls import Calls, Outcome, Question
from arllm.runtime.gateways.config import GatewayConfig
from arllm.runtime.gateways.engine import Engine, load_engine
from arllm.runtime.gateways.filters import Cooldowns
from arllm.runtime.gateways.log import DecisionLog
from arllm.runtime.gateways.metrics import Metrics
from arllm.runtime.gateways.query import Asked, Needs, model_of, read_request
from arllm.runtime.gateways.reload import Watcher, signature
from arllm.runtime.gateways.sticky import Conversations, keep
from arllm.runtime.gateways.verdict import Verdict

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

_LOGGER = logging.getLogger("arllm.gateway")
_NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class Gateway:
    """Decides requests with one bundle at a time, which :meth:`reload` replaces while serving.

    Args:
        load: makes an :class:`Engine`; the default loads, verifies, warms and measures the configured bundle.
        registry: where the Prometheus metrics go; None = a registry of its own.

    Raises:
        ArllmError: the bundle can't be loaded, the settings don't fit it, or the log can't be written.
    """

    def __init__(
        self,
        config: GatewayConfig,
        *,
        load: Callable[[GatewayConfig], Engine] = load_engine,
        registry: CollectorRegistry | None = None,
    ) -> None:
        self.config = config
        self._load = load
        self.engine = load(config)
        self.last_reload = ""  # what the last reload came to; empty before the first
        self._reloading = threading.Lock()
        self._calls = Calls(config, self.engine.deadline)
        self._cooldowns = Cooldowns()
        self._conversations = Conversations(config.sticky_entries, config.sticky_seconds)
        self.metrics: Metrics | None = None
        try:
            self.metrics = Metrics(registry)
        except MissingExtraError as error:
            _LOGGER.info("no metrics: %s", error)
        else:
            self.metrics.watch(lambda: self.queue_length, lambda: self.breaker_open)
            self.metrics.serving(self.engine, self._models())
        self._log: DecisionLog | None = None
        if config.log is not None:
            dropped = self.metrics.dropped.inc if self.metrics else lambda: None
            self._log = DecisionLog(config.log, config.log_bytes, config.log_files, config.log_queue, dropped)
        self._watcher: Watcher | None = None
        if config.reload_seconds is not None:
            self._watcher = Watcher(
                lambda: signature(config.bundle, config.pool), self.try_reload, config.reload_seconds
            )

    async def handle(
        self,
        body: Mapping[str, Any],
        headers: Mapping[str, str] = _NO_HEADERS,
        *,
        unavailable: Collection[str] = (),
        client: str = "",
    ) -> Verdict:
        """Decide a request, in any event loop; nothing in here waits longer than the deadline.

        Args:
            body: the request's JSON object, of any chat shape; other fields than those are not looked at.
            headers: the client's, names in lower case.
            unavailable: models that the gateway knows to be unhealthy or cooling down, by its names or the pool's.
            client: who asks (a key's hash, say): conversations of different clients are never one.

        Returns:
            A verdict, always: a router that fails, hangs or is too busy is a reason, not an exception.
        """
        started = time.perf_counter()
        engine = self.engine  # the one of this whole decision: a reload may swap it meanwhile
        model = model_of(body) or ""
        wanted, policy = parse_alias(model, self.config.alias, engine.router.policies)
        if not wanted and not self.config.shadow:
            return self._counted(self._untouched(engine, model, started))
        span = spans.start()
        query: str | None = None
        ignored: tuple[str, ...] = ()
        candidate: str | None = None
        try:
            asked = read_request(body, self.config.query_from, needs=engine.choosy)
            query = asked.query
            asks = client_asks(headers, self.config, engine.candidates)
            ignored = asks.ignored
            outcome = await self._decide(engine, asked, asks, policy or self.config.policy, unavailable, started)
            if outcome.decision is not None:
                key = (headers.get(self.config.session_header), asked.opening, client)
                candidate, cause = self._conversation_model(outcome.decision, key)
                outcome = Outcome(cause, outcome.decision, outcome.queue_ms)
        except Exception:  # whatever it is, the request gets its answer
            _LOGGER.exception("a decision failed")
            outcome = Outcome(verdict.ERROR)
        found = self._verdict(engine, model, wanted, outcome, candidate, ignored, started)
        spans.finish(span, found)
        if self._log is not None:
            self._log.write(found.record(query, with_text=self.config.log_text))
        return self._counted(found)

    async def _decide(
        self,
        engine: Engine,
        asked: Asked,
        asks: Asks,
        policy: str | None,
        unavailable: Collection[str],
        started: float,
    ) -> Outcome:
        if asked.query is None:
            return Outcome(verdict.NO_QUERY)
        allowed = self._allowed(engine, asked.needs, asks, unavailable)
        if not allowed:
            return Outcome(verdict.NO_CANDIDATES)
        everyone = len(allowed) == len(engine.candidates)
        question = Question(asked.query, asks.beta, policy, None if everyone else allowed, started)
        return await self._calls.route(engine, question)

    def _allowed(self, engine: Engine, needs: Needs, asks: Asks, unavailable: Collection[str]) -> list[str]:
        masked = self._cooldowns.current().union(*map(self._candidates_of, unavailable))
        if not masked and asks.candidates is None and not engine.choosy:
            return list(engine.capabilities)
        return [
            name
            for name, capability in engine.capabilities.items()
            if name not in masked and capability.meet(needs) and (asks.candidates is None or name in asks.candidates)
        ]

    def _conversation_model(self, decision: Decision, key: tuple[str | None, str, str]) -> tuple[str, str]:
        """(candidate, cause): the decision's, or the conversation's earlier one."""
        margin = self.config.sticky_margin
        if margin is None:
            return decision.model, verdict.ROUTED
        conversation = _conversation(*key)
        previous = self._conversations.get(conversation)
        stays = previous is not None and keep(decision, previous, margin)
        candidate = previous if stays and previous is not None else decision.model
        self._conversations.put(conversation, candidate)
        return candidate, verdict.STICKY if stays else verdict.ROUTED

    def _verdict(
        self,
        engine: Engine,
        model: str,
        wanted: bool,
        outcome: Outcome,
        candidate: str | None,
        ignored: tuple[str, ...],
        started: float,
    ) -> Verdict:
        default = self.config.default_model
        if candidate is None:
            candidate = default if default in engine.candidates else None
        selected = self.config.upstream(candidate or default)
        shadow = self.config.shadow
        sent = selected
        if shadow:  # as without arllm; but nobody upstream knows the alias
            sent = self.config.upstream(default) if wanted else model
        return Verdict(
            model=sent,
            changed=sent != model,
            reason=verdict.SHADOW if shadow else outcome.cause,
            candidate=candidate,
            selected=selected,
            cause=outcome.cause,
            decision=outcome.decision,
            bundle=engine.label,
            routing_ms=(time.perf_counter() - started) * 1e3,
            queue_ms=outcome.queue_ms,
            ignored=ignored,
        )

    def _untouched(self, engine: Engine, model: str, started: float) -> Verdict:
        """The verdict on a request that names a concrete model."""
        return Verdict(
            model=model,
            changed=False,
            reason=verdict.PINNED,
            candidate=min(self._candidates_of(model), default=None),
            selected=model,
            cause=verdict.PINNED,
            decision=None,
            bundle=engine.label,
            routing_ms=(time.perf_counter() - started) * 1e3,
        )

    def _counted(self, found: Verdict) -> Verdict:
        if self.metrics is not None:
            self.metrics.decided(found)
        return found

    def cool_down(self, model: str, seconds: float) -> None:
        """Don't choose a model (by the gateway's name or the pool's) for a while."""
        for name in self._candidates_of(model):
            self._cooldowns.start(name, seconds)

    def recovered(self, model: str) -> None:
        """Choose a model again."""
        for name in self._candidates_of(model):
            self._cooldowns.end(name)

    def _candidates_of(self, model: str) -> frozenset[str]:
        return self.engine.by_name.get(model, frozenset())

    def _models(self) -> frozenset[str]:
        return self.engine.upstreams | {self.config.upstream(self.config.default_model)}

    @property
    def queue_length(self) -> int:
        """Decisions that wait: for a thread, or for their turn in an event loop."""
        return self._calls.queued

    @property
    def breaker_open(self) -> bool:
        return self._calls.breaker.open

    def reload(self) -> Engine:
        """Load the configured bundle and pool again, beside what serves, and swap. Blocks: call it in a thread.

        Raises:
            ArllmError, OSError: what was wrong; the old bundle serves on.
        """
        with self._reloading:
            try:
                engine = self._load(self.config)
            except Exception as error:
                self.last_reload = f"refused: {error}"
                _LOGGER.error("reload refused, %s serves on: %s", self.engine.label, error)
                if self.metrics is not None:
                    self.metrics.reloaded("refused")
                raise
            self.engine = engine
            self._calls.breaker.success()  # the failures were the old one's
            self.last_reload = f"swapped: {engine.label}"
            _LOGGER.info("reloaded: %s serves", engine.label)
            if self.metrics is not None:
                self.metrics.reloaded("swapped")
                self.metrics.serving(engine, self._models())
            return engine

    def try_reload(self) -> bool:
        """:meth:`reload`, and whether it went well; the reason is in ``last_reload``, the log and the metrics."""
        try:
            self.reload()
        except Exception:  # logged and counted there
            return False
        return True

    def close(self) -> None:
        """Stop the threads, and write what the decision log still holds."""
        if self._watcher is not None:
            self._watcher.close()
        self._calls.close()
        if self._log is not None:
            self._log.close()


def _conversation(session: str | None, opening: str, client: str) -> str:
    """The key of a conversation: the session that the client names, or its first user turn."""
    parts = (client, "session", session) if session else (client, "opening", opening)
    return hashlib.blake2b(repr(parts).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
