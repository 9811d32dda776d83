"""Cross-fitted teachers: for every training query, P(correct) by predictors that never saw its outcomes.

An outcome is one throw of a biased coin, and what tells candidates apart is a fiftieth of its variance: a network
trained on outcomes alone learns the throws. Trained on the mean of three unlike predictors of the *other* folds, it
learns the bias. The three: NIR itself, the mean per predicted domain, a kernel regression. Only the student ships.
Sources: Hinton et al. 2015 (distillation); Wolpert 1992 (cross-fitted stacking).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.kernel_approximation import Nystroem
from sklearn.linear_model import Ridge

from arllm.runtime.errors import RunError
from arllm.runtime.quality import ability
from arllm.train.domains import imputed, model_vectors
from arllm.train.encoder import QueryEncoder
from arllm.train.fit import Examples, RouterNet
from arllm.train.heads import fit_heads
from arllm.train.nir import build_nir
from arllm.train.options import NANO, TrainOptions

Floats = NDArray[np.float32]

LANDMARKS = 1000
GAMMA = 1.0  # of exp(-gamma * squared distance), with centred features of mean square norm 1
EASE_PENALTY, DIFFERENCE_PENALTY = 5.0, 20.0  # of a query's ease, and of how candidates differ: that is mostly noise
DROPOUT = 0.5
EPOCHS = 10


def teach(
    encoder: QueryEncoder, views: Floats, train: Examples, options: TrainOptions, progress: Callable[[str], None]
) -> Floats:
    """(N, M) float32 in [0, 1]: the teachers' mean for each training query, from the folds that it isn't in.

    Args:
        encoder: with its views standardized; only read.
        views: (N, 2 * width) of the training queries.

    Raises:
        RunError: fewer queries than folds.
    """
    if len(views) < options.teacher_folds:
        raise RunError(
            f"{len(views)} training queries are too few for {options.teacher_folds} folds: --teacher-folds 0"
        )
    rng = np.random.default_rng(options.seed)
    folds = rng.integers(0, options.teacher_folds, len(views))
    if len(np.unique(folds)) < options.teacher_folds:  # a handful of queries, and a fold without any
        folds = rng.permutation(len(views)) % options.teacher_folds
    taught = np.empty_like(train.correct)
    features = _kernel_features(encoder, views, options)
    for fold in range(options.teacher_folds):
        progress(f"teachers: fold {fold + 1}/{options.teacher_folds}")
        inside, outside = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        known = _rows(train, inside)
        blank = np.isnan(known.correct).all(axis=0)  # all of a candidate's few outcomes are in this fold
        known.correct[:, blank] = np.nanmean(train.correct[:, blank], axis=0)
        nir, means = _network(encoder, views[inside], known, views[outside], options)
        kernel = kernel_regression(features[inside], known.correct, features[outside], options.seed)
        taught[outside] = (nir + means + kernel) / 3.0
    return taught


def _kernel_features(encoder: QueryEncoder, views: Floats, options: TrainOptions) -> Floats:
    """(N, width): what pretrained layers make of a query where there are such, else its tokens."""
    width = views.shape[1] // 2
    if options.backbone == NANO or not encoder.spec.backbone.num_layers:
        return views[:, width:]
    standard: Floats = ((views - encoder.center.numpy()) / encoder.scale.numpy())[:, :width]
    return standard


def kernel_regression(features: Floats, correct: Floats, others: Floats, seed: int) -> NDArray[np.float64]:
    """P(correct) of ``others`` (K, F) by ridge regression in a Gaussian kernel on ``features`` (N, F), (K, M).

    A query's ease (the mean over candidates) and the candidates' differences from it are penalized apart.
    Source: Williams and Seeger 2001 (Nyström), as scikit-learn has it.
    """
    target = correct.astype(np.float64)
    seen = ~np.isnan(target)
    if not seen.all():
        target = np.where(seen, target, imputed(target, seen))
    center = features.mean(axis=0)
    spread = max(float(np.sqrt(np.mean(np.sum((features - center) ** 2, axis=1)))), 1e-6)  # 0 where all are alike
    near = Nystroem(kernel="rbf", gamma=GAMMA, n_components=min(LANDMARKS, len(features)), random_state=seed)
    inputs = near.fit_transform((features - center) / spread)
    queries = near.transform((others - center) / spread)
    ease = target.mean(axis=1, keepdims=True)
    parts = [
        Ridge(alpha=penalty).fit(inputs, part).predict(queries).reshape(len(others), -1)
        for part, penalty in ((ease, EASE_PENALTY), (target - ease, DIFFERENCE_PENALTY))
    ]
    predicted: NDArray[np.float64] = np.clip(parts[0] + parts[1], 0.02, 0.98)
    return predicted


def _network(
    encoder: QueryEncoder, views: Floats, known: Examples, others: Floats, options: TrainOptions
) -> tuple[Floats, NDArray[np.float64]]:
    """Predictions for ``others`` by a NIR trained on ``known``, and the mean per domain that its heads predict."""
    spec = encoder.spec
    vectors = model_vectors(known.correct, known.domain, len(spec.domains))
    torch.manual_seed(options.seed)
    twin = QueryEncoder(spec, encoder.backbone, DROPOUT)
    for name in ("center", "scale"):
        twin.get_buffer(name).copy_(encoder.get_buffer(name))
    net = RouterNet(twin, build_nir(options.nir, spec.query_width, len(spec.domains)))
    fit_heads(net, views, known, vectors, replace(options, teacher_folds=0, head_epochs=EPOCHS))
    with torch.inference_mode():
        query_vectors = twin.heads(torch.from_numpy(others)).query_vector.numpy()
    return net.nir.quality(query_vectors, vectors), ability(query_vectors, vectors)


def _rows(examples: Examples, index: NDArray[Any]) -> Examples:
    return Examples(
        [examples.ids[i] for i in index],
        examples.correct[index],
        examples.domain[index],
        examples.difficulty[index],
    )
