"""Tests of train/heads.py: standardization, the backbone at rest, the best epoch kept, no epochs at all."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from arllm.runtime.tokens import TokenSpec
from arllm.train import encoder as encoder_module
from arllm.train.backbones import nano_spec
from arllm.train.encoder import EncoderSpec, QueryEncoder, view_all
from arllm.train.fit import Examples, RouterNet, losses_of, routing_loss, validation_losses
from arllm.train.heads import fit_heads, standardize
from arllm.train.nir import build_nir
from arllm.train.options import TrainOptions

SPEC = EncoderSpec(nano_spec(60, layers=1, width=64), TokenSpec(32, (1,), (2,), 0), ("a", "b"), 4)
VECTORS = np.array([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]], dtype=np.float32)
OPTIONS = TrainOptions(head_epochs=6, head_lr=5e-3, dropout=0.1, teacher_folds=0)


def examples(count: int, seed: int) -> Examples:
    """Domain a speaks in tokens 3 to 29, b in 30 to 56; the candidate that is good at it answers correctly."""
    rng = np.random.default_rng(seed)
    domain = rng.integers(0, 2, count)
    ids = [rng.integers(3, 30, rng.integers(4, 20)) + 27 * d for d in domain]
    correct = np.stack([domain == 0, domain == 1, rng.random(count) < 0.5], axis=1).astype(np.float32)
    correct[rng.random(correct.shape) < 0.1] = np.nan
    return Examples(ids, correct, domain.astype(np.int64), rng.random(count).astype(np.float32))


def fitted(options: TrainOptions, *, watched: bool = True) -> tuple[RouterNet, list[str]]:
    """Trained on 300 queries, with 80 held out unless nobody watches."""
    torch.manual_seed(0)
    encoder = QueryEncoder(SPEC, dropout=options.dropout)
    net = RouterNet(encoder, build_nir("interaction", SPEC.query_width, 2))
    said: list[str] = []
    train, val = examples(300, 1), examples(80, 2)
    views, val_views = standardize(encoder, train, val, options, said.append)
    held_out = (val_views, val) if watched else None
    fit_heads(net, views, train, VECTORS, options, held_out=held_out, progress=said.append)
    return net, said


def test_the_views_of_the_training_queries_are_standardized() -> None:
    net, _ = fitted(dataclasses.replace(OPTIONS, head_epochs=0))
    views = view_all(net.encoder, examples(300, 1).ids)
    np.testing.assert_allclose(net.encoder.center.numpy(), views.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(net.encoder.scale.numpy(), np.maximum(views.std(axis=0), 1e-3), atol=1e-5)


def test_long_encoding_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_module, "SAY_EVERY", 0.0)
    said: list[str] = []
    view_all(QueryEncoder(SPEC), examples(300, 1).ids, batch_size=128, progress=said.append)
    assert said == [f"encoded {done} of 300 queries" for done in (128, 256, 300)]


def test_standardizing_returns_the_views_as_they_are_and_looks_at_training_alone() -> None:
    torch.manual_seed(0)
    encoder, train = QueryEncoder(SPEC), examples(300, 1)
    found = []
    for val in (examples(80, 2), examples(80, 3)):
        views, val_views = standardize(encoder, train, val, OPTIONS, lambda message: None)
        np.testing.assert_allclose(views, view_all(encoder, train.ids), atol=1e-6)
        np.testing.assert_allclose(val_views, view_all(encoder, val.ids), atol=1e-6)
        found.append((encoder.center.clone(), encoder.scale.clone()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert float(found[0][1].min()) >= 1e-3  # a dimension that never moves is not divided by 0


def test_it_learns_with_the_backbone_at_rest_and_keeps_the_best_epoch() -> None:
    start, _ = fitted(dataclasses.replace(OPTIONS, head_epochs=0))
    net, said = fitted(OPTIONS)
    before, after = start.encoder.backbone.state_dict(), net.encoder.backbone.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    val, vectors = examples(80, 2), torch.from_numpy(VECTORS)
    untrained = routing_loss(validation_losses(start, val, vectors, OPTIONS), OPTIONS)
    trained = routing_loss(validation_losses(net, val, vectors, OPTIONS), OPTIONS)
    assert trained < 0.7 * untrained
    epochs = [message for message in said if message.startswith("heads: epoch")]
    assert len(epochs) == 6
    assert said[-1].startswith("heads: kept epoch")


def figures_of(net: RouterNet, val: Examples) -> tuple[float, float]:
    """The losses on the views of all of ``val`` at once, as the first phase takes them."""
    with torch.inference_mode():
        encoded = net.encoder.heads(torch.from_numpy(view_all(net.encoder, val.ids)))
        parts = losses_of(net, encoded, val.targets(), torch.from_numpy(VECTORS))
    return parts["correct"].item(), parts["contrast"].item()


def test_the_best_epoch_is_kept_where_somebody_watches_and_the_last_elsewhere() -> None:
    wild = dataclasses.replace(OPTIONS, head_lr=0.1)  # the losses jump about
    net, said = fitted(wild)
    seen = [line.split("correct ")[1] for line in said if line.startswith("heads: epoch")]
    figures = [tuple(float(part) for part in line.split(", contrast ")) for line in seen]
    best = int(np.argmin([correct + wild.contrast_weight * contrast for correct, contrast in figures]))
    assert said[-1] == f"heads: kept epoch {best + 1}"
    assert best < 5  # else keeping the last would look the same
    assert figures_of(net, examples(80, 2)) == pytest.approx(figures[best], abs=2e-4)
    alone, silence = fitted(wild, watched=False)
    assert not [line for line in silence if "epoch" in line]
    assert figures_of(alone, examples(80, 2)) == pytest.approx(figures[-1], abs=2e-4)
    assert not alone.training


def test_equal_seeds_give_equal_heads_and_other_seeds_others() -> None:
    first, second, other = (fitted(dataclasses.replace(OPTIONS, seed=seed))[0] for seed in (0, 0, 1))
    same = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)
    assert not torch.equal(first.encoder.domain_head.weight, other.encoder.domain_head.weight)
