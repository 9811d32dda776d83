"""Load on a gateway: fake upstreams, a closed-loop generator, and two arms compared in one run.

Knows nothing about LiteLLM, Envoy or arllm: an arm is an address, headers and bodies. Standard library and numpy.

    async with Upstream("small") as small, Upstream("large") as large:
        ...  # start a gateway that knows small.url and large.url, with and without arllm
        levels = await compare(Target(plain_port, path, bodies), Target(routed_port, path, bodies), (1, 4, 16), 30)
    print(table(levels)); json.dumps(as_json(levels))
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from load_answers import completion, events, response

T = TypeVar("T")
QUANTILES = (50, 95, 99)
_PATIENCE = 30.0  # seconds after which a request counts as failed
_REASONS = {200: "OK", 429: "Too Many Requests", 500: "Internal Server Error", 503: "Service Unavailable"}


@dataclass(frozen=True)
class Seen:
    """A request as an upstream got it; header names in lower case."""

    path: str
    headers: Mapping[str, str]
    body: dict[str, Any]
    size: int  # bytes of the body


class Upstream:
    """An OpenAI-compatible server that says ``{name} answers``: chat completions, also streamed; responses.

    Attributes:
        url: its base, with ``/v1``. seen: every POST, in order; ``keep=False`` only counts, for load.
        status: other than 200 = every request is refused with it; delay: seconds before an answer. Both may change.
    """

    def __init__(self, name: str, *, keep: bool = True) -> None:
        self.name, self.status, self.delay = name, 200, 0.0
        self.seen: list[Seen] = []
        self.models: Counter[str] = Counter()  # what was asked for, by name
        self.port = 0
        self._keep = keep
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def start(self) -> Upstream:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 26, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()

    async def __aenter__(self) -> Upstream:
        return await self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                first, headers, raw = await _message(reader)
                method, path, _ = first.split(" ")
                if method != "POST":  # a gateway that looks around
                    writer.write(_answer(200, {"object": "list", "data": []}))
                    continue
                body = json.loads(raw)
                self.models[str(body.get("model"))] += 1
                if self._keep:
                    self.seen.append(Seen(path, headers, body, len(raw)))
                if self.delay:
                    await asyncio.sleep(self.delay)
                if self.status != 200:
                    writer.write(_answer(self.status, {"error": {"message": f"{self.name} refuses"}}))
                elif path.endswith("/responses"):
                    writer.write(_answer(200, response(self.name, body)))
                elif body.get("stream"):
                    await self._stream(writer, body)
                else:
                    writer.write(_answer(200, completion(self.name, body)))
                await writer.drain()
        writer.close()

    async def _stream(self, writer: asyncio.StreamWriter, body: Mapping[str, Any]) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for event in events(self.name, body):
            data = f"data: {event}\n\n".encode()
            writer.write(b"%x\r\n%s\r\n" % (len(data), data))
            await writer.drain()
        writer.write(b"0\r\n\r\n")


class Background:
    """An event loop in a thread, for tests whose client is a plain function: ``.run(upstream.start())``."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)


@dataclass(frozen=True)
class Target:
    """One arm: where requests go. ``bodies`` are sent in turn. ``watch``: response headers that are kept."""

    port: int
    path: str
    bodies: Sequence[bytes]
    headers: Mapping[str, str] = field(default_factory=dict)
    watch: Sequence[str] = ()

    def requests(self) -> list[bytes]:
        fixed = {"host": f"127.0.0.1:{self.port}", "content-type": "application/json", **self.headers}
        head = f"POST {self.path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in fixed.items())
        return [f"{head}content-length: {len(body)}\r\n\r\n".encode() + body for body in self.bodies]


@dataclass
class Samples:
    """What an arm answered: milliseconds of each good request, and the others, counted by what they said."""

    ms: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    watched: dict[str, list[str]] = field(default_factory=dict)
    seconds: float = 0.0

    def add(self, other: Samples) -> None:
        self.ms += other.ms
        self.failures += other.failures
        self.seconds += other.seconds
        for name, values in other.watched.items():
            self.watched.setdefault(name, []).extend(values)

    @property
    def failed(self) -> int:
        return self.failures.total() if hasattr(self.failures, "total") else sum(self.failures.values())

    @property
    def rate(self) -> float:
        return len(self.ms) / self.seconds if self.seconds else 0.0


