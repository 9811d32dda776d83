"""The options of a training run: one plain dataclass, stored in the run folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from arllm.runtime.errors import RunError

NANO = "nano"  # the backbone that is made here, from scratch


@dataclass(frozen=True)
class TrainOptions:
    """What ``arllm train`` can be told. The defaults are those of ``nano``; :meth:`for_backbone` adapts them."""

    backbone: str = NANO
    # The first N layers of the backbone; None = all of a pretrained one, none of nano's: from scratch they cost
    # latency and brought nothing (tests/benchmarks/QUALITY.md).
    layers: int | None = None
    vocab_size: int = 16_000  # nano's own tokenizer
    domains: str = "auto"  # auto, dataset, subset, or a mapping file
    min_domain_queries: int = 30
    embedding_width: int = 32
    max_tokens: int = 256
    nir: str = "interaction"
    head_epochs: int = 15  # of the first phase: body, heads and NIR on a backbone that does not move
    head_lr: float = 1e-3
    epochs: int = 0  # of the second phase: everything; 0 = leave the backbone as it is
    batch_size: int = 32
    lr: float = 3e-4  # of the heads and NIR
    # None: lr / 10. The standardized views make much of a small step in the layers, from scratch too.
    backbone_lr: float | None = None
    table_lr: float | None = None  # of a token table from scratch; None: lr / 10, for it starts from LSA
    weight_decay: float = 0.01
    warmup: float = 0.1  # share of all steps
    clip: float = 1.0
    dropout: float = 0.1  # before the heads; half of it on the views
    token_dropout: float = 0.2  # share of tokens hidden from attention and pooling, in training only
    contrast_weight: float = 2.0  # of telling candidates apart, beside telling queries apart
    teacher_folds: int = 4  # of the cross-fitted teachers; 0 = learn from the outcomes alone
    outcome_weight: float = 0.3  # of the outcomes themselves beside the teachers
    domain_weight: float = 0.3
    difficulty_weight: float = 0.3
    evaluations_per_epoch: int = 2
    patience: int = 4  # evaluations without improvement before the run stops
    checkpoint_steps: int = 100
    max_queries: int | None = None  # train on the first N of the seeded order; None = all
    precision: str = "fp32"  # or bf16: autocast on CPU and CUDA
    threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        def need(ok: bool, message: str) -> None:
            if not ok:
                raise RunError(message)

        need(self.epochs >= 0, f"epochs must not be negative: {self.epochs}")
        need(self.head_epochs >= 0, f"head epochs must not be negative: {self.head_epochs}")
        need(self.batch_size >= 1, f"batch size must be at least 1, not {self.batch_size}")
        need(self.max_tokens >= 8, f"max tokens must be at least 8, not {self.max_tokens}")
        need(self.embedding_width >= 0, f"embedding width must not be negative: {self.embedding_width}")
        need(self.threads is None or self.threads >= 1, f"threads must be at least 1, not {self.threads}")
        need(
            self.vocab_size >= 300,
            f"the vocabulary needs the 256 bytes and more: at least 300, not {self.vocab_size}",
        )
        for name in (
            "lr",
            "head_lr",
            "backbone_lr",
            "table_lr",
            "weight_decay",
            "contrast_weight",
            "outcome_weight",
            "dropout",
        ):
            value = getattr(self, name)
            need(value is None or 0 <= value < math.inf, f"{name} must be a finite number >= 0, not {value}")
        need(self.precision in ("fp32", "bf16"), f"precision must be fp32 or bf16, not {self.precision!r}")
        need(0 <= self.token_dropout < 1, f"token dropout must lie in [0, 1), not {self.token_dropout}")
        need(self.max_queries is None or self.max_queries >= 1, "max queries must be at least 1")
        need(self.teacher_folds == 0 or self.teacher_folds >= 2, "teacher folds: 0, or at least 2")
        need(self.evaluations_per_epoch >= 1, "evaluations per epoch must be at least 1")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrainOptions:
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise RunError(f"unknown training option {unknown[0]!r}: the run comes from another version of arllm")
        return cls(**data)

    def with_changes(self, **changes: Any) -> TrainOptions:
        return replace(self, **{key: value for key, value in changes.items() if value is not None})

    @classmethod
    def for_backbone(cls, backbone: str) -> TrainOptions:
        """The defaults for a backbone: pretrained layers are worth an epoch of fine-tuning."""
        if backbone == NANO:
            return cls()
        return cls(backbone=backbone, token_dropout=0.0, epochs=1)
