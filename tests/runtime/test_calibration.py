"""Tests of runtime/calibration.py: values by hand, unknown candidates, doubt of strange queries, malformed JSON."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arllm.runtime import decision as rule
from arllm.runtime.calibration import EDGE, Calibration, calibrated, logit, mixed, overall, shrunk, standing
from arllm.runtime.errors import BundleSchemaError

QUERIES = np.array([[0.75, 0.25, 0.4, -3.0], [0.0, 1.0, 0.9, 5.0]], dtype=np.float32)  # 2 domains, difficulty, 1 more
VECTORS = np.array([[0.8, 0.4], [0.5, 0.5]], dtype=np.float32)
NAMES = ("able", "even")
FITTED = Calibration(0.25, 2.0, (0.0, 0.25, -0.25), {"able": (0.1, -0.4, 0.8), "even": (-0.2, 0.0, 0.3)})
PLAIN: dict[str, Any] = {"ability": 0.5, "scale": 1.0, "default": [0.0, 0.0], "offsets": {"a": [0.1, 0.2]}}


PREDICTION = np.array([[0.6, 0.5], [0.2, 0.9]])


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_the_blend_by_hand() -> None:
    """Ability: 0.75 * 0.8 + 0.25 * 0.4 = 0.7 and 0.5 of the first query, 0.4 and 0.5 of the second."""
    found = mixed(PREDICTION, QUERIES, VECTORS, 0.25)
    by_hand = [
        [0.75 * 0.6 + 0.25 * 0.7, 0.75 * 0.5 + 0.25 * 0.5],
        [0.75 * 0.2 + 0.25 * 0.4, 0.75 * 0.9 + 0.25 * 0.5],
    ]
    np.testing.assert_allclose(found, by_hand, rtol=1e-6)
    np.testing.assert_allclose(mixed(PREDICTION, QUERIES, VECTORS, 0.0), PREDICTION, rtol=1e-12)
    np.testing.assert_allclose(mixed(PREDICTION, QUERIES, VECTORS, 1.0), [[0.7, 0.5], [0.4, 0.5]], rtol=1e-6)


def test_a_value_by_hand() -> None:
    found = calibrated(FITTED, FITTED.table(NAMES), PREDICTION, QUERIES, VECTORS)
    blend = [[0.625, 0.5], [0.25, 0.8]]
    offsets = [[0.1 - 0.75 * 0.4 + 0.25 * 0.8, -0.2 + 0.25 * 0.3], [0.1 + 0.8, -0.2 + 0.3]]
    by_hand = [
        [sigmoid(2 * math.log(p / (1 - p)) + offset) for p, offset in zip(*rows, strict=True)]
        for rows in zip(blend, offsets, strict=True)
    ]
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, by_hand, rtol=1e-6)


def test_a_calibration_that_changes_nothing() -> None:
    identity = Calibration(0.0, 1.0, (0.0, 0.0, 0.0), {})
    prediction = np.array([[0.3, 0.99], [0.01, 0.5]])
    found = calibrated(identity, identity.table(NAMES), prediction, QUERIES, VECTORS)
    np.testing.assert_allclose(found, prediction, rtol=1e-12)


def test_the_logit_is_held_off_its_ends() -> None:
    assert EDGE == 0.01
    np.testing.assert_allclose(logit(np.array([0.0, 0.01, 0.5, 1.0])), np.log([1 / 99, 1 / 99, 1.0, 99.0]))
    np.testing.assert_allclose(logit(np.array([0.25], dtype=np.float32)), [math.log(1 / 3)], rtol=1e-7)
    extreme = calibrated(FITTED, FITTED.table(NAMES), np.array([[0.0, 1.0]] * 2), QUERIES, VECTORS)
    assert ((extreme > 0) & (extreme < 1)).all()


def test_an_unknown_name_gets_the_default_row() -> None:
    table = FITTED.table(("stranger", "even", "able"))
    assert table.tolist() == [[0.0, 0.25, -0.25], [-0.2, 0.0, 0.3], [0.1, -0.4, 0.8]]
    assert FITTED.table(()).size == 0


def test_round_trip_through_json() -> None:
    again = Calibration.from_json(json.loads(json.dumps(FITTED.to_json())), 2)
    assert again.to_json() == FITTED.to_json()
    assert again.offsets == FITTED.offsets
    assert (again.ability, again.scale, again.default) == (0.25, 2.0, (0.0, 0.25, -0.25))


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in PLAIN.items() if name != key}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        *[(without(key), f"expected ability, scale, default and offsets .*'{key}'") for key in PLAIN],
        ({**PLAIN, "scale": "steep"}, "expected ability, .*'steep'"),
        ({**PLAIN, "scale": None}, "expected ability, "),
        ({**PLAIN, "scale": 10**400}, "expected ability, "),
        ({**PLAIN, "ability": [0.5]}, "expected ability, scale"),
        ({**PLAIN, "default": 0.0}, "expected ability, scale, default"),
        ({**PLAIN, "offsets": [[0.1, 0.2]]}, "default and offsets"),
        ({**PLAIN, "offsets": {"a": 0.1}}, "default and offsets"),
        ({**PLAIN, "offsets": {"a": [0.1, None]}}, "default and offsets"),
        ({**PLAIN, "default": [0.0]}, "'default' has 1 offsets, expected 2"),
        ({**PLAIN, "offsets": {"a": [0.1, 0.2], "b": [0.1, 0.2, 0.3]}}, "'b' has 3 offsets, expected 2"),
        ({**PLAIN, "scale": math.nan}, "not finite"),
        ({**PLAIN, "ability": math.inf}, "not finite"),
        ({**PLAIN, "default": [0.0, math.nan]}, "not finite"),
        ({**PLAIN, "offsets": {"a": [-math.inf, 0.2]}}, "not finite"),
        ([], "expected ability, "),
        (None, "expected ability, "),
    ],
)
def test_malformed_json_is_refused(data: Any, message: str) -> None:
    with pytest.raises(BundleSchemaError, match=f"^calibration: .*{message}"):
        Calibration.from_json(data, 1)


def test_whole_numbers_will_do() -> None:
    found = Calibration.from_json({"ability": 0, "scale": 1, "default": [0, 1], "offsets": {}}, 1)
    assert found.to_json() == {"ability": 0.0, "scale": 1.0, "default": [0.0, 1.0], "offsets": {}}


# --- doubt --------------------------------------------------------------------------------------------------

PRIOR = np.array([0.3, 0.55, 0.8])
QUALITY = np.array([[0.9, 0.1, 0.2], [0.4, 0.7, 0.6], [0.0, 1.0, 0.5]])


def test_a_query_of_mean_difficulty_gets_the_overall_accuracies() -> None:
    np.testing.assert_allclose(overall(standing(PRIOR, 0.4), np.array([0.4])), [PRIOR])


def test_a_harder_query_lowers_all_by_the_same_odds() -> None:
    found = overall(standing(PRIOR, 0.5), np.array([0.8]))[0]  # odds of 1 to 4 where they were even
    np.testing.assert_allclose(found / (1 - found), 0.25 * PRIOR / (1 - PRIOR))


def test_candidates_come_closer_on_queries_that_nobody_or_everybody_answers() -> None:
    easy, middling, hard = np.ptp(overall(standing(PRIOR, 0.5), np.array([0.03, 0.5, 0.97])), axis=1)
    assert hard < middling / 3
    assert easy < middling / 3


def test_quality_moves_from_what_is_known_overall_to_the_prediction() -> None:
    known = overall(standing(PRIOR, 0.5), np.full(3, 0.5))
    found = shrunk(QUALITY, np.array([0.0, 1.0, 0.25]), known)
    np.testing.assert_allclose(found[0], PRIOR)
    np.testing.assert_array_equal(found[1], QUALITY[1])
    np.testing.assert_allclose(found[2], [0.225, 0.6625, 0.725])


def test_single_precision_is_taken_as_it_is() -> None:
    known = overall(standing(PRIOR, 0.5), np.full(3, 0.5, dtype=np.float32))
    found = shrunk(QUALITY.astype(np.float32), np.full(3, 0.5, dtype=np.float32), known)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, 0.5 * QUALITY + 0.5 * PRIOR, rtol=1e-6)


@given(st.lists(st.floats(0, 1), min_size=3, max_size=3), st.floats(0, 1), st.floats(0, 1))
def test_a_strange_query_is_ranked_by_overall_accuracy(
    quality: list[float], difficulty: float, mean_difficulty: float
) -> None:
    known = overall(standing(PRIOR, mean_difficulty), np.array([difficulty]))
    strange = shrunk(np.array([quality]), np.array([0.0]), known)[0]
    assert 0.0 <= strange.min() <= strange.max() <= 1.0
    assert (np.argsort(strange) == np.argsort(PRIOR)).all()
    assert int(rule.choose(rule.utility(strange, np.array([0.0, 0.2, 1.0]), 0.0))) == int(np.argmax(PRIOR))