async def drive(target: Target, concurrency: int, seconds: float, per_second: float | None = None) -> Samples:
    """``concurrency`` clients, each with one connection, ask one request after the other for ``seconds``.

    Args:
        per_second: requests of all of them together, as far as they are answered in time; None = without a pause.
    """
    found = Samples(watched={name: [] for name in target.watch})
    bodies = itertools.cycle(target.requests())
    started = time.perf_counter()
    pace = concurrency / per_second if per_second else 0.0  # seconds, of one client
    clients = (
        _client(target, bodies, started + pace * number / concurrency, pace, started + seconds, found)
        for number in range(concurrency)
    )
    await asyncio.gather(*clients)
    found.seconds = time.perf_counter() - started
    return found


async def _client(
    target: Target, requests: Iterator[bytes], due: float, pace: float, until: float, found: Samples
) -> None:
    reader, writer = None, None
    while time.perf_counter() < until and due < until:
        if due > time.perf_counter():
            await asyncio.sleep(due - time.perf_counter())
        due += pace
        asked = time.perf_counter()
        try:
            if reader is None or writer is None:
                reader, writer = await asyncio.open_connection("127.0.0.1", target.port, limit=1 << 26)
                asked = time.perf_counter()
            writer.write(next(requests))
            first, headers, raw = await asyncio.wait_for(_message(reader), _PATIENCE)
        except (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError) as error:
            found.failures[type(error).__name__] += 1
            reader = writer = None
            await asyncio.sleep(0.01)
            continue
        status = first.split(" ")[1]
        if status == "200":
            found.ms.append((time.perf_counter() - asked) * 1e3)
            for name, values in found.watched.items():
                values.append(headers.get(name, ""))
        else:
            found.failures[f"{status} {raw[:200].decode(errors='replace')}"] += 1
        if headers.get("connection", "").lower() == "close":
            writer.close()
            reader = writer = None
    if writer is not None:
        writer.close()


@dataclass
class Level:
    """The arms at one concurrency. ``pairs``: (plain, routed) p50 of every round of slices; ``beside``: a third arm,
    what the gateway itself pays for being extended, and its own pairs.
    """

    concurrency: int
    plain: Samples
    routed: Samples
    pairs: list[tuple[float, float]] = field(default_factory=list)
    beside: Samples | None = None
    beside_pairs: list[tuple[float, float]] = field(default_factory=list)

    def samples(self) -> list[Samples]:
        return [arm for arm in (self.plain, self.routed, self.beside) if arm is not None]


async def compare(
    plain: Target,
    routed: Target,
    levels: Sequence[int],
    seconds: float,
    per_second: float | None = None,
    slice_seconds: float = 0.5,
    beside: Target | None = None,
) -> list[Level]:
    """The arms at rising concurrency, in short slices by turns, so that what else the machine does hits all.

    What routing adds is judged by the median, over the rounds of slices, of the difference of two p50s within a
    round. A difference of p50s over the whole run would mix a machine that drifts (clock, neighbours, garbage of the
    proxy's) into it: the more, the longer the run. Within a round of about a second the arms meet the same machine,
    and a round that something hit moves a median by one place, a mean by all of it. The order of the arms rotates,
    so that being first or last is nobody's alone. The quartiles are shown with it: how far rounds disagree.

    Args:
        seconds: of the whole run, an unmeasured slice of each arm and level included.
        per_second: as in :func:`drive`.
        beside: a third arm, in the same rounds.
    """
    found = []
    targets = [plain, routed, *([] if beside is None else [beside])]
    rounds = max(1, int(seconds / len(levels) / slice_seconds / len(targets)))
    length = seconds / len(levels) / (len(targets) * (rounds + 0.5))
    for concurrency in levels:
        for arm in targets:
            await drive(arm, concurrency, length / 2, per_second)  # connections, caches
        level = Level(concurrency, Samples(), Samples(), beside=None if beside is None else Samples())
        into = level.samples()
        for number in range(rounds):
            order = list(range(len(targets)))
            order = order[number % len(order) :] + order[: number % len(order)]
            p50 = [float("nan")] * len(targets)
            for at in order:
                samples = await drive(targets[at], concurrency, length, per_second)
                into[at].add(samples)
                if samples.ms:
                    p50[at] = float(np.median(samples.ms))
            level.pairs.append((p50[0], p50[1]))
            if beside is not None:
                level.beside_pairs.append((p50[0], p50[2]))
        found.append(level)
    return found


