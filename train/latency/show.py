"""A latency report as text for the terminal. Formatting, nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from arllm.runtime.tables import table
from arllm.train.latency.report import Report, RouteRow, SubjectInfo
from arllm.train.latency.stats import Ratio, in_words

TIMED = {"tokens": "route()", "candidates": "NIR and decision", "queries": "route_batch()"}

Column = tuple[str, Callable[[Any], str]]


def text_report(report: Report) -> str:
    """Machine, subjects, every table, the slopes in words, and how it was measured."""
    several = len(report.subjects) > 1
    blocks = [_machine(report.machine), "\n".join(_subject(s, report.subjects) for s in report.subjects)]
    callers = max((row.callers for row in report.tokens), default=1)
    alone, together = ([r for r in report.tokens if (r.callers > 1) is many] for many in (False, True))
    mix_alone, mix_together = ([r for r in report.mix if (r.callers > 1) is many] for many in (False, True))
    latency: list[Column] = [
        ("p50", lambda r: ms(r.latency.p50)),
        ("p95", lambda r: ms(r.latency.p95)),
        ("p99", lambda r: ms(r.latency.p99)),
        ("max", lambda r: ms(r.latency.max)),
    ]
    calls: list[Column] = [("calls", lambda r: f"{r.latency.n:,}")]
    stages: list[Column] = [
        ("tokenize", lambda r: ms(r.stages.tokenize)),
        ("encode", lambda r: ms(r.stages.encode)),
        ("score", lambda r: ms(r.stages.score)),
        ("rest", lambda r: ms(r.stages.rest)),
    ]
    speed: list[Column] = [("queries/s", lambda r: rate(r.per_second))]
    scaling: list[Column] = [("scaling", lambda r: quartiles(r.scaling)), ("cpus", lambda r: f"{r.cpus:.2f}")]
    size: list[Column] = [("tokens", _length)]

    def show(title: str, rows: Sequence[Any], columns: list[Column]) -> None:
        if rows:
            own: list[Column] = [("subject", lambda r: r.subject)] if several else []
            compared: list[Column] = [("faster", lambda r: times(r.faster))] if several else []
            every = [*columns[:1], *own, *columns[1:], *compared]
            blocks.append(f"{title}\n{_table(every, rows)}")

    show("route(), one caller, ms", [*alone, *mix_alone], [*size, *latency, *stages, *speed, *calls])
    show(f"route(), {callers} callers at once, ms", [*together, *mix_together],
         [*size, *latency, *speed, *scaling, *calls])  # fmt: skip
    show("route_batch(), the same texts in batches", report.batches,
         [("batch", lambda r: str(r.size)), ("ms a query", lambda r: ms(r.per_query_ms)), *speed])  # fmt: skip
    show("NIR and decision alone, ms", report.candidates,
         [("candidates", lambda r: f"{r.candidates:,}"), *latency, *calls])  # fmt: skip
    if report.cold:
        names = list(report.cold[0].parts)
        parts: list[Column] = [(name.replace("_", " "), _part(name)) for name in names]
        show("cold start in a fresh process, ms", report.cold, [
            ("processes", lambda r: str(r.processes)), *parts, ("whole", lambda r: ms(r.whole_ms)),
            ("slowest", lambda r: ms(r.slowest_ms)), ("peak MB", lambda r: f"{r.peak_mb:.0f}"),
        ])  # fmt: skip
    slopes = [
        f"{f'{slope.subject}: ' if several else ''}{in_words(piece, TIMED[slope.of], slope.of)}"
        for slope in report.slopes
        for piece in slope.pieces
    ]
    if slopes:
        blocks.append("Cost as work grows\n" + "\n".join(slopes))
    mix = report.mix_of
    rounds = ", ".join(f"{part} {number}" for part, number in report.rounds.items())
    blocks.append("\n".join([
        f"mix: {mix['queries']:,} queries, {mix['source']}; {mix['truncated']:.0%} of them cut to the token budget",
        f"rounds counted: {rounds}",
        *(f"note: {note}" for note in report.notes),
        *report.method,
    ]))  # fmt: skip
    return "\n\n".join(blocks)


def ms(value: float) -> str:
    """Three significant digits, without an exponent."""
    digits = 3 if value < 10 else 1 if value < 100 else 0
    return f"{value:,.{digits}f}"


def rate(value: float) -> str:
    """Whole numbers from 100 on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def times(value: Ratio | None) -> str:
    """A median that says how many times, and the quartiles over the rounds."""
    return quartiles(value, "x")


def quartiles(value: Ratio | None, unit: str = "") -> str:
    return "–" if value is None else f"{value.median:.2f}{unit} [{value.low:.2f} {value.high:.2f}]"


def _table(columns: Sequence[Column], rows: Sequence[Any]) -> str:
    return table([name for name, _ in columns], [[cell(row) for _, cell in columns] for row in rows])


def _length(row: RouteRow) -> str:
    return "mix" if row.tokens is None else f"{row.tokens:,}"


def _part(name: str) -> Callable[[Any], str]:
    return lambda row: ms(row.parts[name])


def _machine(about: dict[str, Any]) -> str:
    load = [about["load_before"], about["load_after"]]
    busy = " then ".join("unknown" if one is None else f"{one[0]:g}" for one in load)
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        f"{about['cores']} cores of {about['cpu']} ({', '.join(about['flags']) or 'flags unknown'}), governor "
        f"{about['governor'] or 'unknown'}, load average {busy}",
        f"{about['system']}; {versions}",
    ]
    if about["environment"]:
        lines.append(", ".join(f"{name}={value}" for name, value in about["environment"].items()))
    return "\n".join(lines)


def _subject(subject: SubjectInfo, subjects: Sequence[SubjectInfo]) -> str:
    first = ", the first: ratios are to it" if len(subjects) > 1 and subject is subjects[0] else ""
    threads = "1 thread" if subject.threads == 1 else f"{subject.threads} threads"
    return (
        f"{subject.label}: {subject.bundle} (sha256 {subject.digest[:12]}…), {subject.variant} ({subject.precision}, "
        f"{subject.provider}), {threads} an inference, up to {subject.max_tokens:,} tokens, "
        f"{subject.candidates} candidates{first}"
    )
