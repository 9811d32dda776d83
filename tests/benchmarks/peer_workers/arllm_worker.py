"""arllm: the bundle that ships, over 16 candidates."""

from __future__ import annotations

from typing import Any

import shapes
from worker import serve

from arllm.runtime.bundle import open_bundle
from arllm.runtime.router import Router


def start() -> tuple[dict[str, Any], dict[str, Any]]:
    router = Router.load("nano", pool=shapes.pool_of(shapes.CANDIDATES, open_bundle("nano").pool))
    router.warmup()
    return {"arllm nano": lambda text: router.route(text).model}, {}


if __name__ == "__main__":
    serve(start)
