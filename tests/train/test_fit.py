"""Tests of train/fit.py: masked losses by hand, the order of batches, early stopping, resuming, best weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from arllm.runtime.errors import RunError
from arllm.runtime.tokens import TokenSpec
from arllm.train import fit as loop
from arllm.train.backbones import nano_spec, token_table
from arllm.train.encoder import EncoderSpec, QueryEncoder
from arllm.train.fit import (
    Examples,
    RouterNet,
    batches_of_epoch,
    contrast,
    distillation,
    fit,
    learning_rate,
    losses,
    masked_bce,
    validation_losses,
)
from arllm.train.nir import build_nir
from arllm.train.options import TrainOptions

NAN = float("nan")
PARTS = ("correct", "contrast", "taught", "domain", "difficulty")
VECTORS = np.array([[0.9, 0.2], [0.3, 0.8], [0.5, 0.5]], dtype=np.float32)  # 3 candidates, 2 domains
OPTIONS = TrainOptions(
    epochs=3,
    batch_size=8,
    lr=3e-3,
    dropout=0.0,
    evaluations_per_epoch=2,
    patience=99,
    checkpoint_steps=4,
    teacher_folds=0,
    seed=1,
)


pytestmark = pytest.mark.usefixtures("one_thread")


def router_net(seed: int = 0) -> RouterNet:
    spec = EncoderSpec(
        backbone=dataclasses.replace(nano_spec(60, layers=1, width=64), intermediate_size=64),
        tokens=TokenSpec(16, (1,), (2,), 0),
        domains=("even", "odd"),
        embedding_width=2,
    )
    torch.manual_seed(seed)
    return RouterNet(QueryEncoder(spec, dropout=0.0), build_nir("interaction", spec.query_width, 2))


def examples(count: int, seed: int, flipped: bool = False) -> Examples:
    """Queries of one parity; candidate 0 is right on the even ones, 1 on the odd ones, 2 was rarely asked."""
    rng = np.random.default_rng(seed)
    domain = rng.integers(0, 2, count)
    ids = [np.r_[1, 3 + 2 * rng.integers(0, 28, rng.integers(2, 9)) + d, 2].astype(np.int64) for d in domain]
    right = (1 - domain if not flipped else domain).astype(np.float32)
    correct = np.stack([right, 1 - right, np.where(rng.random(count) < 0.2, 1.0, NAN)], axis=1).astype(np.float32)
    difficulty = rng.random(count).astype(np.float32)
    difficulty[0] = NAN
    return Examples(ids, correct, np.where(np.arange(count) % 5 == 0, -1, domain), difficulty)


def run(net: RouterNet, checkpoint: Path, options: TrainOptions = OPTIONS, **changes: Any) -> loop.History:
    arguments = {
        "train": examples(50, 0),
        "val": examples(20, 1),
        "model_vectors": VECTORS,
        "pretrained": False,
        "progress": lambda message: None,
        **changes,
    }
    return fit(net, options=options, checkpoint=checkpoint, **arguments)


def state_of(net: RouterNet) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


# --- losses -------------------------------------------------------------------------------------------------


def test_masked_bce_by_hand() -> None:
    logits = torch.tensor([[0.0, 7.0, -1.0]])
    target = torch.tensor([[1.0, NAN, 0.25]])
    p = 1 / (1 + np.exp(1.0))  # of the last one
    by_hand = (-np.log(0.5) - 0.25 * np.log(p) - 0.75 * np.log(1 - p)) / 2
    assert masked_bce(logits, target).item() == pytest.approx(by_hand, rel=1e-6)


def test_masked_entries_have_no_gradient() -> None:
    target = torch.tensor([[1.0, NAN], [NAN, 0.0]])
    gradients = []
    for hidden in (0.5, -40.0):  # whatever the logit of a masked entry is
        logits = torch.tensor([[0.3, hidden], [hidden, 0.1]], requires_grad=True)
        masked_bce(logits, target).backward()
        assert logits.grad is not None
        gradients.append(logits.grad)
    assert gradients[0][0, 1] == gradients[0][1, 0] == 0.0
    assert gradients[0][0, 0] == pytest.approx((1 / (1 + np.exp(-0.3)) - 1) / 2, rel=1e-5)
    assert torch.equal(gradients[0], gradients[1])


def test_nothing_observed_is_a_loss_of_zero() -> None:
    logits = torch.ones((2, 2), requires_grad=True)
    loss = masked_bce(logits, torch.full((2, 2), NAN))
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros(2, 2))


def test_the_losses_of_a_batch() -> None:
    net = router_net().eval()
    ids, mask = torch.tensor([[1, 9, 2], [1, 12, 2]]), torch.ones(2, 3, dtype=torch.int64)
    correct, domain = torch.tensor([[1.0, NAN, NAN], [NAN] * 3]), torch.tensor([-1, 1])
    difficulty = torch.tensor([NAN, 0.5])
    taught = torch.tensor([[NAN] * 3, [0.3, 0.6, NAN]])
    parts = losses(net, (ids, mask, correct, domain, difficulty, taught), torch.from_numpy(VECTORS))
    encoded = net.encoder(ids, mask)
    logit = net.nir(encoded.query_vector[:1], torch.from_numpy(VECTORS[:1]))[0]
    logits = net.nir.all_pairs(encoded.query_vector, torch.from_numpy(VECTORS))
    assert parts["taught"].item() == pytest.approx(distillation(logits, taught).item(), rel=1e-5)
    assert parts["taught"].item() > 0.1
    assert parts["correct"].item() == pytest.approx(-logit.sigmoid().log().item(), rel=1e-5)
    assert parts["domain"].item() == pytest.approx(-encoded.domain_logits[1].log_softmax(0)[1].item(), rel=1e-5)
    p = encoded.difficulty_logit[1].sigmoid()
    assert parts["difficulty"].item() == pytest.approx((-0.5 * p.log() - 0.5 * (1 - p).log()).item(), rel=1e-5)


def test_a_batch_in_which_everything_is_masked() -> None:
    net = router_net()
    ids = torch.tensor([[1, 9, 2]])
    blank = torch.full((1, 3), NAN)
    batch = (ids, torch.ones_like(ids), blank, torch.tensor([-1]), torch.tensor([NAN]), blank)
    parts = losses(net, batch, torch.from_numpy(VECTORS))
    assert {name: part.item() for name, part in parts.items()} == dict.fromkeys(PARTS, 0.0)
    sum(parts.values(), torch.zeros(())).backward()
    assert all(bool((p.grad == 0).all()) for p in net.parameters() if p.grad is not None)


# --- schedule -----------------------------------------------------------------------------------------------


def test_an_epoch_is_a_permutation() -> None:
    lengths = np.random.default_rng(0).integers(3, 200, 1000)
    batches = batches_of_epoch(lengths, 7, seed=0, epoch=0)
    assert sorted(np.concatenate(batches).tolist()) == list(range(1000))
    assert max(len(batch) for batch in batches) == 7
    again, later, other = (batches_of_epoch(lengths, 7, *key) for key in ((0, 0), (0, 1), (1, 0)))
    assert [b.tolist() for b in again] == [b.tolist() for b in batches]
    assert [b.tolist() for b in later] != [b.tolist() for b in batches]
    assert [b.tolist() for b in other] != [b.tolist() for b in batches]
    assert len(later) == len(other) == len(batches)  # or steps and epochs would drift apart


def test_batches_hold_like_lengths_in_no_order_of_length() -> None:
    lengths = np.random.default_rng(0).integers(3, 200, 1024)
    batches = batches_of_epoch(lengths, 8, seed=0, epoch=0)
    assert np.mean([np.ptp(lengths[batch]) for batch in batches]) < 20  # of about 160 in a random batch
    means = [lengths[batch].mean() for batch in batches]
    assert means != sorted(means)


def test_the_learning_rate_rises_and_falls() -> None:
    factors = [learning_rate(step, 100, 0.1) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * (k + 1) for k in range(10)])
    assert max(factors) == 1.0
    assert factors[10:] == pytest.approx([(100 - k) / 90 for k in range(10, 100)])
    assert learning_rate(0, 1, 0.1) == 1.0
    assert [learning_rate(step, 4, 0.0) for step in range(4)] == pytest.approx([1.0, 1.0, 2 / 3, 1 / 3])


# --- the loop -----------------------------------------------------------------------------------------------


def test_fitting_lowers_the_training_loss_and_writes_no_masked_candidate_off(tmp_path: Path) -> None:
    net, train = router_net(), examples(50, 0)
    vectors = torch.from_numpy(VECTORS)
    before = validation_losses(net, train, vectors, OPTIONS)
    history = run(net, tmp_path / "c.pt", dataclasses.replace(OPTIONS, epochs=8))
    after = validation_losses(net, train, vectors, OPTIONS)
    assert after["correct"] < 0.5 * before["correct"]
    assert after["domain"] < 0.5 * before["domain"]
    assert history.step == 8 * 7  # 50 queries in batches of 8
    assert [record["step"] for record in history.evaluations][:4] == [0, 4, 7, 11]
    assert not net.training


def test_the_best_weights_come_back_and_training_stops(tmp_path: Path) -> None:
    net, val = router_net(), examples(20, 1, flipped=True)  # the better it learns, the worse it does here
    options = dataclasses.replace(OPTIONS, patience=2, epochs=20, lr=2e-2, backbone_lr=2e-2)
    said: list[str] = []
    history = run(net, tmp_path / "c.pt", options, val=val, progress=said.append)
    assert history.stopped_early
    assert history.step < 20 * 7
    assert len([r for r in history.evaluations if r["step"] > history.best_step]) == 2
    assert history.best_loss == min(loop.routing_loss(record, OPTIONS) for record in history.evaluations)
    assert any("stopped early" in message for message in said)
    now = validation_losses(net, val, torch.from_numpy(VECTORS), options)
    assert loop.routing_loss(now, options) == pytest.approx(history.best_loss, abs=1e-6)
    assert now["correct"] < history.evaluations[-1]["correct"] - 1e-3


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    states = []
    for seed in (1, 1, 2):
        net = router_net()
        run(net, tmp_path / "c.pt", dataclasses.replace(OPTIONS, epochs=1, dropout=0.1, seed=seed))
        states.append(state_of(net))
    assert equal(states[0], states[1])
    assert not equal(states[0], states[2])


class _Killed(Exception):
    pass


def killed_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop dies in its ``step``-th training step from now on (counted from 1)."""
    original: Callable[..., dict[str, Tensor]] = loop.losses
    calls = 0

    def counted(net: RouterNet, *arguments: Any) -> dict[str, Tensor]:
        nonlocal calls
        calls += net.training
        if calls == step:
            raise _Killed
        return original(net, *arguments)

    monkeypatch.setattr(loop, "losses", counted)


