"""Tests of train/curves.py: every measure against a value worked out by hand, and what must hold for any table."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from arllm.runtime.errors import BetaError, OutcomesError, PoolError
from arllm.train import curves
from arllm.train.curves import Frame, Measures, Played, Table

NAN = float("nan")

# Four queries, two candidates of cost 1 and 3: cheap is right on the first two, dear on the first and the third.
HAND = np.array([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
COSTS = np.array([1.0, 3.0])


def hand_table() -> Table:
    return curves.outcome_table(HAND, COSTS)


def random_table(seed: int, n: int = 200, m: int = 5, blank: float = 0.0) -> Table:
    rng = np.random.default_rng(seed)
    skill, ease = np.sort(rng.normal(size=m)), rng.normal(size=(n, 1))
    correct = (rng.random((n, m)) < 1 / (1 + np.exp(-skill - ease))).astype(np.float64)
    correct[rng.random((n, m)) < blank] = NAN
    correct[:, 0] = np.where(np.isnan(correct).all(axis=1), 1.0, correct[:, 0])
    return curves.outcome_table(correct, np.sort(rng.lognormal(size=m)))


def measured(quality: NDArray[np.float64], table: Table, frame: Frame, weights: NDArray[np.float64] | None = None):
    betas = curves.hull_betas(quality, table)
    return curves.measure(curves.play(quality, table, betas), curves.play(quality, table, [0.0]), frame, weights)


# --- choices ------------------------------------------------------------------------------------------------


def test_choices_are_the_decision_rules() -> None:
    quality = np.array([[0.5, 0.9], [0.5, 0.6]])
    table = curves.outcome_table(np.zeros((2, 2)), COSTS)
    # normalized costs 0 and 1: the dear one wins where (1 - beta) * gain > beta; 0.4 → beta < 2/7, 0.1 → beta < 1/11
    assert curves.choices(quality, table, [0.0, 0.09, 0.1, 0.28, 0.29, 1.0]).tolist() == [
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 0, 0],
    ]


def test_ties_go_to_the_cheaper() -> None:
    assert curves.choices(np.full((1, 2), 0.5), curves.outcome_table(np.zeros((1, 2)), COSTS), [0.0])[0, 0] == 0


def test_what_was_not_evaluated_is_not_chosen() -> None:
    table = curves.outcome_table(np.array([[1.0, NAN], [NAN, 0.0]]), COSTS)
    played = curves.play(np.array([[0.1, NAN], [NAN, 0.1]]), table, [0.0, 1.0])
    assert played.accuracy.tolist() == [[1.0, 1.0], [0.0, 0.0]]
    assert played.cost.tolist() == [[1.0, 1.0], [3.0, 3.0]]


def test_decided_on_flat_costs_judged_by_what_was_paid() -> None:
    paid = np.array([[5.0, 2.0], [1.0, 9.0]])
    table = curves.outcome_table(np.ones((2, 2)), COSTS, paid=paid)
    played = curves.play(np.array([[0.5, 0.5], [0.1, 0.9]]), table, [0.0, 1.0])
    assert played.cost.tolist() == [[5.0, 5.0], [9.0, 1.0]]
    blank = curves.outcome_table(np.ones((1, 2)), COSTS, paid=np.array([[NAN, 2.0]]))
    assert blank.evaluated.tolist() == [[False, True]]


def test_beta_keeps_the_bundles_scale() -> None:
    table = curves.outcome_table(np.zeros((1, 2)), COSTS, bounds=(1.0, 5.0))
    assert table.normalized.tolist() == [0.0, 0.5]


def test_the_grid_holds_both_ends() -> None:
    grid = curves.beta_grid()
    assert (grid[0], grid[-1], len(grid)) == (0.0, 1.0, 101)
    assert (np.diff(grid) > 0).all()


@pytest.mark.parametrize(
    ("correct", "costs", "error", "message"),
    [
        ([[1.0, 0.0]], [3.0, 1.0], PoolError, "ascending"),
        ([[1.0, 0.0]], [1.0], PoolError, r"pool's \(2,\)"),
        ([[NAN, NAN]], [1.0, 3.0], OutcomesError, "evaluated"),
        (np.zeros((0, 2)), [1.0, 3.0], OutcomesError, "there must be a query"),
    ],
)
def test_unusable_tables(correct: object, costs: list[float], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        curves.outcome_table(np.array(correct), np.array(costs))


def test_unusable_qualities_and_betas() -> None:
    with pytest.raises(OutcomesError, match=r"\(4, 2\), found \(4, 1\)"):
        curves.choices(np.zeros((4, 1)), hand_table(), [0.0])
    with pytest.raises(OutcomesError, match="finite"):
        curves.choices(np.full((4, 2), NAN), hand_table(), [0.0])
    with pytest.raises(BetaError):
        curves.choices(np.zeros((4, 2)), hand_table(), [1.5])


def test_shares_by_hand() -> None:
    chosen = np.array([[0, 2], [0, 2], [1, 2], [0, 0]])
    assert curves.shares(chosen, 3).tolist() == [[0.75, 0.25, 0.0], [0.25, 0.0, 0.75]]


# --- curve, AIQ, cost to match ------------------------------------------------------------------------------


def test_hull_by_hand() -> None:
    cost = np.array([3.0, 1.0, 2.0, 2.5, 4.0, 1.0])
    accuracy = np.array([0.8, 0.4, 0.7, 0.6, 0.7, 0.5])
    assert curves.upper_hull(cost, accuracy).tolist() == [5, 2, 0]  # 2.5 is below, 4.0 is no gain, 1 is beaten by 5


def test_hull_leaves_out_what_lies_under_a_chord() -> None:
    assert curves.upper_hull(np.array([0.0, 1.0, 2.0]), np.array([0.0, 0.4, 1.0])).tolist() == [0, 2]


def test_of_equal_points_the_first_is_taken() -> None:
    assert curves.upper_hull(np.array([1.0, 1.0, 1.0]), np.array([0.5, 0.6, 0.6])).tolist() == [1]


def test_aiq_by_hand() -> None:
    # (1, .5) → (2, .7) → flat to 3: (.6 + .7) / 2
    assert curves.aiq(np.array([0.5, 0.7]), np.array([1.0, 2.0]), 1.0, 3.0) == pytest.approx(0.65)
    # the order of the points doesn't matter, and a fall is not hidden: (.5→.7) .6, (.7→.5) .6
    assert curves.aiq(np.array([0.7, 0.5, 0.5]), np.array([2.0, 1.0, 3.0]), 1.0, 3.0) == pytest.approx(0.6)
    # no credit below the first point: 1 × 0 + 1 × .8, over 2
    assert curves.aiq(np.array([0.8]), np.array([2.0]), 1.0, 3.0) == pytest.approx(0.4)
    # what lies outside the span doesn't count: at 1 the line from (0, .2) to (2, .6) is at .4: (.5 + .6) / 2
    assert curves.aiq(np.array([0.2, 0.6]), np.array([0.0, 2.0]), 1.0, 3.0) == pytest.approx(0.55)
    assert np.isnan(curves.aiq(np.array([0.2]), np.array([1.0]), 1.0, 1.0))


def test_cost_to_match_by_hand() -> None:
    accuracy, cost = np.array([0.5, 0.7, 0.6]), np.array([1.0, 2.0, 3.0])
    assert curves.cost_to_match(accuracy, cost, 0.6) == pytest.approx(1.5)
    assert curves.cost_to_match(accuracy, cost, 0.4) == 1.0
    assert np.isnan(curves.cost_to_match(accuracy, cost, 0.71))


def test_measures_by_hand() -> None:
    table = hand_table()
    frame = curves.frame(table, table, curves.best_single(HAND))
    # Both are right on half: of equals the cheapest is the best single, and zero is that one: AIQ .5.
    assert frame.best == 0
    # The oracle: cheap at (1, .5), and at beta 0 dear on query 3 alone: (1.5, .75), flat to 3.
    # Its AIQ: (.625 * .5 + .75 * 1.5) / 2 = .71875
    assert curves.aiq(*frame.oracle.means(), 1.0, 3.0) == pytest.approx(0.71875)
    assert curves.aiq(*frame.zero.means(), 1.0, 3.0) == pytest.approx(0.5)
    # A router that finds query 3 but also sends query 2 up at beta 0: (1, .5), (1.5, .75) on the hull, (2, .5) off it
    quality = np.array([[0.5, 0.5], [0.5, 0.6], [0.2, 0.9], [0.2, 0.2]])
    own = measured(quality, table, frame)
    assert own.aiq == pytest.approx(0.71875)
    assert own.gap_closed == pytest.approx(1.0)
    assert own.accuracy == pytest.approx(0.5)
    assert own.cost_to_match == pytest.approx(1.0)


def test_cost_to_match_is_relative_to_the_best_single() -> None:
    correct = np.array([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [1.0, 1.0]])  # .5 and .75
    table = curves.outcome_table(correct, COSTS)
    frame = curves.frame(table, table, curves.best_single(correct))
    assert frame.best == 1
    assert measured(correct, table, frame).cost_to_match == pytest.approx(1.5 / 3.0)
    flat = np.tile([0.9, 0.1], (4, 1))  # always the cheap one
    assert np.isnan(measured(flat, table, frame).cost_to_match)


def test_settings_come_from_validation_alone() -> None:
    validation = curves.outcome_table(np.array([[1.0, 0.0], [1.0, 1.0]]), COSTS)
    frame = curves.frame(validation, curves.outcome_table(np.array([[0.0, 1.0]]), COSTS), 0)
    assert frame.zero.accuracy.tolist() == [[0.0]]  # cheap was best on validation; that dear is now right is unseen


# --- invariants ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("blank", [0.0, 0.2])
def test_nothing_beats_the_oracle(seed: int, blank: float) -> None:
    table = random_table(seed, blank=blank)
    frame = curves.frame(table, table, curves.best_single(table.correct))
    rng = np.random.default_rng(seed + 100)
    oracle = measured(curves.oracle_quality(table), table, frame)
    assert oracle.gap_closed == pytest.approx(1.0)
    for quality in (rng.random(table.correct.shape), curves.oracle_quality(table) + rng.normal(size=(200, 5))):
        other = measured(quality, table, frame)
        assert other.aiq <= oracle.aiq + 1e-9
        assert other.accuracy <= oracle.accuracy + 1e-9


@pytest.mark.parametrize("seed", range(8))
def test_constants_never_beat_zero_and_zero_closes_nothing(seed: int) -> None:
    table = random_table(seed)
    frame = curves.frame(table, table, curves.best_single(table.correct))
    low, high = (f(frame.constants.means()[1]) for f in (np.min, np.max))
    zero = curves.aiq(*frame.zero.means(), low, high)
    for m in range(5):
        always = np.zeros(table.correct.shape)
        always[:, m] = 1.0
        assert measured(always, table, frame).aiq <= zero + 1e-12
    assert curves.measure(frame.zero, frame.zero[:1], frame).gap_closed == pytest.approx(0.0)
    assert curves.measure(frame.oracle, frame.oracle[-1:], frame).gap_closed == pytest.approx(1.0)


def test_each_price_may_be_stretched() -> None:
    table = random_table(3)
    quality = np.random.default_rng(0).random(table.correct.shape)
    stretched = curves.outcome_table(table.correct, 7 + 3 * table.paid[0])
    betas = curves.beta_grid()
    np.testing.assert_array_equal(curves.choices(quality, table, betas), curves.choices(quality, stretched, betas))


# --- bootstrap ----------------------------------------------------------------------------------------------


def test_resamples_draw_each_query_about_once() -> None:
    weights = curves.resamples(50, 400, seed=1)
    assert weights.shape == (400, 50)
    assert (weights.sum(axis=1) == 50).all()
    assert np.abs(weights.mean(axis=0) - 1.0).max() < 0.25
    np.testing.assert_array_equal(weights, curves.resamples(50, 400, seed=1))


@pytest.mark.parametrize("blank", [0.0, 0.2])
def test_a_resample_is_the_measure_of_its_rows(blank: float) -> None:
    table = random_table(5, blank=blank)
    quality = np.random.default_rng(1).random(table.correct.shape) + curves.oracle_quality(table)
    frame = curves.frame(table, table, 4)
    betas = curves.hull_betas(quality, table)
    weights = curves.resamples(200, 3, seed=2)
    fast = measured(quality, table, frame, weights)
    for r in range(3):
        rows = np.repeat(np.arange(200), weights[r].astype(int))
        again = table.rows(rows)
        picked = Frame(curves.constants(again), *(take(p, rows) for p in (frame.zero, frame.oracle)), frame.best)
        slow = curves.measure(
            curves.play(quality[rows], again, betas), curves.play(quality[rows], again, [0.0]), picked
        )
        for name in Measures.__dataclass_fields__:
            assert getattr(fast, name)[r] == pytest.approx(float(getattr(slow, name)), nan_ok=True)


def take(played: Played, rows: NDArray[np.intp]) -> Played:
    return Played(played.accuracy[rows], played.cost[rows])


def test_a_router_differs_from_itself_by_nothing() -> None:
    table = random_table(5)
    quality = np.random.default_rng(1).random(table.correct.shape)
    frame = curves.frame(table, table, 4)
    weights = curves.resamples(200, 20)
    first, second = (measured(quality, table, frame, weights) for _ in range(2))
    assert curves.interval(first.gap_closed - second.gap_closed) == (0.0, 0.0)


def test_interval_by_hand() -> None:
    assert curves.interval(np.linspace(0.0, 1.0, 101)) == pytest.approx((0.025, 0.975))
    assert curves.interval(np.array([NAN, NAN, 1.0, 2.0])) is None
    assert curves.interval(np.array([NAN, 1.0, 1.0])) == (1.0, 1.0)


# --- RouteLLM -----------------------------------------------------------------------------------------------


def test_pair_measures_by_hand() -> None:
    correct = np.array([[0.0, 1.0], [0.0, 1.0], [1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    quality = np.column_stack([np.zeros(5), [0.9, 0.7, 0.5, 0.3, 0.1]])  # sent to strong in the order of the rows
    # gains 1, 1, 0, -1, 1 of 2 in all: PGR 0, .5, 1, 1, .5, 1 at shares 0, .2 … 1
    pair = curves.pair_measures(quality, correct, strong=1, weak=0)
    assert pair.apgr == pytest.approx(0.2 * (0.25 + 0.75 + 1.0 + 0.75 + 0.75))
    assert pair.cpt == {0.5: pytest.approx(0.2), 0.8: pytest.approx(0.2 + 0.2 * 0.6)}


def test_a_coin_and_a_constant_recover_half() -> None:
    correct = np.array([[0.0, 1.0], [1.0, 1.0], [0.0, 1.0]])
    pair = curves.pair_measures(np.full((3, 2), 0.5), correct, strong=1, weak=0)
    assert pair.apgr == pytest.approx(0.5)
    assert pair.cpt == {0.5: pytest.approx(0.5), 0.8: pytest.approx(0.8)}


def test_pairs_leave_missing_outcomes_out() -> None:
    correct = np.array([[0.0, 1.0], [NAN, 0.0], [1.0, NAN]])
    assert curves.pair_measures(np.zeros((3, 2)), correct, 1, 0).apgr == pytest.approx(0.5)


def test_a_pair_the_wrong_way_round_has_no_measures() -> None:
    pair = curves.pair_measures(np.zeros((1, 2)), np.array([[1.0, 0.0]]), strong=1, weak=0)
    assert math.isnan(pair.apgr)
    assert all(math.isnan(value) for value in pair.cpt.values())
