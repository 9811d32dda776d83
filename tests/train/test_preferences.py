"""Tests of train/preferences.py: every step of beta, the wishes, what to expect."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from arllm.runtime import decision as rule
from arllm.runtime.errors import InputError, OutcomesError
from arllm.train import preferences
from arllm.train.preferences import Traffic

NAN = float("nan")

# Two queries, three candidates of normalized cost 0, 1/2 and 1. Choices, with odds = beta / (1 - beta):
# query 0: dear to odds (0.9 - 0.6) / (1 - 0.5) = 0.6, middle to 0.4 / 0.5 = 0.8, then cheap;
# query 1: dear to odds (0.8 - 0.5) / (1 - 0) = 0.3, then cheap: the middle one never leads.
QUALITY = np.array([[0.2, 0.6, 0.9], [0.5, 0.5, 0.8]])
HAND = Traffic(
    ("cheap", "middle", "dear"), QUALITY, np.array([1.0, 2.0, 3.0]), np.array([0.0, 0.5, 1.0]), unit="cents a query"
)
STEPS = [0.3 / 1.3, 0.6 / 1.6, 0.8 / 1.8]


def drawn(seed: int, queries: int = 60, candidates: int = 5, *, coarse: bool = False) -> Traffic:
    """Random traffic; coarse: qualities and costs of few values, so that everything ties with something."""
    rng = np.random.default_rng(seed)
    quality = rng.random((queries, candidates))
    costs = np.sort(rng.random(candidates) * 7 + 0.1)
    if coarse:
        quality, costs = np.round(quality, 1), np.round(costs)
    names = tuple("abcdefgh"[:candidates])
    correct = (rng.random(quality.shape) < quality).astype(np.float64)
    normalized = rule.normalize_costs(costs, float(costs.min()), float(costs.max()))
    return Traffic(names, quality, costs, normalized, correct)


# --- the steps ----------------------------------------------------------------------------------------------


def test_the_steps_by_hand() -> None:
    path = preferences.sweep(HAND)
    assert path.low.tolist() == pytest.approx([0.0, *STEPS])
    assert path.high.tolist() == pytest.approx([*STEPS, 1.0])
    assert path.mean(HAND.costs).tolist() == pytest.approx([3.0, 2.0, 1.5, 1.0])
    assert path.mean(QUALITY).tolist() == pytest.approx([0.85, 0.7, 0.55, 0.35])
    assert path.mean(np.array([0.0, 1.0, 0.0])).tolist() == pytest.approx([0.0, 0.0, 0.5, 0.0])


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_every_stretch_is_what_the_decision_rule_does(seed: int, coarse: bool) -> None:
    traffic = drawn(seed, coarse=coarse)
    path = preferences.sweep(traffic)
    rows = np.arange(len(traffic.quality))
    assert len(path.low) > 5
    assert (path.low[1:] >= path.high[:-1]).all()
    costs, quality = path.mean(traffic.costs), path.mean(traffic.quality)
    for k in range(len(path.low)):
        low, high = path.low[k], path.high[k]
        for beta in {path.beta(k), (low + high) / 2, low + 0.01 * (high - low), low + 0.99 * (high - low)}:
            chosen = traffic.choices(beta)
            assert traffic.costs[chosen].mean() == pytest.approx(costs[k]), (k, beta)
            assert traffic.quality[rows, chosen].mean() == pytest.approx(quality[k]), (k, beta)
    assert (np.diff(costs) <= 1e-12).all()  # saving never falls with beta, and neither does what it costs in quality
    assert (np.diff(quality) <= 1e-12).all()


def test_no_step_is_missed() -> None:
    traffic = drawn(7)
    path = preferences.sweep(traffic)
    grid = np.linspace(0.0, 1.0, 4001)
    k = np.searchsorted(path.high, grid)
    far = np.abs(grid[:, None] - np.concatenate([path.low, path.high])).min(axis=1) > 1e-6
    found = [traffic.costs[traffic.choices(float(beta))].mean() for beta in grid[far]]
    np.testing.assert_allclose(path.mean(traffic.costs)[k[far]], found)


def test_beta_1_falls_to_the_first_of_equal_costs() -> None:
    equal = Traffic(("a", "b"), np.array([[0.1, 0.9], [0.9, 0.1]]), np.array([2.0, 2.0]), np.zeros(2))
    path = preferences.sweep(equal)
    assert path.low.tolist() == [0.0, 1.0]
    assert path.mean(np.array([1.0, 0.0])).tolist() == [0.5, 1.0]
    assert path.beta(1) == 1.0
    single = Traffic(("a",), np.array([[0.5]]), np.array([2.0]), np.zeros(1))
    assert preferences.sweep(single).low.tolist() == [0.0]


def test_the_beta_of_a_stretch_is_short_and_inside() -> None:
    path = preferences.sweep(HAND)
    assert path.beta(0) == 0.0
    assert path.beta(1) == 0.2308  # just above 0.230769…
    narrow = replace(path, low=np.array([0.31234567]), high=np.array([0.31234569]))
    assert narrow.beta(0) == pytest.approx(0.31234568, abs=1e-12)


def test_traffic_must_be_there_and_finite() -> None:
    with pytest.raises(OutcomesError, match="at least one query"):
        replace(HAND, quality=np.empty((0, 3)))
    with pytest.raises(OutcomesError, match="finite"):
        replace(HAND, quality=np.full((1, 3), NAN))


# --- the wishes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "stretch"), [(9.0, 0), (3.0, 0), (2.999, 1), (2.0, 1), (1.99, 2), (1.5, 2), (1.0, 3)]
)
def test_a_budget_is_kept_by_the_smallest_beta(budget: float, stretch: int) -> None:
    assert preferences.for_budget(HAND, preferences.sweep(HAND), budget) == stretch


def test_a_budget_that_nothing_keeps() -> None:
    with pytest.raises(InputError, match=r"a budget of 0.9 can't be kept: .* from 1 .* to 3 .*, cents a query"):
        preferences.for_budget(HAND, preferences.sweep(HAND), 0.9)
    with pytest.raises(InputError, match="a budget of nan"):
        preferences.for_budget(HAND, preferences.sweep(HAND), NAN)


@pytest.mark.parametrize("seed", range(4))
def test_no_smaller_beta_keeps_the_budget(seed: int) -> None:
    traffic = drawn(seed, queries=200)
    path = preferences.sweep(traffic)
    budget = float(path.mean(traffic.costs)[[0, -1]].mean())
    k = preferences.for_budget(traffic, path, budget)
    assert k > 0
    assert traffic.costs[traffic.choices(path.beta(k))].mean() <= budget
    smaller = np.linspace(0.0, path.low[k] - 1e-6, 300)
    assert all(traffic.costs[traffic.choices(float(beta))].mean() > budget for beta in smaller)


def test_a_share_of_the_dearest_and_the_cheapest() -> None:
    path = preferences.sweep(HAND)
    assert [preferences.for_share(HAND, path, "dear", share) for share in (1.0, 0.5, 0.0)] == [0, 1, 2]
    assert [preferences.for_share(HAND, path, "cheap", share) for share in (0.0, 0.5, 1.0)] == [0, 1, 3]


def test_a_share_that_is_reached_twice_puts_quality_first() -> None:
    traffic = drawn(2, queries=400)
    path = preferences.sweep(traffic)
    share = path.mean(np.array([0.0, 0.0, 1.0, 0.0, 0.0]))
    wanted = float(0.7 * share.max())
    near = np.flatnonzero(np.abs(share - wanted) <= 0.005)
    assert near.max() - near.min() > len(near)  # a rising side and a falling one
    k = preferences.for_share(traffic, path, "c", wanted)
    assert k < int(np.argmax(share))
    assert abs(share[k] - wanted) == np.abs(share - wanted)[: int(np.argmax(share))].min()
    assert np.mean(traffic.choices(path.beta(k)) == 2) == pytest.approx(wanted, abs=0.5 / 400)


def test_a_share_that_cannot_be() -> None:
    path = preferences.sweep(HAND)
    with pytest.raises(InputError, match=r"middle can't get 80% .* it gets 0.0% to 50.0%, .* 50.0% at beta 0.3751"):
        preferences.for_share(HAND, path, "middle", 0.8)
    with pytest.raises(InputError, match="no candidate 'nobody'"):
        preferences.for_share(HAND, path, "nobody", 0.5)
    same = Traffic(HAND.names, np.repeat(QUALITY[:1], 100, axis=0), HAND.costs, HAND.normalized)
    with pytest.raises(InputError, match=r"0.0% to 100.0%, the nearest being 0.0%"):  # all queries move together
        preferences.for_share(same, preferences.sweep(same), "cheap", 0.3)


def test_matching_the_best_single_as_predicted() -> None:
    # dear alone is predicted at 0.85; that is what beta 0 gives, and nothing dearer in beta.
    assert preferences.best_single(HAND) == 2
    assert preferences.for_best(HAND, preferences.sweep(HAND)) == 0
    # A query where cheap is the better one pays for one where dear is dropped at a loss.
    better = replace(HAND, quality=np.array([[0.9, 0.0, 0.5], [0.7, 0.0, 0.9], [0.6, 0.0, 0.9]]))
    path = preferences.sweep(better)
    k = preferences.for_best(better, path)
    assert path.mean(better.quality)[k] >= 2.3 / 3
    assert path.mean(better.quality)[k + 1] < 2.3 / 3
    assert path.mean(better.costs)[k] < 3.0


def test_matching_the_best_single_as_measured() -> None:
    # Measured, middle is best alone (both right). Only the stretch of beta with middle or better on both will do.
    truth = np.array([[0.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    measured = replace(HAND, correct=truth)
    assert preferences.best_single(measured) == 1
    path = preferences.sweep(measured)
    assert path.mean(truth).tolist() == [0.5, 1.0, 1.0, 0.5]
    assert preferences.for_best(measured, path) == 2
    blank = replace(HAND, correct=np.array([[0.0, 1.0, 1.0], [NAN, 1.0, 1.0]]))
    assert preferences.for_best(blank, path) == 2  # the cheap choice of query 1 was not evaluated: it has no say
    worse = replace(HAND, quality=np.tile([0.9, 0.1, 0.1], (2, 1)), correct=np.tile([0.0, 0.0, 1.0], (2, 1)))
    with pytest.raises(InputError, match=r"dear, can't be matched .* stays 100.00 to 100.00 points below it"):
        preferences.for_best(worse, preferences.sweep(worse))


def test_the_largest_saving_is_taken_where_accuracy_comes_back() -> None:
    """Measured accuracy need not fall with beta: the last beta that matches saves the most."""
    truth = np.array([[1.0, 0.0, 1.0], [1.0, 0.0, 1.0]])
    measured = replace(HAND, correct=truth)
    path = preferences.sweep(measured)
    assert path.mean(truth).tolist() == [1.0, 1.0, 0.5, 1.0]
    assert preferences.for_best(measured, path) == 3


# --- what to expect -----------------------------------------------------------------------------------------


def test_the_figures_by_hand() -> None:
    measured = replace(HAND, correct=np.array([[0.0, 1.0, 1.0], [1.0, 1.0, NAN]]))
    first, second = preferences.expect(measured, [0.0, 0.3], resamples=200)
    assert first["beta"] == 0.0
    assert first["accuracy_predicted"]["value"] == pytest.approx(0.85)
    assert first["accuracy_measured"]["value"] == 1.0  # of the one that was evaluated
    assert first["measured_on"] == 0.5
    assert first["cost"]["value"] == 3.0
    assert first["shares"] == {
        "cheap": {"value": 0.0, "interval": [0.0, 0.0]},
        "middle": {"value": 0.0, "interval": [0.0, 0.0]},
        "dear": {"value": 1.0, "interval": [1.0, 1.0]},
    }
    assert second["cost"] == {"value": 2.0, "interval": [1.0, 3.0]}  # dear and cheap
    assert second["saving"]["value"] == pytest.approx(0.0)  # middle, the first of the best, costs as much
    assert second["lead_predicted"]["value"] == pytest.approx(0.7 - 0.55)
    assert second["lead_measured"]["value"] == 0.0
    assert preferences.of_single(measured, 1) == {
        "accuracy_predicted": pytest.approx(0.55), "accuracy_measured": 1.0, "cost": 2.0,
    }  # fmt: skip


def test_without_outcomes_nothing_was_measured() -> None:
    (entry,) = preferences.expect(HAND, [0.3], resamples=20)
    assert entry["accuracy_measured"] is entry["lead_measured"] is entry["measured_on"] is None
    assert preferences.of_single(HAND, 0)["accuracy_measured"] is None
    assert json.loads(json.dumps(entry, allow_nan=False)) == entry


def test_a_free_best_model_leaves_nothing_to_save() -> None:
    free = replace(HAND, costs=np.zeros(3))
    assert preferences.expect(free, [0.5], resamples=20)[0]["saving"] is None


def test_intervals_narrow_with_the_sample_and_hold_the_value() -> None:
    widths = []
    for queries in (50, 5000):
        traffic = drawn(3, queries=queries)
        (entry,) = preferences.expect(traffic, [0.2], resamples=300)
        shares = entry.pop("shares")
        for figure in [*(f for f in entry.values() if isinstance(f, dict)), *shares.values()]:
            low, high = figure["interval"]
            assert low <= figure["value"] <= high
        assert sum(figure["value"] for figure in shares.values()) == pytest.approx(1.0)
        low, high = entry["cost"]["interval"]
        widths.append(high - low)
        chosen = traffic.costs[traffic.choices(0.2)]
        assert high - low == pytest.approx(3.92 * chosen.std() / queries**0.5, rel=0.25)
    assert widths[1] < widths[0] / 5


def test_resampling_in_blocks_covers_every_resample(monkeypatch: pytest.MonkeyPatch) -> None:
    traffic = drawn(4)
    sizes = []
    real = preferences.curves.resamples

    def noted(queries: int, count: int, seed: int) -> Any:
        sizes.append((count, seed))
        return real(queries, count, seed)

    monkeypatch.setattr(preferences.curves, "resamples", noted)
    monkeypatch.setattr(preferences, "BLOCK", 60 * 40)
    preferences.expect(traffic, [0.1], resamples=100)
    assert sizes == [(40, 0), (40, 40), (20, 80)]


def test_neighbours_halve_and_double_the_odds() -> None:
    # odds of 3/7: halved 3/14, to beta 3/17; doubled 6/7, to beta 6/13
    assert preferences.neighbours(0.3) == [0.0, 0.176, 0.231, 0.3, 0.375, 0.462, 1.0]
    assert preferences.neighbours(0.0) == [0.0, 0.01, 0.02, 0.05, 0.1, 1.0]
    assert preferences.neighbours(1.0) == [0.0, 0.9, 0.95, 0.98, 0.99, 1.0]
    assert all(0.0 <= beta <= 1.0 for tiny in (1e-9, 1 - 1e-9) for beta in preferences.neighbours(tiny))
