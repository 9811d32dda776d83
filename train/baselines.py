"""Plain routers to compare with, by scikit-learn: ``fit(train) → predict(outcomes) → (N, M)`` quality. No torch.

Every fit sees the training outcomes alone; every prediction sees texts, or for the means per *true* domain the
domain's name, and never an outcome. Outcomes that are missing are left out of every mean and every fit. A candidate
that training never saw gets the mean of what is predicted for the others.

What needs no fit is elsewhere: single models, the zero router and the oracle are in :mod:`arllm.train.curves`. The
published NIR recipe needs torch: whoever has it gives its qualities to :func:`arllm.train.evaluate.evaluate`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import NearestNeighbors

from arllm.runtime.errors import OutcomesError
from arllm.train.metrics import brier, mean_per_subset
from arllm.train.outcomes import Outcomes, carve_validation

Array = NDArray[np.float64]
Predictor = Callable[[Outcomes], Array]

NEIGHBOURS = 60
RIDGE_ALPHA = 2.0
TUNED_ALPHAS = (1.0, 3.0, 10.0, 30.0)


class TfIdf:
    """Term weights fitted on training texts; the rows of a text list are computed once and kept."""

    def __init__(self, queries: Sequence[str]) -> None:
        # Words and pairs of words that occur twice; log counts, since a long prompt repeats its template.
        self._vectorizer = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=2)
        try:
            self._vectorizer.fit(queries)
        except ValueError:  # nothing occurs twice: a handful of queries
            self._vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=r"\S+").fit(queries)
        self._rows: dict[tuple[str, ...], Any] = {}

    def rows(self, queries: tuple[str, ...]) -> Any:
        """(N, V) scipy CSR matrix, rows of length 1."""
        if queries not in self._rows:
            self._rows[queries] = self._vectorizer.transform(queries)
        return self._rows[queries]


def fit_random(train: Outcomes, seed: int = 0) -> Predictor:
    """Uniform noise."""
    return lambda other: np.random.default_rng(seed).random((len(other), len(train.candidates)))


def fit_mean_per_true_dataset(train: Outcomes) -> Predictor:
    """Training accuracy on the query's dataset; of an unknown one, the overall accuracy."""
    return lambda other: _filled(mean_per_subset(_datasets_alone(train), _columns(_datasets_alone(other), train)))


def fit_mean_per_true_subset(train: Outcomes) -> Predictor:
    """Training accuracy on the query's subset, else on its dataset, else overall."""
    return lambda other: _filled(mean_per_subset(train, _columns(other, train)))


def fit_mean_per_predicted_dataset(train: Outcomes, text: TfIdf | None = None) -> Predictor:
    """Training accuracy per dataset, weighted by a logistic regression's probabilities of the datasets."""
    return _fit_predicted_domain(_datasets_alone(train), text)


def fit_mean_per_predicted_subset(train: Outcomes, text: TfIdf | None = None) -> Predictor:
    """Training accuracy per subset, weighted by a logistic regression's probabilities of the subsets."""
    return _fit_predicted_domain(train, text)


def fit_knn(train: Outcomes, text: TfIdf | None = None, neighbours: int = NEIGHBOURS) -> Predictor:
    """Mean outcome of the nearest training queries by cosine of tf-idf; the overall accuracy where none has one."""
    text = text or TfIdf(train.queries)
    search = NearestNeighbors(n_neighbors=min(neighbours, len(train)), metric="cosine", algorithm="brute")
    search.fit(text.rows(train.queries))
    overall = _means(train.correct)

    def predict(other: Outcomes) -> Array:
        near = train.correct[search.kneighbors(text.rows(other.queries), return_distance=False)]  # (N, k, M)
        seen = ~np.isnan(near)
        total, count = np.where(seen, near, 0.0).sum(axis=1, dtype=np.float64), seen.sum(axis=1)
        return _filled(np.where(count > 0, total / np.maximum(count, 1), overall))

    return predict


def fit_ridge(train: Outcomes, text: TfIdf | None = None, alpha: float = RIDGE_ALPHA) -> Predictor:
    """Ridge regression of every candidate's outcome on tf-idf. Not clipped: below 0 and above 1 still rank."""
    text = text or TfIdf(train.queries)
    features = text.rows(train.queries)
    seen = ~np.isnan(train.correct)
    # Candidates evaluated on the same queries share a fit: where every cell is filled, there is one.
    groups: dict[bytes, list[int]] = {}
    for column in range(len(train.candidates)):
        if seen[:, column].any():
            groups.setdefault(seen[:, column].tobytes(), []).append(column)
    fits = []
    for columns in groups.values():
        rows = seen[:, columns[0]]
        fits.append(
            (columns, Ridge(alpha=alpha, solver="sparse_cg").fit(features[rows], train.correct[rows][:, columns]))
        )

    def predict(other: Outcomes) -> Array:
        out = np.full((len(other), len(train.candidates)), np.nan)
        rows = text.rows(other.queries)
        for columns, model in fits:
            out[:, columns] = model.predict(rows).reshape(len(other), len(columns))
        return _filled(out)

    return predict


