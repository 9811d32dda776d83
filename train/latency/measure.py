"""Measures exported bundles on this machine, several of them interleaved round by round. Free of torch.

The parts: ``Router.route`` by token count for one caller and for several at once, a mix of queries, ``route_batch``
by batch size, NIR and decision by number of candidates, and cold starts. :func:`measure` is the whole. What it finds
stands in ``report.py``, how it times in ``rounds.py``. An evaluation's bench is ``bench.py``.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from arllm.runtime.devices import cores
from arllm.runtime.errors import QueryError
from arllm.runtime.pool import Candidate, Pool
from arllm.train.latency import machine
from arllm.train.latency.cold import ColdSubject, cold_starts
from arllm.train.latency.report import BatchRow, CandidateRow, ColdRow, Report, RouteRow, Stages, SubjectInfo
from arllm.train.latency.rounds import (
    BURST_NS,
    LEAST_CALLS,
    MOST_CALLS,
    WARMUP_ROUNDS,
    Bound,
    Burst,
    Clock,
    Run,
    every_item,
    interleave,
    many_callers,
    one_caller,
    paired,
    per_second,
    throughputs,
)
from arllm.train.latency.stats import ratio, spread
from arllm.train.latency.texts import MIX_MEDIAN, MIX_P90, bucket_texts, mixed_texts

if TYPE_CHECKING:
    from arllm.runtime.router import Router

Progress = Callable[[str], None]

# Share of the seconds that each part gets.
SHARES = {"cold": 0.15, "tokens": 0.4, "mix": 0.15, "batches": 0.15, "candidates": 0.15}
FIRST_TEXT = 16  # tokens of the query that a fresh process decides first
VECTORS = 8  # different query vectors that NIR and decision are timed on


@dataclass(frozen=True, eq=False)
class Subject:
    """A loaded router and the name under which it is reported. ``threads`` are those it was loaded with."""

    label: str
    router: Router
    threads: int = 1


@dataclass(frozen=True)
class Plan:
    """What is measured, and for how long.

    ``seconds`` is for everything together, warm-ups included; where the subjects are so slow that it does not suffice
    for two rounds, they take longer. With ``rounds``, each part takes so many instead.
    """

    seconds: float = 20.0
    rounds: int | None = None
    tokens: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512)
    callers: int | None = None  # None: as many as the cores
    batches: tuple[int, ...] = (1, 8, 32, 128)
    candidates: tuple[int, ...] = (1, 16, 100, 1000, 10000)

    def bound(self, part: str) -> Bound:
        return Bound(SHARES[part] * self.seconds, self.rounds)


METHOD = (
    "Each round does every piece of work once, and within it every subject in turn, whose turn moves on by one each "
    f"round; {WARMUP_ROUNDS} warm-up round a part is not counted, nor is one call before each burst.",
    f"A burst lasts about {BURST_NS // 1_000_000} ms ({LEAST_CALLS} to {MOST_CALLS} calls). Percentiles are "
    "nearest-rank over all calls: p99 of fewer than 100 is their maximum.",
    "Python's cyclic garbage collector is off while timing, as timeit does it.",
    "faster: how many times as fast as the first subject, as the median over rounds [quartiles].",
    "scaling: throughput of all callers over that of one caller times the cores that they can use, round by "
    "round; cpus: how many processors' time they got (fewer where other programs had them, or callers waited).",
    "Cold start: files are in the page cache; whole is from process start to first decision, as the parent sees it; "
    "every file's sha256 is verified.",
)


def measure(
    subjects: Sequence[Subject],
    plan: Plan | None = None,
    *,
    queries: Sequence[str] | None = None,
    queries_from: str | None = None,
    cold: bool = True,
    clock: Clock = time.perf_counter_ns,
    progress: Progress = lambda message: None,
) -> Report:
    """Measure the subjects beside each other. Ratios are to the first one.

    Args:
        queries: the mix, routed as they are; None: generated texts of chat-like lengths.
        queries_from: where they come from, for the report.
        cold: start fresh processes too.

    Raises:
        QueryError: no subject, two of one label, a bundle without an encoder, or an empty ``queries``.
    """
    plan = plan or Plan()
    _check(subjects, queries)
    about = machine.describe()
    notes: list[str] = []
    rounds: dict[str, int] = {}
    cold_rows: list[ColdRow] = []
    if cold:  # first: a parent that has measured for long would find its machine warmer
        progress("cold starts, in fresh processes")
        cold_rows = cold_starts([_cold_subject(subject) for subject in subjects], plan.bound("cold"))
        rounds["cold"] = cold_rows[0].processes
    callers = plan.callers or cores()
    random.Random("mix").shuffle(shuffled := list(queries or ()))
    mixes = {s: shuffled or mixed_texts(subject.router) for s, subject in enumerate(subjects)}
    texts = {n: {s: found for s, subject in enumerate(subjects) if (found := bucket_texts(subject.router, n))}
             for n in plan.tokens}  # fmt: skip
    skipped = [str(n) for n, of in texts.items() if not of]
    if skipped:
        notes.append(f"tokens {', '.join(skipped)}: beyond the budget, or below what prompt and affixes take")
    progress(f"route() by tokens, by one caller and by {callers} at once")
    tokens = _routes(subjects, {n: of for n, of in texts.items() if of}, callers, plan.bound("tokens"), clock)
    rounds["tokens"] = tokens[1]
    progress("route() on the mix of queries")
    mix = _routes(subjects, {None: mixes}, callers, plan.bound("mix"), clock)
    rounds["mix"] = mix[1]
    progress("route_batch() by batch size")
    batches, rounds["batches"], left_out = _batches(subjects, plan, clock)
    notes += left_out
    progress("NIR and decision by number of candidates")
    candidates, rounds["candidates"] = _candidates(subjects, plan, clock)
    if about["load_before"] and about["load_before"][0] > 0.5 * about["cores"]:
        notes.append(
            f"the machine was busy before this began (load average {about['load_before'][0]:g} on {about['cores']} "
            "cores): times are too long, tails most, and scaling too low; ratios to the first subject still hold"
        )
    cut = [subjects[0].router.tokenize(text)[1].truncated for text in mixes[0]]
    return Report(
        machine={**about, "load_after": machine.load_average()},
        subjects=tuple(_info(subject) for subject in subjects),
        tokens=tuple(tokens[0]),
        mix=tuple(mix[0]),
        batches=tuple(batches),
        candidates=tuple(candidates),
        cold=tuple(cold_rows),
        rounds=rounds,
        mix_of={
            "source": (queries_from or "given") if queries is not None else
            f"generated; lengths log-normal, median {MIX_MEDIAN} tokens, 90th percentile {MIX_P90}",
            "queries": len(mixes[0]),
            "truncated": sum(cut) / len(cut),
        },
        method=METHOD,
        notes=tuple(notes),
    )  # fmt: skip


def _check(subjects: Sequence[Subject], queries: Sequence[str] | None) -> None:
    labels = [subject.label for subject in subjects]
    if not labels or len(set(labels)) != len(labels):
        raise QueryError(f"a benchmark needs subjects of different labels, not {labels}")
    if queries is not None and not queries:
        raise QueryError("the mix of queries is empty: give at least one query")
    for subject in subjects:
        if subject.router.bundle.manifest.tokens is None:
            raise QueryError(f"{subject.router.bundle.path}: holds no encoder (NIR alone), so it routes no text")


def _info(subject: Subject) -> SubjectInfo:
    router, manifest = subject.router, subject.router.bundle.manifest
    variant = manifest.variants[router.variant]
    assert manifest.tokens is not None
    return SubjectInfo(
        subject.label, str(router.bundle.path), router.bundle.digest, variant.name, variant.provider,
        variant.precision, subject.threads, manifest.tokens.max_tokens, len(router.pool),
    )  # fmt: skip


def _cold_subject(subject: Subject) -> ColdSubject:
    router = subject.router
    text = (bucket_texts(router, FIRST_TEXT, 1) or ["What is 17 * 23?"])[0]
    return ColdSubject(subject.label, str(router.bundle.path), router.variant, subject.threads, text)


def _routes(
    subjects: Sequence[Subject],
    texts: dict[int | None, dict[int, list[str]]],
    callers: int,
    bound: Bound,
    clock: Clock,
) -> tuple[list[RouteRow], int]:
    """Rows of every size of text, for one caller and for several, and how many rounds were counted."""
    works: dict[tuple[int | None, int], dict[int, Run]] = {}
    with ThreadPoolExecutor(callers) as pool:
        for n, of in texts.items():
            works[n, 1] = {
                s: one_caller(subjects[s].router.route, items, clock, lambda d: d.timing) for s, items in of.items()
            }
            if callers > 1:
                works[n, callers] = {
                    s: many_callers(subjects[s].router.route, items, pool, callers, clock) for s, items in of.items()
                }
        if not works:
            return [], 0
        found = interleave(works, bound, clock, together=lambda work: work[0])
    ideal = min(callers, cores())
    rows = []
    for ((n, many), s), bursts in found.items():
        alone, first = found[(n, 1), s], found.get(((n, many), 0))
        compare = paired if many == 1 else throughputs
        rows.append(
            RouteRow(
                subject=subjects[s].label,
                tokens=n,
                callers=many,
                latency=spread([time for burst in bursts for time in burst.times]),
                per_second=per_second(bursts),
                stages=_stages(bursts) if many == 1 else None,
                scaling=None if many == 1 else ratio(
                    [per_second([b]) / per_second([a]) / ideal for a, b in zip(alone, bursts, strict=True)]
                ),
                cpus=None if many == 1 else sum(b.cpu for b in bursts) / max(1, sum(b.wall for b in bursts)),
                faster=None if s == 0 or first is None else compare(first, bursts),
            )
        )  # fmt: skip
    return rows, len(next(iter(found.values())))


def _stages(bursts: Sequence[Burst]) -> Stages:
    timings = [timing for burst in bursts for timing in burst.kept]
    times = [time / 1e6 for burst in bursts for time in burst.times]
    return Stages(
        tokenize=median(t.tokenize_ms for t in timings),
        encode=median(t.encode_ms for t in timings),
        score=median(t.score_ms for t in timings),
        rest=median(whole - t.total_ms for whole, t in zip(times, timings, strict=True)),
    )


def _batches(subjects: Sequence[Subject], plan: Plan, clock: Clock) -> tuple[list[BatchRow], int, list[str]]:
    """The same texts in batches of every size; larger sizes are left out where a round would take too long."""
    largest = max(plan.batches, default=0)
    if not largest:
        return [], 0, []
    mixes = [mixed_texts(subject.router, largest, cut=False) for subject in subjects]
    sizes = list(plan.batches)
    if plan.rounds is None:
        sizes = _affordable(subjects, mixes, sizes, plan.bound("batches").seconds, clock)
    texts = max(sizes)

    def run(s: int, size: int) -> Run:
        batches = [mixes[s][i : i + size] for i in range(0, texts, size)]
        return every_item(subjects[s].router.route_batch, batches, clock)

    works = {size: {s: run(s, size) for s in range(len(subjects))} for size in sizes}
    found = interleave(works, plan.bound("batches"), clock)
    rows = []
    for (size, s), bursts in found.items():
        seconds = sum(burst.wall for burst in bursts) / 1e9
        routed = texts * len(bursts)
        faster = None if s == 0 else ratio([a.wall / b.wall for a, b in zip(found[size, 0], bursts, strict=True)])
        rows.append(BatchRow(subjects[s].label, size, routed / seconds, 1e3 * seconds / routed, faster))
    gone = [str(size) for size in plan.batches if size not in sizes]
    notes = [f"batches of {', '.join(gone)}: left out, they would take too long; give more --seconds"] if gone else []
    return rows, len(next(iter(found.values()))), notes


def _affordable(
    subjects: Sequence[Subject], mixes: Sequence[list[str]], sizes: list[int], seconds: float, clock: Clock
) -> list[int]:
    """The sizes, without the largest ones where three rounds of all would take more than the seconds."""
    began = clock()
    probe = 8
    for subject, texts in zip(subjects, mixes, strict=True):
        subject.router.route_batch(texts[:probe])
    each = (clock() - began) / 1e9 / probe
    kept = sorted(sizes)
    while len(kept) > 1 and 3 * len(kept) * kept[-1] * each > seconds:
        kept.pop()
    return kept


def _candidates(subjects: Sequence[Subject], plan: Plan, clock: Clock) -> tuple[list[CandidateRow], int]:
    encoded = [[subject.router.encode(text) for text in mixed_texts(subject.router, VECTORS)] for subject in subjects]
    works: dict[int, dict[int, Run]] = {
        m: {s: one_caller(_scorer(subject.router, m), encoded[s], clock) for s, subject in enumerate(subjects)}
        for m in plan.candidates
    }
    if not works:
        return [], 0
    found = interleave(works, plan.bound("candidates"), clock)
    rows = [
        CandidateRow(
            subjects[s].label,
            m,
            spread([time for burst in bursts for time in burst.times]),
            None if s == 0 else paired(found[m, 0], bursts),
        )
        for (m, s), bursts in found.items()
    ]
    return rows, len(next(iter(found.values())))


def _scorer(router: Router, candidates: int) -> Callable[[Any], Any]:
    """NIR and decision of a router over a synthetic pool; its sessions are shared, not opened again."""
    from arllm.runtime.router import Router as Load

    policies = {name: router.quality_of(name) for name in router.policies}
    scorer = Load(router.bundle, router.variant, None, policies, synthetic_pool(router, candidates))
    return lambda encoded: scorer.route_vector(encoded.vector, familiarity=encoded.familiarity)


def synthetic_pool(router: Router, candidates: int) -> Pool:
    """Candidates with random model vectors, and costs within the bounds of the bundle's; the same every time."""
    manifest = router.bundle.manifest
    dice = random.Random(candidates)
    low, high = manifest.cost_minimum, manifest.cost_maximum
    rows = [
        Candidate(f"synthetic-{i:05d}", dice.uniform(low, high), tuple(dice.random() for _ in manifest.domains))
        for i in range(candidates)
    ]
    return Pool(tuple(rows), router.pool.unit)
