"""The real LiteLLM proxy with a router that fails as told, keys with limits, and deployments on cooldown."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from arllm.runtime.router import Router

if any(importlib.util.find_spec(name) is None for name in ("litellm", "apscheduler", "prometheus_client")):
    pytest.skip("the extra litellm is not installed", allow_module_level=True)
openai: Any = pytest.importorskip("openai", reason="the OpenAI client, of the extra dev, is not installed")

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))  # what the load run uses too
import litellm_world as world  # noqa: E402

TEXT = "Write a haiku about autumn"

# What the router does first, as the file `behaviour` says.
BEFORE = """behaviour = Path("behaviour").read_text()
        if behaviour == "raise":
            raise RuntimeError("as told")
        if behaviour == "die":
            raise SystemExit
        while Path("behaviour").read_text() == "stall":
            time.sleep(0.05)"""

# Keys that say themselves what they may call; LiteLLM's own checks enforce it, as for keys in its database.
KEYS = """
from litellm.proxy._types import UserAPIKeyAuth


async def check(request, api_key):
    if api_key == "sk-master":
        return UserAPIKeyAuth(api_key=api_key, user_role="proxy_admin")
    _, models, team = api_key.split(":")  # sk:model,model:model,model
    return UserAPIKeyAuth(
        api_key=api_key, models=models.split(",") if models else [], team_models=team.split(",") if team else []
    )
"""


@pytest.fixture(scope="module")
def faulty(providers: Any, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    settings = world.settings_of(
        providers.models(),
        "faulty.hook",
        bundle=str(tiny_bundle),
        default_model="sim-small",
        names=providers.names(),
        beta=0.0,
        deadline_ms=3000,
        breaker_failures=2,
        breaker_seconds=1.0,
        inline_ms=0,
    )
    settings["litellm_settings"]["enable_post_custom_auth_checks"] = True
    settings["general_settings"] |= {"custom_auth": "keys.check", "custom_auth_run_common_checks": True}
    settings["router_settings"] |= {"allowed_fails": 0, "cooldown_time": 600}
    files = {"faulty.py": world.AROUND.replace("BEFORE", BEFORE), "keys.py": KEYS, "behaviour": "work"}
    made = world.Proxy(tmp_path_factory.mktemp("faulty"), settings, files)
    try:
        made.wait()
        yield made
    finally:
        made.close()


@pytest.fixture
def behave(faulty: Any) -> Iterator[Callable[[str], None]]:
    def change(behaviour: str) -> None:
        (faulty.folder / "next").write_text(behaviour, encoding="utf-8")
        os.replace(faulty.folder / "next", faulty.folder / "behaviour")

    yield change
    change("work")
    client = faulty.client()
    until = time.monotonic() + 60
    while world.ask(client, TEXT)[1]["x-arllm-decision-reason"] != "routed":  # the breaker closes by itself
        assert time.monotonic() < until
        time.sleep(0.2)


@pytest.mark.parametrize(("behaviour", "reason"), [("raise", "error"), ("die", "error"), ("stall", "deadline")])
def test_a_router_that_is_killed_or_stalls_loses_no_request(
    faulty: Any, providers: Any, behave: Callable[[str], None], behaviour: str, reason: str
) -> None:
    client, before = faulty.client(), faulty.metrics()
    world.ask(client, TEXT)
    behave(behaviour)
    providers.forget()
    reasons = []
    for number in range(8):
        answer, headers = world.ask(client, TEXT, stream=number % 2 == 1)
        assert answer == f"{providers.of['sim-small'].name} answers"
        assert headers["x-arllm-selected-model"] == "at-sim-small"
        reasons.append(headers["x-arllm-decision-reason"])
    assert reasons[0] == reason
    assert set(reasons) == {reason, "breaker"}  # after two failures; a request may still be a probe
    assert providers.counts() == {"sim-small": 8}
    after = faulty.metrics()
    for cause, count in Counter(reasons).items():
        line = f'arllm_routing_fallbacks_total{{reason="{cause}"}}'
        assert after[line] - before.get(line, 0) == count


def test_a_stalling_router_does_not_stall_the_proxy(faulty: Any, behave: Callable[[str], None]) -> None:
    """While the router's thread hangs, a request for a concrete model is answered first, though it came last."""
    done: list[str] = []

    def ask(model: str) -> None:
        world.ask(faulty.client(), TEXT, model=model)
        done.append(model)

    behave("stall")
    with ThreadPoolExecutor(3) as threads:
        routed = [threads.submit(ask, "auto") for _ in range(2)]
        time.sleep(0.2)
        ask("at-sim-tiny")
        for future in routed:
            future.result(60)
    assert done == ["at-sim-tiny", "auto", "auto"]


def test_a_key_needs_the_alias_to_be_routed(faulty: Any, providers: Any) -> None:
    """LiteLLM authorizes what the request names: a key without the alias, or with it alone."""
    client = faulty.client("sk:at-sim-small:")
    providers.forget()
    with pytest.raises((openai.AuthenticationError, openai.PermissionDeniedError)):
        world.ask(client, TEXT)
    assert providers.seen() == []
    assert world.ask(client, TEXT, model="at-sim-small")[0]
    client = faulty.client("sk:auto:")
    with pytest.raises((openai.AuthenticationError, openai.PermissionDeniedError)):
        world.ask(client, TEXT, model="at-sim-small")
    with pytest.raises((openai.AuthenticationError, openai.PermissionDeniedError)):
        world.ask(client, TEXT, model="auto/hdp")
    assert world.ask(faulty.client("sk:auto,auto/hdp:"), TEXT, model="auto/hdp")[0]


@pytest.mark.parametrize(
    ("models", "team", "among"),
    [
        ("", "", None),
        ("auto", "", None),  # the alias grants the whole pool
        ("auto,at-sim-tiny,at-sim-code", "", {"sim-tiny", "sim-code"}),  # a key that may name some gets those
        ("auto,at-sim-*", "", None),
        ("", "auto,at-sim-large", {"sim-large"}),
        ("auto,at-sim-tiny,at-sim-code", "auto,at-sim-code,at-sim-large", {"sim-code"}),
    ],
)
def test_a_key_that_may_name_candidates_is_routed_among_them(
    faulty: Any, providers: Any, router: Router, models: str, team: str, among: set[str] | None
) -> None:
    providers.forget()
    _, headers = world.ask(faulty.client(f"sk:{models}:{team}"), TEXT)
    wanted = router.route(TEXT, 0.0, candidates=None if among is None else sorted(among)).model
    ((_, seen),) = providers.seen()
    assert seen.body["model"] == wanted
    assert headers["x-arllm-decision-reason"] == "routed"


def test_a_candidate_on_cooldown_is_not_chosen(faulty: Any, providers: Any, router: Router) -> None:
    """The last test of this proxy: LiteLLM takes a deployment out after a failure, for ten minutes here."""
    client = faulty.client()
    best = router.route(TEXT, 0.0).model
    second = router.route(TEXT, 0.0, candidates=[name for name in router.pool.names if name != best]).model
    providers.forget()
    providers.of[best].status = 500
    with pytest.raises(openai.InternalServerError) as failure:
        world.ask(client, TEXT, model=f"at-{best}")
    providers.of[best].status = 200
    assert failure.value.response.headers["x-arllm-decision-reason"] == "pinned"  # a failed answer has them too
    for _ in range(3):
        answer, headers = world.ask(client, TEXT)
        assert answer == f"{providers.of[second].name} answers"
        assert headers["x-arllm-selected-model"] == f"at-{second}"
        assert headers["x-arllm-decision-reason"] == "routed"
