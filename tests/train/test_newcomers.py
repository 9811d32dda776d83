"""Tests of train/newcomers.py: what a few outcomes say of a newcomer, what many say, and which queries to score."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from arllm.runtime.calibration import logit
from arllm.train.newcomers import LEAST, SHRINK, estimate, population, probe

Array = NDArray[np.float64]
D = 6


@pytest.fixture
def pool() -> Array:
    """12 candidates: they differ in level by about 1 logit, in single domains by about half of one."""
    rng = np.random.default_rng(0)
    return sigmoid(rng.normal(size=(12, 1)) + 0.5 * rng.normal(size=(12, D)) + np.linspace(-1, 1, D))


def sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-x))


def queries(n: int, seed: int, sharp: float = 0.3) -> Array:
    """Query vectors: domain probabilities, a difficulty, and an embedding, which must play no part."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.dirichlet(np.full(D, sharp), n), rng.random((n, 1)), rng.normal(size=(n, 3))], axis=1)


def test_with_many_outcomes_the_vector_is_the_measured_accuracy(pool: Array) -> None:
    truth = np.array([0.9, 0.2, 0.6, 0.05, 0.75, 0.4])  # unlike anyone in the pool
    vectors = queries(40000, 1, sharp=0.1)
    correct = np.random.default_rng(2).random(40000) < vectors[:, :D] @ truth
    found = estimate(vectors, correct.astype(float), pool)
    assert np.abs(found.vector - truth).max() < 0.03
    assert found.accuracy == pytest.approx(truth.mean(), abs=0.01)
    assert found.interval[1] - found.interval[0] < 0.02


def test_a_few_outcomes_move_the_level_in_every_domain(pool: Array) -> None:
    one = np.concatenate([np.eye(D)[0], [0.5]])[None].repeat(10, axis=0)  # all of the first domain
    right, wrong = estimate(one, np.ones(10), pool), estimate(one, np.zeros(10), pool)
    expected = sigmoid(population(pool)[0])
    assert np.all(right.vector > expected)
    assert np.all(wrong.vector < expected)
    moved = np.abs(logit(right.vector) - logit(expected))
    assert moved[0] == moved.max()  # the domain that was asked moves most
    assert 0.0 < wrong.interval[0] < wrong.accuracy < wrong.interval[1] < 1.0


def test_the_mode_is_where_the_posterior_is_stationary(pool: Array) -> None:
    vectors = queries(40, 3)
    correct = np.random.default_rng(4).random(40)  # fractions
    found = estimate(vectors, correct, pool)
    mean, covariance = population(pool)

    def posterior(logits: Array) -> float:
        p = vectors[:, :D] @ sigmoid(logits)
        apart = logits - mean
        likelihood = float((correct * np.log(p) + (1 - correct) * np.log(1 - p)).sum())
        return likelihood - 0.5 * float(apart @ np.linalg.solve(covariance, apart))

    mode = np.log(found.vector / (1 - found.vector))
    best = posterior(mode)
    for d in range(D):
        for step in (-0.02, 0.02):
            assert posterior(mode + step * np.eye(D)[d]) < best


def test_the_estimate_beats_the_pools_mean_and_the_raw_share_for_draws_of_the_population(pool: Array) -> None:
    rng = np.random.default_rng(5)
    vectors = queries(30, 6)
    mean, covariance = population(pool)
    ours, prior, raw, covered = [], [], [], []
    for _ in range(60):
        truth = sigmoid(rng.multivariate_normal(mean, covariance))
        correct = (rng.random(30) < vectors[:, :D] @ truth).astype(float)
        found = estimate(vectors, correct, pool)
        ours.append(np.mean((found.vector - truth) ** 2))
        prior.append(np.mean((sigmoid(mean) - truth) ** 2))
        raw.append(np.mean((correct.mean() - truth) ** 2))
        covered.append(found.interval[0] <= truth.mean() <= found.interval[1])
    assert np.mean(ours) < 0.7 * np.mean(prior)
    assert np.mean(ours) < 0.7 * np.mean(raw)
    assert np.mean(covered) > 0.85


