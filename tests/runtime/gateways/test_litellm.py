"""Tests of the LiteLLM hook alone: what it hands to the gateway, and what it does with the verdict."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections.abc import Callable, Coroutine
from contextvars import Context
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest

from arllm.runtime.errors import ArllmError, InputError
from arllm.runtime.gateways.gate import Gateway

if any(importlib.util.find_spec(name) is None for name in ("litellm", "apscheduler", "prometheus_client")):
    pytest.skip("the extra litellm is not installed", allow_module_level=True)

T = TypeVar("T")
Ask = Callable[..., dict[str, Any]]


class FakeRouter:
    """Of LiteLLM's Router, what the hook asks: deployments by name, which of them cool down, which are unhealthy."""

    def __init__(self, *names: str) -> None:
        self.rows = {name: [{"model_info": {"id": f"{name}-0"}}] for name in names}
        self.cold: set[str] = set()
        self.unhealthy: set[str] = set()
        self.enable_health_check_routing = True
        self.cooldown_cache = SimpleNamespace(async_get_active_cooldowns=self._cooldowns)
        self.error: Exception | None = None
        self.model_group_alias: dict[str, str] = {}
        self.looks = 0

    async def _cooldowns(self, model_ids: list[str], parent_otel_span: Any) -> list[tuple[str, dict[str, Any]]]:
        if self.error is not None:
            raise self.error
        return [(name, {}) for name in model_ids if name in self.cold]

    def get_model_list(self, model_name: str) -> list[dict[str, Any]] | None:
        self.looks += 1
        return self.rows.get(model_name)

    def get_model_access_groups(self, model_name: str, team_id: str | None = None) -> dict[str, list[str]]:
        return {"cheap ones": [model_name]} if model_name in ("small", "medium") else {}

    async def async_get_fully_unhealthy_model_names(self) -> set[str]:
        return self.unhealthy


def make_key(**fields: Any) -> Any:
    given = {"models": [], "team_models": [], "team_id": None, "access_group_ids": None}
    given |= {"api_key": "hashed", "end_user_id": None, **fields}
    return SimpleNamespace(**given, model_copy=lambda update: make_key(**{**given, **update}))


@pytest.fixture
def deployments() -> FakeRouter:
    return FakeRouter("small", "medium", "large")


@pytest.fixture
def make_hook(make_gateway: Callable[..., Gateway], deployments: FakeRouter) -> Callable[..., Any]:
    from arllm.runtime.gateways.litellm import RoutingHook

    return lambda **settings: RoutingHook(make_gateway(**settings), lambda: deployments)


def run(call: Coroutine[Any, Any, T]) -> T:
    """In a context of its own, as every request of a server."""
    return Context().run(asyncio.run, call)


def route(hook: Any, data: dict[str, Any], key: Any = None, call_type: str = "acompletion") -> dict[str, str]:
    """The response headers of a request; ``data`` is changed as the proxy would send it."""
    key = key or make_key()

    async def both() -> dict[str, str]:
        found = await hook.async_pre_call_hook(user_api_key_dict=key, cache=None, data=data, call_type=call_type)
        assert found is data
        headers = await hook.async_post_call_response_headers_hook(data=data, user_api_key_dict=key, response=None)
        return headers or {}

    return run(both())


def test_the_model_is_rewritten_and_the_headers_say_so(make_hook: Callable[..., Any], ask: Ask) -> None:
    hook = make_hook(names={"large": "openai-large"}, default_model="small")
    hook._router().rows["openai-large"] = hook._router().rows.pop("large")
    data = ask("a large one", temperature=0.5)
    headers = route(hook, data)
    assert data == ask("a large one", model="openai-large", temperature=0.5)
    assert headers["x-arllm-selected-model"] == "openai-large"
    assert headers["x-arllm-decision-reason"] == "routed"
    assert set(headers) >= {"x-arllm-routing-ms", "x-arllm-bundle"}


def test_a_concrete_model_is_left_alone(make_hook: Callable[..., Any], ask: Ask) -> None:
    data = ask("a large one", model="gpt-4o")
    headers = route(make_hook(), data)
    assert data == ask("a large one", model="gpt-4o")
    assert headers["x-arllm-decision-reason"] == "pinned"


@pytest.mark.parametrize("call_type", ["aembedding", "call_mcp_tool", "moderation", "_arealtime", "something new"])
def test_calls_without_a_conversation_are_not_routed(make_hook: Callable[..., Any], ask: Ask, call_type: str) -> None:
    data = ask("a large one")
    assert route(make_hook(), data, call_type=call_type) == {}
    assert data == ask("a large one")


@pytest.mark.parametrize("call_type", ["completion", "acompletion", "aresponses", "anthropic_messages"])
def test_conversations_are_routed(make_hook: Callable[..., Any], ask: Ask, call_type: str) -> None:
    data = ask("a large one")
    route(make_hook(), data, call_type=call_type)
    assert data["model"] == "large"


