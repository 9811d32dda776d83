"""Tests of what teachers say in train/fit.py: distillation by hand, masks, and its weight beside the outcomes."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from arllm.train.fit import DIFFERENCES, Examples, distillation, total_loss
from arllm.train.options import TrainOptions

NAN = float("nan")
PARTS = ("correct", "contrast", "taught", "domain", "difficulty")


def test_distillation_by_hand() -> None:
    logits = torch.logit(torch.tensor([[0.7, 0.4, 0.9]]))
    taught = torch.tensor([[0.5, 0.6, NAN]])
    entropy = -(0.5 * math.log(0.7) + 0.5 * math.log(0.3) + 0.6 * math.log(0.4) + 0.4 * math.log(0.6)) / 2
    # the gaps are .2 and -.2, their mean 0: nothing of them is the query's own level
    assert distillation(logits, taught).item() == pytest.approx(entropy + DIFFERENCES * 0.04, rel=1e-5)
    level = distillation(torch.logit(torch.tensor([[0.7, 0.8, 0.1]])), taught)  # both .2 too high: of no weight
    entropy = -(0.5 * math.log(0.7) + 0.5 * math.log(0.3) + 0.6 * math.log(0.8) + 0.4 * math.log(0.2)) / 2
    assert level.item() == pytest.approx(entropy, rel=1e-5)


def test_what_was_not_taught_has_no_gradient_in_distillation() -> None:
    taught = torch.tensor([[0.5, 0.6, NAN], [NAN, NAN, NAN]])
    gradients = []
    for hidden in (0.5, -40.0):  # whatever the logit of a masked entry is
        logits = torch.tensor([[0.8, -0.4, hidden], [hidden] * 3], requires_grad=True)
        distillation(logits, taught).backward()
        assert logits.grad is not None
        gradients.append(logits.grad)
    assert not gradients[0][taught.isnan()].any()
    assert bool((gradients[0][~taught.isnan()].abs() > 0.01).all())
    assert torch.equal(gradients[0], gradients[1])


def test_distillation_from_nobody_is_zero_and_has_a_gradient() -> None:
    logits = torch.ones((2, 2), requires_grad=True)
    loss = distillation(logits, torch.full((2, 2), NAN))
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_the_outcomes_step_back_beside_teachers() -> None:
    parts = {name: torch.tensor(value) for name, value in zip(PARTS, (1.0, 10.0, 100.0, 1e3, 1e4), strict=True)}
    weights = {"contrast_weight": 2.0, "outcome_weight": 0.5, "domain_weight": 0.25, "difficulty_weight": 0.125}
    options = dataclasses.replace(TrainOptions(teacher_folds=0), **weights)
    assert total_loss(parts, options).item() == 21 + 100 + 250 + 1250
    taught = dataclasses.replace(options, teacher_folds=4)
    assert total_loss(parts, taught).item() == 0.5 * 21 + 100 + 250 + 1250


def test_examples_without_teachers_are_taught_nothing() -> None:
    rng = np.random.default_rng(0)
    ids = [rng.integers(3, 60, 5) for _ in range(6)]
    figures = rng.random((6, 4), dtype=np.float32)
    rows = Examples(ids, figures[:, :3], rng.integers(-1, 2, 6), figures[:, 3])
    correct, domain, difficulty, taught = rows.targets(np.array([4, 1]))
    np.testing.assert_array_equal(correct.numpy(), rows.correct[[4, 1]])
    np.testing.assert_array_equal(domain.numpy(), rows.domain[[4, 1]])
    np.testing.assert_array_equal(difficulty.numpy(), rows.difficulty[[4, 1]])
    assert taught.shape == (2, 3)
    assert bool(taught.isnan().all())
    told = dataclasses.replace(rows, taught=np.arange(18, dtype=np.float32).reshape(6, 3))
    assert told.targets(np.array([4, 1]))[3].tolist() == [[12.0, 13.0, 14.0], [3.0, 4.0, 5.0]]
