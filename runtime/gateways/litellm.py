"""Inside LiteLLM's proxy: a ``CustomLogger`` that picks the model of requests for ``auto``.

Needs the extra ``litellm``. Of the proxy it knows the hooks, the deployments' health and what a key may call; it
decides nothing. In the proxy's YAML:

    litellm_settings:
      callbacks: [prometheus, arllm.runtime.gateways.litellm.hook]
    callback_settings: {arllm: {config: arllm.toml}}
"""

from __future__ import annotations

import atexit
import logging
import time
from collections.abc import Callable, Collection
from contextvars import ContextVar
from typing import Any

from arllm.runtime.errors import InputError, needs_extra
from arllm.runtime.gateways.asks import is_ours
from arllm.runtime.gateways.config import GatewayConfig
from arllm.runtime.gateways.gate import Gateway
from arllm.runtime.gateways.verdict import Verdict

with needs_extra("litellm", "the LiteLLM hook"):
    from litellm.integrations.custom_logger import CustomLogger
    from prometheus_client import REGISTRY

    import litellm

_LOGGER = logging.getLogger("arllm.gateway")

SECTION = "arllm"  # of callback_settings
LOOK_SECONDS = 1.0  # how old the view of deployments and keys may be
# LiteLLM's names of calls that carry a conversation; it asks the hook before every other call too.
ROUTED_CALLS = frozenset(
    {
        *("completion", "acompletion", "text_completion", "atext_completion"),
        *("responses", "aresponses", "anthropic_messages"),
    }
)

# A request is one task from the first hook to the last, so its verdict travels in the task's context: LiteLLM
# copies and replaces the request's dict on the way, and passes what it doesn't know in there to the provider.
_VERDICT: ContextVar[Verdict | None] = ContextVar("arllm_verdict", default=None)


class RoutingHook(CustomLogger):  # type: ignore[misc]
    """Rewrites ``data["model"]``, and answers with the decision's headers.

    Args:
        router: LiteLLM's own ``Router``, which knows the deployments; None = there is none (yet).
    """

    def __init__(self, gateway: Gateway, router: Callable[[], Any] | None = None) -> None:
        super().__init__()
        self.gateway = gateway
        self._router = router or _proxy_router
        self._looked = float("-inf")
        self._deployments: dict[str, list[str]] = {}  # by name, as of the last look
        self._ids: list[str] = []  # of all of them
        self._out: frozenset[str] = frozenset()  # names
        self._beyond: dict[tuple[Any, ...], frozenset[str]] = {}  # by key, for LOOK_SECONDS
        self._warned: set[str] = set()

    async def async_pre_call_hook(
        self, user_api_key_dict: Any, cache: Any, data: dict[str, Any], call_type: str
    ) -> dict[str, Any]:
        """Where LiteLLM lets callbacks change a request: after authorization, which saw the alias."""
        _strip(data)
        if call_type not in ROUTED_CALLS:
            return data
        request = data.get("proxy_server_request") or {}
        headers = {str(name).lower(): value for name, value in (request.get("headers") or {}).items()}
        found = await self.gateway.handle(
            data, headers, unavailable=await self._unavailable(user_api_key_dict), client=_client(user_api_key_dict)
        )
        _VERDICT.set(found)
        if found.changed:
            data["model"] = found.model
        return data

    async def async_post_call_response_headers_hook(
        self,
        data: dict[str, Any],
        user_api_key_dict: Any,
        response: Any,
        request_headers: dict[str, str] | None = None,
        litellm_call_info: dict[str, Any] | None = None,
    ) -> dict[str, str] | None:
        """The headers of every answer, also of a failed or streamed one."""
        found = _VERDICT.get()
        return None if found is None else found.headers()

    async def _unavailable(self, key: Any) -> frozenset[str]:
        """Names that must not be chosen for this key now."""
        names = self.gateway.engine.upstreams
        router = self._router()
        try:
            down = frozenset() if router is None else await self._down(router, names)
        except Exception:  # LiteLLM's inside, or its Redis: the request gets its answer
            _LOGGER.exception("the deployments' health is not known; any candidate may be chosen")
            down = frozenset()
        try:
            return down | await self._beyond_key(key, names, router)
        except Exception:
            _LOGGER.exception("what a key may call is not known; it gets the default model")
            return names

    async def _down(self, router: Any, names: frozenset[str]) -> frozenset[str]:
        """Names without a deployment that works now. LiteLLM asks the same of every request, at the same cost."""
        if time.monotonic() - self._looked > LOOK_SECONDS:
            self._looked = time.monotonic()  # before waiting: the others go on with the last view
            self._beyond.clear()
            self._deployments, self._out = await self._look(router, names)
            self._ids = [deployment for rows in self._deployments.values() for deployment in rows]
        cooldowns = router.cooldown_cache
        cooling = await cooldowns.async_get_active_cooldowns(model_ids=self._ids, parent_otel_span=None)
        if not cooling:
            return self._out
        cold = {deployment for deployment, _ in cooling}
        return self._out | {name for name, rows in self._deployments.items() if rows and cold.issuperset(rows)}

    async def _look(self, router: Any, names: Collection[str]) -> tuple[dict[str, list[str]], frozenset[str]]:
        """(ids of the deployments of each name, names that are out: all paused or unhealthy, or there is none)."""
        rows = {name: [row["model_info"] for row in router.get_model_list(model_name=name) or []] for name in names}
        serving = {name: [str(m["id"]) for m in infos if not m.get("blocked")] for name, infos in rows.items()}
        unknown = {name for name, infos in rows.items() if not infos}
        if unknown - self._warned:
            listed = ", ".join(sorted(unknown))
            _LOGGER.warning("never chosen, since model_list lacks them (the setting names maps names): %s", listed)
            self._warned |= unknown
        out = {name for name, ids in serving.items() if not ids}
        if self.gateway.config.shadow:  # nobody has to serve them
            out -= unknown
        if router.enable_health_check_routing:
            out |= await router.async_get_fully_unhealthy_model_names()
        return serving, frozenset(out)

    async def _beyond_key(self, key: Any, names: frozenset[str], router: Any) -> frozenset[str]:
        """Names that a key, or its team, may not call. A key that may call none of them (but the alias) gets all."""
        limits = tuple(tuple(models or ()) for models in (key.models, key.team_models))
        if not any(limits):
            return frozenset()
        identity = (*limits, key.team_id, tuple(key.access_group_ids or ()))
        if identity not in self._beyond:
            beyond: set[str] = set()
            for models in filter(None, limits):
                holder = key.model_copy(update={"models": list(models)})
                allowed = {name for name in names if await _may_call(holder, name, router)}
                beyond |= (names - allowed) if allowed else set()
            self._beyond[identity] = frozenset(beyond)
        return self._beyond[identity]


