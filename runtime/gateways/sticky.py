"""Which model a conversation had last. Bounded in number and age; monotonic time; thread-safe."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from arllm.runtime.answer import Decision


class Conversations:
    """Conversation key → candidate, least recently used first out."""

    def __init__(self, entries: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._entries, self._seconds, self._clock = entries, seconds, clock
        self._models: OrderedDict[str, tuple[str, float]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._models)

    def get(self, key: str) -> str | None:
        with self._lock:
            model, until = self._models.get(key, ("", 0.0))
            return model if model and self._clock() < until else None

    def put(self, key: str, model: str) -> None:
        with self._lock:
            self._models[key] = (model, self._clock() + self._seconds)
            self._models.move_to_end(key)
            while len(self._models) > self._entries:
                self._models.popitem(last=False)


def keep(decision: Decision, previous: str, margin: float) -> bool:
    """Whether a conversation stays with its model: no allowed candidate has more than ``margin`` utility over it.

    Switching throws the provider's prompt cache away, so a better model must be worth the margin.
    """
    if previous == decision.model or previous not in decision.candidates:
        return False
    utility = decision.utility
    return utility[decision.model] - utility[previous] <= margin
