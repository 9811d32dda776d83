"""RESULTS.md on whole bundles: what a caller waits for, what a host pays at start, what several callers get."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cells import count, ms, table

Found = Mapping[str, Any]

# What is reached for, of a bundle by the begin of its title: most MB on disk, most seconds of a cold start, most MB.
LIMITS = {"nano": (None, 0.5, 150.0), "EmbeddingGemma": (250.0, 2.0, 700.0)}
TAIL = 2.0  # p99 over p50, one caller, at most
ENOUGH = 100  # calls: of fewer, p99 is the maximum
SCALING = 0.8  # of the cores, with a thread for each caller, at least


def section(found: Found) -> str:
    parts = [
        "## Whole bundles\n\n`arllm bench` on each, one thread an inference: `route()` from text to decision. "
        "**Past** marks what misses a figure to reach: p99 (of 100 calls or more) within twice p50 for one caller, "
        "callers in threads of one process with at least 0.8 of the cores, `nano` started in 0.5 s and 150 MB, "
        "EmbeddingGemma's shape in 2 s, 700 MB and 250 MB on disk."
    ]
    parts += [_bundle(one) for one in found["bundles"]]
    if found.get("missing"):
        parts.append(f"Missing: {found['missing']}.")
    return "\n\n".join(parts)


def _bundle(one: Found) -> str:
    bench, (cold,) = one["bench"], one["bench"]["cold"]
    disk, seconds, memory = next(limits for begin, limits in LIMITS.items() if one["title"].startswith(begin))
    took, size = cold["whole_ms"] / 1e3, one["bytes"] / 1e6
    start = [
        ["on disk", _held(size, disk, f"{size:,.0f} MB")],
        ["process start to first decision", _held(took, seconds, f"{took:.2f} s")],
        ["peak memory", _held(cold["peak_mb"], memory, f"{cold['peak_mb']:,.0f} MB")],
    ]
    rows = []
    for row in (row for row in bench["tokens"] if row["callers"] == 1):
        several = next((r for r in bench["tokens"] if r["callers"] > 1 and r["tokens"] == row["tokens"]), None)
        shown, scaling = row["latency"], several["scaling"]["median"] if several else None
        rows.append(
            [
                str(row["tokens"]),
                *(ms(shown[part]) for part in ("p50", "p95")),
                _held(shown["p99"], TAIL * shown["p50"] if shown["n"] >= ENOUGH else None, ms(shown["p99"])),
                str(shown["n"]),
                "not measured" if scaling is None else _held(SCALING / scaling, 1.0, f"{scaling:.2f}"),
            ]
        )
    callers = max(row["callers"] for row in bench["tokens"])
    head = ["tokens", "p50 ms", "p95", "p99", "calls", f"{callers} callers: throughput, share of the cores"]
    parts = ", ".join(f"{name.replace('_', ' ')} {ms(value)}" for name, value in cold["parts"].items())
    deciding = ", ".join(
        f"{row['candidates']:,}: {ms(row['latency']['p50'])}"
        for row in bench["candidates"]
        if row["candidates"] in (16, 1_000)
    )
    return "\n\n".join(
        [
            f"### {one['title']}",
            table(["what", "value"], start),
            f"Cold start, ms: {parts} (medians of {count(cold['processes'], 'start')}). NIR and decision alone, ms "
            f"by candidates: {deciding}.",
            table(head, rows),
        ]
    )


def _held(value: float, most: float | None, text: str) -> str:
    return text if most is None or value <= most else f"**past** {text}"
