"""The generated outcomes of ``make demo``: SYNTHETIC, for trying the pipeline; no quality claim rests on it.

Nine task families in four data sets, six simulated candidates. A query's text shows its difficulty: the level
sets the number of operands, steps, clues or nested calls. The response model is :func:`probabilities`.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arllm.runtime.errors import OutcomesError
from arllm.train.staging import staged_folder
from arllm.train.synthetic_tasks import LEVELS, TASKS

GUESS = 0.05
SLOPE = 8.0
BLANK_SHARE = 0.03
UNIT = "synthetic cost units per query"


_FAMILIES = tuple(TASKS)


@dataclass(frozen=True)
class SimulatedCandidate:
    """A candidate that answers by the response model; ``ability`` is per family, on difficulty's scale."""

    name: str
    cost: float
    role: str
    ability: Mapping[str, float]


def _candidate(name: str, cost: float, role: str, *ability: float) -> SimulatedCandidate:
    return SimulatedCandidate(name, cost, role, dict(zip(_FAMILIES, ability, strict=True)))


# The specialists lead everyone in a part of their families and every generalist but the dearest in the rest:
# without that, one candidate would win each beta and there would be nothing to route.
# fmt: off
CANDIDATES = (
    #                                              arith dates seque lette odd   order boole loops funct
    _candidate("sim-tiny",     0.05, "generalist", 0.25, 0.10, 0.10, 0.20, 0.45, 0.15, 0.25, 0.05, 0.00),
    _candidate("sim-small",    0.15, "generalist", 0.45, 0.35, 0.35, 0.45, 0.75, 0.40, 0.45, 0.25, 0.20),
    _candidate("sim-code",     0.40, "code",       0.50, 0.40, 0.45, 0.40, 0.45, 0.35, 0.80, 1.20, 1.00),
    _candidate("sim-math",     0.40, "math",       1.25, 0.90, 1.10, 0.30, 0.40, 0.55, 0.55, 0.30, 0.30),
    _candidate("sim-large",    1.00, "generalist", 0.75, 0.70, 0.65, 0.80, 1.05, 0.75, 0.75, 0.60, 0.55),
    _candidate("sim-frontier", 3.00, "generalist", 1.05, 1.05, 0.95, 1.10, 1.25, 1.10, 1.05, 0.95, 1.05),
)
# fmt: on


@dataclass(frozen=True, eq=False)
class SyntheticOutcomes:
    """Queries (the records of queries.jsonl), candidate names, and one row per query of each array.

    ``correct`` holds 0, 1, or NaN where the candidate was not evaluated; it was drawn from ``probability``.
    """

    queries: list[dict[str, str]]
    candidates: tuple[str, ...]
    difficulty: NDArray[np.float64]  # (N,)
    probability: NDArray[np.float64]  # (N, M)
    correct: NDArray[np.float64]  # (N, M)


