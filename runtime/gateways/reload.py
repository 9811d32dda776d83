"""Watches a bundle and a pool file, and has them loaded anew when they changed and are at rest."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from arllm.runtime.bundle import find_bundle
from arllm.runtime.errors import BundleNotFoundError

Signature = tuple[tuple[str, int, int, int], ...]


def signature(bundle: str, pool: str | None) -> Signature:
    """Path, inode, size and time of every file of a bundle and of the pool file; what is missing is left out."""
    found = []
    try:
        paths = [os.path.join(at, name) for at, _, names in os.walk(find_bundle(bundle)) for name in names]
    except BundleNotFoundError:
        paths = []
    for path in sorted([*paths, *([] if pool is None else [pool])]):
        try:
            state = os.lstat(path)
        except OSError:  # gone meanwhile
            continue
        found.append((path, state.st_ino, state.st_size, state.st_mtime_ns))
    return tuple(found)


class Watcher:
    """Calls ``changed`` in a thread of its own, once for every state of the files that lasts for two looks.

    A bundle that is being copied is not at rest, so it is not refused half-way. One that is refused is tried
    again when its files change again.
    """

    def __init__(self, look: Callable[[], Signature], changed: Callable[[], object], seconds: float) -> None:
        self._look, self._changed, self._seconds = look, changed, seconds
        self._served = look()
        self._seen = self._served
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="arllm-reload", daemon=True)
        self._thread.start()

    def step(self) -> None:
        """One look at the files."""
        now = self._look()
        if now != self._served and now == self._seen:
            self._served = now
            self._changed()
        self._seen = now

    def close(self) -> None:
        self._stop.set()

    def _work(self) -> None:
        while not self._stop.wait(self._seconds):
            self.step()
