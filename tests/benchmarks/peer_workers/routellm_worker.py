"""routellm: ``BERTRouter`` through its controller, on a random XLM-R base with three labels, as it publishes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from random_models import save_random
from worker import serve


def start() -> tuple[dict[str, Any], dict[str, Any]]:
    os.environ.setdefault("OPENAI_API_KEY", "unused: importing the module makes a client")
    cache, tokenizer = Path(sys.argv[1]), sys.argv[2]
    folder = save_random("xlm-roberta-base", tokenizer, cache / "xlm-roberta-base", 512)
    from routellm.controller import Controller

    controller = Controller(["bert"], "strong", "weak", config={"bert": {"checkpoint_path": str(folder)}})
    router, pair = controller.routers["bert"], controller.model_pair
    return {"BERTRouter": lambda text: router.route(text, 0.5, pair)}, {}


if __name__ == "__main__":
    serve(start)
