"""The first phase of training: body, heads and NIR on the views of a backbone that does not move yet.

The views are computed once, so that many epochs cost seconds; what the layers themselves can add is left to
:mod:`arllm.train.fit`. Source of the order: Kumar et al. 2022, "Fine-tuning can distort pretrained features".
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from arllm.train.encoder import QueryEncoder, view_all
from arllm.train.fit import Examples, RouterNet, autocast, losses_of, routing_loss, total_loss
from arllm.train.options import TrainOptions

BATCH = 128
Floats = NDArray[np.float32]


def standardize(
    encoder: QueryEncoder, train: Examples, val: Examples, options: TrainOptions, progress: Callable[[str], None]
) -> tuple[Floats, Floats]:
    """Encode once, set ``center`` and ``scale`` from training; the views of both, (N, 2 * width) float32."""
    progress(f"heads: encoding {len(train.ids) + len(val.ids)} queries once")
    with autocast(encoder.center.device, options.precision):
        views, val_views = (view_all(encoder, part.ids, progress=progress) for part in (train, val))
    encoder.center.copy_(torch.from_numpy(views.mean(axis=0)))
    encoder.scale.copy_(torch.from_numpy(np.maximum(views.std(axis=0), 1e-3)))
    return views, val_views


def fit_heads(
    net: RouterNet,
    views: Floats,
    train: Examples,
    model_vectors: Floats,
    options: TrainOptions,
    *,
    held_out: tuple[Floats, Examples] | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> None:
    """Train everything behind the views in place.

    AdamW with one cycle of the learning rate (up over the first 30%, then down to 0), batches of 128. With views and
    examples ``held_out`` the epoch of their best loss is kept, else the last.
    """
    if options.head_epochs == 0:
        return
    encoder = net.encoder
    trained = {name: p for name, p in net.named_parameters() if not name.startswith("encoder.backbone.")}
    optimizer = torch.optim.AdamW(list(trained.values()), lr=options.head_lr, weight_decay=options.weight_decay)
    batches = max(1, len(views) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.head_lr, total_steps=options.head_epochs * batches + 1
    )
    vectors, inputs, targets = torch.from_numpy(model_vectors), torch.from_numpy(views), train.targets()
    generator = torch.Generator().manual_seed(options.seed)
    torch.manual_seed(options.seed)
    best, best_loss, best_epoch = {}, float("inf"), 0
    for epoch in range(options.head_epochs):
        net.train()
        for index in torch.randperm(len(views), generator=generator).tensor_split(batches):
            parts = losses_of(net, encoder.heads(inputs[index]), tuple(t[index] for t in targets), vectors)
            optimizer.zero_grad(set_to_none=True)
            total_loss(parts, options).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        net.eval()
        if held_out is None:
            continue
        figures = _losses(net, *held_out, vectors)
        if routing_loss(figures, options) < best_loss:
            best_loss, best_epoch = routing_loss(figures, options), epoch + 1
            best = {name: p.detach().clone() for name, p in trained.items()}
        progress(
            f"heads: epoch {epoch + 1}/{options.head_epochs} validation: correct {figures['correct']:.4f}, "
            f"contrast {figures['contrast']:.4f}"
        )
    if held_out is not None:
        progress(f"heads: kept epoch {best_epoch}")
        net.load_state_dict(best, strict=False)


@torch.inference_mode()
def _losses(net: RouterNet, views: Floats, examples: Examples, vectors: Tensor) -> dict[str, float]:
    parts = losses_of(net, net.encoder.heads(torch.from_numpy(views)), examples.targets(), vectors)
    return {name: value.item() for name, value in parts.items()}
