"""Tests of runtime/quality.py: HDP by hand, and the demonstration of what difficulty does and doesn't decide."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from arllm.runtime.decision import choose, utility
from arllm.runtime.errors import BundleSchemaError
from arllm.runtime.quality import Hdp, HdpPaper, Quality, ability
from arllm.runtime.router import Router

Vector = NDArray[np.float32]

# Two domains, difficulty 0.25, one number of embedding that HDP must not read.
QUERY = np.array([[0.75, 0.25, 0.25, 9.0]], dtype=np.float32)
MODELS = np.array([[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]], dtype=np.float32)


def test_ability_by_hand() -> None:
    # 0.75 * a_1 + 0.25 * a_2
    assert ability(QUERY, MODELS).tolist() == [[0.5, 0.75, 0.25]]


def test_hdp_paper_by_hand() -> None:
    # (ability - 0.25 + 1) / 2
    assert HdpPaper().predict(QUERY, MODELS).tolist() == [[0.625, 0.75, 0.5]]


def test_hdp_paper_clips() -> None:
    impossible = np.array([[1.0, 1.0, -1.0], [0.0, 0.0, 3.0]], dtype=np.float32)
    assert HdpPaper().predict(impossible, MODELS[:1]).tolist() == [[1.0], [0.0]]


def test_hdp_by_hand() -> None:
    got = Hdp(slope=4.0, weight=2.0, bias=-1.0).predict(QUERY, MODELS)
    # 4 * ability - 2 * 0.25 - 1
    want = [1 / (1 + math.exp(-logit)) for logit in (0.5, 1.5, -0.5)]
    assert got[0] == pytest.approx(want, abs=1e-15)


def test_centred_hdp_by_hand() -> None:
    got = Hdp(slope=4.0, weight=2.0, bias=0.25, centre=(0.5, 1.0)).predict(QUERY, MODELS)
    # 4 * (ability - (0.75 * 0.5 + 0.25 * 1.0)) - 2 * 0.25 + 0.25
    want = [1 / (1 + math.exp(-logit)) for logit in (-0.75, 0.25, -1.75)]
    assert got[0] == pytest.approx(want, abs=1e-15)


def test_batches_are_rows() -> None:
    queries = np.concatenate([QUERY, QUERY[:, [1, 0, 2, 3]]])
    for policy in (HdpPaper(), Hdp(4.0, 2.0, -1.0)):
        both = policy.predict(queries, MODELS)
        assert both.shape == (2, 3)
        assert both[1].tolist() == policy.predict(queries[1:], MODELS)[0].tolist()


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"slope": 1.0, "weight": 1.0},
        {"slope": "steep", "weight": 1.0, "bias": 0.0},
        {"slope": None, "weight": 1.0, "bias": 0.0},
        {"slope": math.nan, "weight": 1.0, "bias": 0.0},
        {"slope": 1.0, "weight": math.inf, "bias": 0.0},
        {"slope": 1.0, "weight": 1.0, "bias": 10**400},
        {"slope": 1.0, "weight": 1.0, "bias": 0.0, "centre": 0.5},
        {"slope": 1.0, "weight": 1.0, "bias": 0.0, "centre": [0.5, math.nan]},
    ],
)
def test_unusable_parameters_are_refused(data: dict[str, Any]) -> None:
    with pytest.raises(BundleSchemaError, match=r"^slope, weight, bias and centre must be"):
        Hdp.from_json(data, 2)


def test_a_centre_of_another_width_is_refused() -> None:
    with pytest.raises(BundleSchemaError, match=r"^centre has 1 numbers, expected 2"):
        Hdp.from_json({"slope": 1.0, "weight": 1.0, "bias": 0.0, "centre": [0.5]}, 2)


def test_parameters_are_read() -> None:
    assert Hdp.from_json({"slope": 4, "weight": 2.0, "bias": -1.5}, 2) == Hdp(4.0, 2.0, -1.5)
    centred = Hdp(4.0, 2.0, -1.5, (0.25, 0.5))
    assert Hdp.from_json(centred.to_json(), 2) == centred


# The demonstration that issue 3 asks for. All numbers are fractions with a power of two below, small enough for
# float64 to compute hdp-paper's utilities without rounding: equality then holds for exact ties as well.


@st.composite
def questions(draw: st.DrawFn) -> tuple[list[float], Vector, NDArray[np.float64], float]:
    """Domain probabilities, model vectors, normalized costs (ascending) and beta."""
    cut = sorted(draw(st.lists(st.integers(0, 64), min_size=2, max_size=2)))
    probabilities = [cut[0] / 64, (cut[1] - cut[0]) / 64, (64 - cut[1]) / 64]
    accuracies = st.lists(st.integers(0, 64), min_size=3, max_size=3)
    rows = draw(st.lists(st.tuples(st.integers(0, 32), accuracies), min_size=2, max_size=8))
    rows.sort(key=lambda row: row[0])
    costs = np.array([cost / 32 for cost, _ in rows])
    models = np.array([accuracy for _, accuracy in rows], dtype=np.float32) / 64
    return probabilities, models, costs, draw(st.integers(0, 64)) / 64


def choice(policy: Quality, question: tuple[Any, ...], difficulty: float, beta: float | None = None) -> int:
    probabilities, models, costs, own_beta = question
    query = np.array([[*probabilities, difficulty]], dtype=np.float32)
    used = own_beta if beta is None else beta
    return int(choose(utility(policy.predict(query, models), costs, used))[0])


difficulties = st.integers(0, 64).map(lambda n: n / 64)
centres = st.just(()) | st.tuples(*[st.floats(0.0, 1.0)] * 3)
parameters = st.builds(Hdp, st.floats(0.5, 8.0), st.floats(0.0, 8.0), st.floats(-4.0, 4.0), centres)


@given(questions(), difficulties, difficulties)
def test_difficulty_changes_no_decision_of_hdp_paper(question: tuple[Any, ...], one: float, other: float) -> None:
    assert choice(HdpPaper(), question, one) == choice(HdpPaper(), question, other)


def test_difficulty_changes_decisions_of_hdp_between_0_and_1() -> None:
    # Abilities 0.5 (free) and 0.9 (cost 1), logit 4 * ability - 4 * difficulty, beta 0.2.
    # Easy, 0:    sigmoid(3.6) - sigmoid(2.0)  = 0.973 - 0.881; 0.8 * 0.093 < 0.2: the cheap one.
    # Hard, 0.75: sigmoid(0.6) - sigmoid(-1.0) = 0.646 - 0.269; 0.8 * 0.377 > 0.2: the good one.
    question = ([1.0], np.array([[0.5], [0.9]], dtype=np.float32), np.array([0.0, 1.0]), 0.2)
    assert choice(Hdp(4.0, 4.0, 0.0), question, 0.0) == 0
    assert choice(Hdp(4.0, 4.0, 0.0), question, 0.75) == 1
    assert choice(HdpPaper(), question, 0.0) == choice(HdpPaper(), question, 0.75)


@given(questions(), parameters, difficulties, difficulties)
def test_difficulty_changes_no_decision_of_hdp_at_the_ends(
    question: tuple[Any, ...], hdp: Hdp, one: float, other: float
) -> None:
    assert choice(hdp, question, one, beta=0.0) == choice(hdp, question, other, beta=0.0)
    assert choice(hdp, question, one, beta=1.0) == choice(hdp, question, other, beta=1.0) == 0


@given(questions(), parameters, difficulties)
def test_the_ranking_of_hdp_at_beta_0_is_that_of_the_abilities(
    question: tuple[Any, ...], hdp: Hdp, difficulty: float
) -> None:
    probabilities, models, costs, _ = question
    query = np.array([[*probabilities, difficulty]], dtype=np.float32)
    able = ability(query, models)[0]
    quality = utility(hdp.predict(query, models), costs, 0.0)[0]
    for i, j in itertools.combinations(range(len(models)), 2):
        assert np.sign(able[i] - able[j]) == np.sign(quality[i] - quality[j])
    assert choice(hdp, question, difficulty, beta=0.0) == choice(HdpPaper(), question, difficulty, beta=0.0)


def test_candidates_of_one_ability_are_of_one_quality() -> None:
    """Found by the property above: with the centre taken off the model vectors, the fifth had another last digit."""
    models = np.array([[0, 0, 0]] * 2 + [[0, 1 / 32, 0]] * 3, dtype=np.float32)
    hdp = Hdp(1.0, 0.0, 0.0, (0.0, 0.21283764008612566, 0.9177841030668155))
    quality = hdp.predict(np.array([[1 / 64, 1 / 64, 31 / 32, 0.0]], dtype=np.float32), models)[0]
    assert len(set(quality[2:].tolist())) == 1
    assert quality[0] == quality[1] < quality[2]


def random_vectors(router: Router, n: int) -> NDArray[np.float64]:
    """Query vectors as the encoder could give them, (n, Q), difficulty still 0."""
    manifest = router.bundle.manifest
    rng = np.random.default_rng(5)
    vectors = np.zeros((n, manifest.query_width))
    vectors[:, : len(manifest.domains)] = rng.dirichlet(np.full(len(manifest.domains), 0.3), n)
    vectors[:, len(manifest.domains) + 1 :] = rng.normal(size=(n, manifest.embedding_width))
    return vectors


def changed_choices(router: Router, policy: str, beta: float) -> int:
    """Of 100 random query vectors, how many get another model when difficulty goes from 0.1 to 0.9."""
    at = len(router.bundle.manifest.domains)
    changed = 0
    for vector in random_vectors(router, 100):
        models = set()
        for vector[at] in (0.1, 0.9):
            models.add(router.route_vector(vector, beta, policy).model)
        changed += len(models) > 1
    return changed


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.3, 0.5, 0.7, 1.0])
def test_in_a_trained_bundle_difficulty_changes_no_decision_of_hdp_paper(router: Router, beta: float) -> None:
    assert changed_choices(router, "hdp-paper", beta) == 0


def test_in_a_bundle_difficulty_changes_decisions_of_hdp(bundle_copy: Any) -> None:
    # The tiny bundle's own fit puts the weight of difficulty at its lower bound: 500 queries teach it nothing.
    fitted = {"slope": 6.0, "weight": 5.0, "bias": 0.0}
    bundle_copy.edit(lambda data: data["policies"].update(hdp=fitted))
    router = Router.load(bundle_copy.path, variant="cpu-fp32")
    changes = {beta: changed_choices(router, "hdp", beta) for beta in (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)}
    assert changes.pop(0.0) == 0
    assert changes.pop(1.0) == 0
    assert max(changes.values()) >= 10
