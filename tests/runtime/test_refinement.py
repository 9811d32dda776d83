"""Tests of what runtime/router.py makes of a bare prediction: calibrated, shrunk by familiarity; who is spared."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from arllm.runtime.calibration import Calibration, calibrated, overall, standing
from arllm.runtime.errors import BundleSchemaError, QueryError
from arllm.runtime.pool import Candidate, Pool
from arllm.runtime.router import Router

BETAS = (0.0, 0.02, 0.1, 0.25, 0.5, 0.75, 1.0)
KNOWN = "What is 17 + 25?"
STRANGE = "zqx vvk, qqj: ŵŷ xkcd"


@pytest.fixture(scope="module")
def vectors(router: Router) -> NDArray[np.float32]:
    """20 unlike query vectors, (20, Q)."""
    rng = np.random.default_rng(0)
    domains = len(router.bundle.manifest.domains)
    parts = (rng.dirichlet(np.full(domains, 0.3), 20), rng.random((20, 1)), rng.normal(size=(20, 8)))
    return np.concatenate(parts, axis=1).astype(np.float32)


def known(router: Router, vector: NDArray[np.float32]) -> NDArray[np.float64]:
    """What overall accuracy and the query's difficulty alone say, (M,)."""
    mean = router.bundle.manifest.mean_difficulty
    assert router.prior is not None
    assert mean is not None
    return overall(standing(router.prior, mean), vector[None, len(router.bundle.manifest.domains)])[0]


def bare(router: Router, policy: str, vectors: NDArray[np.float32]) -> NDArray[Any]:
    return router.quality_of(policy).predict(vectors, router.pool.vectors())


# --- calibration and doubt ----------------------------------------------------------------------------------


def test_nir_is_calibrated_and_both_formulas_are_not(router: Router, vectors: NDArray[np.float32]) -> None:
    manifest = router.bundle.manifest
    assert [name for name in router.policies if "calibration" in manifest.policies[name]] == ["nir"]
    stored = Calibration.from_json(manifest.policies["nir"]["calibration"], len(manifest.domains))
    table, raw = stored.table(router.pool.names), bare(router, "nir", vectors)
    want = calibrated(stored, table, raw, vectors, router.pool.vectors())
    np.testing.assert_array_equal(router.predict(vectors, "nir"), want)
    assert np.abs(want - raw).max() > 0.02
    for policy in ("hdp", "hdp-paper"):
        np.testing.assert_array_equal(router.predict(vectors, policy), bare(router, policy, vectors))


def test_refine_is_what_predict_does(router: Router, vectors: NDArray[np.float32]) -> None:
    familiarity = np.linspace(0, 1, len(vectors))
    for policy in router.policies:
        found = router.refine(policy, bare(router, policy, vectors), vectors, familiarity)
        np.testing.assert_array_equal(found, router.predict(vectors, policy, familiarity))


def test_the_prior_is_accuracy_over_the_training_queries(router: Router) -> None:
    shares = router.bundle.manifest.domain_shares
    assert shares is not None
    assert router.prior is not None
    by_hand = [
        sum(share * float(entry) for share, entry in zip(shares, candidate.vector or (), strict=True))
        for candidate in router.pool.candidates
    ]
    assert router.prior == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("policy", ["nir", "hdp"])
def test_of_a_strange_query_only_its_difficulty_is_left(
    router: Router, policy: str, vectors: NDArray[np.float32]
) -> None:
    assert router.prior is not None
    best = router.pool.names[int(np.argmax(router.prior))]
    for vector in vectors:
        decision = router.route_vector(vector, 0.0, policy, familiarity=0.0)
        np.testing.assert_allclose(decision.qualities, known(router, vector))
        assert decision.model == best
    assert len({router.route_vector(vector, beta, policy).model for vector in vectors for beta in BETAS}) > 1


