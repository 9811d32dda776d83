"""The operator's settings of a gateway: one frozen dataclass, from keywords or a JSON or TOML file.

Knows nothing about routers: whether a name is in the pool is checked where a bundle is loaded.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arllm.runtime.decision import check_beta
from arllm.runtime.errors import BetaError, InputError
from arllm.runtime.gateways.query import QUERY_FROM

ANY = "*"  # in client_candidates: every candidate of the pool


@dataclass(frozen=True)
class GatewayConfig:
    """What the operator decides. Clients move nothing beyond ``beta_bounds`` and ``client_candidates``.

    Attributes:
        default_model: answers when no decision is made: deadline, error, overload, open breaker, no candidate left.
            A candidate, or any other name that the gateway knows.
        bundle, variant, threads, pool: as in ``Router.load``.
        names: candidate → the name that the gateway knows it by, where they differ.
        alias: the model name that asks for a decision; ``<alias>/<policy>`` asks for a policy.
        beta, policy: of every decision; policy None = the bundle's.
        query_from: which human text is the query: last-user, conversation or first-user.
        beta_bounds: where given, the header ``x-arllm-beta`` is heard, and clamped into these bounds.
        client_candidates: where given, the header ``x-arllm-candidates`` may choose among these; ("*",) = all.
        deadline_ms: of a decision, from the request's arrival; None = from the variant's p99, measured at loading.
        inline_ms: a query whose inference takes less (measured at loading) runs in the event loop; 0 = none does.
        workers: threads for the others.
        max_queue: decisions that may wait for a thread; beyond, the default model answers.
        breaker_failures, breaker_seconds: so many failures in a row, and the default model answers for so long.
        sticky_margin: where given, a conversation keeps its model unless another has this much more utility.
        sticky_seconds, sticky_entries: how long and how many conversations are remembered.
        session_header: names the conversation; without it, the first user turn does.
        shadow: decide and record, change nothing.
        reload_seconds: how often the bundle and pool files are looked at; None = never.
        log: a JSONL decision log; log_text also writes the query itself, in place of a hash alone.
        log_bytes, log_files: a file's size, and how many older ones are kept.
        log_queue: records that may wait for the disk; beyond, they are dropped and counted.
    """

    default_model: str
    bundle: str = "nano"
    variant: str = "auto"
    threads: int | None = None
    pool: str | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    alias: str = "auto"
    beta: float = 0.5
    policy: str | None = None
    query_from: str = "last-user"
    beta_bounds: tuple[float, float] | None = None
    client_candidates: tuple[str, ...] = ()
    deadline_ms: float | None = None
    inline_ms: float = 2.0
    workers: int = 1
    max_queue: int = 32
    breaker_failures: int = 5
    breaker_seconds: float = 5.0
    sticky_margin: float | None = None
    sticky_seconds: float = 3600.0
    sticky_entries: int = 10_000
    session_header: str = "x-arllm-session"
    shadow: bool = False
    reload_seconds: float | None = None
    log: str | None = None
    log_text: bool = False
    log_bytes: int = 100_000_000
    log_files: int = 5
    log_queue: int = 1000

    def __post_init__(self) -> None:
        for name in ("default_model", "bundle", "variant", "alias", "session_header"):
            _check(isinstance(getattr(self, name), str) and getattr(self, name).strip(), name, "a name", self)
        for name in ("pool", "policy", "log"):
            value = getattr(self, name)
            _check(value is None or (isinstance(value, str) and value), name, "a name", self)
        for name, least in _COUNTS.items():
            value = getattr(self, name)
            right = isinstance(value, int) and not isinstance(value, bool) and value >= least
            _check(right, name, f"a whole number of at least {least}", self)
        for name in _AMOUNTS:
            _check(_amount(getattr(self, name)), name, "a finite number >= 0", self)
        for name in _OPTIONAL_AMOUNTS:
            value = getattr(self, name)
            _check(value is None or (_amount(value) and value > 0), name, "a finite number > 0, or none", self)
        _check(self.sticky_margin is None or _amount(self.sticky_margin), "sticky_margin", "a number >= 0", self)
        for name in ("shadow", "log_text"):
            _check(isinstance(getattr(self, name), bool), name, "true or false", self)
        _check(self.query_from in QUERY_FROM, "query_from", f"one of {', '.join(QUERY_FROM)}", self)
        pairs = isinstance(self.names, Mapping) and all(
            isinstance(name, str) and name for pair in self.names.items() for name in pair
        )
        _check(pairs, "names", "a table candidate = name", self)
        asked = self.client_candidates
        listed = isinstance(asked, (list, tuple)) and all(isinstance(name, str) for name in asked)
        _check(listed, "client_candidates", "a list of names", self)
        object.__setattr__(self, "client_candidates", tuple(asked))
        object.__setattr__(self, "session_header", self.session_header.lower())
        self._check_betas()

    def _check_betas(self) -> None:
        try:
            object.__setattr__(self, "beta", check_beta(self.beta))
            if self.beta_bounds is not None:
                _check(
                    isinstance(self.beta_bounds, (list, tuple)) and len(self.beta_bounds) == 2,
                    "beta_bounds",
                    "two numbers",
                    self,
                )
                low, high = (check_beta(bound) for bound in self.beta_bounds)
                _check(low <= high, "beta_bounds", "two numbers, the lower one first", self)
                object.__setattr__(self, "beta_bounds", (low, high))
        except BetaError as error:
            raise InputError(f"gateway setting beta or beta_bounds: {error}") from None

    def upstream(self, model: str) -> str:
        """The name by which the gateway knows a candidate (or the default model)."""
        return self.names.get(model, model)

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any], where: str = "gateway settings") -> GatewayConfig:
        """Settings by name, as a file, a YAML section or a command line gives them.

        Raises:
            InputError: names ``where`` and the setting at fault.
        """
        if not isinstance(settings, Mapping):
            raise InputError(f"{where}: expected a table of settings, not {type(settings).__name__}")
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(str(key) for key in set(settings) - set(known))
        if unknown:
            raise InputError(f"{where}: unknown setting {unknown[0]!r}: there are {', '.join(known)}")
        if "default_model" not in settings:
            raise InputError(f"{where}: default_model is missing: the model that answers when no decision is made")
        try:
            return cls(**settings)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], **overrides: Any) -> GatewayConfig:
        """Settings from a ``.json`` or ``.toml`` file (TOML from Python 3.11 on); ``overrides`` win.

        Raises:
            InputError: names the file, and the setting at fault.
        """
        return cls.from_mapping({**read_settings(path), **overrides}, str(path))


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The table that a settings file holds, unchecked. Raises InputError: not readable, not JSON or TOML."""
    file = Path(path)
    try:
        data = file.read_bytes()
    except OSError as error:
        raise InputError(f"{file}: can't be read: {error.strerror}") from None
    settings: Any
    try:
        if file.suffix == ".toml":
            if sys.version_info < (3, 11):
                raise InputError(f"{file}: TOML is read from Python 3.11 on; write the settings as JSON")
            import tomllib

            settings = tomllib.loads(data.decode())
        else:
            settings = json.loads(data)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not valid {'TOML' if file.suffix == '.toml' else 'JSON'}: {error}") from None
    if not isinstance(settings, dict):
        raise InputError(f"{file}: expected a table of settings, not {type(settings).__name__}")
    return settings


_COUNTS = {
    "workers": 1,
    "max_queue": 1,
    "breaker_failures": 1,
    "sticky_entries": 1,
    "log_bytes": 1,
    "log_files": 0,
    "log_queue": 1,
}
_AMOUNTS = ("inline_ms", "breaker_seconds", "sticky_seconds")
_OPTIONAL_AMOUNTS = ("deadline_ms", "reload_seconds")


def _amount(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0 and math.isfinite(value)


def _check(right: object, name: str, expected: str, config: GatewayConfig) -> None:
    if not right:
        raise InputError(f"gateway setting {name}: expected {expected}, not {getattr(config, name)!r}")
