"""The training loop: encoder and NIR together, on masked outcomes; resumable, seeded, early-stopped.

Reads top to bottom: prepare → steps → evaluate → keep the best. Knows nothing about files of outcomes or about
the run folder's layout, except for its own checkpoint.

The order of the queries, the dropout masks and the learning rate are functions of (seed, step) alone, so that
a checkpoint holds weights, optimizer moments and counters, and a resumed run repeats the rest bit by bit.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from arllm.runtime.errors import RunError
from arllm.train.backbones import token_table
from arllm.train.encoder import Encoded, QueryEncoder, pad_batch
from arllm.train.nir import Nir
from arllm.train.options import TrainOptions

Progress = Callable[[str], None]
DIFFERENCES = 10.0  # see distillation; chosen on cross-validation of the training split


@dataclass(frozen=True, eq=False)
class Examples:
    """Tokenized queries with their targets. NaN in the floats and -1 in ``domain`` are masked."""

    ids: Sequence[NDArray[np.int64]]  # N rows of (L_i,)
    correct: NDArray[np.float32]  # (N, M)
    domain: NDArray[np.int64]  # (N,)
    difficulty: NDArray[np.float32]  # (N,)
    taught: NDArray[np.float32] | None = None  # (N, M) the teachers' P(correct), see arllm.train.teacher; None = none

    def targets(self, index: Any = slice(None)) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(correct, domain, difficulty, taught) of the rows, as tensors."""
        taught = np.full_like(self.correct, np.nan) if self.taught is None else self.taught
        arrays = (self.correct[index], self.domain[index], self.difficulty[index], taught[index])
        correct, domain, difficulty, soft = (torch.from_numpy(array) for array in arrays)
        return correct, domain, difficulty, soft


class RouterNet(nn.Module):
    """The query encoder and NIR as one module, so that one optimizer and one state dict hold both."""

    def __init__(self, encoder: QueryEncoder, nir: Nir) -> None:
        super().__init__()
        self.encoder = encoder
        self.nir = nir


@dataclass
class History:
    """What happened: one record an evaluation, and which was best."""

    step: int = 0
    evaluations: list[dict[str, float]] = field(default_factory=list)
    best_step: int = -1
    best_loss: float = math.inf
    stopped_early: bool = False


def masked_bce(logits: Tensor, target: Tensor) -> Tensor:
    """Mean binary cross-entropy over the entries of ``target`` that are not NaN; 0 where all are."""
    observed = ~target.isnan()
    if not bool(observed.any()):
        return logits.sum() * 0.0
    return functional.binary_cross_entropy_with_logits(logits[observed], target[observed])


def contrast(logits: Tensor, correct: Tensor) -> Tensor:
    """Mean of ``-log sigmoid(difference of logits)`` over the pairs of candidates of which one did better.

    The likelihood of *who* was correct given how many were: what a query's own difficulty contributes cancels,
    what tells candidates apart remains, and only that decides a route. ``correct`` (B, M), NaN = not evaluated.
    Source: Bradley and Terry 1952; Rasch's conditional likelihood has the same form.
    """
    first, second = torch.triu_indices(logits.shape[1], logits.shape[1], offset=1, device=logits.device)
    ahead = correct[:, first] - correct[:, second]  # (B, pairs)
    decided = (ahead != 0) & ~ahead.isnan()
    if not bool(decided.any()):
        return logits.sum() * 0.0
    difference = (logits[:, first] - logits[:, second])[decided] * ahead[decided].sign()
    return (functional.softplus(-difference) * ahead[decided].abs()).mean()


