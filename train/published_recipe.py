"""The published NIR recipe as a baseline: probabilities of the datasets and a difficulty into NIR. Needs torch.

What is published: the ``interaction`` shape, model vectors of accuracy per domain, Adam at 5e-4, batches of 32 pairs,
10 epochs of BCE; the domains are the datasets. What is not: the published code trains on its encoder's own training
queries, splits by pair and takes difficulty from every outcome. Here the query vectors that NIR learns from are
out-of-fold, and everything is fitted on training queries alone.

A stand-in takes the place of the two published encoders: logistic regression (dataset) and ridge regression
(difficulty) on tf-idf, so that the baseline costs minutes and says what the *recipe* is worth, not a large backbone.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import Ridge
from torch.nn import functional

from arllm.runtime.errors import OutcomesError
from arllm.train.baselines import RIDGE_ALPHA, Predictor, TfIdf, domain_model
from arllm.train.domains import assign_domains, difficulty, model_vectors
from arllm.train.nir import InteractionNir
from arllm.train.outcomes import Outcomes, normalise_query

Array = NDArray[np.float64]

NAME = "published NIR recipe"
FOLDS = 5
EPOCHS = 10
BATCH = 32  # pairs
LEARNING_RATE = 5e-4


def fit_published_recipe(
    train: Outcomes,
    *,
    epochs: int = EPOCHS,
    seed: int = 0,
    progress: Callable[[str], None] = lambda message: None,
) -> Predictor:
    """Fit on the training queries alone; the predictor takes texts, N queries → (N, M) quality in [0, 1], float64.

    A candidate without a training outcome gets the mean of what is predicted for the others. Deterministic for a seed
    on one machine; torch's global generator is left as it was.

    Raises:
        OutcomesError: no training query has an outcome.
    """
    columns = np.flatnonzero(~np.isnan(train.correct).all(axis=0))
    seen = [train.candidates[m] for m in columns]
    if not seen:
        raise OutcomesError("the published recipe needs training outcomes: no query of the train split has one")
    known = train.columns(seen)
    known = known.rows(~np.isnan(known.correct).all(axis=1))
    domains = assign_domains(known, "dataset")
    vectors = model_vectors(known.correct, domains.index, len(domains.names), prior_weight=0.0, names=seen)
    text = TfIdf(known.queries)
    progress(f"{NAME}: out-of-fold query vectors")
    out_of_fold = np.empty((len(known), len(domains.names) + 1))
    hardness = difficulty(known.correct)
    for fold in _folds(known.queries, seed):
        rest = np.setdiff1d(np.arange(len(known)), fold)
        stand_in = _Encoder(text, known.rows(rest), domains.index[rest], hardness[rest], len(domains.names))
        out_of_fold[fold] = stand_in.vectors(known.rows(fold).queries)
    stand_in = _Encoder(text, known, domains.index, hardness, len(domains.names))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = _fit_nir(out_of_fold, vectors, known.correct, epochs, progress)
    models = torch.from_numpy(vectors)

    def predict(other: Outcomes) -> Array:
        quality = np.empty((len(other), len(train.candidates)))
        queries = torch.from_numpy(stand_in.vectors(other.queries).astype(np.float32))
        with torch.inference_mode():
            for start in range(0, len(other), 1024):
                rows = slice(start, start + 1024)
                found = torch.sigmoid(net.all_pairs(queries[rows], models)).numpy().astype(np.float64)
                quality[rows] = found.mean(axis=1, keepdims=True)
                quality[rows, columns] = found
        return quality

    return predict


class _Encoder:
    """The stand-in: tf-idf → [probability of each dataset…, difficulty]."""

    def __init__(
        self, text: TfIdf, queries: Outcomes, domain: NDArray[np.int64], hardness: Array, domains: int
    ) -> None:
        self._text, self._width = text, domains + 1
        rows = text.rows(queries.queries)
        self._present = np.unique(domain)
        self._domain = domain_model().fit(rows, domain) if len(self._present) > 1 else None
        self._difficulty = Ridge(alpha=RIDGE_ALPHA, solver="sparse_cg").fit(rows, hardness)

    def vectors(self, queries: tuple[str, ...]) -> Array:
        """(N, D + 1)."""
        rows = self._text.rows(queries)
        found = np.zeros((len(queries), self._width))
        found[:, self._present] = 1.0 if self._domain is None else self._domain.predict_proba(rows)
        found[:, -1] = np.clip(self._difficulty.predict(rows), 0.0, 1.0)
        return found


def _folds(queries: tuple[str, ...], seed: int) -> list[NDArray[np.intp]]:
    """Positions of each fold; equal questions share one. Folds without a query are left out."""
    _, question = np.unique([normalise_query(text) for text in queries], return_inverse=True)
    count = int(question.max()) + 1
    if count < 2:
        raise OutcomesError("the published recipe needs at least two different training queries with outcomes")
    fold_of = np.random.default_rng(seed).permutation(count) % FOLDS
    parts = [np.flatnonzero(fold_of[question] == fold) for fold in range(FOLDS)]
    return [part for part in parts if len(part)]


def _fit_nir(
    queries: Array,
    models: NDArray[np.float32],
    correct: NDArray[np.float32],
    epochs: int,
    progress: Callable[[str], None],
) -> InteractionNir:
    """Adam on batches of pairs that were evaluated, in a new order each epoch."""
    net = InteractionNir(queries.shape[1], models.shape[1])
    optimizer = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE, fused=True)
    at_query, at_model = np.nonzero(~np.isnan(correct))
    pairs = torch.from_numpy(np.stack([at_query, at_model], axis=1))
    targets = torch.from_numpy(correct[at_query, at_model])
    q, m = torch.from_numpy(queries.astype(np.float32)), torch.from_numpy(models)
    net.train()
    for epoch in range(epochs):
        total = 0.0
        order = torch.randperm(len(pairs))
        for start in range(0, len(pairs), BATCH):
            index = order[start : start + BATCH]
            logits = net(q[pairs[index, 0]], m[pairs[index, 1]])
            loss = functional.binary_cross_entropy_with_logits(logits, targets[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += loss.item() * len(index)
        progress(f"{NAME}: epoch {epoch + 1}/{epochs}, loss {total / len(pairs):.4f}")
    return net.eval()
