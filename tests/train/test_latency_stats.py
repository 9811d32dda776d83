"""Tests of train/latency/stats.py: percentiles, ratios and slopes, worked out by hand."""

from __future__ import annotations

import pytest

from arllm.train.latency.stats import Growth, exponent, growth, in_words, nearest_rank, ratio, spread


def test_percentiles_are_nearest_rank() -> None:
    found = spread([i * 1_000_000 for i in range(200, 0, -1)])  # 1 to 200 ms, in any order
    assert (found.n, found.p50, found.p95, found.p99, found.max) == (200, 100.0, 190.0, 198.0, 200.0)


@pytest.mark.parametrize(("percent", "value"), [(0, 10), (1, 10), (25, 10), (26, 20), (50, 20), (51, 30), (100, 40)])
def test_a_rank_is_reached_by_that_share_of_the_values(percent: int, value: float) -> None:
    assert nearest_rank([10, 20, 30, 40], percent) == value


def test_few_durations_have_their_maximum_as_p99() -> None:
    found = spread([5_000_000, 1_000_000, 3_000_000])
    assert (found.p50, found.p95, found.p99, found.max) == (3.0, 5.0, 5.0, 5.0)


def test_one_duration_is_every_percentile() -> None:
    found = spread([2_500_000])
    assert {found.p50, found.p95, found.p99, found.max} == {2.5}


def test_no_duration_is_an_error() -> None:
    with pytest.raises(ValueError, match="no durations"):
        spread([])
    with pytest.raises(ValueError, match="no rounds"):
        ratio([])


def test_a_ratio_has_the_median_and_quartiles_of_its_rounds() -> None:
    found = ratio([4.0, 1.0, 3.0, 2.0])
    assert (found.median, found.low, found.high) == (2.5, 1.0, 3.0)


def test_the_slope_of_a_power_is_its_exponent() -> None:
    assert exponent([1, 2, 4, 8], [3 * x**1.5 for x in (1, 2, 4, 8)]) == pytest.approx(1.5)


def test_the_slope_is_the_least_squares_line() -> None:
    # In powers of two the points are (0, 0), (1, 1), (2, 0): a line through their mean, flat by symmetry.
    assert exponent([1, 2, 4], [1, 2, 1]) == pytest.approx(0.0)
    # (0, 0), (1, 0), (2, 3): slope = sum((x - 1) * y) / sum((x - 1) ** 2) = 3 / 2.
    assert exponent([1, 2, 4], [1, 1, 8]) == pytest.approx(1.5)


def test_five_sizes_give_a_slope_for_each_half() -> None:
    sizes = [8.0, 16.0, 32.0, 64.0, 128.0]
    first, second = growth(sizes, [1.0, 1.0, 1.0, 2.0, 4.0])
    assert (first.start, first.end, second.start, second.end) == (8.0, 32.0, 32.0, 128.0)
    assert first.exponent == pytest.approx(0.0)
    assert second.exponent == pytest.approx(1.0)


def test_fewer_sizes_give_one_slope_or_none() -> None:
    (only,) = growth([1.0, 8.0, 32.0, 128.0], [1.0, 8.0, 32.0, 128.0])
    assert only == Growth(1.0, 128.0, pytest.approx(1.0))
    assert growth([16.0], [1.0]) == []
    assert growth([], []) == []


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.5, "from 64 to 1,024 tokens, route() grows as tokens^0.50 (twice the tokens, 1.41 times as long)"),
        (-1.0, "from 64 to 1,024 tokens, route() falls as tokens^-1.00 (twice the tokens, 0.50 times as long)"),
        (0.04, "from 64 to 1,024 tokens, route() hardly changes (tokens^0.04)"),
    ],
)
def test_a_slope_in_words(value: float, words: str) -> None:
    assert in_words(Growth(64, 1024, value), "route()", "tokens") == words
