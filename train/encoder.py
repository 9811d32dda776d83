"""The query encoder: backbone, masked mean pooling, domain, difficulty and embedding heads → query vector.

Knows nothing about candidates or training data.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from arllm.runtime.tokens import TokenSpec
from arllm.train.backbones import GemmaSpec, build_model

PAIRS = 1 << 19  # slots for pairs of neighbouring tokens; two pairs that share one pass for each other
PAIR_FACTOR = 40_503  # of a pair's first token: spreads pairs over the slots
SAY_EVERY = 10.0  # seconds between two words on how far encoding is


@dataclass(frozen=True)
class EncoderSpec:
    """All that rebuilds an encoder beside its weights and its tokenizer."""

    backbone: GemmaSpec
    tokens: TokenSpec
    domains: tuple[str, ...]
    embedding_width: int  # 0 = the query vector is domains and difficulty alone
    source: Mapping[str, str] = field(default_factory=dict)
    body_width: int = 256  # of the hidden layer between the views and the heads

    @property
    def query_width(self) -> int:
        """Width of the query vector: domains, difficulty, embedding."""
        return len(self.domains) + 1 + self.embedding_width

    def to_json(self) -> dict[str, Any]:
        return {
            "backbone": self.backbone.to_json(),
            "tokens": self.tokens.to_json(),
            "domains": list(self.domains),
            "embedding_width": self.embedding_width,
            "source": dict(self.source),
            "body_width": self.body_width,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EncoderSpec:
        return cls(
            backbone=GemmaSpec.from_json(data["backbone"]),
            tokens=TokenSpec.from_json(data["tokens"]),
            domains=tuple(data["domains"]),
            embedding_width=int(data["embedding_width"]),
            source=dict(data["source"]),
            body_width=int(data["body_width"]),
        )


class Encoded(NamedTuple):
    """``query_vector`` (B, D + 1 + E) and the logits that its first D + 1 entries come from."""

    query_vector: Tensor
    domain_logits: Tensor  # (B, D)
    difficulty_logit: Tensor  # (B,)


class QueryEncoder(nn.Module):
    """``[softmax(domain logits), sigmoid(difficulty logit), embedding]`` of two views of a query.

    One is the masked mean of the backbone's last layer; the other the idf-weighted mean of the token table's rows,
    which a few thousand outcomes teach sooner than they teach layers. Both are standardized, go through one
    hidden layer (``body``), then into the heads.

    ``token_weight`` (vocabulary,), ``center`` and ``scale`` (2 * width,) are statistics of the training queries:
    see :mod:`arllm.train.lexical` and :func:`arllm.train.heads.fit_heads`; ``pair_density`` (PAIRS,) uint8 and
    ``familiar`` (2,) say what is familiar: see :mod:`arllm.train.familiarity`. ``original_ids`` (vocabulary,) int64
    is None but where the vocabulary was trimmed: the ids that ``pair_density`` knows the tokens by.
    """

    token_weight: Tensor
    center: Tensor
    scale: Tensor
    pair_density: Tensor
    familiar: Tensor
    original_ids: Tensor | None

    def __init__(self, spec: EncoderSpec, backbone: nn.Module | None = None, dropout: float = 0.1) -> None:
        super().__init__()
        self.spec = spec
        self.backbone = build_model(spec.backbone) if backbone is None else backbone
        width, hidden = spec.backbone.hidden_size, spec.body_width
        self.register_buffer("token_weight", torch.ones(spec.backbone.vocab_size))
        self.register_buffer("center", torch.zeros(2 * width))
        self.register_buffer("scale", torch.ones(2 * width))
        self.register_buffer("pair_density", torch.ones(PAIRS, dtype=torch.uint8))
        self.register_buffer("familiar", torch.tensor([0.0, 1.0]))
        self.register_buffer("original_ids", None)
        self.body = nn.Sequential(
            nn.Dropout(dropout / 2), nn.Linear(2 * width, hidden), nn.ReLU(), nn.Dropout(dropout)
        )
        self.domain_head = nn.Linear(hidden, len(spec.domains))
        self.difficulty_head = nn.Linear(hidden, 1)
        self.embedding_head = nn.Linear(hidden, spec.embedding_width) if spec.embedding_width else None

    def views(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Both views of queries, (B, width) float32 each; ids and mask (B, S) int64.

        The first is the mean of the last layer over the unmasked tokens, the second the weighted mean of their
        rows of the token table, of norm sqrt(width).
        """
        rows = self.backbone.get_submodule("embed_tokens")(input_ids)  # (B, S, width)
        hidden = self.backbone(inputs_embeds=rows, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(torch.float32)  # (B, S, 1)
        pooled = (hidden.to(torch.float32) * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1.0)
        weight = self.token_weight[input_ids].unsqueeze(-1) * mask
        summed = (rows.to(torch.float32) * weight).sum(dim=1)
        norm = summed.square().mean(dim=-1, keepdim=True).sqrt()
        return pooled, summed / norm.clamp(min=1e-6)

    def heads(self, views: Tensor) -> Encoded:
        """The heads on both views side by side, (B, 2 * width)."""
        hidden = self.body((views - self.center) / self.scale)
        domain_logits = self.domain_head(hidden)
        difficulty_logit = self.difficulty_head(hidden)
        parts = [domain_logits.softmax(dim=-1), difficulty_logit.sigmoid()]
        if self.embedding_head is not None:
            parts.append(self.embedding_head(hidden))
        return Encoded(torch.cat(parts, dim=-1), domain_logits, difficulty_logit.squeeze(-1))

    def wording(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Mean of ``pair_density`` over the pairs of neighbouring tokens, (B,) float32; 0 where there is no pair."""
        pair = (attention_mask[:, :-1] * attention_mask[:, 1:]).to(torch.float32)  # (B, S - 1)
        ids = input_ids if self.original_ids is None else self.original_ids[input_ids]
        density = self.pair_density[pair_slots(ids[:, :-1], ids[:, 1:])].to(torch.float32)
        return (density * pair).sum(dim=1) / pair.sum(dim=1).clamp(min=1.0)

    def familiarity(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """How much a query's wording is like training's, (B,) in [0, 1]: :meth:`wording` between two marks."""
        low, high = self.familiar[0], self.familiar[1]
        return ((self.wording(input_ids, attention_mask) - low) / (high - low)).clamp(0.0, 1.0)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        return self.heads(torch.cat(self.views(input_ids, attention_mask), dim=-1))


def pair_slots(first: Any, second: Any) -> Any:
    """The slots of pairs of token ids in ``pair_density``: int64 tensors or arrays of one shape."""
    return (first * PAIR_FACTOR + second) % PAIRS


def pad_batch(rows: Sequence[NDArray[np.int64]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Right-padded ids and mask, both (B, longest) int64."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(rows), longest), dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.from_numpy(row)
        mask[i, : len(row)] = 1
    return ids, mask


@torch.inference_mode()
def encode_all(
    encoder: QueryEncoder, rows: Sequence[NDArray[np.int64]], *, batch_size: int = 64
) -> NDArray[np.float32]:
    """Query vectors (N, Q) float32 of tokenized queries, batched by length, in the given order."""
    width = encoder.spec.query_width
    return by_length(encoder, rows, lambda ids, mask: encoder(ids, mask).query_vector, width, batch_size)


@torch.inference_mode()
def view_all(
    encoder: QueryEncoder,
    rows: Sequence[NDArray[np.int64]],
    *,
    batch_size: int = 64,
    progress: Callable[[str], None] = lambda message: None,
) -> NDArray[np.float32]:
    """Both views (N, 2 * width) float32 of tokenized queries, in the given order."""
    width = 2 * encoder.spec.backbone.hidden_size
    return by_length(
        encoder, rows, lambda ids, mask: torch.cat(encoder.views(ids, mask), dim=-1), width, batch_size, progress
    )


def by_length(
    encoder: QueryEncoder,
    rows: Sequence[NDArray[np.int64]],
    function: Callable[[Tensor, Tensor], Tensor],
    width: int,
    batch_size: int = 64,
    progress: Callable[[str], None] = lambda message: None,
) -> NDArray[np.float32]:
    """(ids, mask) → (B, width) of tokenized queries, batched by length; (N, width) float32 in the given order.

    ``progress`` hears every ``SAY_EVERY`` seconds how many are done, the shortest first.
    """
    encoder.eval()
    device = encoder.center.device
    out = np.empty((len(rows), width), dtype=np.float32)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    said = time.monotonic()
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        ids, mask = pad_batch([rows[i] for i in index], encoder.spec.tokens.pad_id)
        out[index] = function(ids.to(device), mask.to(device)).float().cpu().numpy()
        if time.monotonic() >= said + SAY_EVERY:
            said = time.monotonic()
            progress(f"encoded {start + len(index)} of {len(order)} queries")
    return out
