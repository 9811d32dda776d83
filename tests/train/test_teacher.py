"""Tests of train/teacher.py: no query teaches itself, blanks are filled, teachers know more than one throw does."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from arllm.runtime.errors import RunError
from arllm.runtime.tokens import TokenSpec
from arllm.train import teacher
from arllm.train.backbones import nano_spec
from arllm.train.encoder import EncoderSpec, QueryEncoder
from arllm.train.fit import Examples
from arllm.train.options import TrainOptions
from arllm.train.teacher import kernel_regression, teach

Floats = NDArray[np.float32]
NAN = float("nan")
WIDTH = 64
SPEC = EncoderSpec(
    dataclasses.replace(nano_spec(60, layers=1, width=WIDTH), intermediate_size=64),
    TokenSpec(16, (1,), (2,), 0),
    ("a", "b"),
    2,
)
OPTIONS = TrainOptions(teacher_folds=3, head_lr=3e-3, dropout=0.1, seed=1)
ABILITY = np.array([[0.9, 0.2], [0.3, 0.8], [0.6, 0.6]])  # of 3 candidates in 2 domains


pytestmark = pytest.mark.usefixtures("one_thread")


def encoder_of(views: Floats) -> QueryEncoder:
    torch.manual_seed(0)
    encoder = QueryEncoder(SPEC)
    encoder.center.copy_(torch.from_numpy(views.mean(axis=0)))
    encoder.scale.copy_(torch.from_numpy(views.std(axis=0)))
    return encoder.eval()


def classroom(count: int = 500, seed: int = 0) -> tuple[Floats, Examples, NDArray[np.float64]]:
    """(views, examples, true P(correct)): both views tell the domain, and the domain is all there is to know."""
    rng = np.random.default_rng(seed)
    domain = rng.integers(0, 2, count)
    views = rng.normal(0, 1.0, (count, 2 * WIDTH)).astype(np.float32)
    views[:, [0, 1, 2, WIDTH, WIDTH + 1, WIDTH + 2]] += np.where(domain == 1, 3.0, -3.0)[:, None].astype(np.float32)
    truth = ABILITY.T[domain]
    correct = (rng.random(truth.shape) < truth).astype(np.float32)
    ids = [np.array([1, 2]) for _ in domain]
    difficulty = (1 - correct.mean(axis=1)).astype(np.float32)
    return views, Examples(ids, correct, domain.astype(np.int64), difficulty), truth


def taught_by(views: Floats, examples: Examples, options: TrainOptions = OPTIONS) -> Floats:
    return teach(encoder_of(views), views, examples, options, lambda message: None)


@pytest.fixture(scope="module")
def lesson() -> tuple[Floats, Examples, NDArray[np.float64], Floats]:
    views, examples, truth = classroom()
    return views, examples, truth, taught_by(views, examples)


def test_a_querys_own_outcomes_do_not_move_what_it_is_taught(
    lesson: tuple[Floats, Examples, NDArray[np.float64], Floats],
) -> None:
    views, examples, _, before = lesson
    for query in (0, 444):
        correct, difficulty = examples.correct.copy(), examples.difficulty.copy()
        correct[query], difficulty[query] = 1 - correct[query], 1 - difficulty[query]
        after = taught_by(views, dataclasses.replace(examples, correct=correct, difficulty=difficulty))
        moved = (after != before).any(axis=1)
        assert not moved[query]
        same_fold = ~moved
        assert 0.2 < same_fold.mean() < 0.5  # a third: who shares its fold is taught without it too
        assert np.abs(after - before)[moved].mean() > 1e-4


def test_a_query_without_outcomes_is_taught_by_the_others(
    lesson: tuple[Floats, Examples, NDArray[np.float64], Floats],
) -> None:
    views, examples, truth, before = lesson
    rng = np.random.default_rng(3)
    correct = np.where(rng.random(examples.correct.shape) < 0.3, np.float32(NAN), examples.correct)
    correct[5] = NAN
    found = taught_by(views, dataclasses.replace(examples, correct=correct))
    assert found.dtype == np.float32
    assert found.shape == correct.shape
    assert np.isfinite(found).all()
    assert ((found > 0) & (found < 1)).all()
    assert np.abs(found - before).max() > 1e-3
    blank = np.isnan(correct)
    level = truth.mean(axis=0)
    assert np.mean((found - truth)[blank] ** 2) < 0.5 * np.mean((level - truth)[blank] ** 2)


def test_teachers_know_more_than_the_outcomes_and_than_constants(
    lesson: tuple[Floats, Examples, NDArray[np.float64], Floats],
) -> None:
    _, examples, truth, found = lesson
    error = np.mean((found - truth) ** 2)
    assert error < 0.5 * np.mean((examples.correct.mean(axis=0) - truth) ** 2)
    assert error < 0.2 * np.mean((examples.correct - truth) ** 2)


def test_the_student_stays_as_it_is(lesson: tuple[Floats, Examples, NDArray[np.float64], Floats]) -> None:
    views, examples, _, before = lesson
    encoder, fresh = encoder_of(views), encoder_of(views)
    said: list[str] = []
    again = teach(encoder, views, examples, OPTIONS, said.append)
    np.testing.assert_array_equal(again, before)  # seeded
    state = fresh.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert said == [f"teachers: fold {k}/3" for k in (1, 2, 3)]
    other = taught_by(views, examples, dataclasses.replace(OPTIONS, seed=2))
    assert np.abs(other - before).max() > 1e-3


def test_each_of_the_three_has_a_third_of_the_say(
    lesson: tuple[Floats, Examples, NDArray[np.float64], Floats], monkeypatch: pytest.MonkeyPatch
) -> None:
    views, examples, truth, before = lesson
    with monkeypatch.context() as patch:
        patch.setattr(
            teacher, "kernel_regression", lambda inside, correct, outside, seed: np.zeros((len(outside), 3))
        )
        two = taught_by(views, examples)
    kernel = 3 * (before - two)
    assert kernel.min() > 0.0
    assert kernel.max() < 1.0
    level = np.abs(examples.correct.mean(axis=0) - truth).mean()
    assert np.abs(kernel - truth).mean() < 0.6 * level
    assert np.abs(1.5 * two - truth).mean() < 0.8 * level  # the mean of the other two


# --- the kernel regression ----------------------------------------------------------------------------------


def curve(count: int, seed: int) -> tuple[Floats, Floats, NDArray[np.float64]]:
    """(features, correct, true P(correct)) of 3 candidates: a query's ease, and who is good where, bend with them."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(count, 4)).astype(np.float32)
    x, y = features[:, 0], features[:, 1]
    ease = np.tanh(x * y)
    scores = np.stack([ease + np.sin(2 * y), ease - np.sin(2 * y), ease + np.cos(2 * x)], axis=1)
    truth = 1 / (1 + np.exp(-1.5 * scores))
    return features, (rng.random(truth.shape) < truth).astype(np.float32), truth


