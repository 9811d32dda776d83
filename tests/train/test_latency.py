"""Tests of train/latency/measure.py and what shows its report: structure, JSON, table, plot; no duration judged."""

from __future__ import annotations

import itertools
import json
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest

from arllm.runtime import Decision, Router
from arllm.runtime.errors import MissingExtraError, QueryError
from arllm.train.latency import machine as latency_machine
from arllm.train.latency import measure as latency
from arllm.train.latency.machine import describe, parse_cpuinfo
from arllm.train.latency.measure import Plan, Subject, measure, synthetic_pool
from arllm.train.latency.plot import need_matplotlib, plot
from arllm.train.latency.report import Report
from arllm.train.latency.show import ms, text_report

TINY = Plan(rounds=2, tokens=(8, 16, 32, 100_000), callers=2, batches=(1, 4), candidates=(1, 10, 100, 1000, 5000))


@pytest.fixture(scope="module")
def nano() -> Router:
    return Router.load("nano")


@pytest.fixture(scope="module")
def report(nano: Router) -> Report:
    """The same router twice, under two names; no fresh processes."""
    return measure([Subject("one", nano), Subject("two", nano, threads=1)], TINY, cold=False)


def test_every_work_has_a_row_for_every_subject(report: Report) -> None:
    both = ("one", "two")
    assert [(r.tokens, r.callers, r.subject) for r in report.tokens] == [
        (n, callers, s) for n in (8, 16, 32) for callers in (1, 2) for s in both
    ]
    assert [(r.tokens, r.callers, r.subject) for r in report.mix] == [(None, c, s) for c in (1, 2) for s in both]
    assert [(r.size, r.subject) for r in report.batches] == [(size, s) for size in (1, 4) for s in both]
    assert [(r.candidates, r.subject) for r in report.candidates] == [(m, s) for m in TINY.candidates for s in both]
    assert report.cold == ()
    assert report.rounds == {"tokens": 2, "mix": 2, "batches": 2, "candidates": 2}
    assert any("100000" in note for note in report.notes)


def test_figures_are_ordered_and_add_up(report: Report) -> None:
    for row in (*report.tokens, *report.mix, *report.candidates):
        spread = row.latency
        assert 0 < spread.p50 <= spread.p95 <= spread.p99 <= spread.max
        assert spread.n >= 2 * 3  # rounds times the least calls
    for row in (*report.tokens, *report.mix):
        assert row.per_second > 0
        assert (row.stages is None) == (row.callers > 1)
        assert (row.scaling is None) == (row.cpus is None) == (row.callers == 1)
        assert row.cpus is None or row.cpus > 0
        assert (row.faster is None) == (row.subject == "one")
        if row.stages is not None:
            parts = (row.stages.tokenize, row.stages.encode, row.stages.score, row.stages.rest)
            assert all(0 < part <= row.latency.max for part in parts)
    for batch in report.batches:
        assert batch.per_query_ms * batch.per_second == pytest.approx(1000.0)


def test_calls_can_be_compared_one_by_one(report: Report) -> None:
    for tokens in (8, 16, 32):
        n = {(r.subject, r.callers): r.latency.n for r in report.tokens if r.tokens == tokens}
        assert n["one", 1] == n["two", 1]
        assert n["one", 2] == n["two", 2] == 2 * n["one", 1]


def test_slopes_are_those_of_one_caller_and_of_each_work(report: Report) -> None:
    found = {(slope.subject, slope.of): [(p.start, p.end) for p in slope.pieces] for slope in report.slopes}
    assert set(found) == {(s, of) for s in ("one", "two") for of in ("tokens", "candidates", "queries")}
    assert found["one", "tokens"] == [(8, 32)]
    assert found["one", "candidates"] == [(1, 100), (100, 5000)]


def test_the_report_is_json_and_says_what_it_is_of(report: Report, nano: Router) -> None:
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert data["schema"] == 1
    assert data["subjects"][0]["digest"] == nano.bundle.digest
    assert data["subjects"][0]["variant"] == nano.variant
    assert set(data["tokens"][0]) == {
        "subject", "tokens", "callers", "latency", "per_second", "stages", "scaling", "cpus", "faster",
    }  # fmt: skip
    assert set(data["tokens"][0]["latency"]) == {"n", "p50", "p95", "p99", "max"}
    assert data["machine"]["cores"] >= 1
    assert data["machine"]["versions"]["onnxruntime"]
    assert data["mix_of"]["queries"] == 64
    assert 0 < data["mix_of"]["truncated"] < 1
    assert "gc" in " ".join(data["method"]) or "garbage collector" in " ".join(data["method"])
    assert data["slopes"][0]["pieces"][0]["exponent"] == report.slopes[0].pieces[0].exponent


