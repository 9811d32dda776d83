"""Tests of train/published_recipe.py: what is fitted on what, and that nothing leaks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from arllm.runtime.errors import OutcomesError
from arllm.train.metrics import candidate_auc
from arllm.train.outcomes import Outcomes

torch = pytest.importorskip("torch", reason="the published recipe needs the extra train")

from arllm.train import published_recipe  # noqa: E402
from arllm.train.published_recipe import fit_published_recipe  # noqa: E402

NAN = float("nan")
WORDS = {"sums": "add the numbers plus minus equals", "law": "court judge statute appeal claim"}


def outcomes_of(queries: list[str], datasets: list[str], correct: np.ndarray) -> Outcomes:
    n = len(queries)
    names = tuple(f"m{i}" for i in range(correct.shape[1]))
    ids = tuple(map(str, range(n)))
    return Outcomes(ids, tuple(queries), tuple(datasets), tuple(datasets), ("train",) * n, names,
                    correct.astype(np.float32))  # fmt: skip


def specialists(n: int = 240, seed: int = 0) -> Outcomes:
    """m0 knows sums, m1 knows law, m2 a bit of both; texts tell the datasets apart."""
    rng = np.random.default_rng(seed)
    datasets = [("sums", "law")[i % 2] for i in range(n)]
    queries = [" ".join(rng.choice(WORDS[d].split(), 6)) + f" {i}" for i, d in enumerate(datasets)]
    chance = np.where(np.array(datasets)[:, None] == "sums", [0.95, 0.1, 0.5], [0.1, 0.95, 0.5])
    return outcomes_of(queries, datasets, rng.random((n, 3)) < chance)


def test_it_learns_who_knows_what_from_texts_alone() -> None:
    predict = fit_published_recipe(specialists())
    other = specialists(100, seed=1)
    quality = predict(other)
    assert quality.shape == (100, 3)
    assert quality.dtype == np.float64
    assert ((quality > 0) & (quality < 1)).all()
    assert (candidate_auc(other.correct, quality)[:2] > 0.85).all()
    disguised = replace(other, datasets=("x",) * 100, subsets=("x",) * 100, correct=1 - other.correct)
    np.testing.assert_array_equal(predict(disguised), quality)


def caught(monkeypatch: pytest.MonkeyPatch, train: Outcomes) -> tuple[np.ndarray, np.ndarray, int]:
    """The query vectors, model vectors and epochs that NIR is given."""
    seen: list[Any] = []

    def instead(queries: Any, models: Any, correct: Any, epochs: int, progress: Any) -> Any:
        seen.extend((queries, models, epochs))
        return published_recipe.InteractionNir(queries.shape[1], models.shape[1]).eval()

    with monkeypatch.context() as patch:
        patch.setattr(published_recipe, "_fit_nir", instead)
        fit_published_recipe(train)
    return seen[0], seen[1], seen[2]


def test_nir_gets_the_published_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    train = specialists()
    queries, models, epochs = caught(monkeypatch, train)
    assert queries.shape == (240, 2 + 1)  # two datasets and the difficulty
    assert epochs == 10
    np.testing.assert_allclose(queries[:, :2].sum(axis=1), 1.0)
    law = np.array(train.datasets) == "law"
    assert (queries[:, :2].argmax(axis=1) == np.where(law, 0, 1)).mean() > 0.95  # domains sorted: law, sums
    expected = np.stack([train.correct[law].mean(axis=0), train.correct[~law].mean(axis=0)], axis=1)
    np.testing.assert_allclose(models, expected, rtol=1e-5)


def test_the_vectors_that_nir_learns_from_are_out_of_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each question, asked twice, has words of its own and a difficulty by lot: only a leak could know it."""
    rng = np.random.default_rng(0)
    one = [f"w{i}a w{i}b w{i}c" for i in range(150)]
    twice = [*one, *(text.upper() for text in one)]
    hard = rng.integers(0, 2, 150)
    correct = np.repeat(1 - np.tile(hard, 2)[:, None], 2, axis=1)
    train = outcomes_of(twice, ["d"] * 300, correct)
    queries, _, _ = caught(monkeypatch, train)
    told = queries[:, -1]
    assert ((told >= 0) & (told <= 1)).all()
    hardness = np.tile(hard, 2)
    assert abs(np.corrcoef(told, hardness)[0, 1]) < 0.3
    text = published_recipe.TfIdf(train.queries)
    leaky = published_recipe._Encoder(text, train, np.zeros(300, dtype=np.int64), hardness.astype(np.float64), 1)
    assert np.corrcoef(leaky.vectors(train.queries)[:, -1], hardness)[0, 1] > 0.95  # what a leak would look like


def test_missing_outcomes_are_left_out_and_an_unknown_candidate_is_average() -> None:
    full = specialists()
    correct = full.correct.copy()
    correct[::3, 0] = NAN
    correct[5] = NAN
    blank = np.full((len(full), 1), NAN, dtype=np.float32)
    train = replace(full, candidates=(*full.candidates, "new"), correct=np.hstack([correct, blank]))
    other = specialists(60, seed=2)
    quality = fit_published_recipe(train, epochs=2)(other)
    assert np.isfinite(quality).all()
    np.testing.assert_allclose(quality[:, 3], quality[:, :3].mean(axis=1))


def test_a_single_dataset_has_probability_1(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = replace(specialists(60), datasets=("d",) * 60)
    assert (caught(monkeypatch, alone)[0][:, 0] == 1.0).all()
    assert fit_published_recipe(alone, epochs=1)(alone).shape == (60, 3)


def test_the_same_seed_gives_the_same_bits_and_torch_keeps_its_own() -> None:
    train, other = specialists(80), specialists(20, seed=3)
    torch.manual_seed(5)
    expected = torch.rand(1).item()
    torch.manual_seed(5)
    first = fit_published_recipe(train, epochs=2, seed=1)(other)
    assert torch.rand(1).item() == expected
    np.testing.assert_array_equal(fit_published_recipe(train, epochs=2, seed=1)(other), first)
    assert (fit_published_recipe(train, epochs=2, seed=2)(other) != first).any()


def test_nothing_to_learn_from() -> None:
    train = specialists(20)
    with pytest.raises(OutcomesError, match="no query of the train split has one"):
        fit_published_recipe(replace(train, correct=np.full_like(train.correct, NAN)))
    with pytest.raises(OutcomesError, match="two different training queries"):
        fit_published_recipe(replace(train, queries=("the same",) * 20))