def make_hook() -> RoutingHook:
    """The hook of ``callback_settings: {arllm: …}``: settings by name, or ``config``: their file, or both.

    Its metrics go into the process's registry, which LiteLLM's ``/metrics`` shows.

    Raises:
        ArllmError: no settings, wrong ones, or a bundle that can't be loaded. The proxy then doesn't start.
    """
    given = (litellm.callback_settings or {}).get(SECTION)
    if not isinstance(given, dict) or not given:
        raise InputError(f"LiteLLM's YAML has no `callback_settings: {{{SECTION}: {{config: FILE}}}}`")
    settings = dict(given)
    file = settings.pop("config", None)
    where = f"callback_settings: {SECTION}"
    if file is not None and not isinstance(file, str):
        raise InputError(f"{where}: config: expected the path of a settings file, not {file!r}")
    if file is None:
        gateway = Gateway(GatewayConfig.from_mapping(settings, where), registry=REGISTRY)
    else:
        gateway = Gateway(GatewayConfig.from_file(file, **settings), registry=REGISTRY)
    atexit.register(gateway.close)  # LiteLLM tells callbacks nothing of its end
    return RoutingHook(gateway)


def __getattr__(name: str) -> Any:
    """``hook``: made when LiteLLM asks for it, once; importing this module loads nothing."""
    if name == "hook":
        made = globals()["hook"] = make_hook()
        return made
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _proxy_router() -> Any:
    from litellm.proxy import proxy_server

    return proxy_server.llm_router


async def _may_call(key: Any, model: str, router: Any) -> bool:
    from litellm.proxy._types import ProxyException
    from litellm.proxy.auth.auth_checks import can_key_call_model

    try:
        await can_key_call_model(model=model, llm_model_list=None, valid_token=key, llm_router=router)
    except ProxyException:
        return False
    return True


def _client(key: Any) -> str:
    """Whose conversation it is: a key's, and of its users each one's."""
    return f"{key.api_key} {key.end_user_id}"


def _strip(data: dict[str, Any]) -> None:
    """Take our headers out of what LiteLLM forwards to providers, where the operator has it forward any."""
    for field in ("headers", "extra_headers"):
        given = data.get(field)
        if isinstance(given, dict):
            data[field] = {name: value for name, value in given.items() if not is_ours(str(name))}
