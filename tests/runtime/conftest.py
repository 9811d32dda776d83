"""Fixtures of the runtime's tests: a loaded router of the tiny bundle, and copies of the bundle to damage."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from arllm.runtime.router import Router


class BundleCopy:
    """A bundle folder of one test, to be damaged; it disappears with the test."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def manifest(self) -> dict[str, Any]:
        data: dict[str, Any] = json.loads((self.path / "manifest.json").read_bytes())
        return data

    def edit(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Change manifest.json in place."""
        data = self.manifest()
        change(data)
        (self.path / "manifest.json").write_text(json.dumps(data), encoding="utf-8")

    def rewrite(self, name: str, content: bytes) -> None:
        """Replace a file and list it in the manifest as an exporter would: a consistent forgery."""
        (self.path / name).write_bytes(content)
        entry = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        self.edit(lambda data: data["files"].update({name: entry}))


@pytest.fixture
def bundle_copy(tiny_bundle: Path, tmp_path: Path) -> Iterator[BundleCopy]:
    path = tmp_path / "copy"
    shutil.copytree(tiny_bundle, path)
    yield BundleCopy(path)
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def router(tiny_bundle: Path) -> Router:
    """The tiny bundle's fp32 variant, shared: nothing may change it."""
    return Router.load(tiny_bundle, variant="cpu-fp32")