def distillation(logits: Tensor, taught: Tensor) -> Tensor:
    """Distance of predictions (B, M) to the teachers', NaN = not taught: of each, and of how candidates differ.

    Cross-entropy to a soft target, plus ``DIFFERENCES`` times the squared distance of the probabilities less their
    mean over the candidates: what moves a route is a tenth of what makes a query easy or hard.
    Source: Hinton et al. 2015, "Distilling the knowledge in a neural network".
    """
    observed = ~taught.isnan()
    if not bool(observed.any()):
        return logits.sum() * 0.0
    count = observed.sum(dim=1, keepdim=True).clamp(min=1)
    gap = torch.where(observed, logits.sigmoid() - taught.nan_to_num(), 0.0)
    centred = torch.where(observed, gap - gap.sum(dim=1, keepdim=True) / count, 0.0)
    return masked_bce(logits, taught) + DIFFERENCES * centred.square().sum() / observed.sum()


def losses(net: RouterNet, batch: tuple[Tensor, ...], model_vectors: Tensor) -> dict[str, Tensor]:
    """The losses of a batch (ids, mask, correct, domain, difficulty, taught)."""
    ids, mask, *targets = batch
    return losses_of(net, net.encoder(ids, mask), tuple(targets), model_vectors)


def losses_of(
    net: RouterNet, encoded: Encoded, targets: tuple[Tensor, ...], model_vectors: Tensor
) -> dict[str, Tensor]:
    """The losses of encoded queries against (correct, domain, difficulty, taught)."""
    correct, domain, difficulty, taught = targets
    logits = net.nir.all_pairs(encoded.query_vector, model_vectors)  # (B, M): every candidate in one call
    known = domain >= 0
    return {
        "correct": masked_bce(logits.float(), correct),
        "contrast": contrast(logits.float(), correct),
        "taught": distillation(logits.float(), taught),
        "domain": functional.cross_entropy(encoded.domain_logits[known].float(), domain[known])
        if bool(known.any())
        else logits.sum() * 0.0,
        "difficulty": masked_bce(encoded.difficulty_logit.float(), difficulty),
    }


def total_loss(parts: dict[str, Tensor], options: TrainOptions) -> Tensor:
    """The weighted sum that is minimized."""
    own = 1.0 if options.teacher_folds == 0 else options.outcome_weight
    return (
        own * (parts["correct"] + options.contrast_weight * parts["contrast"])
        + parts["taught"]
        + options.domain_weight * parts["domain"]
        + options.difficulty_weight * parts["difficulty"]
    )


def routing_loss(parts: Mapping[str, float], options: TrainOptions) -> float:
    """What the best weights are chosen by, on validation: the losses that a route depends on."""
    return parts["correct"] + options.contrast_weight * parts["contrast"]


def batches_of_epoch(lengths: NDArray[np.int64], batch_size: int, seed: int, epoch: int) -> list[NDArray[np.int64]]:
    """Row indices of every batch: shuffled, grouped by length inside windows of 32 batches, shuffled again."""
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths))
    window = 32 * batch_size
    batches: list[NDArray[np.int64]] = []
    for start in range(0, len(order), window):
        part = order[start : start + window]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def learning_rate(step: int, total: int, warmup: float) -> float:
    """Factor in [0, 1]: linear warm-up over the first ``warmup`` share of the steps, then linear decay to 0."""
    ramp = max(1, round(total * warmup))
    if step < ramp:
        return (step + 1) / ramp
    return max(0.0, (total - step) / max(1, total - ramp))


