"""Tests of how a load run compares its arms (load.py): every arm in every round, and the figure that is judged."""

from __future__ import annotations

import asyncio
import math

import load


def test_every_arm_answers_in_every_round() -> None:
    async def run() -> tuple[list[load.Level], list[load.Level]]:
        async with load.Upstream("one", keep=False) as upstream:
            arm = load.Target(upstream.port, "/v1/chat/completions", [b'{"model": "x"}'])
            three = await load.compare(arm, arm, [1, 2], 0.7, slice_seconds=0.05, beside=arm)
            upstream.status = 500
            return three, await load.compare(arm, arm, [1], 0.2, slice_seconds=0.05, beside=arm)

    three, broken = asyncio.run(run())
    assert [level.concurrency for level in three] == [1, 2]
    for level, row in zip(three, load.as_json(three), strict=True):
        assert row["rounds"] == len(level.pairs) == len(level.beside_pairs) == 2
        assert len(row["requests"]) == 3
        assert all(row["requests"])
    assert load.failed(three) == 0
    assert load.failed(broken) == sum(arm.failed for arm in broken[0].samples()) > 0
    assert all(arm.failed for arm in broken[0].samples())


def test_the_judged_figure_is_a_median_over_rounds() -> None:
    drifting = [(10.0, 11.0), (20.0, 21.0), (10.0, 10.5), (20.0, 90.0), (math.nan, 3.0)]
    assert load.quartiles(drifting) == [0.875, 1.0, 18.25]  # a round that something hit moves the median by a place
    assert all(map(math.isnan, load.quartiles([(math.nan, 1.0)])))
