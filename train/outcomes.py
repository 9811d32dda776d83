"""Outcomes: reading their three published forms, checking every row, splitting by query. Free of torch.

The forms are told apart by what is there:

1. a folder with ``queries.jsonl[.gz]`` and ``labels.csv[.gz]``, or that pair given as two paths;
2. long JSONL: one object per (query, model) with ``query, model, dataset, correct`` and, where known,
   ``subset, split, query_id`` (an ``answer`` is not read);
3. the same columns as CSV or Parquet.
"""

from __future__ import annotations

import hashlib
import math
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from arllm.runtime.errors import OutcomesError
from arllm.train.records import (
    Record,
    correct_field,
    csv_header,
    csv_rows,
    jsonl_records,
    label_field,
    parquet_records,
    scored_rows,
    text_field,
)

SPLITS = ("train", "val", "test", "ood")

_QUERY_FIELDS = ("query", "dataset", "subset", "split")
_LONG_REQUIRED = ("query", "model", "dataset", "correct")
_LONG_OPTIONAL = ("subset", "split", "query_id")
_QueryRow = tuple[str, str, str, str]  # in the order of _QUERY_FIELDS


@dataclass(frozen=True)
class Source:
    """A file that outcomes were read from: its path as given, and the hash and size of its bytes on disk."""

    path: str
    sha256: str
    bytes: int


