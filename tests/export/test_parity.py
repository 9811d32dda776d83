"""Tests of export/parity.py: what is measured, what is refused, and that a refused bundle leaves nothing behind."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from arllm.export import authored, authored_int8, authored_nir, parity
from arllm.export import bundle as exporting
from arllm.export.bundle import export_run
from arllm.runtime.bundle import open_bundle
from arllm.runtime.errors import ExportError, ParityError
from arllm.runtime.quality import HdpPaper
from arllm.runtime.router import Router
from arllm.train.encoder import QueryEncoder
from arllm.train.nir import build_nir
from arllm.train.rundir import Run, read_run

NAN = float("nan")
QUIET = {"progress": lambda message: None}


@pytest.fixture(scope="module")
def run(tiny_run: Path) -> Run:
    return read_run(tiny_run)


def reference_of(run: Run, queries: int) -> parity.Reference:
    return exporting._reference(run, exporting.split_heldout(run, queries)[0], lambda message: None)


@pytest.fixture(scope="module")
def reports(run: Run, tiny_bundle: Path) -> dict[str, dict[str, Any]]:
    """Both variants of the tiny bundle, measured anew on fewer queries."""
    reference = reference_of(run, 40)
    return {
        name: {"graph": "authored", **parity.measure(Router.load(tiny_bundle, variant=name), reference)}
        for name in ("cpu-fp32", "cpu-int8")
    }


def test_the_tiny_bundle_is_within_its_bounds(reports: dict[str, dict[str, Any]], run: Run) -> None:
    verified = len(exporting.split_heldout(run, 40)[0])
    for name, report in reports.items():
        parity.check(report, name, name.removeprefix("cpu-"))
        assert report["queries"] == verified + 26  # and cuts and joins of every length
    fp32, int8 = reports["cpu-fp32"], reports["cpu-int8"]
    assert fp32["query_vector_max_difference"] < 1e-5
    assert fp32["padded_batch_max_difference"] < 1e-5
    assert fp32["familiarity_max_difference"] < 1e-5
    assert int8["familiarity_max_difference"] < 1e-5  # of whole numbers that no variant rounds
    assert int8["query_vector_max_difference"] > 1e-5  # int8 was measured, not fp32 twice
    assert int8["pooled_centred_cosine"]["mean"] < fp32["pooled_centred_cosine"]["mean"]


class _Drifting:
    """Stands for a session whose batches of one size differ from single queries by a known amount."""

    def __init__(self, size: int, drift: float) -> None:
        self.size, self.drift = size, drift
        self.sizes: set[int] = set()

    def run_many(self, outputs: tuple[str, ...], inputs: dict[str, Any]) -> list[np.ndarray[Any, Any]]:
        ids = inputs["input_ids"]
        self.sizes.add(len(ids))
        found = ids.sum(axis=1, dtype=np.float32)
        return [found[:, None], found + (self.drift if len(ids) == self.size else 0.0)]


@pytest.mark.parametrize("size", [2, 4, 8, 16, 32])
def test_a_batch_of_any_size_is_compared_with_its_queries(size: int) -> None:
    ids = [np.full(length, length, dtype=np.int64) for length in (3, 4, 5, 6, 7, 7, 900)]
    singly = np.array([float(row.sum()) for row in ids], dtype=np.float32)
    for drift in (0.0, 0.5):
        session = _Drifting(size, drift)
        assert parity._batch_difference(session, ids, singly[:, None], singly) == drift
        assert session.sizes == {2, 4, 8, 16, 32}


def test_a_variant_is_batch_invariant_only_where_no_bit_differed(tiny_bundle: Path) -> None:
    for variant in open_bundle(tiny_bundle).manifest.variants.values():
        assert variant.batch_invariant == (variant.parity["batch_max_difference"] == 0.0)
        for figure, promised in ((0.0, True), (1e-9, False), (None, False)):
            summary = {**variant.parity, "batch_max_difference": figure}
            assert dataclasses.replace(variant, parity=summary).batch_invariant is promised
        assert not dataclasses.replace(variant, parity={}).batch_invariant  # of a bundle that never measured it


def test_what_is_compared_is_the_refined_quality(run: Run, tiny_bundle: Path) -> None:
    """A variant whose calibration or familiarity went astray decides otherwise, and must be told by its quality."""
    router = Router.load(tiny_bundle, variant="cpu-fp32")
    reference = reference_of(run, 20)
    assert reference.familiarity is not None
    assert reference.familiarity.std() > 0.1
    forgetful = dataclasses.replace(reference, familiarity=np.ones_like(reference.familiarity))
    report = parity.measure(router, forgetful)
    for policy in ("nir", "hdp"):
        assert report["policies"][policy]["quality_max_difference"] > 0.01
    assert report["policies"]["hdp-paper"]["quality_max_difference"] < 1e-5  # knows no familiarity
    with pytest.raises(ParityError):
        parity.check(report, "cpu-fp32", "fp32")


def test_the_references_prediction_is_bare(run: Run) -> None:
    reference = reference_of(run, 10)
    vectors = run.pool.vectors()
    with torch.no_grad():
        queries = torch.from_numpy(reference.query_vectors)
        bare = run.nir.all_pairs(queries, torch.from_numpy(vectors)).sigmoid().numpy()
    np.testing.assert_array_equal(reference.prediction("nir", vectors), bare)
    np.testing.assert_array_equal(
        reference.prediction("hdp", vectors), run.hdp.predict(reference.query_vectors, vectors)
    )
    paper = HdpPaper().predict(reference.query_vectors, vectors)
    np.testing.assert_array_equal(reference.prediction("hdp-paper", vectors), paper)
    assert np.abs(reference.prediction("hdp", vectors) - paper).max() > 0.01


def test_the_centred_cosine_is_the_harder_one(reports: dict[str, dict[str, Any]]) -> None:
    for report in reports.values():
        assert report["pooled_centred_cosine"]["min"] <= report["pooled_centred_cosine"]["mean"] <= 1 + 1e-6
        assert report["pooled_centred_cosine"]["mean"] <= report["pooled_cosine"]["mean"] + 1e-6


# Path into a report, and a value just past its bound.
FP32_BOUNDS: list[tuple[tuple[str, ...], float]] = [
    (("query_vector_max_difference",), 1.1e-4),
    (("familiarity_max_difference",), 1.1e-4),
    (("padded_batch_max_difference",), 1.1e-4),
    (("policies", "nir", "quality_max_difference"), 1.1e-4),
    (("policies", "hdp", "quality_max_difference"), 1.1e-4),
    (("policies", "hdp-paper", "differing_choices"), 1),
    (("policies", "nir", "differing_choices"), 1),
    (("near_ties", "nir", "quality_max_difference"), 1.1e-4),
    (("near_ties", "nir", "differing_choices"), 1),
]
INT8_BOUNDS: list[tuple[tuple[str, ...], float]] = [
    (("padded_batch_max_difference",), 0.051),
    (("policies", "nir", "mean_regret"), 2.1e-3),
    (("policies", "hdp", "mean_regret"), 2.1e-3),
    (("near_ties", "nir", "mean_regret"), 2.1e-3),
    (("policies", "nir", "accuracy_loss"), 3.1e-3),
    (("policies", "hdp", "accuracy_loss"), 3.1e-3),
]


@pytest.mark.parametrize(
    ("variant", "path", "value"),
    [("cpu-fp32", *bound) for bound in FP32_BOUNDS] + [("cpu-int8", *bound) for bound in INT8_BOUNDS],
)
def test_each_bound_is_held(
    variant: str, path: tuple[str, ...], value: float, reports: dict[str, dict[str, Any]]
) -> None:
    for doctored in (value, NAN, math.inf):
        report = copy.deepcopy(reports[variant])
        part = report
        for key in path[:-1]:
            part = part[key]
        assert part[path[-1]] < value  # else the report would be refused as it is
        part[path[-1]] = doctored
        with pytest.raises(ParityError, match=f"variant {variant}: .* bound") as caught:
            parity.check(report, variant, variant.removeprefix("cpu-"))
        assert f"{doctored:.3g}" in str(caught.value)


def test_a_bound_that_is_just_met_passes(reports: dict[str, dict[str, Any]]) -> None:
    report = copy.deepcopy(reports["cpu-int8"])
    report["policies"]["nir"].update(mean_regret=0.002, accuracy_loss=0.003)
    report["policies"]["hdp"]["accuracy_loss"] = None  # nothing was evaluated
    parity.check(report, "cpu-int8", "int8")
    report = copy.deepcopy(reports["cpu-fp32"])
    report["query_vector_max_difference"] = 1e-4
    parity.check(report, "cpu-fp32", "fp32")


def test_traced_int8_is_not_held_to_invariance(reports: dict[str, dict[str, Any]]) -> None:
    """Its batch shares activation scales; the runtime runs it on single queries."""
    report = {**copy.deepcopy(reports["cpu-int8"]), "graph": "traced", "padded_batch_max_difference": 0.4}
    parity.check(report, "cpu-int8", "int8")


# --- one comparison, by hand --------------------------------------------------------------------------------


def compared(expected: Any, actual: Any, outcomes: Any = None) -> dict[str, Any]:
    """Two candidates of normalized cost 0 and 1."""
    costs = np.array([0.0, 1.0])
    return parity.compare(
        np.array(expected), np.array(actual), costs, None if outcomes is None else np.array(outcomes)
    )


def test_equal_qualities_compare_as_equal() -> None:
    quality = [[0.2, 0.9], [0.5, 0.5]]
    figures = compared(quality, quality, [[0.0, 1.0], [1.0, NAN]])
    assert (figures["quality_max_difference"], figures["mean_regret"], figures["differing_choices"]) == (0.0, 0.0, 0)
    assert (figures["agreement"], figures["accuracy_loss"]) == (1.0, 0.0)
    assert figures["distinct_choices"] == figures["distinct_choices_pytorch"] == 2
    assert figures["accuracy_at_beta_0"] == 1.0  # the dear one for the first query, the cheap one for the second


def test_regret_is_what_pytorch_loses_by_the_variants_choice() -> None:
    """PyTorch: 0.2 and 0.6 of quality, so the dear candidate while (1 - b) * 0.4 > b: b up to 0.25.

    The variant sees no difference and takes the cheap one throughout. Lost: (1 - b) * 0.4 - b.
    """
    figures = compared([[0.2, 0.6]], [[0.5, 0.5]], [[0.0, 1.0]])
    lost = [max(0.0, (1 - beta) * 0.4 - beta) for beta in np.arange(21) * 0.05]
    assert figures["mean_regret"] == pytest.approx(np.mean(lost))
    assert figures["differing_choices"] == 6  # 0, 0.05, … 0.25
    assert figures["agreement"] == pytest.approx(15 / 21)
    assert (figures["distinct_choices"], figures["distinct_choices_pytorch"]) == (1, 2)
    assert figures["quality_max_difference"] == pytest.approx(0.3)
    assert figures["accuracy_loss"] == pytest.approx(6 / 21)
    assert (figures["accuracy_at_beta_0"], figures["accuracy_at_beta_0_pytorch"]) == (0.0, 1.0)


def test_a_numeric_tie_is_no_differing_choice() -> None:
    figures = compared([[0.5, 0.5001]], [[0.5, 0.4999]])
    assert figures["differing_choices"] == 0
    assert figures["agreement"] < 1.0
    assert compared([[0.5, 0.51]], [[0.5, 0.49]])["differing_choices"] > 0


def test_quality_that_is_nan_is_never_within_bounds() -> None:
    figures = compared([[0.5, 0.6]], [[NAN, NAN]])
    report = {"policies": {"nir": figures}, "near_ties": {}}
    for precision in ("fp32", "int8"):
        with pytest.raises(ParityError):
            parity.check({**report, "queries": 1}, "cpu", precision)


def test_a_choice_that_nobody_evaluated_leaves_accuracy_out() -> None:
    """At beta 1 the cheap candidate is chosen throughout; if it has no held-out outcome, that is no failure."""
    figures = compared([[0.1, 0.9]], [[0.1, 0.9]], [[NAN, 1.0]])
    assert figures["accuracy_loss"] == 0.0
    assert figures["accuracy_at_beta_0"] == 1.0
    nothing = compared([[0.1, 0.9]], [[0.1, 0.9]], [[NAN, NAN]])
    assert nothing["accuracy_loss"] is None
    assert nothing["accuracy_at_beta_0"] is None
    json.dumps(nothing, allow_nan=False)


def test_near_ties_are_twins_of_equal_cost(run: Run) -> None:
    vectors, costs = run.pool.vectors(), np.arange(len(run.pool)) / len(run.pool)
    twins, twin_costs = parity._near_ties(vectors, costs)
    assert len(twins) == len(twin_costs) == 2 * len(run.pool)
    np.testing.assert_array_equal(twins[::2], vectors)
    np.testing.assert_array_equal(twin_costs[::2], twin_costs[1::2])
    gap = np.abs(twins[1::2] - twins[::2])
    assert 1e-4 < gap.mean() < 2e-3
    assert twins.min() >= 0.0
    assert twins.max() <= 1.0


# --- what a refusal leaves ----------------------------------------------------------------------------------


def reuse_graphs(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the int8 encoder's graph from the tiny bundle: calibrating it again would show nothing new."""

    def encoder(_: Any, folder: Path, *arguments: Any, **options: Any) -> Path:
        for name in ("encoder.onnx", "weights.bin"):
            shutil.copyfile(bundle / "cpu-int8" / name, folder / name)
        return folder / "encoder.onnx"

    monkeypatch.setattr(authored_int8, "export_authored_int8", encoder)


