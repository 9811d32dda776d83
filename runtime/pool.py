"""The candidate pool: names, costs, model vectors, metadata, kept in tie-break order; reads pool.json.

Knows nothing about outcomes or training: other pool formats are read by ``arllm.train.pools``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from arllm.runtime.errors import PoolError


def _is_amount(value: object) -> TypeGuard[int | float]:
    """A finite number >= 0; JSON also brings true, NaN, and whole numbers beyond any float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max


@dataclass(frozen=True)
class Candidate:
    """A model that can be chosen.

    ``cost`` is the expected cost of one query in the pool's unit: finite and not negative.
    ``vector`` is the model vector: accuracy in [0, 1] per domain, or None before training.
    ``metadata`` is free: whatever the pool file says of the candidate beside these.
    """

    name: str
    cost: float
    vector: tuple[float, ...] | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise PoolError(f"a candidate's name must be a non-empty string, not {self.name!r}")
        cost = self.cost
        if not _is_amount(cost):
            raise PoolError(f"candidate {self.name!r}: cost must be a finite number >= 0, not {cost!r}")
        if self.vector is not None and not all(0.0 <= value <= 1.0 for value in self.vector):
            raise PoolError(f"candidate {self.name!r}: every entry of a model vector lies in [0, 1]")


@dataclass(frozen=True)
class Pool:
    """The candidates, sorted by (cost, name), so that the first maximum of a utility row wins every tie.

    ``unit`` is the unit of every cost, e.g. "USD per million output tokens".
    """

    candidates: tuple[Candidate, ...]
    unit: str = "unspecified"

    def __post_init__(self) -> None:
        if not self.candidates:
            raise PoolError("the pool has no candidates")
        ordered = tuple(sorted(self.candidates, key=lambda c: (c.cost, c.name)))
        object.__setattr__(self, "candidates", ordered)
        seen: set[str] = set()
        for candidate in ordered:
            if candidate.name in seen:
                raise PoolError(f"candidate {candidate.name!r} stands in the pool twice")
            seen.add(candidate.name)

    def __len__(self) -> int:
        return len(self.candidates)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(candidate.name for candidate in self.candidates)

    @property
    def costs(self) -> NDArray[np.float64]:
        """(M,) float64, in the pool's unit, ascending."""
        return np.array([candidate.cost for candidate in self.candidates], dtype=np.float64)

    def vectors(self) -> NDArray[np.float32]:
        """(M, D) float32 model vectors.

        Raises:
            PoolError: a candidate has no model vector, or the widths differ.
        """
        widths = {len(c.vector) for c in self.candidates if c.vector is not None}
        missing = [c.name for c in self.candidates if c.vector is None]
        if missing:
            raise PoolError(f"candidate {missing[0]!r} has no model vector: train, or add one to the pool file")
        if len(widths) != 1:
            raise PoolError(f"model vectors have different widths: {sorted(widths)}")
        return np.array([c.vector for c in self.candidates], dtype=np.float32)

    def subset(self, names: Iterable[str]) -> Pool:
        """The pool of the named candidates alone (their order does not matter)."""
        wanted = set(names)
        unknown = wanted - set(self.names)
        if unknown:
            raise PoolError(f"unknown candidate {sorted(unknown)[0]!r}: the pool has {', '.join(self.names)}")
        return Pool(tuple(c for c in self.candidates if c.name in wanted), self.unit)

    def with_vectors(self, names: Sequence[str], vectors: NDArray[np.floating[Any]]) -> Pool:
        """The same pool with the rows of ``vectors`` (M, D) as model vectors, row i belonging to names[i]."""
        missing = sorted(set(self.names) - set(names))
        if missing:
            raise PoolError(f"no model vector for candidate {missing[0]!r}")
        by_name = {name: tuple(float(v) for v in row) for name, row in zip(names, vectors, strict=True)}
        return Pool(tuple(Candidate(c.name, c.cost, by_name[c.name], c.metadata) for c in self.candidates), self.unit)

    def to_json(self) -> dict[str, Any]:
        rows = []
        for c in self.candidates:
            row: dict[str, Any] = {"name": c.name, "cost": c.cost}
            if c.vector is not None:
                row["vector"] = list(c.vector)
            if c.metadata:
                row["metadata"] = dict(c.metadata)
            rows.append(row)
        return {"unit": self.unit, "candidates": rows}


def price_cost(record: Mapping[str, Any], where: str) -> float:
    """Cost of a query: (input_price * expected_input_tokens + output_price * expected_output_tokens) / 1e6.

    Prices are per million tokens; a missing ``expected_input_tokens`` counts as 0.
    """

    def number(key: str, default: float | None = None) -> float:
        value = record.get(key, default)
        if not _is_amount(value):
            raise PoolError(f"{where}: {key} must be a finite number >= 0, not {value!r}")
        return float(value)

    tokens_in = number("expected_input_tokens", 0.0)
    price_in = number("input_price", None if tokens_in else 0.0)
    return (price_in * tokens_in + number("output_price") * number("expected_output_tokens")) / 1e6


def candidate_from_json(record: Any, where: str) -> Candidate:
    """One record of pool.json: ``name`` and either ``cost`` or the prices of :func:`price_cost`."""
    if not isinstance(record, Mapping):
        raise PoolError(f"{where}: a candidate must be an object, not {type(record).__name__}")
    priced = [key for key in ("input_price", "output_price", "expected_output_tokens") if key in record]
    if "cost" in record and priced:
        raise PoolError(f"{where}: give either cost or prices, not both (found cost and {priced[0]})")
    if "cost" in record:
        cost = record["cost"]
    elif priced:
        cost = price_cost(record, where)
    else:
        raise PoolError(f"{where}: no cost: give cost, or output_price with expected_output_tokens")
    vector = record.get("vector")
    if vector is not None and (
        not isinstance(vector, list)
        or not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in vector)
    ):
        raise PoolError(f"{where}: vector must be a list of numbers")
    known = {"name", "cost", "vector", "metadata"}
    metadata = {key: value for key, value in record.items() if key not in known}
    extra = record.get("metadata", {})
    if not isinstance(extra, Mapping):
        raise PoolError(f"{where}: metadata must be an object")
    metadata.update(extra)
    try:
        return Candidate(record.get("name"), cost, None if vector is None else tuple(vector), metadata)  # type: ignore[arg-type]
    except PoolError as error:
        raise PoolError(f"{where}: {error}") from None


def pool_from_json(data: Any, where: str) -> Pool:
    """A pool from the parsed content of pool.json: ``{"unit": …, "candidates": [{"name": …, "cost": …}, …]}``.

    Raises:
        PoolError: names ``where`` and the record at fault.
    """
    if not isinstance(data, Mapping) or not isinstance(data.get("candidates"), list):
        raise PoolError(f'{where}: expected {{"unit": …, "candidates": [{{"name": …, "cost": …}}, …]}}')
    unit = data.get("unit", "unspecified")
    if not isinstance(unit, str):
        raise PoolError(f"{where}: unit must be a string, not {unit!r}")
    rows = [candidate_from_json(r, f"{where}: candidate {i + 1}") for i, r in enumerate(data["candidates"])]
    try:
        return Pool(tuple(rows), unit)
    except PoolError as error:
        raise PoolError(f"{where}: {error}") from None


def read_pool_json(path: str | os.PathLike[str]) -> Pool:
    """Read pool.json.

    Raises:
        PoolError: the file can't be read, is not JSON, or a record is unusable.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PoolError(f"{path}: can't be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise PoolError(f"{path}: not valid JSON: {error}") from None
    return pool_from_json(data, str(path))