def test_the_verdict_of_one_request_is_never_another_ones(make_hook: Callable[..., Any], ask: Ask) -> None:
    hook = make_hook()

    async def one(text: str) -> str:
        data = ask(text)
        await hook.async_pre_call_hook(make_key(), None, data, "acompletion")
        await asyncio.sleep(0.01)  # the others are decided meanwhile
        headers = await hook.async_post_call_response_headers_hook(data, make_key(), None)
        return str(headers["x-arllm-selected-model"])

    async def all_at_once() -> list[str]:
        return await asyncio.gather(*(asyncio.create_task(one(f"a {name} one")) for name in names))

    names = ["large", "medium", "small"] * 5
    assert run(all_at_once()) == names


def test_client_headers_are_heard_in_any_case_and_ours_go_no_further(make_hook: Callable[..., Any], ask: Ask) -> None:
    sent = {"X-Arllm-Beta": "1.0", "X-ARLLM-Selected-Model": "large", "x-other": "1"}
    data = ask("a large one", headers=dict(sent), extra_headers=dict(sent), proxy_server_request={"headers": sent})
    route(make_hook(beta_bounds=(0.0, 1.0)), data)
    assert data["model"] == "small"
    assert data["headers"] == data["extra_headers"] == {"x-other": "1"}


def test_headers_are_stripped_from_calls_that_are_not_routed(make_hook: Callable[..., Any]) -> None:
    data = {"model": "embedder", "input": "a", "headers": {"x-arllm-bundle": "forged", "x-other": "1"}}
    route(make_hook(), data, call_type="aembedding")
    assert data["headers"] == {"x-other": "1"}


def test_deployments_that_do_not_work_are_not_chosen(
    make_hook: Callable[..., Any], deployments: FakeRouter, ask: Ask
) -> None:
    def chosen() -> str:
        data = ask("a large medium one")  # large and medium are equally good; large is dearer
        route(make_hook(), data)
        return str(data["model"])

    assert chosen() == "medium"
    deployments.cold = {"medium-0"}
    assert chosen() == "large"
    deployments.rows["medium"].append({"model_info": {"id": "medium-1"}})
    assert chosen() == "medium"  # one of two works
    deployments.rows["medium"][1]["model_info"]["blocked"] = True
    assert chosen() == "large"
    deployments.cold = set()
    assert chosen() == "medium"
    deployments.rows["medium"][0]["model_info"]["blocked"] = True
    assert chosen() == "large"
    deployments.unhealthy = {"large"}
    assert chosen() == "small"


