"""The command `arllm serve`: click, nothing else. What it starts is imported inside it."""

from __future__ import annotations

import logging
import os
from typing import Any

import click

from arllm.runtime.errors import InputError, needs_extra
from arllm.runtime.requests import names_of


@click.command()
@click.argument("bundle", required=False)
@click.option("--config", type=click.Path(exists=True), help="Settings, as .json or .toml; options below win.")
@click.option("--default-model", help="Answers when no decision is made. Required, here or in --config.")
@click.option("--pool", type=click.Path(exists=True), help="A pool.json with other costs.")
@click.option("--variant", help="[default: auto]")
@click.option("--threads", type=int, help="Threads of one inference.  [default: 1]")
@click.option("--beta", type=float, help="0 = quality alone, 1 = cost alone.  [default: 0.5]")
@click.option("--policy", help="nir, hdp or hdp-paper.  [default: the bundle's]")
@click.option("--query-from", type=click.Choice(["last-user", "conversation", "first-user"]))
@click.option("--beta-bounds", type=(float, float), help="Hear x-arllm-beta, within these bounds.")
@click.option("--client-candidates", help="Hear x-arllm-candidates, among these names (comma-separated; * = all).")
@click.option("--deadline-ms", type=float, help="[default: from the variant's p99, measured at the start]")
@click.option("--workers", type=int, help="Threads for long queries.  [default: 1]")
@click.option("--max-queue", type=int, help="Decisions that may wait.  [default: 32]")
@click.option("--sticky-margin", type=float, help="A conversation keeps its model unless another is worth this more.")
@click.option("--shadow", is_flag=True, default=None, help="Decide and record, change nothing.")
@click.option("--reload-seconds", type=float, help="Look for a new bundle so often; SIGHUP always reloads.")
@click.option("--log", type=click.Path(dir_okay=False), help="A JSONL decision log, with hashes of the queries.")
@click.option("--log-text", is_flag=True, default=None, help="Log the queries themselves too.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8080, show_default=True, help="0 = any free one.")
@click.option("--token-file", type=click.Path(exists=True), help="Holds the bearer token.  [or ARLLM_TOKEN]")
@click.option("--max-body", default=8_000_000, show_default=True, help="Bytes of a request.")
@click.option("--max-concurrency", default=256, show_default=True, help="Requests at once.")
@click.option("--grace-seconds", default=30.0, show_default=True, help="For accepted requests when stopping.")
@click.option(
    "--envoy",
    is_flag=False,
    flag_value="127.0.0.1:9002",
    metavar="[HOST:PORT]",
    help="Serve Envoy's ext_proc too.  [127.0.0.1:9002]",
)
@click.option(
    "--envoy-header",
    default="plain",
    show_default=True,
    help="Gets the model, for Envoy's routes: plain (x-arllm-model), semantic-router (x-selected-model), "
    "gateway-api (x-gateway-model-name), or a name.",
)
def serve(
    config: str | None,
    client_candidates: str | None,
    host: str,
    port: int,
    token_file: str | None,
    max_body: int,
    max_concurrency: int,
    grace_seconds: float,
    envoy: str | None,
    envoy_header: str,
    **settings: Any,
) -> None:
    """Serve decisions of BUNDLE (a folder, or one that ships) over HTTP: POST /v1/route, and /openapi.json says more.

    \b
    Examples:
      arllm serve nano --default-model google/gemma-2b-it
      arllm serve --config arllm.toml --port 9000
      arllm serve nano --default-model google/gemma-2b-it --envoy
      curl localhost:8080/v1/route -d '{"messages": [{"role": "user", "content": "What is 17 * 23?"}]}'
    """
    with needs_extra("serve", "arllm serve"):
        from arllm.runtime.gateways.server import Companion, HttpConfig
        from arllm.runtime.gateways.server import serve as run
    from arllm.runtime.gateways.config import GatewayConfig, read_settings
    from arllm.runtime.gateways.gate import Gateway

    given = {name: value for name, value in settings.items() if value is not None}
    if client_candidates is not None:
        given["client_candidates"] = tuple(names_of(client_candidates))
    merged = {**({} if config is None else read_settings(config)), **given}
    chosen = GatewayConfig.from_mapping(merged, config or "arllm serve")
    served = HttpConfig(
        host=host,
        port=port,
        token=_token(token_file),
        max_body=max_body,
        max_concurrency=max_concurrency,
        grace_seconds=grace_seconds,
    )
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")  # on stderr
    companions: list[Companion] = []  # servers beside the HTTP one
    if envoy is not None:
        with needs_extra("envoy", "arllm serve --envoy"):
            from arllm.runtime.gateways.envoy import EnvoyConfig, companion, parse_address
        beside, at = parse_address(envoy)
        companions.append(companion(EnvoyConfig(beside, at, envoy_header, max_body, grace_seconds=grace_seconds)))
    gateway = Gateway(chosen)
    try:
        if served.token is None and host not in ("127.0.0.1", "::1", "localhost"):
            click.echo(f"warning: {host} may be reached from elsewhere, and no token is asked for", err=True)
        label = gateway.engine.label
        run(gateway, served, companions, lambda address: click.echo(f"serving {label} on {address}", err=True))
    finally:
        gateway.close()


def _token(path: str | None) -> str | None:
    """The token: never an argument, where every user of the machine would see it."""
    if path is None:
        return os.environ.get("ARLLM_TOKEN") or None
    with open(path, encoding="utf-8") as file:
        token = file.read().strip()
    if not token or not token.isascii():
        raise InputError(f"{path}: expected a token of ASCII characters")
    return token