def quartiles(pairs: Sequence[tuple[float, float]]) -> list[float]:
    """Lower quartile, median and upper quartile of what the second of each pair adds to the first.

    A slice in which nothing was answered takes no part. NaN where there is no other.
    """
    added = [b - a for a, b in pairs if not np.isnan(b - a)]
    return [float(value) for value in np.percentile(added, (25, 50, 75))] if added else [float("nan")] * 3


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """``{"p50": …, "p95": …, "p99": …}``; NaN where there is no value."""
    found = np.percentile(values, QUANTILES) if len(values) else np.full(len(QUANTILES), np.nan)
    return {f"p{q}": float(value) for q, value in zip(QUANTILES, found, strict=True)}


def as_json(levels: Sequence[Level]) -> list[dict[str, Any]]:
    """Milliseconds of both arms, and what the routed one adds, as differences and ratios of percentiles."""
    rows = []
    for level in levels:
        plain, routed = percentiles(level.plain.ms), percentiles(level.routed.ms)
        rows.append(
            {
                "concurrency": level.concurrency,
                "plain_ms": plain,
                "routed_ms": routed,
                "added_ms": {q: routed[q] - plain[q] for q in plain},
                "ratio": {q: routed[q] / plain[q] for q in plain},
                "added_p50_ms_by_slice": quartiles(level.pairs),
                "rounds": len(level.pairs),
                "beside_added_p50_ms_by_slice": quartiles(level.beside_pairs) if level.beside else None,
                "requests": [len(arm.ms) for arm in level.samples()],
                "per_second": [level.plain.rate, level.routed.rate],
                "failed": [dict(arm.failures) for arm in level.samples()],
            }
        )
    return rows


def failed(levels: Sequence[Level]) -> int:
    """Requests that got no good answer, of all arms."""
    return sum(arm.failed for level in levels for arm in level.samples())


def table(levels: Sequence[Level]) -> str:
    """The rows of :func:`as_json` for a reader; p50 / p95 / p99 in milliseconds."""
    head = ("clients", "without (ms)", "with (ms)", "added (ms)", "ratio", "added p50 by slice", "req/s", "failed")
    rows = [head]
    for level, row in zip(levels, as_json(levels), strict=True):
        low, middle, high = row["added_p50_ms_by_slice"]
        rows.append(
            (
                str(level.concurrency),
                _triple(row["plain_ms"], ".2f"),
                _triple(row["routed_ms"], ".2f"),
                _triple(row["added_ms"], "+.2f"),
                _triple(row["ratio"], ".2f"),
                f"{middle:+.2f} ({low:+.2f} to {high:+.2f})",
                " / ".join(f"{rate:.0f}" for rate in row["per_second"]),
                str(failed([level])),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _triple(values: Mapping[str, float], form: str) -> str:
    return " / ".join(format(value, form) for value in values.values())


async def _message(reader: asyncio.StreamReader) -> tuple[str, dict[str, str], bytes]:
    """(first line, headers, body) of an HTTP/1.1 message. Raises IncompleteReadError: the peer has gone."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head[:-4].split("\r\n")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if headers.get("transfer-encoding", "").lower() == "chunked":
        parts = []
        while size := int(await reader.readuntil(b"\r\n"), 16):
            parts.append((await reader.readexactly(size + 2))[:-2])
        await reader.readuntil(b"\r\n")
        return first, headers, b"".join(parts)
    return first, headers, await reader.readexactly(int(headers.get("content-length", 0)))


def _answer(status: int, body: Mapping[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"HTTP/1.1 {status} {_REASONS.get(status, 'Error')}\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(data)}\r\n\r\n".encode() + data
