"""Tests of the command `arllm serve`: starting, reloading on SIGHUP, finishing what it accepted, bad settings."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

pytest.importorskip("starlette", reason="the extra serve is not installed")

COMMAND = "import sys; from arllm.cli import main; sys.exit(main())"


@pytest.fixture
def command() -> Iterator[Callable[..., tuple[subprocess.Popen[str], str]]]:
    """Starts `arllm serve` on a free port and gives (process, address)."""
    started = []

    def start(*arguments: str) -> tuple[subprocess.Popen[str], str]:
        command = [sys.executable, "-c", COMMAND, "serve", "nano", "--port", "0", *arguments]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("serving "):
                return process, line.split()[-1]
        raise AssertionError(f"it ended with {process.wait()}")

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_the_command_reloads_and_finishes_what_it_accepted(
    command: Callable[..., tuple[subprocess.Popen[str], str]], ask: Any
) -> None:
    process, address = command("--default-model", "google/gemma-2b-it", "--deadline-ms", "20000")
    with httpx.Client(base_url=address, timeout=30, trust_env=False) as client:
        assert client.post("/v1/route", json=ask("What is 17 * 23?")).json()["reason"] == "routed"
        process.send_signal(signal.SIGHUP)
        while not (reload := client.get("/readyz").json()["last_reload"]):
            time.sleep(0.02)
        assert reload.startswith("swapped: nano@")
        body = json.dumps(ask("What is 17 * 23?")).encode()
        with socket.create_connection((client.base_url.host, client.base_url.port or 0), timeout=30) as connection:
            head = f"POST /v1/route HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
            connection.sendall(head.encode() + body[:-10])
            client.get("/healthz")  # by now the request has been accepted
            process.send_signal(signal.SIGTERM)
            while True:  # no new connections from now on
                try:
                    httpx.get(f"{address}/healthz", trust_env=False)
                except httpx.HTTPError:
                    break
            connection.sendall(body[-10:])
            answer = b""
            while chunk := connection.recv(65_536):
                answer += chunk
        assert b" 200 " in answer
        assert b'"routed"' in answer
    assert process.wait(30) == 0


def test_the_command_says_what_is_missing() -> None:
    for arguments, message in (
        (["nano"], "default_model is missing"),
        (["nano", "--default-model", "x", "--policy", "best"], "no policy 'best'"),
        (["nano", "--default-model", "x", "--client-candidates", "huge"], "no candidate 'huge'"),
        (["nowhere", "--default-model", "x"], "nowhere: no bundle here"),
    ):
        command = [sys.executable, "-c", COMMAND, "serve", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode in (1, 2)
        assert message in done.stderr
        assert "Traceback" not in done.stderr
