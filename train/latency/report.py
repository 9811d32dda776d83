"""What a latency benchmark found, as plain values, and its JSON. Measures nothing, formats no table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from arllm.train.latency.stats import Growth, Ratio, Spread, growth

SCHEMA = 1


@dataclass(frozen=True)
class SubjectInfo:
    """Whom the figures are of. ``threads`` are those of one inference."""

    label: str
    bundle: str
    digest: str
    variant: str
    provider: str
    precision: str
    threads: int
    max_tokens: int
    candidates: int


@dataclass(frozen=True)
class Stages:
    """Medians of what ``Router.route`` says of itself, in ms; ``rest`` is what the whole call takes beside them."""

    tokenize: float
    encode: float
    score: float
    rest: float


@dataclass(frozen=True)
class RouteRow:
    """``Router.route`` on texts of ``tokens`` ids, or on the mix (``tokens`` None).

    ``stages`` are of one caller alone. Of several callers, ``scaling`` is their throughput over that of one caller
    times the cores that they can use, and ``cpus`` how many processors' time they got meanwhile. ``faster``: how many
    times as fast as the first subject (of one caller the latency, of several the throughput); None for the first.
    """

    subject: str
    tokens: int | None
    callers: int
    latency: Spread
    per_second: float
    stages: Stages | None = None
    scaling: Ratio | None = None
    cpus: float | None = None
    faster: Ratio | None = None


@dataclass(frozen=True)
class BatchRow:
    """``Router.route_batch`` on the same texts in batches of ``size``."""

    subject: str
    size: int
    per_second: float
    per_query_ms: float
    faster: Ratio | None = None


@dataclass(frozen=True)
class CandidateRow:
    """``Router.route_vector``: NIR and decision alone, over a synthetic pool."""

    subject: str
    candidates: int
    latency: Spread
    faster: Ratio | None = None


@dataclass(frozen=True)
class ColdRow:
    """Fresh processes: medians of each part in ms, the whole from process start to first decision, peak memory.

    ``parts`` in order: interpreter, import, bundle (reading and hashing), tokenizer, session, first_route.
    """

    subject: str
    processes: int
    parts: dict[str, float]
    whole_ms: float
    slowest_ms: float
    peak_mb: float
    faster: Ratio | None = None


@dataclass(frozen=True)
class Slope:
    """How a subject's median time grows with ``of``: ``tokens``, ``candidates``, or ``queries`` in a batch."""

    subject: str
    of: str
    pieces: tuple[Growth, ...]


@dataclass(frozen=True)
class Report:
    """Everything measured. Times are in ms; rows name a subject by its label; ratios are to the first subject."""

    machine: dict[str, Any]
    subjects: tuple[SubjectInfo, ...]
    tokens: tuple[RouteRow, ...]
    mix: tuple[RouteRow, ...]
    batches: tuple[BatchRow, ...]
    candidates: tuple[CandidateRow, ...]
    cold: tuple[ColdRow, ...]
    rounds: dict[str, int]  # of each part of the measurement, counted ones
    mix_of: dict[str, Any]  # source, queries, truncated (share of them)
    method: tuple[str, ...]
    notes: tuple[str, ...] = ()
    slopes: tuple[Slope, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "slopes", tuple(_slopes(self)))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"schema": SCHEMA, **asdict(self)}


def _slopes(report: Report) -> Iterable[Slope]:
    for subject in report.subjects:
        points: dict[str, list[tuple[int | None, float]]] = {
            "tokens": [(r.tokens, r.latency.p50) for r in report.tokens if _is(r, subject) and r.callers == 1],
            "candidates": [(r.candidates, r.latency.p50) for r in report.candidates if _is(r, subject)],
            "queries": [(r.size, r.per_query_ms * r.size) for r in report.batches if _is(r, subject)],
        }
        for of, pairs in points.items():
            found = growth([float(x or 0) for x, _ in pairs], [y for _, y in pairs])
            if found:
                yield Slope(subject.label, of, tuple(found))


def _is(row: RouteRow | CandidateRow | BatchRow, subject: SubjectInfo) -> bool:
    return row.subject == subject.label