def test_the_kernel_regression_beats_constants() -> None:
    features, correct, _ = curve(1200, 0)
    others, _, truth = curve(400, 1)
    found = kernel_regression(features, correct, others, 0)
    assert found.shape == (400, 3)
    assert found.min() >= 0.02
    assert found.max() <= 0.98
    constant = np.mean((correct.mean(axis=0) - truth) ** 2)
    assert np.mean((found - truth) ** 2) < 0.5 * constant
    gaps, true_gaps = found - found.mean(axis=1, keepdims=True), truth - truth.mean(axis=1, keepdims=True)
    level = correct.mean(axis=0) - correct.mean()
    assert np.mean((gaps - true_gaps) ** 2) < 0.6 * np.mean((level - true_gaps) ** 2)  # candidates told apart


def test_the_kernel_regression_fills_blanks() -> None:
    features, correct, _ = curve(1200, 0)
    others, _, truth = curve(400, 1)
    hidden = np.random.default_rng(2).random(correct.shape) < 0.4
    hidden[0] = True  # of one query nothing is known
    found = kernel_regression(features, np.where(hidden, np.float32(NAN), correct), others, 0)
    assert np.isfinite(found).all()
    assert np.mean((found - truth) ** 2) < 0.7 * np.mean((correct.mean(axis=0) - truth) ** 2)
    assert np.abs(found - kernel_regression(features, correct, others, 0)).max() > 1e-3


def test_blanks_of_hard_queries_do_not_make_a_candidate_look_good() -> None:
    """Candidate 0 was spared the hard queries: what its mean over the others gains by that must not be believed."""
    features, correct, truth = curve(3000, 0)
    kept = correct.copy()
    kept[features[:, 0] * features[:, 1] < 0, 0] = NAN
    others, _, fresh = curve(500, 1)
    found = kernel_regression(features, kept, others, 0)
    naive = np.nanmean(kept[:, 0]) - truth[:, 0].mean()
    bias = (found[:, 0] - fresh[:, 0]).mean()
    assert naive > 0.1
    assert abs(bias) < 0.5 * naive


def test_more_rows_than_landmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    features, correct, _ = curve(600, 0)
    others, _, _ = curve(200, 1)
    full = kernel_regression(features, correct, others, 0)
    monkeypatch.setattr(teacher, "LANDMARKS", 100)
    fewer = kernel_regression(features, correct, others, 0)
    assert 0.0 < np.abs(fewer - full).mean() < 0.1
    np.testing.assert_array_equal(kernel_regression(features, correct, others, 0), fewer)
    assert np.abs(kernel_regression(features, correct, others, 1) - fewer).max() > 1e-4  # other landmarks


def test_scale_and_place_of_the_features_do_not_matter() -> None:
    features, correct, _ = curve(300, 0)
    others, _, _ = curve(50, 1)
    found = kernel_regression(features, correct, others, 0)
    moved = kernel_regression(features * 40 + 7, correct, others * 40 + 7, 0)
    np.testing.assert_allclose(moved, found, atol=2e-3)
    assert found.std() > 0.05


def test_features_that_are_all_alike_predict_the_mean() -> None:
    correct = np.array([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.0, 1.0]], dtype=np.float32)
    same = np.ones((4, 3), dtype=np.float32)
    np.testing.assert_allclose(kernel_regression(same, correct, same[:2], 0), 0.5, atol=1e-6)


def test_fewer_queries_than_folds_are_refused() -> None:
    views, examples, _ = classroom(3)
    with pytest.raises(RunError, match="3 training queries are too few for 4 folds"):
        taught_by(views, examples, dataclasses.replace(OPTIONS, teacher_folds=4))
