"""Candidate pools in their published forms: pool.json, models_info.json and CSV. Free of torch.

``models_info.json`` is read in both shapes it was published in: an object of model name → info, or a list of
records with ``model``, ``name`` or ``model_name``. An info holds ``co2_cost``, the model vector as
``feature_vector`` or as one ``<domain>_acc`` per domain, and anything else, which becomes metadata.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from arllm.runtime.errors import PoolError
from arllm.runtime.pool import Candidate, Pool, pool_from_json, price_cost
from arllm.train.records import csv_header, csv_rows, lines

CO2_UNIT = "co2_cost as published (kg CO2)"

_PRICES = ("input_price", "output_price", "expected_input_tokens", "expected_output_tokens")
_NAME_KEYS = ("model", "name", "model_name")


def read_pool(
    path: str | Path,
    *,
    cost_column: str | None = None,
    where: Mapping[str, str] | None = None,
    unit: str | None = None,
) -> Pool:
    """Read a pool in any of its forms, told apart by the file's ending and content.

    A CSV has ``name`` or ``model``; ``cost``, or the prices of ``runtime.pool.price_cost``; if need be
    ``unit``, the same in every row. Its other columns become metadata, as text.

    Args:
        cost_column: where the cost stands, instead of ``cost`` (CSV) or ``co2_cost`` (models_info.json).
        where: keep only the CSV rows that hold these values, e.g. ``{"bundle": "ollb2"}``.
        unit: the unit of the costs, before anything that the file says.

    Raises:
        PoolError: the file can't be read or a record is unusable; names the file, and the line or the model.
    """
    path = Path(path)
    if path.suffix.lower() == ".csv":
        return _read_csv(path, cost_column, where or {}, unit)
    if path.suffix.lower() != ".json":
        raise PoolError(f"{path}: unknown form; give a .json or .csv file")
    if where:
        raise PoolError(f"{path}: rows can be chosen in a CSV alone; drop the condition on {sorted(where)[0]!r}")
    data = _load_json(path)
    if _is_pool_json(data):
        if cost_column is not None:
            raise PoolError(f"{path}: a pool.json holds its cost as cost; drop the cost column {cost_column!r}")
        pool = pool_from_json(data, str(path))
        return pool if unit is None else Pool(pool.candidates, unit)
    return _read_models_info(path, _infos(path, data), cost_column, unit)


def models_info_domains(path: str | Path) -> tuple[str, ...] | None:
    """The domains that a models_info.json's vectors stand for, in their order: its ``*_acc`` fields.

    None where it has no such fields, where a ``feature_vector`` of another length takes their place, and for
    every other form of pool.

    Raises:
        PoolError: as :func:`read_pool`.
    """
    path = Path(path)
    if path.suffix.lower() != ".json":
        return None
    data = _load_json(path)
    if _is_pool_json(data):
        return None
    infos = _infos(path, data)
    domains = tuple(key.removesuffix("_acc") for key in _vector_keys(path, infos))
    vectors = _raw_vectors(path, infos)
    return domains if domains and all(len(vector) == len(domains) for vector in vectors.values()) else None


def match_pool(pool: Pool, candidates: Iterable[str]) -> Pool:
    """The part of the pool that has outcomes.

    Raises:
        PoolError: a candidate with outcomes is not in the pool.
    """
    names = tuple(candidates)
    missing = [name for name in names if name not in set(pool.names)]
    if missing:
        raise PoolError(
            f"candidate {missing[0]!r} has outcomes but is not in the pool ({', '.join(pool.names)}); "
            "add it with its cost, or leave its outcomes out"
        )
    return pool.subset(names)


# --- models_info.json ---------------------------------------------------------------------------------------


def _load_json(path: Path) -> Any:
    try:
        return json.loads("".join(lines(path, PoolError)))
    except json.JSONDecodeError as error:
        raise PoolError(f"{path}:{error.lineno}: malformed JSON ({error.msg}); mend it there") from None


def _is_pool_json(data: Any) -> bool:
    return isinstance(data, dict) and isinstance(data.get("candidates"), list)


def _infos(path: Path, data: Any) -> dict[str, dict[str, Any]]:
    """Model name → info, from either shape."""
    named: list[tuple[Any, Any]] = []
    if isinstance(data, dict):
        named = list(data.items())
    elif isinstance(data, list):
        for number, record in enumerate(data, 1):
            key = next((k for k in _NAME_KEYS if isinstance(record, dict) and k in record), None)
            if key is None:
                raise PoolError(f"{path}: record {number} must be an object with one of {', '.join(_NAME_KEYS)}")
            named.append((record[key], {k: v for k, v in record.items() if k != key}))
    else:
        raise PoolError(f"{path}: expected a pool.json, or models by name or as a list")
    if not named:
        raise PoolError(f"{path}: no candidates; add one")
    infos: dict[str, dict[str, Any]] = {}
    for name, info in named:
        if not isinstance(name, str) or not name.strip():
            raise PoolError(f"{path}: a model's name must be a non-empty string, not {name!r}")
        if not isinstance(info, dict):
            raise PoolError(f"{path}: model {name!r} must be an object, not {info!r}")
        if name in infos:
            raise PoolError(f"{path}: model {name!r} stands there twice; remove one")
        infos[name] = info
    return infos


def _vector_keys(path: Path, infos: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """The ``*_acc`` fields, equal in every model: a vector has no other record of which entry is which."""
    by_model = {name: tuple(key for key in info if key.endswith("_acc")) for name, info in infos.items()}
    first, expected = next(iter(by_model.items()))
    for name, keys in by_model.items():
        if keys != expected:
            raise PoolError(
                f"{path}: model {name!r} has the accuracies ({', '.join(keys)}), {first!r} has "
                f"({', '.join(expected)}); give every model the same ones in the same order"
            )
    return expected


def _raw_vectors(path: Path, infos: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[float, ...]]:
    """Each model's vector as published, before scaling; none where the file holds no accuracies."""
    with_vector = [name for name, info in infos.items() if "feature_vector" in info]
    if with_vector and len(with_vector) < len(infos):
        name = next(name for name in infos if name not in with_vector)
        raise PoolError(f"{path}: model {name!r} has no feature_vector, others have; give every model one")
    keys = () if with_vector else _vector_keys(path, infos)
    vectors: dict[str, tuple[float, ...]] = {}
    for name, info in infos.items():
        entries: Any = info["feature_vector"] if with_vector else [info[key] for key in keys]
        labels: Sequence[str] = keys
        if with_vector:
            if not isinstance(entries, list) or not entries:
                raise PoolError(f"{path}: model {name!r}: feature_vector must be a list of numbers, not {entries!r}")
            labels = [f"feature_vector[{i}]" for i in range(len(entries))]
        for label, value in zip(labels, entries, strict=True):
            if not _is_number(value) or not 0.0 <= value <= 100.0:
                raise PoolError(f"{path}: model {name!r}: {label} must be in [0, 1], or a percent, not {value!r}")
        vectors[name] = tuple(float(value) for value in entries)
    widths = {len(vector) for vector in vectors.values()}
    if len(widths) > 1:
        raise PoolError(f"{path}: model vectors have different widths {sorted(widths)}; make them equal")
    return vectors if widths != {0} else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _read_models_info(
    path: Path, infos: Mapping[str, Mapping[str, Any]], cost_column: str | None, unit: str | None
) -> Pool:
    vectors = _raw_vectors(path, infos)
    # The published files hold fractions or leaderboard percents, never both: one scale for the whole file.
    percent = any(value > 1.0 for vector in vectors.values() for value in vector)
    cost_key = cost_column or "co2_cost"
    used = {cost_key, "feature_vector"}
    if vectors and not any("feature_vector" in info for info in infos.values()):
        used |= set(_vector_keys(path, infos))
    candidates = []
    for name, info in infos.items():
        cost: Any = info.get(cost_key)
        if not _is_number(cost) or cost < 0:
            raise PoolError(
                f"{path}: model {name!r}: {cost_key} must be a finite number >= 0, not {cost!r}; "
                "give its cost, or leave the model out"
            )
        metadata = {key: value for key, value in info.items() if key not in used}
        vector = vectors.get(name)
        if vector is not None and percent:
            vector = tuple(value / 100.0 for value in vector)
            metadata["accuracy_scale"] = "percent"
        candidates.append(Candidate(name, float(cost), vector, metadata))
    return Pool(tuple(candidates), unit or cost_column or CO2_UNIT)


