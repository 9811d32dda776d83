"""The Neural Interaction Router: P(correct | query vector, model vector), in both published shapes.

Knows nothing about text, encoders or training data. The parameter names are the published ones, so that a
published plain state dict loads (:func:`load_published`).
Source: "Adaptive Routing for Specialized Large Language Models" and its notebooks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from arllm.runtime.errors import RunError

SHAPES = ("interaction", "ncf")


class Nir(nn.Module):
    """Base of the two shapes. ``query_width`` and ``model_width`` are the widths of the two vectors."""

    shape: str
    query_width: int
    model_width: int

    def forward(self, query_vectors: Tensor, model_vectors: Tensor) -> Tensor:
        """Logits (P,) of P paired rows: query_vectors (P, query_width), model_vectors (P, model_width)."""
        raise NotImplementedError

    def all_pairs(self, query_vectors: Tensor, model_vectors: Tensor) -> Tensor:
        """Logits (B, M) of every pair: query_vectors (B, query_width), model_vectors (M, model_width).

        Each side is projected once; equal to :meth:`forward` on the B * M repeated rows.
        """
        raise NotImplementedError

    @torch.inference_mode()
    def quality(self, query_vectors: NDArray[np.float32], model_vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """P(correct) of every pair, (B, M) in [0, 1], outside training: (B, query_width), (M, model_width)."""
        logits = self.all_pairs(torch.from_numpy(query_vectors), torch.from_numpy(model_vectors))
        predicted: NDArray[np.float32] = logits.sigmoid().numpy()
        return predicted


class InteractionNir(Nir):
    """``[q, m, q * m, |q - m|, cosine(q, m)]`` of the two projections, then three linear layers."""

    shape = "interaction"

    def __init__(
        self,
        query_width: int,
        model_width: int,
        *,
        projection: int = 32,
        hidden: tuple[int, int] = (256, 128),
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.query_width, self.model_width = query_width, model_width
        self.q_proj = nn.Sequential(nn.Linear(query_width, projection), nn.ReLU())
        self.m_proj = nn.Sequential(nn.Linear(model_width, projection), nn.ReLU())
        self.fc_layers = nn.Sequential(
            nn.Linear(4 * projection + 1, hidden[0]),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden[0], hidden[1]),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden[1], 1),
        )

    def forward(self, query_vectors: Tensor, model_vectors: Tensor) -> Tensor:
        q, m = self.q_proj(query_vectors), self.m_proj(model_vectors)
        cosine = functional.cosine_similarity(q, m, dim=-1).unsqueeze(-1)
        scored: Tensor = self.fc_layers(torch.cat([q, m, q * m, (q - m).abs(), cosine], dim=-1))
        return scored.squeeze(-1)

    def all_pairs(self, query_vectors: Tensor, model_vectors: Tensor) -> Tensor:
        q, m = self.q_proj(query_vectors), self.m_proj(model_vectors)  # (B, H), (M, H)
        cosine = _unit(q) @ _unit(m).T
        each = q.unsqueeze(1)
        both = torch.cat([each * m, (each - m).abs(), cosine.unsqueeze(-1)], dim=-1)
        scored: Tensor = self.fc_layers[1:](_first_layer(self.fc_layers[0], q, m, both))
        return scored.squeeze(-1)


class NcfNir(Nir):
    """NeuMF: an MLP on the concatenated projections beside a product of a second pair of projections."""

    shape = "ncf"

    def __init__(
        self,
        query_width: int,
        model_width: int,
        *,
        projection: int = 32,
        hidden: tuple[int, int] = (256, 128),
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.query_width, self.model_width = query_width, model_width
        self.q_proj_mlp = nn.Linear(query_width, projection)
        self.m_proj_mlp = nn.Linear(model_width, projection)
        self.q_proj_mf = nn.Linear(query_width, projection)
        self.m_proj_mf = nn.Linear(model_width, projection)
        self.fc_layers = nn.ModuleList([nn.Linear(2 * projection, hidden[0]), nn.Linear(hidden[0], hidden[1])])
        self.dropout = nn.Dropout(dropout)
        self.output_layer = nn.Linear(hidden[1] + projection, 1)

    def forward(self, query_vectors: Tensor, model_vectors: Tensor) -> Tensor:
        q_mlp = functional.relu(self.q_proj_mlp(query_vectors))
        m_mlp = functional.relu(self.m_proj_mlp(model_vectors))
        x = torch.cat([q_mlp, m_mlp], dim=-1)
        for layer in self.fc_layers:
            x = self.dropout(functional.relu(layer(x)))
        product = self.q_proj_mf(query_vectors) * self.m_proj_mf(model_vectors)
        scored: Tensor = self.output_layer(torch.cat([x, product], dim=-1))
        return scored.squeeze(-1)

    def all_pairs(self, query_vectors: Tensor, model_vectors: Tensor) -> Tensor:
        q_mlp = functional.relu(self.q_proj_mlp(query_vectors))
        m_mlp = functional.relu(self.m_proj_mlp(model_vectors))
        first, second = self.fc_layers
        x = self.dropout(functional.relu(_first_layer(first, q_mlp, m_mlp)))
        x = self.dropout(functional.relu(second(x)))
        last, width = self.output_layer, x.shape[-1]
        of_x, of_product = last.weight[:, :width], last.weight[:, width:]
        product = (self.q_proj_mf(query_vectors) * of_product) @ self.m_proj_mf(model_vectors).T  # (B, M)
        scored: Tensor = functional.linear(x, of_x, last.bias).squeeze(-1) + product
        return scored


def _first_layer(layer: nn.Module, q: Tensor, m: Tensor, both: Tensor | None = None) -> Tensor:
    """A linear layer on every ``[q, m, both]`` (B, M, hidden), in parts: q (B, H), m (M, H), both (B, M, K).

    What sees q or m alone is multiplied once a row, not once a pair; in an exported graph the side of m is then
    constant for a pool.
    """
    assert isinstance(layer, nn.Linear)
    weight, width = layer.weight, q.shape[1]
    of_m = functional.linear(m, weight[:, width : 2 * width], layer.bias)
    summed: Tensor = functional.linear(q, weight[:, :width]).unsqueeze(1) + of_m
    if both is not None:
        summed = summed + functional.linear(both, weight[:, 2 * width :])
    return summed


def _unit(rows: Tensor) -> Tensor:
    """Rows of length 1; a row of zeros stays one, as in :func:`torch.nn.functional.cosine_similarity`."""
    length: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / length.clamp_min(1e-8)


def build_nir(shape: str, query_width: int, model_width: int) -> Nir:
    """A fresh network of one of the two shapes, with the published inner widths."""
    if shape == "interaction":
        return InteractionNir(query_width, model_width)
    if shape == "ncf":
        return NcfNir(query_width, model_width)
    raise RunError(f"unknown NIR shape {shape!r}: choose one of {', '.join(SHAPES)}")


def load_published(path: str | os.PathLike[str]) -> Nir:
    """Load a published NIR checkpoint: a plain PyTorch state dict. Shape and widths are told from its keys.

    Only tensors are unpickled (``weights_only=True``). The network returned is in evaluation mode.

    Raises:
        RunError: not a plain state dict, or its keys fit neither published shape.
    """
    path = Path(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise RunError(f"{path}: no such file") from None
    except Exception as error:  # torch raises UnpicklingError, RuntimeError, EOFError, … for what isn't tensors
        raise RunError(
            f"{path}: not a plain PyTorch state dict ({type(error).__name__}); "
            "save it again with torch.save(net.state_dict(), path)"
        ) from None
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise RunError(f"{path}: expected a plain state dict of tensors; save net.state_dict() alone")
    try:
        net = _empty_like(state)
        net.load_state_dict(dict(state))
    except (KeyError, IndexError, RuntimeError, ValueError) as error:
        detail = str(error).replace("\n", " ")
        raise RunError(f"{path}: the keys fit neither published NIR shape (interaction, ncf): {detail}") from None
    return net.eval()


def _empty_like(state: Mapping[str, Tensor]) -> Nir:
    if "q_proj.0.weight" in state:
        projection, query_width = state["q_proj.0.weight"].shape
        model_width = state["m_proj.0.weight"].shape[1]
        hidden = (state["fc_layers.0.weight"].shape[0], state["fc_layers.3.weight"].shape[0])
        return InteractionNir(query_width, model_width, projection=projection, hidden=hidden)
    if "q_proj_mlp.weight" in state:
        projection, query_width = state["q_proj_mlp.weight"].shape
        model_width = state["m_proj_mlp.weight"].shape[1]
        hidden = (state["fc_layers.0.weight"].shape[0], state["fc_layers.1.weight"].shape[0])
        return NcfNir(query_width, model_width, projection=projection, hidden=hidden)
    raise KeyError(f"neither q_proj.0.weight nor q_proj_mlp.weight among {sorted(map(str, state))[:6]}")
