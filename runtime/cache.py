"""An exact, bounded cache of decisions: a query that is asked again in the same way gets the decision it got.

Knows nothing about routers; each owns its own. Keys are compared whole, never by hash alone.
"""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from arllm.runtime.answer import Decision

BYTES_PER_ENTRY = 4096  # of text, on average over the cache: many more queries are shorter than longer


class Key(NamedTuple):
    """What a decision of one router depends on."""

    text: str
    beta: float
    policy: str
    candidates: bytes | None  # their positions in the pool, ascending; None = the whole pool


class Asked(NamedTuple):
    """What a caller asks of a router beside the text, checked."""

    beta: float
    policy: str
    rows: NDArray[np.intp] | None  # positions of the allowed candidates; None = all

    def key(self, text: str) -> Key:
        return Key(text, self.beta, self.policy, None if self.rows is None else self.rows.tobytes())


class CacheInfo(NamedTuple):
    """Counters since loading, and what the cache holds now."""

    hits: int
    misses: int
    entries: int
    capacity: int  # entries at most
    text_bytes: int
    text_capacity: int  # bytes at most, of all texts together


class DecisionCache:
    """The ``capacity`` decisions used last, their texts no more than ``capacity * BYTES_PER_ENTRY`` bytes together.

    Thread-safe. Two threads that miss the same key at once both decide, and the later one is kept.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity, self._text_capacity = capacity, capacity * BYTES_PER_ENTRY
        self._entries: OrderedDict[Key, tuple[Decision, int]] = OrderedDict()  # and the bytes of its text
        self._lock = threading.Lock()
        self._hits = self._misses = self._text_bytes = 0

    def get(self, key: Key) -> Decision | None:
        with self._lock:
            found = self._entries.get(key)
            if found is None:
                self._misses += 1
                return None
            self._hits += 1
            self._entries.move_to_end(key)
            return found[0]

    def put(self, key: Key, decision: Decision) -> None:
        """Keep a decision; the ones used longest ago make room. A text larger than the whole cache isn't kept."""
        size = sys.getsizeof(key.text)
        if size > self._text_capacity:
            return
        with self._lock:
            before = self._entries.pop(key, None)
            self._entries[key] = decision, size
            self._text_bytes += size - (before[1] if before else 0)
            while len(self._entries) > self._capacity or self._text_bytes > self._text_capacity:
                _, (_, freed) = self._entries.popitem(last=False)
                self._text_bytes -= freed

    def info(self) -> CacheInfo:
        with self._lock:
            sizes = len(self._entries), self._capacity, self._text_bytes, self._text_capacity
            return CacheInfo(self._hits, self._misses, *sizes)
