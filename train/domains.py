"""What is derived from outcomes: difficulty of queries, domains, model vectors. Free of torch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arllm.runtime.errors import OutcomesError
from arllm.train.outcomes import Outcomes
from arllm.train.records import csv_rows, lines


def difficulty(correct: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Share of the candidates' answers to each query that were wrong, adjusted for who answered.

    ``1 - mean(correct)`` where every candidate answered. Missing answers are imputed first, else strong
    candidates alone would make a query look easy: ``correct[i, m] ≈ ability[m] + ease[i]`` is fitted by least
    squares over the answers that are there, with one pseudo-answer of average ease per query (that shrinks
    ``ease`` by n / (n + 1) and makes the fit unique), and a missing answer counts as
    ``clip(ability[m] + ease[i], 0, 1)``.

    Args:
        correct: (N, M) in [0, 1], NaN where not evaluated. A column of NaN alone is left out.

    Returns:
        (N,) float64 in [0, 1]; NaN for a query with no answer.
    """
    values = np.asarray(correct, dtype=np.float64)
    values = values[:, ~np.isnan(values).all(axis=0)]
    seen = ~np.isnan(values)
    if values.shape[1] == 0:
        return np.full(len(values), np.nan)
    if not seen.all():
        values = np.where(seen, values, imputed(values, seen))
    result: NDArray[np.float64] = 1.0 - values.mean(axis=1)
    result[~seen.any(axis=1)] = np.nan
    return result