@pytest.mark.parametrize("step", [6, 10, 21])
def test_a_resumed_run_ends_bit_equal(step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = dataclasses.replace(OPTIONS, token_dropout=0.2)
    whole = router_net()
    history = run(whole, tmp_path / "whole.pt", options)
    with monkeypatch.context() as patch:
        killed_at(step, patch)
        with pytest.raises(_Killed):
            run(router_net(), tmp_path / "c.pt", options)
    resumed = router_net(seed=9)  # nothing of the fresh weights may survive
    said: list[str] = []
    again = run(resumed, tmp_path / "c.pt", options, resume=True, progress=said.append)
    assert said[0].startswith("resumed at step ")
    assert 0 < int(said[0].split()[3]) < step
    assert again == history
    assert equal(state_of(resumed), state_of(whole))


def test_resuming_with_other_options_names_them(tmp_path: Path) -> None:
    run(router_net(), tmp_path / "c.pt", dataclasses.replace(OPTIONS, epochs=1))
    other = dataclasses.replace(OPTIONS, epochs=1, lr=1e-3, seed=5)
    with pytest.raises(RunError, match=r"other options \(lr, seed\)"):
        run(router_net(), tmp_path / "c.pt", other, resume=True)


def test_resuming_from_nothing(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="without --resume"):
        run(router_net(), tmp_path / "absent.pt", resume=True)


def test_resuming_from_a_damaged_checkpoint_names_it(tmp_path: Path) -> None:
    run(router_net(), tmp_path / "c.pt", dataclasses.replace(OPTIONS, epochs=1))
    data = (tmp_path / "c.pt").read_bytes()
    (tmp_path / "c.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(RunError, match=r"c\.pt"):
        run(router_net(), tmp_path / "c.pt", resume=True)


def test_token_dropout_hides_tokens_but_never_bos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[tuple[Tensor, Tensor]] = []
    original = loop.losses

    def spy(net: RouterNet, batch: tuple[Tensor, ...], vectors: Tensor) -> dict[str, Tensor]:
        if net.training:
            masks.append((batch[0], batch[1]))
        return original(net, batch, vectors)

    monkeypatch.setattr(loop, "losses", spy)
    run(router_net(), tmp_path / "c.pt", dataclasses.replace(OPTIONS, epochs=1, token_dropout=0.5))
    assert len(masks) == 7
    for ids, mask in masks:
        assert bool((mask[:, 0] == 1).all())
        assert bool((mask[ids == 0] == 0).all())  # padding stays hidden
    kept = torch.cat([mask[:, 1:][ids[:, 1:] != 0] for ids, mask in masks]).float().mean()
    assert 0.35 < kept < 0.65


def test_a_pretrained_token_table_stays_as_it_is(tmp_path: Path) -> None:
    net, fresh = router_net(), router_net()
    run(net, tmp_path / "c.pt", dataclasses.replace(OPTIONS, epochs=1), pretrained=True)
    assert torch.equal(token_table(net.encoder.backbone), token_table(fresh.encoder.backbone))
    assert not torch.equal(net.encoder.domain_head.weight, fresh.encoder.domain_head.weight)


def test_a_loss_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    net = router_net()
    with torch.no_grad():
        net.encoder.domain_head.weight.fill_(NAN)
    with pytest.raises(RunError, match="at step 0: lower --lr"):
        run(net, tmp_path / "c.pt")


def test_contrast_by_hand_and_blind_to_the_querys_own_level() -> None:
    logits = torch.tensor([[2.0, 0.5, -1.0], [1.0, 1.0, 1.0]])
    correct = torch.tensor([[1.0, 0.0, float("nan")], [1.0, 1.0, 0.5]])
    # decided pairs: (1, 0) of the first query; (1, .5) twice of the second, each with half the weight
    expected = (math.log(1 + math.exp(-1.5)) + 2 * 0.5 * math.log(2.0)) / 3
    assert contrast(logits, correct).item() == pytest.approx(expected, rel=1e-6)
    shifted = logits + torch.tensor([[7.0], [-3.0]])
    assert contrast(shifted, correct).item() == pytest.approx(expected, rel=1e-5)
    assert contrast(logits.flip(1), correct.flip(1)).item() == pytest.approx(expected, rel=1e-6)


def test_contrast_without_a_decided_pair_is_zero_and_has_a_gradient() -> None:
    logits = torch.zeros(2, 2, requires_grad=True)
    value = contrast(logits, torch.tensor([[1.0, 1.0], [float("nan"), 0.0]]))
    value.backward()
    assert value.item() == 0.0
    assert logits.grad is not None
    assert not logits.grad.any()