def test_time_comes_from_the_clock_alone(nano: Router) -> None:
    """A clock that moves 1 ms each time it is read: every duration is then known."""
    ticks = itertools.count(0, 1_000_000)
    plan = Plan(rounds=1, tokens=(8,), callers=1, batches=(2,), candidates=(1,))
    found = measure([Subject("x", nano)], plan, queries=["a", "b"], cold=False, clock=lambda: next(ticks))
    (row,) = found.tokens
    assert (row.latency.p50, row.latency.max) == (1.0, 1.0)
    assert row.latency.n == 20  # a burst of 20 ms
    assert row.per_second == pytest.approx(20 / 0.041)  # read twice a call, once before and once after
    (batch,) = found.batches
    assert batch.per_query_ms == pytest.approx(3.0 / 2)


class Watched:
    """A router that notes what it is asked."""

    def __init__(self, router: Router, name: str, log: list[tuple[str, str]]) -> None:
        self._router, self._name, self._log = router, name, log

    def __getattr__(self, attribute: str) -> object:
        return getattr(self._router, attribute)

    def route(self, text: str) -> object:
        self._log.append((self._name, text))
        return self._router.route(text)


def test_subjects_route_the_same_queries_in_turns(nano: Router) -> None:
    log: list[tuple[str, str]] = []
    subjects = [Subject(name, Watched(nano, name, log)) for name in "ab"]  # type: ignore[arg-type]
    queries = [f"query {i}" for i in range(50)]
    plan = Plan(rounds=3, tokens=(), callers=1, batches=(), candidates=())
    found = measure(subjects, plan, queries=queries, cold=False)
    turns = [(name, [text for _, text in group]) for name, group in itertools.groupby(log, lambda entry: entry[0])]
    assert [name for name, _ in turns] == ["a", "b", "a", "b", "a"]  # a b | b a | a b | b a: neighbours run together
    texts = {name: [text for who, text in log if who == name] for name in "ab"}
    assert texts["a"] == texts["b"]
    assert set(texts["a"]) <= set(queries)
    assert found.tokens == found.batches == found.candidates == ()
    assert found.mix_of["source"] == "given"
    assert found.mix_of["truncated"] == 0.0


class Slow:
    """A router on a machine with one core for all: a query takes ``cost`` ns of the clock, and nothing else does."""

    now = 0
    lock = threading.Lock()

    def __init__(self, router: Router, cost: int) -> None:
        self._router, self._cost = router, cost

    def __getattr__(self, attribute: str) -> object:
        return getattr(self._router, attribute)

    def route(self, text: str) -> Decision:
        with Slow.lock:
            Slow.now += self._cost
        return self._router.route(text)

    def route_batch(self, texts: list[str]) -> list[Decision]:
        return [self.route(text) for text in texts]


def test_ratios_are_to_the_first_and_scaling_to_the_cores(nano: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "cores", lambda: 2)
    costs = {"slow": 8_000_000, "fast": 2_000_000}
    subjects = [Subject(name, Slow(nano, cost)) for name, cost in costs.items()]  # type: ignore[arg-type]
    plan = Plan(rounds=2, tokens=(8,), batches=(1, 2), candidates=())
    found = measure(subjects, plan, queries=["a"], cold=False, clock=lambda: Slow.now)
    for row in (*found.tokens, *found.mix):
        assert row.per_second == pytest.approx(1e9 / costs[row.subject])  # two callers share the one core
        if row.callers == 1:
            assert row.latency.max == costs[row.subject] / 1e6
        else:
            assert row.callers == 2
            assert row.scaling is not None
            assert (row.scaling.low, row.scaling.high) == pytest.approx((0.5, 0.5))
        if row.subject == "fast":
            assert row.faster is not None
            assert (row.faster.low, row.faster.high) == pytest.approx((4.0, 4.0))
    for batch in found.batches:
        assert batch.per_query_ms == pytest.approx(costs[batch.subject] / 1e6)
        assert batch.faster is None or batch.faster.median == pytest.approx(4.0)


def test_a_batch_that_would_take_too_long_is_left_out_and_said(nano: Router) -> None:
    plan = Plan(seconds=1e-6, tokens=(), callers=1, batches=(1, 2, 64), candidates=())
    found = measure([Subject("x", nano)], plan, queries=["a"], cold=False)
    assert [row.size for row in found.batches] == [1]
    assert any(note.startswith("batches of 2, 64: left out") for note in found.notes)
    assert found.rounds["batches"] == 2