def fit_tuned_ridge(train: Outcomes, text: TfIdf | None = None, alphas: Sequence[float] = TUNED_ALPHAS) -> Predictor:
    """:func:`fit_ridge` with the alpha of the least Brier on a tenth of the training queries, fitted again on all."""
    text = text or TfIdf(train.queries)
    carved = carve_validation(replace(train, splits=("train",) * len(train)))
    inner, held_out = carved.split("train"), carved.split("val")
    errors = [brier(held_out.correct, fit_ridge(inner, text, alpha)(held_out)) for alpha in alphas]
    return fit_ridge(train, text, alphas[int(np.argmin(errors))])


_PLAIN: dict[str, Callable[[Outcomes], Predictor]] = {
    "random": fit_random,
    "mean per true dataset": fit_mean_per_true_dataset,
    "mean per true subset": fit_mean_per_true_subset,
}
_FROM_TEXT: dict[str, Callable[[Outcomes, TfIdf], Predictor]] = {
    "mean per predicted dataset": fit_mean_per_predicted_dataset,
    "mean per predicted subset": fit_mean_per_predicted_subset,
    "tf-idf + kNN": fit_knn,
    "tf-idf + ridge": fit_ridge,
    "tf-idf + ridge, tuned": fit_tuned_ridge,
}
BASELINES = (*_PLAIN, *_FROM_TEXT)


def fit_baselines(train: Outcomes, names: Collection[str] = BASELINES) -> dict[str, Predictor]:
    """The named baselines, fitted with one tf-idf in common.

    Args:
        train: the training queries alone, columns in the order in which qualities are wanted.

    Raises:
        OutcomesError: no training query, no outcome, or an unknown name.
    """
    unknown = [name for name in names if name not in BASELINES]
    if unknown:
        raise OutcomesError(f"no baseline {unknown[0]!r}; there are: {', '.join(BASELINES)}")
    if not len(train) or np.isnan(train.correct).all():
        raise OutcomesError("the baselines need training outcomes: no query of the train split has one")
    fitted = {name: fit(train) for name, fit in _PLAIN.items() if name in names}
    wanted = {name: fit for name, fit in _FROM_TEXT.items() if name in names}
    if wanted:
        text = TfIdf(train.queries)
        fitted |= {name: fit(train, text) for name, fit in wanted.items()}
    return fitted


def _fit_predicted_domain(train: Outcomes, text: TfIdf | None) -> Predictor:
    text = text or TfIdf(train.queries)
    labels = [f"{dataset}\n{subset}" for dataset, subset in zip(train.datasets, train.subsets, strict=True)]
    names = sorted(set(labels))
    first = [labels.index(name) for name in names]
    table = mean_per_subset(train, train.rows(np.array(first)))  # (D, M)
    if len(names) == 1:
        return lambda other: _filled(np.repeat(table, len(other), axis=0))
    model = domain_model().fit(text.rows(train.queries), labels)
    order = [names.index(name) for name in model.classes_]
    return lambda other: _filled(model.predict_proba(text.rows(other.queries)) @ _filled(table)[order])


def domain_model() -> LogisticRegression:
    """Domains from tf-idf: C = 10, since the rows have length 1 and at 1 probabilities stay near the frequencies."""
    return LogisticRegression(C=10.0, max_iter=60, tol=1e-3)


def _datasets_alone(outcomes: Outcomes) -> Outcomes:
    return replace(outcomes, subsets=outcomes.datasets)


def _columns(outcomes: Outcomes, like: Outcomes) -> Outcomes:
    """Blank outcomes in the columns of ``like``: only the queries of ``outcomes`` are used."""
    blank = np.full((len(outcomes), len(like.candidates)), np.nan, dtype=np.float32)
    return replace(outcomes, candidates=like.candidates, correct=blank)


def _means(correct: NDArray[np.float32]) -> Array:
    """(M,) mean of each column over what was evaluated; NaN where nothing was."""
    seen = ~np.isnan(correct)
    total, count = np.where(seen, correct, 0.0).sum(axis=0, dtype=np.float64), seen.sum(axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _filled(quality: Array) -> Array:
    """NaN replaced by the mean of the row's others."""
    missing = np.isnan(quality)
    if not missing.any():
        return quality
    count = np.maximum((~missing).sum(axis=1, keepdims=True), 1)
    return np.where(missing, np.where(missing, 0.0, quality).sum(axis=1, keepdims=True) / count, quality)