def test_a_cooldown_counts_at_once_and_deployments_are_listed_once_a_second(
    make_hook: Callable[..., Any], deployments: FakeRouter, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook, now = make_hook(), [100.0]
    monkeypatch.setattr("arllm.runtime.gateways.litellm.time", SimpleNamespace(monotonic=lambda: now[0]))
    route(hook, ask("a large one"))
    looks = deployments.looks
    deployments.cold = {"large-0"}
    data = ask("a large one")
    route(hook, data)
    assert data["model"] != "large"
    assert deployments.looks == looks
    now[0] += 1.5
    route(hook, ask("a large one"))
    assert deployments.looks == 2 * looks


def test_candidates_without_a_deployment_are_never_chosen_and_named_once(
    make_hook: Callable[..., Any], deployments: FakeRouter, ask: Ask, caplog: pytest.LogCaptureFixture
) -> None:
    del deployments.rows["large"]
    hook = make_hook()
    for _ in range(2):
        data = ask("a large one")
        assert route(hook, data)["x-arllm-decision-reason"] == "routed"
        assert data["model"] == "medium"
        hook._looked = float("-inf")
    assert [record.getMessage() for record in caplog.records if "model_list lacks" in record.getMessage()] == [
        "never chosen, since model_list lacks them (the setting names maps names): large"
    ]


def test_in_shadow_mode_nobody_has_to_serve_the_candidates(
    make_hook: Callable[..., Any], deployments: FakeRouter, ask: Ask
) -> None:
    deployments.rows.clear()
    data = ask("a large one", model="gpt-4o")
    headers = route(make_hook(shadow=True), data)
    assert data["model"] == "gpt-4o"
    assert headers["x-arllm-shadow-model"] == "large"


def test_without_deployments_the_hook_decides_alone(make_gateway: Callable[..., Gateway], ask: Ask) -> None:
    from arllm.runtime.gateways.litellm import RoutingHook

    data = ask("a large one")
    route(RoutingHook(make_gateway(), lambda: None), data)
    assert data["model"] == "large"


def test_if_health_is_not_known_requests_are_routed(
    make_hook: Callable[..., Any], deployments: FakeRouter, ask: Ask
) -> None:
    deployments.error = ConnectionError("Redis is gone")
    data = ask("a large one")
    assert route(make_hook(), data)["x-arllm-decision-reason"] == "routed"
    assert data["model"] == "large"


@pytest.mark.parametrize(
    ("models", "team", "chosen", "reason"),
    [
        ([], [], "large", "routed"),
        (["auto"], [], "large", "routed"),
        (["auto", "small", "medium"], [], "medium", "routed"),
        (["auto", "medium"], ["auto", "small", "medium"], "medium", "routed"),
        (["auto", "cheap ones"], [], "medium", "routed"),
        (["auto", "med*"], [], "medium", "routed"),
        (["all-proxy-models"], [], "large", "routed"),
        (["all-team-models"], ["auto", "small"], "small", "routed"),
        (["auto", "large"], ["auto", "medium"], "small", "no-candidates"),  # nothing in common: the default
    ],
)
def test_a_key_that_may_name_candidates_is_routed_among_those(
    make_hook: Callable[..., Any], ask: Ask, models: list[str], team: list[str], chosen: str, reason: str
) -> None:
    types = pytest.importorskip("litellm.proxy._types", reason="the extra litellm is not installed")
    key = types.UserAPIKeyAuth(models=models, team_models=team, team_id="a team" if team else None)
    data = ask("a large medium one")
    data["messages"][0]["content"] = "a large one" if chosen == "large" else "a medium large one"
    hook = make_hook(beta=0.0)
    headers = route(hook, data, key)
    assert (data["model"], headers["x-arllm-decision-reason"]) == (chosen, reason)


def test_if_a_key_cannot_be_read_it_gets_the_default(make_hook: Callable[..., Any], ask: Ask) -> None:
    key = make_key(models=["auto", "small"])
    del key.model_copy
    data = ask("a large one")
    headers = route(make_hook(default_model="medium"), data, key)
    assert data["model"] == "medium"
    assert headers["x-arllm-decision-reason"] == "no-candidates"


def test_users_of_one_key_have_conversations_of_their_own(make_hook: Callable[..., Any], ask: Ask) -> None:
    hook = make_hook(sticky_margin=2.0)

    def second_turn(user: str) -> str:
        data = ask("hello", messages=[])
        data["messages"] = [{"role": "user", "content": "hello"}, {"role": "user", "content": "a small one"}]
        return route(hook, data, make_key(end_user_id=user))["x-arllm-decision-reason"]

    route(hook, ask("hello"), make_key(end_user_id="anna"))
    assert second_turn("anna") == "sticky"
    assert second_turn("otto") == "routed"


class TestSettings:
    """What the YAML's ``callback_settings`` may hold."""

    @pytest.fixture
    def settings(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
        import litellm

        return lambda value: monkeypatch.setattr(litellm, "callback_settings", value)

    @pytest.mark.parametrize("value", [{}, {"arllm": None}, {"arllm": {}}, {"arllm": "arllm.toml"}, {"other": {}}])
    def test_missing_ones_are_named(self, settings: Callable[[Any], None], value: Any) -> None:
        from arllm.runtime.gateways.litellm import make_hook

        settings(value)
        with pytest.raises(InputError, match=r"callback_settings: \{arllm: \{config: FILE\}\}"):
            make_hook()

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ({"default_model": "small", "betta": 1}, "callback_settings: arllm: unknown setting 'betta'"),
            ({"config": 1}, "callback_settings: arllm: config: expected the path"),
            ({"config": "nowhere.json"}, "nowhere.json: can't be read"),
            ({"bundle": "nano"}, "callback_settings: arllm: default_model is missing"),
        ],
    )
    def test_wrong_ones_too(self, settings: Callable[[Any], None], value: Any, message: str) -> None:
        from arllm.runtime.gateways.litellm import make_hook

        settings({"arllm": value})
        with pytest.raises(ArllmError) as failure:
            make_hook()
        assert message in str(failure.value)

    def test_a_file_and_what_the_yaml_says_beside_it(
        self, settings: Callable[[Any], None], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from arllm.runtime.gateways import litellm as adapter

        seen: list[Any] = []
        gateway = SimpleNamespace(close=int)
        monkeypatch.setattr(adapter, "Gateway", lambda config, registry: seen.append(config) or gateway)
        (tmp_path / "arllm.json").write_text('{"default_model": "small", "beta": 0.1, "alias": "best"}')
        settings({"arllm": {"config": str(tmp_path / "arllm.json"), "beta": 0.7}})
        adapter.make_hook()
        assert (seen[0].default_model, seen[0].beta, seen[0].alias) == ("small", 0.7, "best")

    def test_the_hook_is_made_when_it_is_asked_for_and_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from arllm.runtime.gateways import litellm as adapter

        made: list[object] = []
        monkeypatch.setattr(adapter, "make_hook", lambda: made.append(object()) or made[-1])
        monkeypatch.delitem(vars(adapter), "hook", raising=False)
        try:
            assert adapter.hook is adapter.hook is made[0]
            assert len(made) == 1
        finally:
            vars(adapter).pop("hook", None)
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            adapter.nothing  # noqa: B018


def test_the_module_does_not_shadow_litellm() -> None:
    import litellm

    from arllm.runtime.gateways import litellm as adapter

    assert adapter.litellm is litellm
    assert issubclass(adapter.RoutingHook, sys.modules["litellm.integrations.custom_logger"].CustomLogger)
    # LiteLLM looks for these in the class itself, not in its bases.
    assert {"async_pre_call_hook", "async_post_call_response_headers_hook"} <= set(vars(adapter.RoutingHook))
