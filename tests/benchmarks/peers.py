"""Peers from PyPI beside nano on the same queries: milliseconds of each query by each router, as JSON.

    python tests/benchmarks/peers.py --out out/bench/peers.json [--queries 60] [--smoke]

Every peer runs in a process and a virtual environment of its own, made on demand (``environments.py``), without a
network: encoders have the shape that the peer publishes and random weights. The queries go round in portions: each
peer routes the same portion before anyone sees the next, and who begins changes. A peer that can't be installed or
started is a row that says why.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import shapes
from environments import InstallError, cache_folder, environment
from known_peers import PEERS, Peer
from record import ONE_THREAD, arguments, note, record
from worker import Worker, WorkerError

from arllm.runtime.bundle import SHIPPED
from arllm.train.latency.rounds import turned

FOLDER = Path(__file__).parent / "peer_workers"
PORTION = 5
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": str(FOLDER.parent),
}
if ONE_THREAD:
    OFFLINE |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def start(peer: Peer, cache: Path, texts: Path) -> Worker:
    """Raises InstallError or WorkerError: why there is no figure of this peer."""
    python = environment(peer.name, peer.requirements, note) if peer.requirements else Path(sys.executable)
    models = cache / "models"
    models.mkdir(parents=True, exist_ok=True)
    note(f"starting {peer.name}")
    command = [python, FOLDER / peer.worker, models, SHIPPED / "nano/tokenizer.json", texts]
    return Worker(command, cache / f"{peer.name}.log", OFFLINE)


def run(queries: int, peers: Sequence[Peer] = PEERS) -> dict[str, Any]:
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    every, source = shapes.prompts()
    asked = every[:queries]
    failed: dict[str, str] = {}
    times: dict[str, list[float]] = {}
    with ExitStack() as stack:
        texts = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "texts.json"
        texts.write_text(json.dumps(every[queries:]), encoding="utf-8")
        arms: dict[str, tuple[Peer, Worker]] = {}
        for peer in peers:
            try:
                worker = stack.enter_context(start(peer, cache, texts))
                for arm in peer.arms:
                    worker.run(arm, asked[:2])  # what is made at the first call is not the router's latency
                    arms[arm], times[arm] = (peer, worker), []
            except (InstallError, WorkerError) as error:
                note(f"{peer.name}: {error}")
                failed[peer.name] = str(error)
        for number, begin in enumerate(range(0, len(asked), PORTION)):
            note(f"queries {begin + 1} to {min(begin + PORTION, len(asked))} of {len(asked)}")
            for arm in turned(list(arms), number):
                if arm not in arms:
                    continue
                peer, worker = arms[arm]
                try:
                    times[arm] += worker.run(arm, asked[begin : begin + PORTION])[0]
                except WorkerError as error:
                    note(f"{peer.name}: {error}")
                    failed[peer.name] = str(error)
                    for gone in peer.arms:
                        arms.pop(gone, None)
                        times.pop(gone, None)
    return {
        "queries": len(asked),
        "source": source,
        "characters": [len(text) for text in asked],
        "times": times,
        "failed": failed,
    }


def main() -> None:
    given = arguments("Peers compared with nano on the same queries.", "queries", 60, "of the mix").parse_args()
    record(given.out, lambda: run(5 if given.smoke else given.queries))


if __name__ == "__main__":
    main()
