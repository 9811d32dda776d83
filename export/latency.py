"""Median latency of a bundle's variants by the length of a query, interleaved: the machine's drift hits all alike.

What is timed is the encoder's graph on one query, as the runtime runs it. Figures of different bundles compare only
where machine and load were the same.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arllm.runtime.session import Session
from arllm.train.latency.machine import processor

BUCKETS = (16, 64, 256)  # tokens
THREADS = 1
SECONDS = 1.0  # for each bucket, all variants together
LEAST_ROUNDS, MOST_ROUNDS = 7, 200
OUTPUTS = ("query_vector", "familiarity")  # what the runtime asks for


def measure(
    sessions: Mapping[str, Session], ids: Sequence[NDArray[np.int64]], max_tokens: int
) -> dict[str, dict[str, Any]]:
    """Variant → machine, threads, and median milliseconds by tokens, for the buckets that ``max_tokens`` allows.

    ``ids`` are tokenized queries, (L,) each; cut from them end to end come queries of just the wanted lengths.
    """
    tokens = np.resize(np.concatenate(ids), max(BUCKETS))
    figures: dict[str, dict[str, float]] = {name: {} for name in sessions}
    for length in BUCKETS:
        if length <= max_tokens:
            for name, median in _medians(sessions, tokens[:length]).items():
                figures[name][str(length)] = round(median, 3)
    return {name: {"machine": processor(), "threads": THREADS, "ms": ms} for name, ms in figures.items()}


def _medians(sessions: Mapping[str, Session], ids: NDArray[np.int64]) -> dict[str, float]:
    """Variant → median milliseconds on one query, after one run that isn't counted."""
    inputs = {"input_ids": ids[None], "attention_mask": np.ones_like(ids)[None]}
    taken: dict[str, list[float]] = {name: [] for name in sessions}
    end = None
    for round_ in range(1 + MOST_ROUNDS):
        for name, session in sessions.items():
            started = time.perf_counter_ns()
            session.run_many(OUTPUTS, inputs)
            taken[name].append((time.perf_counter_ns() - started) / 1e6)
        end = end or time.perf_counter() + SECONDS
        if round_ >= LEAST_ROUNDS and time.perf_counter() > end:
            break
    return {name: float(np.median(times[1:])) for name, times in taken.items()}
