"""The query encoder: backbone, masked mean pooling, domain, difficulty and embedding heads → query vector.

Knows nothing about candidates or training data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from arllm.runtime.tokens import TokenSpec
from arllm.train.backbones import GemmaSpec, build_model


@dataclass(frozen=True)
class EncoderSpec:
    """All that rebuilds an encoder beside its weights and its tokenizer."""

    backbone: GemmaSpec
    tokens: TokenSpec
    domains: tuple[str, ...]
    embedding_width: int  # 0 = the query vector is domains and difficulty alone
    source: Mapping[str, str] = field(default_factory=dict)

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
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EncoderSpec:
        return cls(
            backbone=GemmaSpec.from_json(data["backbone"]),
            tokens=TokenSpec.from_json(data["tokens"]),
            domains=tuple(data["domains"]),
            embedding_width=int(data["embedding_width"]),
            source=dict(data["source"]),
        )


class Encoded(NamedTuple):
    """``query_vector`` (B, D + 1 + E) and the logits that its first D + 1 entries come from."""

    query_vector: Tensor
    domain_logits: Tensor  # (B, D)
    difficulty_logit: Tensor  # (B,)


class QueryEncoder(nn.Module):
    """``[softmax(domain logits), sigmoid(difficulty logit), embedding]`` of the masked mean of the last layer."""

    def __init__(self, spec: EncoderSpec, backbone: nn.Module | None = None, dropout: float = 0.1) -> None:
        super().__init__()
        self.spec = spec
        self.backbone = build_model(spec.backbone) if backbone is None else backbone
        width = spec.backbone.hidden_size
        self.dropout = nn.Dropout(dropout)
        self.domain_head = nn.Linear(width, len(spec.domains))
        self.difficulty_head = nn.Linear(width, 1)
        self.embedding_head = nn.Linear(width, spec.embedding_width) if spec.embedding_width else None

    def pool(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Mean of the last layer over the unmasked tokens: ids and mask (B, S) int64 → (B, width) float32."""
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(torch.float32)  # (B, S, 1)
        summed: Tensor = (hidden.to(torch.float32) * weight).sum(dim=1)
        return summed / weight.sum(dim=1).clamp(min=1.0)

    def heads(self, pooled: Tensor) -> Encoded:
        """The heads on pooled vectors (B, width)."""
        domain_logits = self.domain_head(pooled)
        difficulty_logit = self.difficulty_head(pooled)
        parts = [domain_logits.softmax(dim=-1), difficulty_logit.sigmoid()]
        if self.embedding_head is not None:
            parts.append(self.embedding_head(pooled))
        return Encoded(torch.cat(parts, dim=-1), domain_logits, difficulty_logit.squeeze(-1))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Encoded:
        return self.heads(self.dropout(self.pool(input_ids, attention_mask)))


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
    encoder.eval()
    device = next(encoder.parameters()).device
    out = np.empty((len(rows), encoder.spec.query_width), dtype=np.float32)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        ids, mask = pad_batch([rows[i] for i in index], encoder.spec.tokens.pad_id)
        out[index] = encoder(ids.to(device), mask.to(device)).query_vector.cpu().numpy()
    return out