def fit(
    net: RouterNet,
    train: Examples,
    val: Examples,
    model_vectors: NDArray[np.float32],
    options: TrainOptions,
    *,
    pretrained: bool,
    checkpoint: Path,
    identity: Mapping[str, Any] | None = None,
    resume: bool = False,
    progress: Progress = lambda message: print(message, file=sys.stderr),
) -> History:
    """Train ``net`` in place and leave the weights of the best validation loss in it.

    Args:
        identity: what a resumed run must share with the interrupted one (plain JSON types); None = the options.

    Raises:
        RunError: ``resume`` without a checkpoint, or with one of other options; a loss that is not finite.
    """
    identity = options.to_json() if identity is None else identity
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net.to(device)
    vectors = torch.from_numpy(model_vectors).to(device)
    optimizer = _optimizer(net, options, pretrained)
    base_rates = [group["lr"] for group in optimizer.param_groups]
    lengths = np.array([len(row) for row in train.ids])
    per_epoch = len(batches_of_epoch(lengths, options.batch_size, options.seed, 0))
    total = per_epoch * options.epochs
    evaluate_at = {
        epoch * per_epoch + round(per_epoch * (k + 1) / options.evaluations_per_epoch)
        for epoch in range(options.epochs)
        for k in range(options.evaluations_per_epoch)
    }
    history = History()
    best: dict[str, Tensor] = {}
    if resume:
        history, best = _load_checkpoint(checkpoint, net, optimizer, identity)
        progress(f"resumed at step {history.step} of {total}")
    else:  # what the first phase reached: the layers must better it
        best = _evaluate(net, val, vectors, options, history, best)
        progress(_progress_line(history, total))
    pad_id = net.encoder.spec.tokens.pad_id
    started, first_step, running = time.monotonic(), history.step, 0.0

    for step, index in _steps(lengths, options, history.step, total, per_epoch):
        torch.manual_seed(options.seed * 1_000_003 + step)  # dropout is a function of the step
        net.train()
        batch = _batch(train, index, pad_id, device)
        if options.token_dropout:
            keep = torch.rand(batch[1].shape, device=device) >= options.token_dropout
            keep[:, 0] = True  # bos stays: a query never becomes empty
            batch = (batch[0], batch[1] * keep, *batch[2:])
        for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
            group["lr"] = rate * learning_rate(step, total, options.warmup)
        with autocast(device, options.precision):
            parts = losses(net, batch, vectors)
        loss = total_loss(parts, options)
        if not bool(torch.isfinite(loss)):
            raise RunError(
                f"the loss is {loss.item()} at step {step}: lower --lr and --backbone-lr, or use --precision fp32"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], options.clip)
        optimizer.step()
        history.step = step + 1
        running = loss.item() if step == first_step else 0.98 * running + 0.02 * loss.item()

        if history.step % 50 == 0:
            pace = (time.monotonic() - started) / (history.step - first_step)
            progress(
                f"step {history.step}/{total} loss {running:.4f}, about {pace * (total - history.step):.0f} s left"
            )
        if history.step in evaluate_at or history.step == total:
            best = _evaluate(net, val, vectors, options, history, best)
            progress(_progress_line(history, total))
            stale = sum(1 for r in history.evaluations if r["step"] > history.best_step)
            if stale >= options.patience and history.step < total:
                history.stopped_early = True
                progress(f"stopped early: no improvement in {stale} evaluations")
                break
        if history.step % options.checkpoint_steps == 0 or history.step in evaluate_at:
            _save_checkpoint(checkpoint, net, optimizer, identity, history, best)

    net.load_state_dict(best, strict=False)
    net.eval()
    net.cpu()
    return history


