"""Outcomes from a wide table, a row per query and a column per model: RouteLLM's and RouterBench's shape."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from arllm.runtime.errors import OutcomesError
from arllm.train.importers import (
    DatasetNames,
    Observation,
    Paths,
    checked_query,
    dataset_of,
    each,
    each_path,
    join,
    parquet_columns,
    refuse_pickle,
    score,
    text_id,
    text_list,
)
from arllm.train.outcomes import Outcomes
from arllm.train.records import Record, csv_number, csv_table, need_columns, parquet_records, text_field

# What stands beside the column of a model tells that it is one: RouterBench's "NAME|total_cost" and
# "NAME|model_response", RouteLLM's "NAME_response".
_COMPANIONS = ("|total_cost", "|model_response", "_response")


def import_wide_csv(
    path: Paths,
    *,
    query_column: str,
    models: str | Sequence[str] | None = None,
    dataset: DatasetNames = None,
    dataset_column: str | None = None,
    subset_column: str | None = None,
    id_column: str | None = None,
) -> Outcomes:
    """Read one or more wide CSV (also .gz) or Parquet files; a blank is "not evaluated".

    Rows are joined by ``id_column``; without one by their text within a subset, and equal ones are averaged. A
    query that is the Python literal of a list of strings, as RouterBench writes its turns, is joined by newlines.

    A row's task is its ``dataset_column``, else the file's name without suffixes. Its dataset is that of
    :func:`arllm.train.importers.dataset_of`; its subset is ``subset_column``, else the task.

    Args:
        models: the columns of models. None: those with a companion ("NAME|total_cost", "NAME|model_response",
            "NAME_response"); where no column has one, every column that nothing else names.
        dataset: None, one name for all, or a mapping of prefixes of tasks to names.

    Raises:
        OutcomesError: a pickle, a missing column, a value that is no score, or an id with two texts.
        MissingExtraError: Parquet without pyarrow.
    """
    named = tuple(name for name in (dataset_column, subset_column, id_column) if name is not None)

    def observations() -> Iterator[Observation]:
        for file in each_path(path):
            stem = file.name.split(".")[0]
            header, records = _table(file)
            need_columns(str(file), header, (query_column, *named, *each(models)))
            columns = each(models) or _model_columns(file, header, {query_column, *named})
            for where, row in records:
                turns = text_list(row[query_column])
                query = checked_query(where, row[query_column] if turns is None else "\n".join(turns))
                task = stem if dataset_column is None else _text(where, row, dataset_column)
                subset = task if subset_column is None else _text(where, row, subset_column)
                query_id = text_id(subset, query) if id_column is None else _text(where, row, id_column)
                for model in columns:
                    correct = _cell(where, model, row[model])
                    yield Observation(
                        where, model, query_id, query, dataset_of(task, dataset), subset, correct, id_column is None
                    )

    return join(observations())


def _table(file: Path) -> tuple[list[str], Iterator[Record]]:
    refuse_pickle(file)
    name = file.name.lower()
    if name.endswith(".parquet"):
        header = parquet_columns(file)
        return header, parquet_records(file, header, ())
    if not name.removesuffix(".gz").endswith(".csv"):
        raise OutcomesError(f"{file}: unknown form; give .csv (also .gz) or .parquet")
    return csv_table(file)


def _model_columns(file: Path, header: Sequence[str], taken: set[str]) -> tuple[str, ...]:
    known = set(header)
    models = tuple(name for name in header if any(name + suffix in known for suffix in _COMPANIONS))
    models = models or tuple(name for name in header if name not in taken)
    if not models:
        raise OutcomesError(f"{file}: no column is left for a model; the columns are {', '.join(header)}")
    return models


def _text(where: str, row: Any, column: str) -> str:
    value = row[column]
    # An id is often a number, and Parquet keeps it one.
    return text_field(where, {column: str(value) if isinstance(value, int) else value}, column)


def _cell(where: str, model: str, value: Any) -> float:
    if isinstance(value, str):
        value = csv_number(value) if value.strip() else None
    if value is None or value != value:
        return math.nan
    return score(where, model, value, "scale the column to [0, 1], or name the columns of models with --models")
