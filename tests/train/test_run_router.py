"""Tests of train/run_router.py: a run decides as the bundle that is exported from it, text by text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from arllm.runtime import decision as rule
from arllm.runtime.errors import PoolError, QueryError
from arllm.runtime.pool import Candidate, Pool
from arllm.runtime.router import Router
from arllm.train.outcomes import read_outcomes
from arllm.train.run_router import run_router
from arllm.train.rundir import read_run

BETAS = (0.0, 0.02, 0.1, 0.25, 0.5, 1.0)
ODD = ["", "\x00", "日本の首都はどこですか。 🙂", "zqx vvk qqj", "one two three " * 100, "a\udfffb"]


@pytest.fixture(scope="module")
def by_pytorch(tiny_run: Path) -> Router:
    return run_router(read_run(tiny_run), tiny_run)


@pytest.fixture(scope="module")
def exported(tiny_bundle: Path) -> Router:
    return Router.load(tiny_bundle, variant="cpu-fp32")


@pytest.fixture(scope="module")
def texts(outcomes_folder: Path) -> list[str]:
    return [*ODD, *read_outcomes(outcomes_folder).queries[::20]]


def test_it_decides_as_its_bundle_does(by_pytorch: Router, exported: Router, texts: list[str]) -> None:
    chosen, familiarities = set(), set()
    for text in texts:
        for policy in exported.policies:
            for beta in BETAS:
                want, have = exported.route(text, beta, policy), by_pytorch.route(text, beta, policy)
                np.testing.assert_allclose(have.vector, want.vector, rtol=0, atol=1e-5)
                np.testing.assert_allclose(have.qualities, want.qualities, rtol=0, atol=1e-5)
                assert have.familiarity == pytest.approx(want.familiarity, abs=1e-6)
                assert have.truncation == want.truncation
                utility = want.utility
                assert have.model == want.model or utility[want.model] - utility[have.model] < rule.NUMERIC_TIE
                chosen.add((policy, have.model))
                familiarities.add(round(have.familiarity, 3))
    assert len(chosen) > 6
    assert len(familiarities) > 3


def test_everything_but_the_variant_is_the_bundles(by_pytorch: Router, exported: Router, tiny_run: Path) -> None:
    assert (by_pytorch.variant, exported.variant) == ("pytorch", "cpu-fp32")
    assert by_pytorch.pool == exported.pool
    assert by_pytorch.policies == exported.policies
    np.testing.assert_array_equal(by_pytorch.prior, exported.prior)
    np.testing.assert_array_equal(by_pytorch.normalized_costs, exported.normalized_costs)
    ours, theirs = by_pytorch.bundle.manifest, exported.bundle.manifest
    for name in ("domains", "embedding_width", "domain_shares", "tokens", "default_policy"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert (ours.cost_minimum, ours.cost_maximum) == (theirs.cost_minimum, theirs.cost_maximum)
    assert ours.name == tiny_run.name
    assert ours.source.items() <= theirs.source.items()  # the export adds what it made of it
    some = by_pytorch.route("What is 17 + 25?")
    assert set(some.to_dict()) == set(exported.route("What is 17 + 25?").to_dict())
    assert some.pool_overridden is False


def test_a_query_vector_will_do(by_pytorch: Router, exported: Router) -> None:
    vector, familiarity, _ = exported.encode("What is 17 + 25?")
    for given in (familiarity, 0.0):
        want, have = (router.route_vector(vector, 0.1, familiarity=given) for router in (exported, by_pytorch))
        np.testing.assert_allclose(have.qualities, want.qualities, rtol=0, atol=1e-5)
    with pytest.raises(QueryError, match="query vector"):
        by_pytorch.route_vector([0.5])


def test_another_pool(tiny_run: Path, tiny_bundle: Path, exported: Router) -> None:
    candidates = (*exported.pool.candidates[:3], Candidate("newcomer", 0.02, exported.pool.candidates[-1].vector))
    pool = Pool(candidates, exported.pool.unit)
    have = run_router(read_run(tiny_run), tiny_run, pool).route("What is 17 + 25?", 0.1)
    want = Router.load(tiny_bundle, variant="cpu-fp32", pool=pool).route("What is 17 + 25?", 0.1)
    assert have.pool_overridden is want.pool_overridden is True
    assert have.candidates == want.candidates
    np.testing.assert_allclose(have.qualities, want.qualities, rtol=0, atol=1e-5)
    np.testing.assert_allclose(have.utilities, want.utilities, rtol=0, atol=1e-5)  # on the run's own scale of costs
    with pytest.raises(PoolError, match="have 2 entries"):
        run_router(read_run(tiny_run), tiny_run, Pool((Candidate("m", 1.0, (0.5, 0.5)),)))