def imputed(values: NDArray[np.float64], seen: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(N, M) clip(ability + ease, 0, 1), fitted on the seen values by alternating the two exact steps."""
    filled = np.where(seen, values, 0.0)
    by_query, by_candidate = seen.sum(axis=1), seen.sum(axis=0)
    ease = np.zeros(len(values))
    ability = filled.sum(axis=0) / by_candidate
    for _ in range(500):
        ease = (filled.sum(axis=1) - seen @ ability) / (by_query + 1)
        updated = (filled.sum(axis=0) - ease @ seen) / by_candidate
        moved = np.abs(updated - ability).max()
        ability = updated
        if moved < 1e-7:
            break
    fitted: NDArray[np.float64] = np.clip(ability[None, :] + ease[:, None], 0.0, 1.0)
    return fitted


@dataclass(frozen=True, eq=False)
class Domains:
    """Domain names, sorted, and the (N,) int64 index of each query's domain: -1 belongs to none."""

    names: tuple[str, ...]
    index: NDArray[np.int64]
    scheme: str


def assign_domains(
    outcomes: Outcomes,
    scheme: str = "auto",
    *,
    names: Sequence[str] | None = None,
    min_queries: int = 30,
    mapping: Mapping[str, str] | None = None,
) -> Domains:
    """Put each query into a domain. Which domains there are is decided by the train split alone.

    Schemes:
        dataset: the dataset.
        subset: "dataset/subset", where that has ``min_queries`` train queries; the others belong to none.
        auto: as subset; what is left of a dataset joins a domain of the dataset's name, where that is at
            least ``min_queries`` train queries.
        a path: a JSON object or a two-column CSV from "dataset" or "dataset/subset" to a domain's name. The
            more specific entry wins; unmapped queries belong to none.

    Args:
        names: the domains of an earlier training, to index against in their order.
        mapping: the content of a mapping file, in its place.

    Raises:
        OutcomesError: no domain comes out, or the mapping file is malformed (names it).
    """
    subset_of = [f"{d}/{s}" for d, s in zip(outcomes.datasets, outcomes.subsets, strict=True)]
    train = [i for i, split in enumerate(outcomes.splits) if split == "train"]
    fixed = None if names is None else tuple(names)
    # Every query's names, most specific first; it belongs to the first that is a domain.
    choices: list[tuple[str, ...]]
    if mapping is None and scheme not in ("auto", "dataset", "subset"):
        mapping = _read_mapping(Path(scheme))
    elif mapping is not None:
        scheme = "mapping"
    if mapping is not None:
        mapped = [mapping.get(s, mapping.get(d)) for s, d in zip(subset_of, outcomes.datasets, strict=True)]
        choices = [() if name is None else (name,) for name in mapped]
        found = {name for i in train for name in choices[i]}
    elif scheme == "dataset":
        choices = [(dataset,) for dataset in outcomes.datasets]
        found = {outcomes.datasets[i] for i in train}
    else:
        counts = Counter(subset_of[i] for i in train)
        found = {name for name, count in counts.items() if count >= min_queries}
        choices = [(name,) for name in subset_of]
        if scheme == "auto":
            rest = Counter(outcomes.datasets[i] for i in train if subset_of[i] not in found)
            found |= {dataset for dataset, count in rest.items() if count >= min_queries}
            choices = list(zip(subset_of, outcomes.datasets, strict=True))
    domains = tuple(sorted(found)) if fixed is None else fixed
    if not domains:
        why = f"none has {min_queries} train queries" if train else "no query is in the train split"
        raise OutcomesError(f"no domain by the scheme {scheme!r}: {why}; assign splits, or choose another scheme")
    position = {name: i for i, name in enumerate(domains)}
    index = [next((position[name] for name in row if name in position), -1) for row in choices]
    return Domains(domains, np.array(index, dtype=np.int64), scheme)


def _read_mapping(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise OutcomesError(f"{path}: no such domain mapping; give a file, or one of auto, dataset, subset")
    found = dict(_csv_mapping(path)) if path.suffix.lower() == ".csv" else _json_mapping(path)
    if not found:
        raise OutcomesError(f"{path}: the mapping is empty; map a dataset or dataset/subset to a domain")
    return found


def _json_mapping(path: Path) -> dict[str, str]:
    try:
        data = json.loads("".join(lines(path)))
    except json.JSONDecodeError as error:
        raise OutcomesError(f"{path}:{error.lineno}: malformed JSON ({error.msg}); mend it there") from None
    if not isinstance(data, dict):
        raise OutcomesError(f'{path}: expected a JSON object {{"dataset/subset": "domain", …}}')
    for key, value in data.items():
        if not isinstance(value, str) or not value.strip():
            raise OutcomesError(f"{path}: the domain of {key!r} must be a non-empty string, not {value!r}")
    return data


def _csv_mapping(path: Path) -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    for where, row in csv_rows(path):
        if len(row) != 2 or not all(field.strip() for field in row):
            raise OutcomesError(f"{where}: expected two fields: dataset or dataset/subset, and its domain")
        if row[0] in seen:
            raise OutcomesError(f"{where}: {row[0]!r} is mapped twice; remove one")
        seen.add(row[0])
        yield row[0], row[1]


def model_vectors(
    correct: NDArray[np.floating[Any]],
    domain_index: NDArray[np.integer[Any]],
    n_domains: int,
    *,
    prior_weight: float = 5.0,
    names: Sequence[str] | None = None,
) -> NDArray[np.float32]:
    """Accuracy of each candidate per domain, over the rows given: pass those of the train split alone.

    Shrunk toward the candidate's accuracy over all rows, ``(sum + w * overall) / (n + w)``, so that a domain
    with few outcomes is not extreme and one with none counts as average. Rows of no domain count in
    ``overall``.

    Args:
        correct: (N, M) in [0, 1], NaN where not evaluated.
        domain_index: (N,) in [0, n_domains), or -1.
        prior_weight: w, in pseudo-outcomes, >= 0.
        names: the M candidates, for messages.

    Returns:
        (M, D) float32 in [0, 1].

    Raises:
        OutcomesError: a candidate has no outcome at all.
    """
    values = np.asarray(correct, dtype=np.float64)
    seen = ~np.isnan(values)
    filled = np.where(seen, values, 0.0)
    total = seen.sum(axis=0)
    if not total.all():
        column = int(np.flatnonzero(total == 0)[0])
        who = f"candidate {names[column]!r}" if names is not None else f"the candidate of column {column}"
        raise OutcomesError(f"{who} has no outcome in the train split; add outcomes, or take it out of the pool")
    overall = (filled.sum(axis=0) / total)[:, None]
    member = np.asarray(domain_index)[:, None] == np.arange(n_domains)  # (N, D)
    sums, counts = filled.T @ member, seen.T.astype(np.float64) @ member
    weights = counts + prior_weight
    shrunk = (sums + prior_weight * overall) / np.where(weights > 0, weights, 1.0)
    vectors: NDArray[np.float32] = np.where(weights > 0, shrunk, overall).clip(0.0, 1.0).astype(np.float32)
    return vectors
