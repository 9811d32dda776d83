"""What the importers share: joining rows of several models into Outcomes, and writing Outcomes as a folder.

Published results stand in files of one model each, whose rows are in no common order (they are interleaved by
the evaluation's workers): rows are joined by an id or by their text, never by their number. Where ids, texts and
hashes contradict one another, nothing is guessed: the error names both places. A model that lacks a document has
a blank there. ``import_harness``, ``import_leaderboard`` and ``import_wide`` read one layout each.
"""

from __future__ import annotations

import ast
import csv
import gzip
import hashlib
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from arllm.runtime.errors import OutcomesError
from arllm.train.outcomes import Outcomes
from arllm.train.records import parquet_file, text_field
from arllm.train.staging import staged_folder

Paths: TypeAlias = "str | Path | Sequence[str | Path]"
DatasetNames: TypeAlias = "str | Mapping[str, str] | None"


@dataclass(frozen=True)
class Observation:
    """One row of a source file: how ``model`` did on one document. NaN: not evaluated.

    ``query_id`` joins the models' rows; ``by_text`` says that it was made of the text, so that a model's rows
    with one id are answers to equal questions and are averaged. Else a second row is an error. ``doc_hash`` is
    the evaluation's own hash of the whole document, "" where it gives none.
    """

    where: str
    model: str
    query_id: str
    query: str
    dataset: str
    subset: str
    correct: float
    by_text: bool = False
    doc_hash: str = ""


def join(observations: Iterable[Observation]) -> Outcomes:
    """Bring the rows of all models together by ``query_id``, in order of first appearance.

    Raises:
        OutcomesError: rows of one ``query_id`` disagree on text, dataset, subset or hash; a model has a document
            twice; there are no rows.
    """
    first: dict[str, Observation] = {}
    models: dict[str, int] = {}
    cells: dict[tuple[str, str], tuple[str, float, int]] = {}  # (query id, model): where last, sum, count
    for row in observations:
        _check_same(row, first.setdefault(row.query_id, row))
        models.setdefault(row.model, len(models))
        cell = (row.query_id, row.model)
        where, total, count = cells.get(cell, ("", 0.0, 0))
        if where and not row.by_text:
            raise OutcomesError(
                f"{row.where}: {row.model!r} has document {row.query_id!r} already at {where}; "
                "remove one of the rows, or join by text to average them"
            )
        evaluated = not math.isnan(row.correct)
        cells[cell] = (row.where, total + row.correct, count + 1) if evaluated else (row.where, total, count)
    if not first:
        raise OutcomesError("the files hold no rows; give files of evaluated samples")
    position = {query_id: i for i, query_id in enumerate(first)}
    correct = np.full((len(first), len(models)), np.nan, dtype=np.float32)
    for (query_id, model), (_, total, count) in cells.items():
        if count:
            correct[position[query_id], models[model]] = total / count
    rows = list(first.values())
    return Outcomes(
        query_ids=tuple(first),
        queries=tuple(row.query for row in rows),
        datasets=tuple(row.dataset for row in rows),
        subsets=tuple(row.subset for row in rows),
        splits=("",) * len(rows),
        candidates=tuple(models),
        correct=correct,
    )


def _check_same(row: Observation, earlier: Observation) -> None:
    for field, what in (("query", "text"), ("dataset", "dataset"), ("subset", "subset")):
        if getattr(row, field) != getattr(earlier, field):
            raise OutcomesError(
                f"{row.where}: document {row.query_id!r} has another {what} than at {earlier.where}; "
                "if the files number their documents differently, join by text; else import them apart"
            )
    if row.doc_hash and earlier.doc_hash and row.doc_hash != earlier.doc_hash:
        raise OutcomesError(
            f"{row.where}: document {row.query_id!r} has another doc_hash than at {earlier.where}; "
            "the task's data differ: join by text if the question alone matters, or import the files apart"
        )