@pytest.mark.parametrize("policy", ["nir", "hdp"])
def test_quality_moves_from_the_prior_to_the_prediction(
    router: Router, policy: str, vectors: NDArray[np.float32]
) -> None:
    assert router.prior is not None
    sure = router.route_vector(vectors[0], 0.5, policy)
    assert sure.familiarity == 1.0
    np.testing.assert_allclose(sure.qualities, router.predict(vectors[:1], policy)[0], rtol=1e-9)
    for familiarity in (0.25, 0.5):
        decision = router.route_vector(vectors[0], 0.5, policy, familiarity=familiarity)
        assert decision.familiarity == decision.to_dict()["familiarity"] == familiarity
        want = (1 - familiarity) * known(router, vectors[0]) + familiarity * sure.qualities
        np.testing.assert_allclose(decision.qualities, want)
        assert decision.qualities.min() >= 0.0
        assert decision.qualities.max() <= 1.0


def test_the_published_baseline_stays_as_it_was_published(router: Router, vectors: NDArray[np.float32]) -> None:
    published = bare(router, "hdp-paper", vectors)
    for vector, want in zip(vectors, published, strict=True):
        for familiarity in (0.0, 0.3, 1.0):
            decision = router.route_vector(vector, 0.2, "hdp-paper", familiarity=familiarity)
            np.testing.assert_allclose(decision.qualities, want, rtol=1e-6)
            assert decision.familiarity == pytest.approx(familiarity)


@pytest.mark.parametrize("familiarity", [-0.01, 1.01, math.nan, math.inf, -math.inf])
def test_familiarity_stays_within_its_bounds(router: Router, familiarity: float) -> None:
    with pytest.raises(QueryError, match=r"familiarity must lie in \[0, 1\]"):
        router.route_vector(np.full(router.bundle.manifest.query_width, 0.5), familiarity=familiarity)


# --- from text ----------------------------------------------------------------------------------------------


def test_text_brings_its_familiarity_along(router: Router) -> None:
    usual, strange = router.route(KNOWN, 0.0), router.route(STRANGE, 0.0)
    assert usual.familiarity == router.encode(KNOWN).familiarity > 0.9
    assert strange.familiarity == router.encode(STRANGE).familiarity == 0.0
    assert router.prior is not None
    np.testing.assert_allclose(strange.qualities, known(router, strange.vector))
    assert strange.model == router.pool.names[int(np.argmax(router.prior))]
    assert strange.reason == "highest predicted quality, unfamiliar query: overall accuracy decides"
    assert "unfamiliar" not in usual.reason


def test_reasons_say_what_was_decided(router: Router, vectors: NDArray[np.float32]) -> None:
    given = set()
    for vector in vectors:
        for beta in BETAS:
            decision = router.route_vector(vector, beta)
            if decision.model == max(decision.quality, key=lambda name: decision.quality[name]):
                want = "highest predicted quality"
            elif decision.model == min(decision.cost, key=lambda name: decision.cost[name]):
                want = "cheapest; no other is predicted better by what it costs more"
            else:
                want = "best balance of predicted quality and cost"
            assert decision.reason == want
            given.add(want)
    assert len(given) == 3
    assert router.route(KNOWN, candidates=["sim-code"]).reason == "the only candidate allowed"


def test_both_variants_know_the_same_queries(tiny_bundle: Path, router: Router) -> None:
    small = Router.load(tiny_bundle, variant="cpu-int8")
    for text in (KNOWN, STRANGE, "def f(n):\n    return n\nprint(f(3))", ""):
        assert small.route(text).familiarity == router.route(text).familiarity


# --- other pools, other bundles -----------------------------------------------------------------------------


def test_an_unknown_candidate_gets_the_default_offsets(tiny_bundle: Path, router: Router) -> None:
    """A newcomer with the vector of a candidate that training knew: equal but for that candidate's own offsets."""
    twin = router.pool.candidates[-1]
    newcomer = Candidate("newcomer", 0.01, twin.vector)
    changed = Router.load(tiny_bundle, variant="cpu-fp32", pool=Pool((*router.pool.candidates, newcomer)))
    manifest = router.bundle.manifest
    stored = Calibration.from_json(manifest.policies["nir"]["calibration"], len(manifest.domains))
    vector, familiarity, _ = router.encode(KNOWN)
    decision = changed.route(KNOWN, 0.1, "nir")
    assert familiarity == 1.0
    every = changed.pool.vectors()
    raw = router.quality_of("nir").predict(vector[None], every)
    table = np.array([stored.offsets[name] if name != "newcomer" else stored.default for name in changed.pool.names])
    np.testing.assert_allclose(
        decision.qualities, calibrated(stored, table, raw, vector[None], every)[0], rtol=0, atol=1e-6
    )
    assert decision.quality["newcomer"] != pytest.approx(decision.quality[twin.name], abs=1e-5)
    strange = changed.route(STRANGE, 0.1, "nir").quality
    assert strange["newcomer"] == pytest.approx(strange[twin.name], rel=1e-12)  # the prior knows the vector alone