def test_accuracy_and_distances_are_weighted_by_the_domain_shares(pool: Array) -> None:
    vectors, correct = queries(50, 7), np.ones(50)
    shares = np.array([1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    found = estimate(vectors, correct, pool, shares)
    assert found.accuracy == pytest.approx(found.vector[0])
    assert found.nearest[0] == int(np.argmin(np.abs(pool[:, 0] - found.vector[0])))
    assert found.differences[0] == pytest.approx(np.abs(pool[:, 0] - found.vector[0]).min())
    assert sorted(found.nearest) == list(range(12))
    assert list(found.differences) == sorted(found.differences)


def test_the_population_is_the_samples_shrunk_toward_a_level_and_equal_rests(pool: Array) -> None:
    mean, covariance = population(pool)
    logits = logit(pool)
    sample = np.cov(logits, rowvar=False)
    assert mean == pytest.approx(logits.mean(axis=0))
    assert np.trace(covariance) == pytest.approx(np.trace(sample))
    assert covariance.sum() == pytest.approx(sample.sum())  # the level keeps its variance
    apart = np.eye(D)[0] - np.eye(D)[1]  # a contrast: within the rests
    rest = (np.trace(sample) - sample.sum() / D) / (D - 1)
    assert apart @ covariance @ apart == pytest.approx((1 - SHRINK) * apart @ sample @ apart + SHRINK * 2 * rest)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_pool_that_shows_no_differences_still_lets_outcomes_speak(rows: int) -> None:
    pool = np.full((rows, D), 0.5)
    covariance = population(pool)[1]
    assert np.linalg.eigvalsh(covariance).min() >= LEAST[1] - 1e-12
    found = estimate(np.concatenate([np.eye(D)] * 500), np.tile([1.0, 1, 1, 0, 0, 0], 500), pool)
    assert np.all(found.vector[:3] > 0.8)
    assert np.all(found.vector[3:] < 0.2)


def test_one_domain_and_answers_that_are_all_alike() -> None:
    found = estimate(np.ones((3, 2)), np.ones(3), np.array([[0.3], [0.6]]))
    assert 0.3 < found.accuracy < 1.0
    assert 0.0 < found.interval[0] < found.interval[1] < 1.0


def test_the_probe_asks_first_where_most_is_unknown_and_then_elsewhere() -> None:
    rng = np.random.default_rng(8)
    spread = np.array([0.1, 0.1, 1.5, 0.1, 0.1, 0.1])
    pool = sigmoid(rng.normal(size=(40, D)) * spread)
    sharp = np.concatenate([np.eye(D)] * 5)
    chosen = probe(sharp, pool, 12)
    assert chosen[0] % D == 2
    assert len(set(chosen.tolist())) == 12
    vague = np.full((1, D), 1 / D)
    assert probe(np.concatenate([vague, sharp]), pool, 1)[0] != 0


def test_the_probe_leaves_a_smaller_posterior_than_chance_and_its_steps_are_greedy(pool: Array) -> None:
    vectors = queries(300, 9)
    mean, covariance = population(pool)
    a = sigmoid(mean)
    p = vectors[:, :D] @ a
    rows = vectors[:, :D] * (a * (1 - a)) / np.sqrt(p * (1 - p))[:, None]

    def log_volume(chosen: list[int]) -> float:
        taken = rows[chosen]
        return float(-np.linalg.slogdet(np.linalg.inv(covariance) + taken.T @ taken)[1])

    chosen = probe(vectors, pool, 20).tolist()
    for k in (0, 1, 7):
        volumes = [log_volume([*chosen[:k], i]) if i not in chosen[:k] else np.inf for i in range(300)]
        assert int(np.argmin(volumes)) == chosen[k]
    rng = np.random.default_rng(10)
    chance = [log_volume(rng.permutation(300)[:20].tolist()) for _ in range(30)]
    assert log_volume(chosen) < min(chance)


def test_the_probe_takes_one_of_equal_texts_and_stops_when_none_is_left(pool: Array) -> None:
    vectors = np.concatenate([queries(5, 11)] * 3)
    texts = [f"query {i}" for i in range(5)] * 3
    chosen = probe(vectors, pool, 30, texts)
    assert sorted(texts[i] for i in chosen.tolist()) == sorted(set(texts))
    assert len(probe(vectors, pool, 30)) == 15