def write_outcomes(outcomes: Outcomes, folder: str | os.PathLike[str]) -> None:
    """Write ``queries.jsonl.gz`` and ``labels.csv.gz``, from which ``read_outcomes`` reads the same: both, or none.

    Equal outcomes give byte-equal files.

    Raises:
        OutcomesError: ``folder`` exists and is not an empty folder, or can't be written, or the outcomes can't be
            told apart in these files (an id twice, a candidate twice or named "query_id").
    """
    folder = Path(folder).absolute()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise OutcomesError(f"{folder}: exists and is not an empty folder; remove it or name another")
    _check_distinct("query id", outcomes.query_ids)
    _check_distinct("candidate", ("query_id", *outcomes.candidates))
    contents = {"queries.jsonl.gz": _queries_jsonl(outcomes), "labels.csv.gz": _labels_csv(outcomes)}
    try:
        with staged_folder(folder) as staging:
            for name, content in contents.items():
                (staging / name).write_bytes(gzip.compress(content.encode(), mtime=0))
    except OSError as error:
        raise OutcomesError(f"{folder}: can't be written: {error.strerror}; name another folder") from None


def _check_distinct(what: str, names: Sequence[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise OutcomesError(f"{what} {name!r} stands twice in the outcomes; rename one")
        seen.add(name)


def _queries_jsonl(outcomes: Outcomes) -> str:
    columns = (outcomes.query_ids, outcomes.datasets, outcomes.subsets, outcomes.splits, outcomes.queries)
    names = ("query_id", "dataset", "subset", "split", "query")
    lines = []
    for row in zip(*columns, strict=True):
        record = {name: value for name, value in zip(names, row, strict=True) if value or name == "query"}
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    return "".join(lines)


def _labels_csv(outcomes: Outcomes) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(("query_id", *outcomes.candidates))
    for query_id, row in zip(outcomes.query_ids, outcomes.correct.tolist(), strict=True):
        # Nine digits tell every float32 apart.
        writer.writerow((query_id, *("" if math.isnan(value) else f"{value:.9g}" for value in row)))
    return stream.getvalue()


def each(values: str | Sequence[str] | None) -> tuple[str, ...]:
    """One name, several or none, as a tuple."""
    if values is None:
        return ()
    return (values,) if isinstance(values, str) else tuple(values)


def each_path(paths: Paths) -> tuple[Path, ...]:
    return (Path(paths),) if isinstance(paths, (str, Path)) else tuple(Path(path) for path in paths)


def dataset_of(task: str, names: DatasetNames) -> str:
    """The dataset of a task: the task itself, one name for all, or that of the longest prefix in a mapping."""
    if names is None:
        return task
    if isinstance(names, str):
        return names
    prefixes = [prefix for prefix in names if task.startswith(prefix)]
    return names[max(prefixes, key=len)] if prefixes else task


def checked_query(where: str, text: str) -> str:
    """The text, where an outcomes file can hold it: not blank, no half surrogate pair."""
    return text_field(where, {"query": text}, "query")


def text_id(group: str, text: str) -> str:
    """An id of a text within its group (a task or a subset): equal texts of two groups are two queries."""
    return f"{group}/{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def score(where: str, name: str, value: Any, mend: str) -> float:
    """A boolean or a number in [0, 1] as a float.

    Raises:
        OutcomesError: anything else.
    """
    if not isinstance(value, (bool, int, float)) or not 0.0 <= value <= 1.0:
        raise OutcomesError(f'{where}: "{name}" is {value!r}, not true, false or a number in [0, 1]; {mend}')
    return float(value)


def text_list(value: Any) -> list[str] | None:
    """A list of strings, or the Python literal of one (so RouterBench keeps its prompts); None for anything else."""
    if isinstance(value, str) and value.lstrip()[:2] in ("['", '["') and value.rstrip().endswith("]"):
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return value
    return None


def parquet_columns(path: Path) -> list[str]:
    """The names of a Parquet file's top-level columns.

    Raises:
        MissingExtraError: pyarrow is not installed.
    """
    with parquet_file(path) as file:
        return list(file.schema_arrow.names)


def refuse_pickle(path: Path) -> None:
    """Loading a pickle runs the code it holds, so none is ever loaded."""
    if path.name.lower().removesuffix(".gz").endswith((".pkl", ".pickle")):
        raise OutcomesError(
            f"{path}: a pickle runs code when it is loaded, so arllm never loads one; if you trust it, convert it: "
            "pandas.read_pickle(FILE).to_parquet(OUT)"
        )
