"""Tests of gateways/openapi.py: schemathesis holds the server to its description."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from arllm.runtime.gateways.gate import Gateway

TOKEN = "a token of the test"
CONFIG = "[generation]\nallow-extra-parameters = false\n"  # a header that nobody described is no error in HTTP


def test_the_description_follows_the_settings(
    http_server: Callable[..., httpx.Client], make_gateway: Callable[..., Gateway]
) -> None:
    plain = http_server(make_gateway()).get("/openapi.json").json()
    assert plain["paths"]["/v1/route"]["post"]["parameters"] == []
    assert "securitySchemes" not in plain["components"]
    opened = http_server(make_gateway(beta_bounds=(0.1, 0.9), client_candidates=("*",)), token=TOKEN)
    described = opened.get("/openapi.json").json()
    names = [parameter["name"] for parameter in described["paths"]["/v1/route"]["post"]["parameters"]]
    assert names == ["x-arllm-beta", "x-arllm-candidates"]
    assert described["paths"]["/v1/route"]["post"]["security"] == [{"token": []}]


@pytest.mark.parametrize("token", [None, TOKEN], ids=["open", "token"])
def test_the_server_keeps_its_description(
    http_server: Callable[..., httpx.Client], make_gateway: Callable[..., Gateway], token: str | None, tmp_path: Path
) -> None:
    pytest.importorskip("schemathesis", reason="the extra dev brings schemathesis")
    client = http_server(make_gateway(beta_bounds=(0.1, 0.9), client_candidates=("*",)), token=token)
    secret = "" if token is None else f'[auth.openapi.token]\nbearer = "{token}"\n'
    (tmp_path / "schemathesis.toml").write_text(CONFIG + secret, encoding="utf-8")
    command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()"]
    command += ["--config-file", str(tmp_path / "schemathesis.toml"), "run"]
    command += [f"{client.base_url}/openapi.json", "--checks", "all", "--max-examples", "40", "--seed", "1"]
    command += ["--generation-database", "none", "--no-color"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "5 selected / 5 total" in done.stdout, done.stdout
    counted = client.get("/metrics", headers={} if token is None else {"authorization": f"Bearer {token}"}).text
    assert 'reason="routed"' in counted  # valid requests got there, too