# --- CSV ----------------------------------------------------------------------------------------------------


def _read_csv(path: Path, cost_column: str | None, conditions: Mapping[str, str], unit: str | None) -> Pool:
    rows = csv_rows(path, PoolError)
    place, header = csv_header(rows, path, PoolError)
    name_key = "name" if "name" in header else "model"
    for column in (name_key, *conditions, *([cost_column] if cost_column else [])):
        if column not in header:
            wanted = "name or model" if column == name_key else column
            raise PoolError(f"{place}: no column {wanted}; there are: {', '.join(header)}")
    candidates: list[Candidate] = []
    seen: dict[str, str] = {}
    units: dict[str, str] = {}
    for place, fields in rows:
        row = dict(zip(header, fields, strict=True))
        if any(row[column] != value for column, value in conditions.items()):
            continue
        row = {key: value for key, value in row.items() if value.strip()}
        name = row.pop(name_key, "")
        if not name:
            raise PoolError(f"{place}: {name_key} is blank; name the candidate")
        if name in seen:
            raise PoolError(f"{place}: candidate {name!r} stands already at {seen[name]}; remove one, or choose rows")
        seen[name] = place
        units.setdefault(row.pop("unit", ""), place)
        cost = _csv_cost(row, f"{place}: candidate {name!r}", cost_column)
        candidates.append(Candidate(name, cost, None, row))
    if not candidates:
        chosen = " and ".join(f"{column} = {value!r}" for column, value in conditions.items())
        raise PoolError(f"{path}: no candidates" + (f" where {chosen}; check the value" if chosen else "; add a row"))
    if len(units) > 1 and unit is None:
        raise PoolError(
            f"{list(units.values())[1]}: costs in units {', '.join(map(repr, units))}; convert them to one"
        )
    return Pool(tuple(candidates), unit or next(iter(units)) or cost_column or "unspecified")


def _csv_cost(row: dict[str, str], place: str, cost_column: str | None) -> float:
    """Take the cost out of a row; what stays there is metadata."""

    def number(key: str) -> float:
        text = row.pop(key)
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < 0:
            raise PoolError(f"{place}: {key} must be a finite number >= 0, not {text!r}")
        return value

    if cost_column is not None:
        if cost_column not in row:
            raise PoolError(f"{place}: {cost_column} is blank; fill it in, or leave the candidate out")
        return number(cost_column)
    priced = [key for key in _PRICES if key in row]
    if "cost" in row and priced:
        raise PoolError(f"{place}: give either cost or prices, not both (found cost and {priced[0]})")
    if "cost" in row:
        return number("cost")
    if not priced:
        raise PoolError(
            f"{place}: no cost; give cost or output_price and expected_output_tokens, or name the cost column"
        )
    return price_cost({key: number(key) for key in priced}, place)