def test_an_override_reorders_the_prior_with_its_candidates(tiny_bundle: Path, router: Router) -> None:
    assert router.prior is not None
    names = router.pool.names
    pool = Pool(tuple(Candidate(name, float(cost)) for cost, name in enumerate(reversed(names), 1)), router.pool.unit)
    changed = Router.load(tiny_bundle, variant="cpu-fp32", pool=pool)
    assert changed.pool.names == names[::-1]
    np.testing.assert_allclose(changed.prior, router.prior[::-1], rtol=1e-12)
    before, after = router.route(KNOWN).quality, changed.route(KNOWN).quality
    assert after == pytest.approx(before, abs=1e-6)  # every candidate kept its own offsets


def test_a_bundle_of_schema_1_has_neither(bundle_copy: Any, router: Router) -> None:
    """No calibration, no domain shares, a graph without familiarity: all is taken as known, and as predicted."""
    onnx = pytest.importorskip("onnx", reason="the extra export brings onnx")
    path = bundle_copy.path / "cpu-fp32/encoder.onnx"
    model = onnx.load(str(path), load_external_data=False)
    kept = [output for output in model.graph.output if output.name != "familiarity"]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    bundle_copy.rewrite("cpu-fp32/encoder.onnx", model.SerializeToString())

    def older(data: dict[str, Any]) -> None:
        data["schema_version"] = 1
        del data["policies"]["nir"]["calibration"], data["query"]["domain_shares"]
        data["variants"] = [v for v in data["variants"] if v["name"] == "cpu-fp32"]
        encoder = data["variants"][0]["graphs"]["encoder"]
        encoder["outputs"] = [output for output in encoder["outputs"] if output["name"] != "familiarity"]

    bundle_copy.edit(older)
    old = Router.load(bundle_copy.path)
    assert old.prior is None
    for text in (KNOWN, STRANGE):
        decision = old.route(text, 0.1)
        assert decision.familiarity == old.encode(text).familiarity == 1.0
        np.testing.assert_array_equal(decision.vector, router.encode(text).vector)
        np.testing.assert_array_equal(decision.qualities, bare(router, "nir", decision.vector[None])[0])
    vector = np.full(router.bundle.manifest.query_width, 0.5, dtype=np.float32)
    known, strange = (old.route_vector(vector, familiarity=f) for f in (1.0, 0.0))
    np.testing.assert_array_equal(known.qualities, strange.qualities)


@pytest.mark.parametrize(
    ("policy", "change", "message"),
    [
        ("nir", {"calibration": {}}, "calibration: expected ability"),
        ("nir", {"calibration": None}, "calibration: expected ability"),
        (
            "nir",
            {"calibration": {"ability": 1, "scale": 1, "default": [0], "offsets": {}}},
            "'default' has 1 offsets, expected 10",
        ),
        ("hdp", {"slope": "steep"}, "slope, weight, bias and centre must be numbers"),
    ],
)
def test_unusable_parameters_name_the_manifest_and_the_policy(
    bundle_copy: Any, policy: str, change: dict[str, Any], message: str
) -> None:
    bundle_copy.edit(lambda data: data["policies"][policy].update(change))
    with pytest.raises(BundleSchemaError) as caught:
        Router.load(bundle_copy.path)
    assert str(caught.value).startswith(f"{bundle_copy.path / 'manifest.json'}: policies.{policy}: ")
    assert message in str(caught.value)
