"""Scored queries of one new candidate: reading FEW.csv or FEW.jsonl. Knows nothing about bundles. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from arllm.runtime.bundle import sha256_of
from arllm.runtime.errors import OutcomesError
from arllm.train.records import Record, correct_field, jsonl_records, scored_rows, text_field


@dataclass(frozen=True, eq=False)
class Scored:
    """n queries and how right the candidate answered each: ``correct`` (n,) float64 in [0, 1].

    ``source`` names the file, with its sha256 and size, as a bundle's manifest keeps it.
    """

    queries: tuple[str, ...]
    correct: NDArray[np.float64]
    source: dict[str, str | int]

    def __len__(self) -> int:
        return len(self.queries)


def read_scored(path: str | Path, name: str) -> Scored:
    """The outcomes of candidate ``name`` in a .csv or .jsonl file (also .gz) with ``query`` and ``correct``.

    A column ``model`` counts only where it names several: then the rows of ``name`` are taken.

    Raises:
        OutcomesError: the file can't be read or a row is unusable (names the file and line), no row is left.
    """
    path = Path(path)
    rows: list[tuple[str, str, float]] = []
    for where, record in _records(path):
        rows.append(
            (
                text_field(where, record, "model", ""),
                text_field(where, record, "query"),
                correct_field(where, record.get("correct")),
            )
        )
    if not rows:
        raise OutcomesError(f"{path}: no rows; give at least one scored query")
    models = sorted({model for model, _, _ in rows})
    if len(models) > 1:
        rows = [row for row in rows if row[0] == name]
        if not rows:
            raise OutcomesError(
                f"{path}: outcomes of several models, none of them {name!r}; it holds "
                f"{', '.join(model or 'rows without a model' for model in models)}"
            )
    source: dict[str, str | int] = {"path": str(path), "sha256": sha256_of(path), "bytes": path.stat().st_size}
    return Scored(
        tuple(query for _, query, _ in rows),
        np.array([correct for _, _, correct in rows], dtype=np.float64),
        source,
    )


def _records(path: Path) -> Iterator[Record]:
    form = path.name.lower().removesuffix(".gz")
    if form.endswith(".jsonl"):
        yield from jsonl_records(path)
    elif form.endswith(".csv"):
        yield from scored_rows(path, ("query", "correct"))
    else:
        raise OutcomesError(f"{path}: unknown form; give .csv or .jsonl (also .gz) with query and correct")
