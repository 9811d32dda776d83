"""Rows of JSONL, CSV and Parquet files, each with the place it stands at, and checks of single fields.

A place is "file:line" (the first line of a CSV row that spans several), or "file:row N" in Parquet, which has
no lines; every message starts with one. JSONL and CSV are read with the standard library alone, line by line,
also from .gz. Errors are ``OutcomesError``, or where a function takes it the class that the caller names.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from arllm.runtime.errors import ArllmError, MissingExtraError, OutcomesError

Record = tuple[str, Mapping[str, Any]]  # (place, the row)

_NOT_EVALUATED = "leave the row out where the model was not evaluated"


def lines(path: Path, error: type[ArllmError] = OutcomesError) -> Iterator[str]:
    """The decoded lines, cut at "\\n" alone: str.splitlines would also cut inside a query at U+2028."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb") as stream:
            for number, raw in enumerate(stream, 1):
                text = raw.decode("utf-8")
                yield text.removeprefix("\ufeff") if number == 1 else text
    except UnicodeDecodeError as cause:
        raise error(f"{path}:{number}: not valid UTF-8 ({cause.reason}); save the file as UTF-8") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as cause:
        raise error(f"{path}:{number + 1}: broken gzip ({cause}); fetch or compress the file again") from None
    except FileNotFoundError:
        raise error(f"{path}: no such file") from None
    except OSError as cause:
        raise error(f"{path}: can't be read: {cause.strerror}") from None


def jsonl_records(path: Path) -> Iterator[Record]:
    """The object of each line; blank lines are skipped."""
    for number, line in enumerate(lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as cause:
            raise OutcomesError(f"{where}: malformed JSON ({cause}); put one object on each line") from None
        if not isinstance(record, dict):
            raise OutcomesError(f"{where}: expected a JSON object, found {type(record).__name__}")
        yield where, record


def csv_rows(path: Path, error: type[ArllmError] = OutcomesError) -> Iterator[tuple[str, list[str]]]:
    """The fields of each row, as many as in the first one; blank lines are skipped."""
    # csv's limit is global and 128k characters, less than a long prompt: it is only ever raised.
    csv.field_size_limit(max(csv.field_size_limit(), 2**31 - 1))
    reader = csv.reader(lines(path, error), strict=True)
    width = 0
    while True:
        where = f"{path}:{reader.line_num + 1}"
        try:
            row = next(reader, None)
        except csv.Error as cause:
            raise error(f"{where}: malformed CSV ({cause}); check the quotes of this row") from None
        if row is None:
            return
        if not row:
            continue
        width = width or len(row)
        if len(row) != width:
            raise error(f"{where}: {len(row)} fields where the first row has {width}; quote fields with commas")
        yield where, row


def csv_header(
    rows: Iterator[tuple[str, list[str]]], path: Path, error: type[ArllmError] = OutcomesError
) -> tuple[str, list[str]]:
    """Take the header from ``csv_rows``: column names, none of them twice."""
    where, header = next(rows, ("", []))
    if not header:
        raise error(f"{path}: no rows; the first one names the columns")
    twice = [name for i, name in enumerate(header) if name in header[:i]]
    if twice:
        raise error(f"{where}: column {twice[0]!r} stands twice; remove or rename one")
    return where, header


def csv_table(path: Path, required: Sequence[str] = ()) -> tuple[list[str], Iterator[Record]]:
    """The columns of a CSV file, the required ones among them, and its rows by column, as text."""
    rows = csv_rows(path)
    where, header = csv_header(rows, path)
    need_columns(where, header, required)
    return header, ((where, dict(zip(header, row, strict=True))) for where, row in rows)


def scored_rows(path: Path, required: Sequence[str]) -> Iterator[Record]:
    """The rows of a CSV file with ``correct``, which is a truth value or a number where it can be."""
    for where, record in csv_table(path, required)[1]:
        yield where, {**record, "correct": csv_number(record["correct"])}


@contextmanager
def parquet_file(path: Path) -> Iterator[Any]:
    """An open pyarrow.parquet.ParquetFile.

    Raises:
        MissingExtraError: pyarrow is not installed.
        OutcomesError: the file is not readable as Parquet.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise MissingExtraError("pyarrow", "eval", "reading Parquet") from None
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (pa.ArrowException, OSError) as cause:
        raise OutcomesError(f"{path}: not readable as Parquet ({cause}); write the file again") from None


def parquet_records(path: Path, required: Sequence[str], optional: Sequence[str]) -> Iterator[Record]:
    """The named columns of each row; other columns are never loaded.

    Raises:
        MissingExtraError: pyarrow is not installed.
    """
    with parquet_file(path) as file:
        names = file.schema_arrow.names
        need_columns(str(path), names, required)
        number = 0
        for batch in file.iter_batches(columns=[name for name in (*required, *optional) if name in names]):
            for record in batch.to_pylist():
                number += 1
                yield f"{path}:row {number}", record


def need_columns(where: str, header: Sequence[str], required: Sequence[str]) -> None:
    missing = [name for name in required if name not in header]
    if missing:
        raise OutcomesError(f'{where}: no column "{missing[0]}"; the file needs {", ".join(required)}')


def csv_number(text: str) -> bool | float | str:
    lowered = text.strip().lower()
    if lowered in ("true", "false"):
        return lowered == "true"
    try:
        return float(text)
    except ValueError:
        return text


def text_field(where: str, record: Mapping[str, Any], key: str, default: str | None = None) -> str:
    value = record.get(key)
    if isinstance(value, int) and not isinstance(value, bool) and key == "query_id":
        return str(value)
    if value is None or (isinstance(value, float) and math.isnan(value)) or (value == "" and key != "query"):
        if default is None:
            raise OutcomesError(f'{where}: no "{key}"; every row needs one')
        return default
    if not isinstance(value, str):
        raise OutcomesError(f'{where}: "{key}" must be a string, not {value!r}')
    if not value.strip():
        raise OutcomesError(f'{where}: "{key}" is empty; give it, or leave the row out')
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise OutcomesError(f'{where}: "{key}" holds half a surrogate pair, which no encoding has; mend the text')
    return value


def correct_field(where: str, value: Any) -> float:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise OutcomesError(f"{where}: correct is empty; {_NOT_EVALUATED}")
    if not isinstance(value, (bool, int, float)):
        raise OutcomesError(f"{where}: correct must be true, false or a number in [0, 1], not {value!r}")
    if value != value:  # not math.isnan, which overflows at a huge integer
        raise OutcomesError(f"{where}: correct is NaN; {_NOT_EVALUATED}")
    if not 0.0 <= value <= 1.0:
        raise OutcomesError(f"{where}: correct is {value!r}; scale it to [0, 1]")
    return float(value)


def label_field(where: str, candidate: str, field: str) -> float:
    return number_or_blank(where, candidate, field, 1.0, "a number in [0, 1], or a blank where not evaluated")


def number_or_blank(where: str, name: str, field: str, most: float, wanted: str) -> float:
    """A CSV field from 0 to ``most``; NaN for a blank. ``wanted`` completes the error."""
    if not field.strip():
        return math.nan
    try:
        value = float(field)
    except ValueError:
        value = math.nan
    if not 0.0 <= value <= most:
        raise OutcomesError(f"{where}: {name!r} is {field!r}; give {wanted}")
    return value