def another_encoder(encoder: QueryEncoder, folder: Path) -> Path:
    torch.manual_seed(99)
    return REAL_ENCODER(QueryEncoder(encoder.spec).eval(), folder)


def another_nir(nir: Any, folder: Path) -> Path:
    torch.manual_seed(99)
    return REAL_NIR(build_nir(nir.shape, nir.query_width, nir.model_width).eval(), folder)


REAL_ENCODER, REAL_NIR = authored.export_authored, authored_nir.export_nir


@pytest.mark.parametrize(
    ("variant", "module", "name", "broken"),
    [
        ("cpu-fp32", authored, "export_authored", another_encoder),
        ("cpu-int8", authored_nir, "export_nir", another_nir),
    ],
)
def test_a_broken_graph_is_refused_and_leaves_nothing(
    variant: str,
    module: Any,
    name: str,
    broken: Any,
    run: Run,
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reuse_graphs(tiny_bundle, monkeypatch)
    monkeypatch.setattr(module, name, broken)
    with pytest.raises(ParityError, match=f"variant {variant}: nir policies.*not published"):
        export_run(run, tmp_path / "out", variants=(variant,), verify_queries=20, **QUIET)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(encoder: QueryEncoder, folder: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(authored, "export_authored", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_run(run, tmp_path / "out", verify_queries=1, **QUIET)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_bundle_is_refused_untouched(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "manifest.json").write_text("mine")
    said: list[str] = []
    with pytest.raises(ExportError, match="exists already; a bundle is never changed in place"):
        export_run(run, out, verify_queries=1, progress=said.append)
    assert said == []  # at once, not after minutes of encoding
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "manifest.json"]
    assert (out / "manifest.json").read_text() == "mine"


@pytest.mark.parametrize("variants", [(), ("cpu-int4",), ("cpu-fp32", "fp16")])
def test_unknown_variants_name_the_choices(variants: tuple[str, ...], run: Run, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="cpu-int8, cpu-fp32"):
        export_run(run, tmp_path / "out", variants=variants, **QUIET)
    assert list(tmp_path.iterdir()) == []


# --- parity.json --------------------------------------------------------------------------------------------


def test_parity_json_has_every_figure(tiny_bundle: Path) -> None:
    data = json.loads((tiny_bundle / "parity.json").read_text())
    assert data["betas"] == [round(0.05 * k, 2) for k in range(21)]
    assert set(data["variants"]) == {"cpu-int8", "cpu-fp32"}
    for report in data["variants"].values():
        assert {"mean", "min"} == set(report["pooled_centred_cosine"]) == set(report["pooled_cosine"])
        assert report["queries"] >= 40
        assert report["graph"] == "authored"
        for key in ("query_vector", "familiarity", "pooled", "padded_batch", "batch"):
            assert math.isfinite(report[f"{key}_max_difference"])
        assert set(report["policies"]) == set(report["near_ties"]) == {"nir", "hdp", "hdp-paper"}
        for figures in report["policies"].values():
            for key in ("mean_regret", "agreement", "distinct_choices", "quality_max_difference", "accuracy_loss"):
                assert math.isfinite(figures[key])
            assert figures["distinct_choices_pytorch"] >= 1
            assert 0.0 < figures["accuracy_at_beta_0"] <= 1.0
    assert data["variants"]["cpu-fp32"]["policies"]["nir"]["distinct_choices"] > 1


def test_parity_json_has_size_and_latency(tiny_bundle: Path) -> None:
    """Of the buckets, a budget of 48 tokens allows the least alone."""
    data = json.loads((tiny_bundle / "parity.json").read_text())
    for name, report in data["variants"].items():
        assert report["bytes"] == sum(path.stat().st_size for path in (tiny_bundle / name).iterdir())
        assert set(report["latency"]) == {"machine", "threads", "ms"}
        assert report["latency"]["machine"]
        assert report["latency"]["threads"] == 1
        assert set(report["latency"]["ms"]) == {"16"}
        assert report["latency"]["ms"]["16"] > 0.0


# --- queries to calibrate on --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("held_out", "wanted", "verified", "calibrated"),
    [(2000, 5000, 1744, 256), (2000, 40, 40, 256), (100, 2000, 75, 25), (3, 2000, 2, 1), (1, 2000, 1, 1)],
)
def test_no_query_both_calibrates_and_verifies(
    held_out: int, wanted: int, verified: int, calibrated: int, run: Run
) -> None:
    queries = tuple(f"query {i}" for i in range(held_out))
    correct = np.zeros((held_out, len(run.pool)), np.float32)
    longer = dataclasses.replace(run, heldout=dataclasses.replace(run.heldout, queries=queries, correct=correct))
    first, second = exporting.split_heldout(longer, wanted)
    assert (len(set(first)), len(set(second))) == (verified, calibrated)
    if held_out > 1:
        assert not set(first) & set(second)
