"""semantic-router: ``IndexedRouter`` over a local ``HuggingFaceEncoder`` in the shape of its default, MiniLM-L6."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from random_models import save_random
from worker import serve

ROUTES, UTTERANCES = 16, 10


def start() -> tuple[dict[str, Any], dict[str, Any]]:
    cache, tokenizer = Path(sys.argv[1]), sys.argv[2]
    folder = save_random("minilm-l6", tokenizer, cache / "minilm-l6", 512)
    from semantic_router import IndexedRouter, Route
    from semantic_router.encoders import HuggingFaceEncoder

    routes = [
        Route(name=f"route-{r}", utterances=[f"an example of topic {r}, number {u}" for u in range(UTTERANCES)])
        for r in range(ROUTES)
    ]
    router = IndexedRouter(encoder=HuggingFaceEncoder(name=str(folder)), routes=routes)
    return {"IndexedRouter": lambda text: router(text).name}, {}


if __name__ == "__main__":
    serve(start)