def _evaluate(
    net: RouterNet,
    val: Examples,
    vectors: Tensor,
    options: TrainOptions,
    history: History,
    best: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Append a record to the history; return the weights of the best so far."""
    record = validation_losses(net, val, vectors, options)
    record["step"] = history.step
    history.evaluations.append(record)
    loss = routing_loss(record, options)
    if loss < history.best_loss:
        history.best_loss, history.best_step = loss, history.step
        return _trainable_state(net)
    return best


def _progress_line(history: History, total: int) -> str:
    last = history.evaluations[-1]
    return (
        f"step {history.step}/{total} validation: correct {last['correct']:.4f}, contrast {last['contrast']:.4f}, "
        f"domain {last['domain']:.4f}, difficulty {last['difficulty']:.4f}; best at step {history.best_step}"
    )


@torch.inference_mode()
def validation_losses(net: RouterNet, examples: Examples, vectors: Tensor, options: TrainOptions) -> dict[str, float]:
    """Mean losses over ``examples``, each batch weighted by its queries."""
    net.eval()
    device = vectors.device
    order = np.argsort([len(row) for row in examples.ids], kind="stable")
    sums: dict[str, float] = {}
    for start in range(0, len(order), 64):
        index = order[start : start + 64]
        with autocast(device, options.precision):
            parts = losses(net, _batch(examples, index, net.encoder.spec.tokens.pad_id, device), vectors)
        for name, value in parts.items():
            sums[name] = sums.get(name, 0.0) + float(value) * len(index)
    return {name: value / len(order) for name, value in sums.items()}


def _steps(
    lengths: NDArray[np.int64], options: TrainOptions, start: int, total: int, per_epoch: int
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    epoch_batches: list[NDArray[np.int64]] = []
    loaded = -1
    for step in range(start, total):
        epoch, position = divmod(step, per_epoch)
        if epoch != loaded:
            epoch_batches, loaded = batches_of_epoch(lengths, options.batch_size, options.seed, epoch), epoch
        yield step, epoch_batches[position]


def _batch(examples: Examples, index: NDArray[np.int64], pad_id: int, device: torch.device) -> tuple[Tensor, ...]:
    ids, mask = pad_batch([examples.ids[i] for i in index], pad_id)
    return tuple(tensor.to(device) for tensor in (ids, mask, *examples.targets(index)))


def autocast(device: torch.device, precision: str) -> Any:
    """The context of a precision: bfloat16 products, or nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def _optimizer(net: RouterNet, options: TrainOptions, pretrained: bool) -> torch.optim.AdamW:
    """AdamW with a slower rate for pretrained layers; vectors (norms, biases) and token tables don't decay."""
    if pretrained:  # two thirds of the weights, each touched by few queries: what was pretrained stays
        token_table(net.encoder.backbone).requires_grad_(False)
    backbone_lr = options.backbone_lr if options.backbone_lr is not None else options.lr / 10
    table_lr = options.table_lr if options.table_lr is not None else options.lr / 10
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in net.named_parameters():
        if not parameter.requires_grad:
            continue
        is_table = "embed_tokens" in name
        rate = table_lr if is_table else backbone_lr if name.startswith("encoder.backbone.") else options.lr
        decay = options.weight_decay if parameter.ndim >= 2 and not is_table else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]
    )


def _trainable_state(net: RouterNet) -> dict[str, Tensor]:
    """What training changes or measures: trainable weights and buffers; frozen weights come from their source."""
    frozen = {name for name, parameter in net.named_parameters() if not parameter.requires_grad}
    return {name: t.detach().cpu().clone() for name, t in net.state_dict().items() if name not in frozen}


def _save_checkpoint(
    path: Path,
    net: RouterNet,
    optimizer: torch.optim.Optimizer,
    identity: Mapping[str, Any],
    history: History,
    best: dict[str, Tensor],
) -> None:
    """Written beside the last one and renamed over it: a kill leaves one of the two whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_suffix(".tmp")
    torch.save(
        {
            "identity": dict(identity),
            "history": vars(history),
            "weights": _trainable_state(net),
            "optimizer": optimizer.state_dict(),
            "best": best,
        },
        staging,
    )
    os.replace(staging, path)


def _load_checkpoint(
    path: Path, net: RouterNet, optimizer: torch.optim.Optimizer, identity: Mapping[str, Any]
) -> tuple[History, dict[str, Tensor]]:
    if not path.is_file():
        raise RunError(f"{path}: no checkpoint to resume from; start again without --resume")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds
        raise RunError(
            f"{path}: the checkpoint is damaged ({type(error).__name__}); delete the partial run"
        ) from None
    if state["identity"] != identity:
        changed = sorted(k for k, v in identity.items() if state["identity"].get(k) != v)
        raise RunError(f"{path}: the run was started with other options ({', '.join(changed)}); repeat those")
    net.load_state_dict(state["weights"], strict=False)
    optimizer.load_state_dict(state["optimizer"])
    return History(**state["history"]), state["best"]
