"""Tests of train/heads.py: standardization, the backbone at rest, the best epoch kept, no epochs at all."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from arllm.runtime.tokens import TokenSpec
from arllm.train.backbones import nano_spec
from arllm.train.encoder import EncoderSpec, QueryEncoder, view_all
from arllm.train.fit import Examples, RouterNet, routing_loss, validation_losses
from arllm.train.heads import fit_heads
from arllm.train.nir import build_nir
from arllm.train.options import TrainOptions

SPEC = EncoderSpec(nano_spec(60, layers=1, width=64), TokenSpec(32, (1,), (2,), 0), ("a", "b"), 4)
VECTORS = np.array([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]], dtype=np.float32)
OPTIONS = TrainOptions(head_epochs=6, head_lr=5e-3, dropout=0.1)


def examples(count: int, seed: int) -> Examples:
    """Domain a speaks in tokens 3 to 29, b in 30 to 56; the candidate that is good at it answers correctly."""
    rng = np.random.default_rng(seed)
    domain = rng.integers(0, 2, count)
    ids = [rng.integers(3, 30, rng.integers(4, 20)) + 27 * d for d in domain]
    correct = np.stack([domain == 0, domain == 1, rng.random(count) < 0.5], axis=1).astype(np.float32)
    correct[rng.random(correct.shape) < 0.1] = np.nan
    return Examples(ids, correct, domain.astype(np.int64), rng.random(count).astype(np.float32))


def fitted(options: TrainOptions) -> tuple[RouterNet, list[str]]:
    torch.manual_seed(0)
    encoder = QueryEncoder(SPEC, dropout=options.dropout)
    net = RouterNet(encoder, build_nir("interaction", SPEC.query_width, 2))
    said: list[str] = []
    fit_heads(net, examples(300, 1), examples(80, 2), VECTORS, options, said.append)
    return net, said


def test_the_views_of_the_training_queries_are_standardized() -> None:
    net, _ = fitted(dataclasses.replace(OPTIONS, head_epochs=0))
    views = view_all(net.encoder, examples(300, 1).ids)
    np.testing.assert_allclose(net.encoder.center.numpy(), views.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(net.encoder.scale.numpy(), np.maximum(views.std(axis=0), 1e-3), atol=1e-5)


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


def test_equal_seeds_give_equal_heads_and_other_seeds_others() -> None:
    first, second, other = (fitted(dataclasses.replace(OPTIONS, seed=seed))[0] for seed in (0, 0, 1))
    same = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)
    assert not torch.equal(first.encoder.domain_head.weight, other.encoder.domain_head.weight)
