"""Tests of train/baselines.py: what each may read, what it does with missing outcomes; figures on real outcomes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from arllm.runtime.errors import OutcomesError
from arllm.train import baselines
from arllm.train.baselines import BASELINES, fit_baselines
from arllm.train.metrics import candidate_auc
from arllm.train.outcomes import Outcomes, read_outcomes
from arllm.train.synthetic import generate

NAN = float("nan")


def synthetic(n: int = 400, seed: int = 0) -> Outcomes:
    made = generate(n, seed)
    fields = [tuple(q[key] for q in made.queries) for key in ("query_id", "query", "dataset", "subset", "split")]
    return Outcomes(*fields, candidates=made.candidates, correct=made.correct.astype(np.float32))


def tiny(correct: list[list[float]], queries: list[str], datasets: list[str] | None = None) -> Outcomes:
    n = len(correct)
    names = tuple(datasets or ["d"] * n)
    ids = tuple(map(str, range(n)))
    columns = tuple("abc"[: len(correct[0])])
    return Outcomes(ids, tuple(queries), names, names, ("train",) * n, columns, np.array(correct, dtype=np.float32))


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_gives_a_finite_matrix_and_reads_no_outcome(name: str) -> None:
    outcomes = synthetic()
    train, test = outcomes.split("train"), outcomes.split("test")
    predict = fit_baselines(train, [name])[name]
    quality = predict(test)
    assert quality.shape == test.correct.shape
    assert np.isfinite(quality).all()
    blind = replace(test, correct=np.full_like(test.correct, NAN))
    np.testing.assert_array_equal(predict(blind), quality)
    np.testing.assert_array_equal(fit_baselines(train, [name])[name](test), quality)


def test_the_plain_ones_see_what_synthetic_outcomes_hold() -> None:
    outcomes = synthetic(1200)
    train, test = outcomes.split("train"), outcomes.split("test")
    areas = {name: np.nanmean(candidate_auc(test.correct, f(test))) for name, f in fit_baselines(train).items()}
    assert areas["random"] == pytest.approx(0.5, abs=0.05)
    assert all(area > 0.55 for name, area in areas.items() if name not in ("random", "mean per true dataset"))


@pytest.mark.parametrize("name", BASELINES)
def test_a_candidate_that_training_never_saw_gets_the_mean_of_the_others(name: str) -> None:
    outcomes = synthetic(200)
    train, test = outcomes.split("train"), outcomes.split("test")
    train = replace(train, correct=train.correct.copy())
    train.correct[:, 2] = NAN
    quality = fit_baselines(train, [name])[name](test)
    assert np.isfinite(quality).all()
    if name != "random":
        np.testing.assert_allclose(quality[:, 2], np.delete(quality, 2, axis=1).mean(axis=1), rtol=1e-6)


def test_knn_by_hand() -> None:
    train = tiny(
        [[1.0, 0.0], [1.0, NAN], [0.0, 1.0], [0.0, NAN]],
        ["red red apple", "red apple", "blue blue sky", "blue sky"],
    )
    predict = baselines.fit_knn(train, neighbours=2)
    quality = predict(tiny([[NAN, NAN]] * 2, ["apple red", "sky blue"]))
    np.testing.assert_allclose(quality, [[1.0, 0.0], [0.0, 1.0]])  # of the two neighbours one was evaluated on b


def test_knn_falls_back_to_the_overall_accuracy() -> None:
    train = tiny([[1.0, 1.0], [1.0, NAN]], ["red apple red", "blue sky blue"])
    assert baselines.fit_knn(train, neighbours=1)(tiny([[NAN, NAN]], ["blue sky"])).tolist() == [[1.0, 1.0]]


def test_ridge_fits_each_candidate_on_its_own_queries() -> None:
    outcomes = synthetic(300)
    train, test = outcomes.split("train"), outcomes.split("test")
    text = baselines.TfIdf(train.queries)
    both = baselines.fit_ridge(train, text)(test)
    for m in (0, 5):
        seen = ~np.isnan(train.correct[:, m])
        alone = train.rows(seen).columns([train.candidates[m]])
        np.testing.assert_allclose(baselines.fit_ridge(alone, text)(test)[:, 0], both[:, m], atol=1e-3)


def test_predicted_domains_weigh_the_training_means() -> None:
    train = tiny(
        [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]],
        ["red apple", "red apple tree", "blue sky", "blue sky dome"],
        ["fruit", "fruit", "air", "air"],
    )
    quality = baselines.fit_mean_per_predicted_dataset(train)(tiny([[NAN, NAN]], ["red apple"], ["unknown"]))
    assert quality[0, 0] > 0.7
    np.testing.assert_allclose(quality.sum(axis=1), 1.0)
    alone = train.rows([0, 1])
    assert baselines.fit_mean_per_predicted_dataset(alone)(train).tolist() == [[1.0, 0.0]] * 4


def test_unusable_requests() -> None:
    train = synthetic(50).split("train")
    with pytest.raises(OutcomesError, match="no baseline 'oracle'"):
        fit_baselines(train, ["oracle"])
    with pytest.raises(OutcomesError, match="training outcomes"):
        fit_baselines(train.rows([]))


def test_of_domains_real_text_tells_enough(shared_data: Path) -> None:
    outcomes = read_outcomes(shared_data / "zeroeval")
    outcomes = outcomes.columns(outcomes.candidates[:28])
    train, test = outcomes.split("train"), outcomes.split("test")
    fitted = fit_baselines(train, ["mean per predicted dataset", "tf-idf + kNN"])
    areas = {name: float(candidate_auc(test.correct, f(test)).mean()) for name, f in fitted.items()}
    assert areas["mean per predicted dataset"] == pytest.approx(0.71, abs=0.02)
    assert areas["tf-idf + kNN"] == pytest.approx(0.722, abs=0.02)  # ../shared/data/README.md