@dataclass(frozen=True, eq=False)
class Outcomes:
    """N queries × M candidates and who answered what.

    ``splits`` holds one of ``SPLITS`` per query, or "" where the file gives none. ``correct`` is (N, M)
    float32 in [0, 1]; NaN means not evaluated, which is not the same as wrong.

    Raises:
        OutcomesError: the lengths of the fields disagree.
    """

    query_ids: tuple[str, ...]
    queries: tuple[str, ...]
    datasets: tuple[str, ...]
    subsets: tuple[str, ...]
    splits: tuple[str, ...]
    candidates: tuple[str, ...]
    correct: NDArray[np.float32]
    sources: tuple[Source, ...] = ()

    def __post_init__(self) -> None:
        columns = (self.query_ids, self.queries, self.datasets, self.subsets, self.splits)
        lengths = [len(column) for column in columns]
        if len(set(lengths)) != 1 or self.correct.shape != (len(self), len(self.candidates)):
            shape = f"{self.correct.shape} for {len(self.candidates)} candidates"
            raise OutcomesError(f"query columns of lengths {lengths}, correct of shape {shape}: unequal")

    def __len__(self) -> int:
        return len(self.query_ids)

    def rows(self, index: ArrayLike) -> Outcomes:
        """The queries at the integer positions, or where the (N,) bool mask is true, in that order."""
        where = np.asarray(index)
        if where.dtype == np.bool_:
            if where.shape != (len(self),):
                raise OutcomesError(f"a mask over {len(self)} queries needs shape ({len(self)},), not {where.shape}")
            where = np.flatnonzero(where)
        positions = where.astype(np.int64)

        def pick(column: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(column[i] for i in positions.tolist())

        return replace(
            self,
            query_ids=pick(self.query_ids),
            queries=pick(self.queries),
            datasets=pick(self.datasets),
            subsets=pick(self.subsets),
            splits=pick(self.splits),
            correct=self.correct[positions],
        )

    def split(self, name: str) -> Outcomes:
        """The queries of one split; none is not an error, an unknown name is."""
        if name not in SPLITS:
            raise OutcomesError(f"unknown split {name!r}; the splits are {', '.join(SPLITS)}")
        return self.rows(np.array([split == name for split in self.splits], dtype=np.bool_))

    def columns(self, names: Sequence[str]) -> Outcomes:
        """The same queries with the named candidates alone, in that order."""
        at = {name: i for i, name in enumerate(self.candidates)}
        missing = [name for name in names if name not in at]
        if missing:
            raise OutcomesError(f"no outcomes of candidate {missing[0]!r}; there are: {', '.join(self.candidates)}")
        return replace(self, candidates=tuple(names), correct=self.correct[:, [at[name] for name in names]])


def read_outcomes(
    path: str | Path,
    labels: str | Path | None = None,
    *,
    candidates: Collection[str] | None = None,
    ignore_unknown: bool = False,
) -> Outcomes:
    """Read outcomes in any of the three forms (see the module).

    Queries stand in order of first appearance; candidates in that of the columns, or of first appearance. In
    the long forms, repeated (query, model) rows are averaged, and a row without a ``query_id`` gets the first
    16 hex digits of the SHA-256 of its query.

    Args:
        path: a folder, a queries file (with ``labels``), or a long file: .jsonl, .csv (also .gz), .parquet.
        labels: the labels file of a queries file.
        candidates: the known models, i.e. the pool. None: any.
        ignore_unknown: leave out models that are not in ``candidates`` where that would else be an error.

    Raises:
        OutcomesError: a file can't be read or a row is unusable; names the file and line.
        MissingExtraError: Parquet without pyarrow.
    """
    known = None if candidates is None else frozenset(candidates)
    path = Path(path)
    if path.is_dir() or labels is not None:
        queries_file = _in_folder(path, "queries.jsonl") if path.is_dir() else path
        labels_file = _in_folder(path, "labels.csv") if labels is None else Path(labels)
        return _read_wide(queries_file, labels_file, known, ignore_unknown)
    name = path.name.lower().removesuffix(".gz")
    source = source_of(path)
    if name.endswith(".jsonl"):
        records = jsonl_records(path)
    elif name.endswith(".csv"):
        records = scored_rows(path, _LONG_REQUIRED)
    elif path.name.lower().endswith(".parquet"):
        records = parquet_records(path, _LONG_REQUIRED, _LONG_OPTIONAL)
    else:
        raise OutcomesError(f"{path}: unknown form; give a folder, or .jsonl, .csv (also .gz) or .parquet")
    return _read_long(records, source, known, ignore_unknown)


def _in_folder(folder: Path, name: str) -> Path:
    found = [p for p in (folder / name, folder / f"{name}.gz") if p.is_file()]
    if len(found) != 1:
        what = f"no {name} or {name}.gz" if not found else f"both {name} and {name}.gz"
        raise OutcomesError(f"{folder}: {what} in the folder; there must be exactly one")
    return found[0]


def source_of(path: Path) -> Source:
    """What a file is known by later. Raises OutcomesError: it is missing, unreadable or empty."""
    digest, size = hashlib.sha256(), 0
    try:
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
                size += len(block)
    except FileNotFoundError:
        raise OutcomesError(f"{path}: no such file") from None
    except OSError as error:
        raise OutcomesError(f"{path}: can't be read: {error.strerror}") from None
    if size == 0:
        raise OutcomesError(f"{path}: the file is empty")
    return Source(str(path), digest.hexdigest(), size)


def _query_row(where: str, record: Mapping[str, Any]) -> tuple[str, _QueryRow]:
    query = text_field(where, record, "query")
    dataset = text_field(where, record, "dataset")
    subset = text_field(where, record, "subset", dataset)
    split = text_field(where, record, "split", "")
    if split and split not in SPLITS:
        raise OutcomesError(f"{where}: unknown split {split!r}; use {', '.join(SPLITS)}, or leave it blank")
    query_id = text_field(where, record, "query_id", "") or hashlib.sha256(query.encode()).hexdigest()[:16]
    return query_id, (query, dataset, subset, split)


def _unknown(where: str, model: str) -> OutcomesError:
    return OutcomesError(f"{where}: model {model!r} is not in the pool; add it to the pool, or pass --ignore-unknown")


def _read_long(
    records: Iterator[Record], source: Source, known: frozenset[str] | None, ignore_unknown: bool
) -> Outcomes:
    ids: dict[str, int] = {}
    rows: list[_QueryRow] = []
    seen_at: list[str] = []
    models: dict[str, int] = {}
    cells: list[tuple[int, int]] = []
    values: list[float] = []
    for where, record in records:
        query_id, row = _query_row(where, record)
        model = text_field(where, record, "model")
        value = correct_field(where, record.get("correct"))
        if known is not None and model not in known:
            if ignore_unknown:
                continue
            raise _unknown(where, model)
        at = ids.setdefault(query_id, len(rows))
        if at == len(rows):
            rows.append(row)
            seen_at.append(where)
        elif rows[at] != row:
            field = next(f for f, a, b in zip(_QUERY_FIELDS, rows[at], row, strict=True) if a != b)
            raise OutcomesError(
                f'{where}: query id {query_id!r} has another "{field}" than at {seen_at[at]}; '
                "make them equal, or give the queries ids of their own"
            )
        cells.append((at, models.setdefault(model, len(models))))
        values.append(value)
    if not cells:
        raise OutcomesError(f"{source.path}: no rows" + (" of a candidate of the pool" if known is not None else ""))
    shape = (len(rows), len(models))
    flat = np.ravel_multi_index(tuple(np.array(cells, dtype=np.int64).T), shape)
    counts = np.bincount(flat, minlength=shape[0] * shape[1])
    sums = np.bincount(flat, weights=np.array(values), minlength=counts.size)
    with np.errstate(invalid="ignore"):  # 0 / 0 is the NaN of a pair without rows
        correct = (sums / counts).astype(np.float32).reshape(shape)
    return _outcomes(tuple(ids), rows, tuple(models), correct, (source,))


def _read_wide(queries_file: Path, labels_file: Path, known: frozenset[str] | None, ignore_unknown: bool) -> Outcomes:
    sources = (source_of(queries_file), source_of(labels_file))
    rows: dict[str, _QueryRow] = {}
    seen_at: dict[str, str] = {}
    for where, record in jsonl_records(queries_file):
        text_field(where, record, "query_id")
        query_id, row = _query_row(where, record)
        if query_id in rows:
            raise OutcomesError(f"{where}: query id {query_id!r} stands already at {seen_at[query_id]}; remove one")
        rows[query_id], seen_at[query_id] = row, where
    if not rows:
        raise OutcomesError(f"{queries_file}: no rows")

    table = csv_rows(labels_file)
    where, header = csv_header(table, labels_file)
    if "query_id" not in header:
        raise OutcomesError(f'{where}: no column "query_id"; labels need it beside a column per candidate')
    key = header.index("query_id")
    keep = []
    for column, name in enumerate(header):
        if column == key:
            continue
        if not name.strip():
            raise OutcomesError(f"{where}: column {column + 1} has no name; name the candidate")
        if known is None or name in known:
            keep.append(column)
        elif not ignore_unknown:
            raise _unknown(where, name)
    if not keep:
        raise OutcomesError(f"{where}: no column of a candidate" + (" of the pool" if known is not None else ""))
    labels: dict[str, list[float]] = {}
    cache = {"": math.nan, "0": 0.0, "1": 1.0}
    for where, row_fields in table:
        query_id = row_fields[key]
        if query_id not in rows:
            raise OutcomesError(f"{where}: query id {query_id!r} is not in {queries_file}; add it or remove this row")
        if query_id in labels:
            raise OutcomesError(f"{where}: query id {query_id!r} stands in an earlier row; remove one")
        for column, field in enumerate(row_fields):
            if field not in cache and column != key:
                cache[field] = label_field(where, header[column], field)
        labels[query_id] = [cache[row_fields[column]] for column in keep]
    for query_id, at in seen_at.items():
        if query_id not in labels:
            raise OutcomesError(f"{at}: query id {query_id!r} has no row in {labels_file}; add one or remove this")
    correct = np.array([labels[query_id] for query_id in rows], dtype=np.float32)
    return _outcomes(tuple(rows), list(rows.values()), tuple(header[c] for c in keep), correct, sources)


def _outcomes(
    ids: tuple[str, ...],
    rows: Sequence[_QueryRow],
    candidates: tuple[str, ...],
    correct: NDArray[np.float32],
    sources: tuple[Source, ...],
) -> Outcomes:
    queries, datasets, subsets, splits = zip(*rows, strict=True)
    return Outcomes(ids, queries, datasets, subsets, splits, candidates, correct, sources)


def normalise_query(text: str) -> str:
    """The text by which queries count as equal: NFKC, casefolded, white space collapsed and stripped."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _hash_fraction(text: str, salt: str = "") -> float:
    """int(first 16 hex digits of SHA-256(salt + text)) / 2**64, in [0, 1]."""
    return int(hashlib.sha256((salt + text).encode()).hexdigest()[:16], 16) / 2**64


def assign_splits(outcomes: Outcomes, *, ratios: tuple[float, float, float] = (0.7, 0.1, 0.2)) -> Outcomes:
    """Give every query without a split one of train, val and test, in these ratios; given splits stay.

    By ``u = int(sha256(normalise_query(text)).hexdigest()[:16], 16) / 2**64``: train below ``ratios[0]``, val
    below ``ratios[0] + ratios[1]``, else test. So the split of a query depends on its text alone, and equal
    questions never straddle. Where an equal question has a given split, it takes that; of several given ones
    the last in the order of ``SPLITS``, so that no blank row carries a held-out question into training.

    Raises:
        OutcomesError: the ratios are negative or don't sum to 1.
    """
    if len(ratios) != 3 or not all(r >= 0 for r in ratios) or not math.isclose(sum(ratios), 1.0, abs_tol=1e-9):
        raise OutcomesError(f"split ratios must be three numbers >= 0 that sum to 1, not {ratios}")
    if all(outcomes.splits):
        return outcomes
    texts = [normalise_query(query) for query in outcomes.queries]
    given: dict[str, str] = defaultdict(str)
    for text, split in zip(texts, outcomes.splits, strict=True):
        if split:
            given[text] = max(given[text] or split, split, key=SPLITS.index)

    def by_hash(text: str) -> str:
        u = _hash_fraction(text)
        return "train" if u < ratios[0] else "val" if u < ratios[0] + ratios[1] else "test"

    splits = (s or given.get(t) or by_hash(t) for t, s in zip(texts, outcomes.splits, strict=True))
    return replace(outcomes, splits=tuple(splits))


def carve_validation(outcomes: Outcomes, fraction: float = 0.1) -> Outcomes:
    """Move about ``fraction`` of the train queries to val where val is empty; else the outcomes as they are.

    By the hash of ``assign_splits`` over "val:" + the normalised text: a hash of its own, as the train split
    is already the lower part of the other one. At least one question moves; equal questions move together.

    Raises:
        OutcomesError: the fraction is not inside (0, 1), or fewer than two different train queries are there.
    """
    if not 0.0 < fraction < 1.0:
        raise OutcomesError(f"the validation fraction must lie between 0 and 1, not {fraction}")
    if "val" in outcomes.splits:
        return outcomes
    hashes = [
        _hash_fraction(normalise_query(query), "val:") if split == "train" else math.inf
        for query, split in zip(outcomes.queries, outcomes.splits, strict=True)
    ]
    if len(set(hashes) - {math.inf}) < 2:
        raise OutcomesError("a validation split needs at least two different train queries; add queries")
    bound = max(fraction, min(hashes))
    splits = ("val" if h <= bound else s for h, s in zip(hashes, outcomes.splits, strict=True))
    return replace(outcomes, splits=tuple(splits))
