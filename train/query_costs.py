"""Costs, or output lengths, per query and candidate from a wide CSV, aligned with outcomes. Free of torch."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from arllm.runtime.errors import OutcomesError
from arllm.train.outcomes import Outcomes
from arllm.train.records import csv_header, csv_rows, number_or_blank


def read_query_costs(path: str | Path, outcomes: Outcomes) -> NDArray[np.float64]:
    """(N, M) float64 over the rows and columns of ``outcomes``; NaN where the file has no number.

    The file has a column ``query_id`` and one per candidate; other rows and columns are passed over. What it holds
    is returned as it is: for files of output lengths in characters, as those of ``zeroeval``, the cost of a query in
    USD is ``value / 4 * price per million tokens / 1e6``, about 4 characters being a token.

    Raises:
        OutcomesError: the file can't be read, a candidate has no column, or a value is not a number >= 0.
    """
    path = Path(path)
    rows = csv_rows(path)
    where, header = csv_header(rows, path)
    missing = [name for name in ("query_id", *outcomes.candidates) if name not in header]
    if missing:
        raise OutcomesError(f'{where}: no column "{missing[0]}"; the file needs query_id and one per candidate')
    key, columns = header.index("query_id"), [header.index(name) for name in outcomes.candidates]
    at = {query_id: i for i, query_id in enumerate(outcomes.query_ids)}
    costs = np.full((len(outcomes), len(columns)), np.nan)
    for where, row in rows:
        if row[key] in at:
            costs[at[row[key]]] = [_cost(where, header[column], row[column]) for column in columns]
    return costs


def _cost(where: str, name: str, field: str) -> float:
    return number_or_blank(where, name, field, sys.float_info.max, "a number >= 0, or a blank where there is none")
