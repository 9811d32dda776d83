"""Traffic to calibrate a preference on: reading its files, and a router's predictions on it. Free of torch.

A file is one of

1. queries alone: JSONL with ``query``, or CSV or Parquet with a column ``query``; other fields are passed over;
2. outcomes, in any form of :mod:`arllm.train.outcomes`: told by a folder, or by the fields ``model`` and ``correct``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arllm.runtime import decision as rule
from arllm.runtime.errors import OutcomesError
from arllm.train.bench import COVERAGE, router_qualities
from arllm.train.outcomes import SPLITS, Outcomes, read_outcomes
from arllm.train.preferences import Traffic
from arllm.train.records import Record, csv_table, jsonl_records, parquet_file, parquet_records, text_field

if TYPE_CHECKING:
    from arllm.runtime.router import Router

HELD_OUT = ("", "val", "test", "ood")  # of a query that training did not see, as far as the file says


def read_traffic(path: str | Path) -> Outcomes:
    """The queries of a file or folder, in any of the forms above; without outcomes there are no candidates.

    Raises:
        OutcomesError: the file can't be read or a row is unusable; names the file and line.
        MissingExtraError: Parquet without pyarrow.
    """
    path = Path(path)
    name = path.name.lower()
    if path.is_dir():
        return read_outcomes(path)
    if name.removesuffix(".gz").endswith(".jsonl"):
        records = jsonl_records(path)
        first = next(records, None)
        fields: Collection[str] = first[1] if first else ()
        records = chain([first] if first else [], records)
    elif name.removesuffix(".gz").endswith(".csv"):
        fields, records = csv_table(path, ("query",))
    elif name.endswith(".parquet"):
        with parquet_file(path) as file:
            fields = list(file.schema_arrow.names)
        records = parquet_records(path, ("query",), ("split",))
    else:
        raise OutcomesError(f"{path}: unknown form; give a folder, or .jsonl, .csv (also .gz) or .parquet")
    return read_outcomes(path) if {"model", "correct"} <= set(fields) else _queries(path, records)


def _queries(path: Path, records: Iterator[Record]) -> Outcomes:
    queries, splits = [], []
    for where, record in records:
        queries.append(text_field(where, record, "query"))
        split: Any = record.get("split")
        splits.append(split if split in SPLITS else "")  # a log may have another meaning for it
    if not queries:
        raise OutcomesError(f"{path}: no rows")
    n = len(queries)
    ids = tuple(map(str, range(n)))
    blank = ("",) * n
    return Outcomes(ids, tuple(queries), blank, blank, tuple(splits), (), np.empty((n, 0), dtype=np.float32))


def held_out(outcomes: Outcomes, splits: Collection[str] = HELD_OUT) -> Outcomes:
    """The queries of the splits; "" stands for those without one.

    Raises:
        OutcomesError: none is left.
    """
    kept = np.array([split in splits for split in outcomes.splits], dtype=np.bool_)
    if not kept.any():
        there = ", ".join(sorted({split or "none" for split in outcomes.splits}))
        raise OutcomesError(f"no query of the wanted splits; the file has: {there}")
    return outcomes.rows(kept)


def predict_traffic(
    router: Router, outcomes: Outcomes, policy: str, allowed: Collection[str] | None = None
) -> tuple[Traffic, list[str]]:
    """What the router predicts on the queries for the candidates that are allowed, with notes for the reader.

    Outcomes count as a measurement only where every candidate was evaluated on 95% of the queries: accuracies over
    different queries can't be compared.

    Raises:
        CandidateError, PolicyError, QueryError: as :meth:`arllm.runtime.router.Router.route`.
    """
    names, notes = router.pool.names, []
    mask = rule.candidate_mask(names, allowed)
    keep = np.arange(len(names)) if mask is None else np.flatnonzero(mask)
    kept = tuple(names[i] for i in keep)
    correct = np.full((len(outcomes), len(kept)), np.nan, dtype=np.float32)
    for m, name in enumerate(kept):
        if name in outcomes.candidates:
            correct[:, m] = outcomes.correct[:, outcomes.candidates.index(name)]
    everyone = Outcomes(
        outcomes.query_ids, outcomes.queries, outcomes.datasets, outcomes.subsets, outcomes.splits, kept, correct
    )
    quality = router_qualities(router, everyone, [policy], splits=set(outcomes.splits))[policy]
    measured = None
    if outcomes.candidates:
        covered = np.mean(~np.isnan(correct), axis=0)
        scarce = [f"{kept[m]} on {covered[m]:.0%}" for m in np.flatnonzero(covered < COVERAGE)]
        if not covered.any():
            notes.append("accuracy was not measured: the outcomes are of other models")
        elif scarce:
            notes.append(
                f"accuracy was not measured: {len(scarce)} of {len(kept)} candidates were evaluated on less than "
                f"{COVERAGE:.0%} of the queries ({', '.join(scarce[:3])}{', …' if len(scarce) > 3 else ''}); "
                "leave them out with --candidates"
            )
        else:
            measured = correct.astype(np.float64)
    costs, normalized = router.pool.costs[keep], router.normalized_costs[keep]
    return Traffic(kept, quality, costs, normalized, measured, router.pool.unit), notes