def probabilities(families: Sequence[str], difficulty: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N, M) P(correct) = guess + (1 - guess) * sigmoid(slope * (ability[m, family] - difficulty))."""
    ability = np.array([[c.ability[family] for c in CANDIDATES] for family in families])  # (N, M)
    return GUESS + (1 - GUESS) / (1 + np.exp(-SLOPE * (ability - difficulty[:, None])))


def generate(n_queries: int = 2400, seed: int = 0) -> SyntheticOutcomes:
    """Draw distinct queries, uniform over families and levels, and each candidate's answers to them.

    Equal arguments give equal results; none of :func:`sample_queries` is among the queries.

    Raises:
        OutcomesError: ``n_queries`` is below 1.
    """
    if n_queries < 1:
        raise OutcomesError(f"n_queries must be at least 1, not {n_queries}")
    text_rng = random.Random(seed)
    taken = set(sample_queries())
    queries: list[dict[str, str]] = []
    levels: list[int] = []
    while len(queries) < n_queries:
        # A text drawn twice costs a new family and level too: easy families run out first, hard ones never.
        family, level = text_rng.choice(_FAMILIES), text_rng.randrange(LEVELS)
        dataset, compose = TASKS[family]
        text = compose(text_rng, level)
        if text in taken:
            continue
        taken.add(text)
        levels.append(level)
        queries.append(
            {
                "query_id": f"{dataset}/{family}/{len(queries)}",
                "dataset": dataset,
                "subset": family,
                "split": _split(text),
                "query": text,
            }
        )
    difficulty = np.array(levels, dtype=np.float64) / (LEVELS - 1)
    probability = probabilities([query["subset"] for query in queries], difficulty)
    rng = np.random.default_rng(seed)
    correct = (rng.random(probability.shape) < probability).astype(np.float64)
    correct[rng.random(probability.shape) < BLANK_SHARE] = np.nan
    return SyntheticOutcomes(queries, tuple(c.name for c in CANDIDATES), difficulty, probability, correct)


def write(folder: str | os.PathLike[str], n_queries: int = 2400, seed: int = 0) -> None:
    """Write ``queries.jsonl.gz``, ``labels.csv.gz``, ``pool.json`` and ``README.md``: all four, or none.

    Equal arguments give byte-equal files.

    Raises:
        OutcomesError: ``folder`` exists and is not an empty folder, or ``n_queries`` is below 1.
    """
    folder = Path(folder).absolute()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise OutcomesError(f"{folder}: exists and is not an empty folder; remove it or name another")
    outcomes = generate(n_queries, seed)
    contents = {
        "queries.jsonl.gz": gzip.compress(_queries_jsonl(outcomes).encode(), mtime=0),
        "labels.csv.gz": gzip.compress(_labels_csv(outcomes).encode(), mtime=0),
        "pool.json": (json.dumps(_pool(), indent=2) + "\n").encode(),
        "samples.jsonl": "".join(json.dumps({"query": q}) + "\n" for q in sample_queries()).encode(),
        "README.md": _readme(n_queries, seed).encode(),
    }
    with staged_folder(folder) as staging:
        for name, content in contents.items():
            (staging / name).write_bytes(content)


def sample_queries() -> list[str]:
    """Fixed texts to route in the demo, easy and hard, one family each; never among the generated queries."""
    return [
        "Chiara starts with 6 walnuts and buys 5 more. How many walnuts does Chiara have now?",
        "Starting from 29 February 2012, go forward 40 days, go back 11 weeks, go forward 390 days, go back"
        " 77 days, go forward 58 weeks, go back 215 days and go forward 19 weeks. Which date is it then?",
        "Which of these does not belong with the others: cedar, elm, haddock, oak?",
        "Anselm is older than Beatrix. Dorian is younger than Cosima. Edda is older than Fabian. Cosima is"
        " younger than Beatrix. Gwenda is younger than Fabian. Edda is younger than Dorian. Hedwig is younger"
        " than Gwenda. Who is the fifth oldest?",
        "What does this Python program print?\n\nscore = 4\nfor n in range(3):\n    score += 5\nprint(score)",
        "Read this Python code and say what it prints.\n\n"
        "def wrap(x):\n    return x % 7 + 4\n\n"
        "def trim(x):\n    return abs(x - 13)\n\n"
        "def join(x):\n    return 3 * x - 8\n\n"
        "print(join(wrap(trim(join(trim(wrap(join(5))))))))",
    ]


def _split(text: str) -> str:
    """70 / 10 / 20 by hash, so that a query keeps its split whatever the size and the seed."""
    share = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32
    return "train" if share < 0.7 else "val" if share < 0.8 else "test"


def _queries_jsonl(outcomes: SyntheticOutcomes) -> str:
    return "".join(json.dumps(query, ensure_ascii=False) + "\n" for query in outcomes.queries)


def _labels_csv(outcomes: SyntheticOutcomes) -> str:
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["query_id", *outcomes.candidates])
    for query, row in zip(outcomes.queries, outcomes.correct, strict=True):
        table.writerow([query["query_id"], *("" if np.isnan(value) else int(value) for value in row)])
    return out.getvalue()


def _pool() -> dict[str, Any]:
    rows = [{"name": c.name, "cost": c.cost, "metadata": {"synthetic": True, "role": c.role}} for c in CANDIDATES]
    return {"unit": UNIT, "candidates": rows}


def _readme(n_queries: int, seed: int) -> str:
    header = f"| candidate | cost | {' | '.join(_FAMILIES)} |\n|---|{'---|' * (len(_FAMILIES) + 1)}"
    rows = "\n".join(
        f"| {c.name} | {c.cost:g} | {' | '.join(f'{c.ability[f]:.2f}' for f in _FAMILIES)} |" for c in CANDIDATES
    )
    return f"""# Synthetic outcomes

**SYNTHETIC.** The queries are generated from templates and the candidates do not exist: no language model
answered anything here. The files are for trying the pipeline; no quality claim rests on them.

{n_queries} queries, seed {seed}, written by `arllm.train.synthetic`.
Splits are 70 / 10 / 20 by SHA-256 of the text.

## Response model

    P(correct) = guess + (1 - guess) * sigmoid(slope * (ability[candidate, family] - difficulty))

with guess {GUESS:g} and slope {SLOPE:g}. A query's difficulty is its level / {LEVELS - 1}, the level drawn
uniformly from 0 to {LEVELS - 1}. It sets the number of operands, steps, clues or nested calls in the text.
Every answer is one Bernoulli draw; {BLANK_SHARE:.0%} are then blanked at random (not evaluated).

Ability per family, and cost in {UNIT}:

{header}
{rows}
"""