@pytest.mark.parametrize("labels", [(), ("a", "a")])
def test_subjects_need_names_of_their_own(nano: Router, labels: tuple[str, ...]) -> None:
    with pytest.raises(QueryError, match="subjects of different labels"):
        measure([Subject(label, nano) for label in labels], TINY)


def test_an_empty_mix_and_a_bundle_without_encoder_are_refused(nano: Router) -> None:
    with pytest.raises(QueryError, match="the mix of queries is empty"):
        measure([Subject("x", nano)], TINY, queries=[])
    bare = Router(replace(nano.bundle, manifest=replace(nano.bundle.manifest, tokens=None)), nano.variant, None, {})
    with pytest.raises(QueryError, match="holds no encoder"):
        measure([Subject("x", bare)], TINY)


def test_a_synthetic_pool_keeps_to_the_bundle_s_scale(nano: Router) -> None:
    pool = synthetic_pool(nano, 300)
    manifest = nano.bundle.manifest
    assert len(pool) == 300
    assert pool.vectors().shape == (300, len(manifest.domains))
    assert manifest.cost_minimum <= pool.costs.min() <= pool.costs.max() <= manifest.cost_maximum
    assert synthetic_pool(nano, 300) == pool
    assert np.ptp(pool.vectors()) > 0.9


def test_the_text_shows_every_figure(report: Report) -> None:
    text = text_report(report)
    for heading in (
        "route(), one caller, ms", "route(), 2 callers at once, ms", "route_batch(), the same texts in batches",
        "NIR and decision alone, ms", "Cost as work grows",
    ):  # fmt: skip
        assert heading in text
    lines = text.splitlines()
    first = report.tokens[0]
    assert any(line.split()[:3] == ["8", "one", ms(first.latency.p50)] for line in lines)
    assert any(line.startswith("mix ") and " two " in line for line in lines)
    assert "one: from 8 to 32 tokens, route()" in text
    assert "one: from 1 to 4 queries, route_batch()" in text
    assert str(report.machine["cpu"]) in text
    assert max(map(len, lines)) < 250


def test_one_subject_needs_no_comparison(nano: Router) -> None:
    plan = Plan(rounds=1, tokens=(8,), callers=1, batches=(1,), candidates=(1,))
    text = text_report(measure([Subject("alone", nano)], plan, queries=["a"], cold=False))
    header = next(line for line in text.splitlines() if line.startswith("tokens "))
    assert "subject" not in header
    assert "faster" not in header
    assert "callers at once" not in text


@pytest.mark.parametrize(
    ("value", "shown"), [(0.0421, "0.042"), (9.5, "9.500"), (12.34, "12.3"), (123.4, "123"), (12345.6, "12,346")]
)
def test_milliseconds_need_no_exponent(value: float, shown: str) -> None:
    assert ms(value) == shown


@pytest.mark.parametrize("drop", [(), ("candidates",), ("tokens", "batches")])
def test_the_plot_is_a_png(report: Report, drop: tuple[str, ...]) -> None:
    pytest.importorskip("matplotlib")
    image = plot(replace(report, **dict.fromkeys(drop, ())))
    assert image.startswith(b"\x89PNG")
    assert len(image) > 10_000


def test_a_plot_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r'--plot needs the module "matplotlib.*arllm\[eval\]'):
        need_matplotlib()


X86 = """processor\t: 0
model name\t: Some EPYC
flags\t\t: fpu avx2 avx512f avx512_vnni

processor\t: 1
model name\t: Another
flags\t\t: fpu
"""


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (X86, ("Some EPYC", ["avx2", "avx512f", "avx512_vnni"])),
        ("processor : 0\nFeatures : fp asimd asimddp i8mm\n", (None, ["asimddp", "i8mm"])),
        ("", (None, [])),
    ],
)
def test_the_processor_is_read(text: str, found: tuple[str | None, list[str]]) -> None:
    assert parse_cpuinfo(text) == found


def test_a_machine_that_tells_nothing_is_described_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> tuple[float, float, float]:
        raise OSError

    monkeypatch.setattr(latency_machine, "_read", lambda path: None)
    monkeypatch.setattr("os.getloadavg", refuse)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    about = describe()
    assert about["cpu"]
    assert (about["flags"], about["governor"], about["load_before"]) == ([], None, None)
    assert about["environment"]["OMP_NUM_THREADS"] == "3"


def test_a_busy_machine_is_said(nano: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(rounds=1, tokens=(), callers=1, batches=(), candidates=())
    for load, said in ((1e6, True), (0.0, False)):
        monkeypatch.setattr(latency_machine, "load_average", lambda load=load: [load, 0.0, 0.0])
        notes = measure([Subject("x", nano)], plan, queries=["a"], cold=False).notes
        assert any("the machine was busy" in note for note in notes) == said
