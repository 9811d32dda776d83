"""A run as a router, by PyTorch: what `arllm eval RUN` judges before anything is exported."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from arllm.runtime.bundle import SCHEMA_VERSION, Bundle, Manifest
from arllm.runtime.encoder import QueryEncoder
from arllm.runtime.pool import Pool
from arllm.runtime.quality import HdpPaper, Predict, Quality
from arllm.runtime.router import Router
from arllm.runtime.tokens import TextTokenizer
from arllm.train.encoder import QueryEncoder as Network
from arllm.train.nir import Nir
from arllm.train.rundir import Run


class _Encoder(QueryEncoder):
    """The runtime's encoder with PyTorch in the place of the session."""

    def __init__(self, tokenizer: TextTokenizer, network: Network) -> None:
        self.tokenizer, self._network = tokenizer, network

    def encode(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        one = torch.from_numpy(ids)[None]
        mask = torch.ones_like(one)
        with torch.inference_mode():
            vector = self._network(one, mask).query_vector
            return vector.numpy(), self._network.familiarity(one, mask).numpy()


class _Nir(Quality):
    """The policy with PyTorch in the place of the graph."""

    def __init__(self, nir: Nir) -> None:
        self._nir = nir

    def bind(self, model_vectors: NDArray[np.float32]) -> Predict:
        return lambda query_vectors: self._nir.quality(query_vectors, model_vectors)


def run_router(run: Run, path: str | os.PathLike[str], pool: Pool | None = None) -> Router:
    """The run in ``path`` as a :class:`Router` that decides as its bundle would."""
    spec, costs = run.encoder.spec, run.pool.costs
    manifest = Manifest(
        name=Path(path).name,
        producer={},
        source=run.source,
        domains=spec.domains,
        embedding_width=spec.embedding_width,
        domain_shares=run.domain_shares,
        mean_difficulty=run.mean_difficulty,
        tokens=spec.tokens,
        default_policy="nir",
        policies=run.policies,
        cost_minimum=float(costs.min()),
        cost_maximum=float(costs.max()),
        variants={},
        files={},
        raw={"schema_version": SCHEMA_VERSION},
    )
    policies: dict[str, Quality] = {"nir": _Nir(run.nir), "hdp": run.hdp, "hdp-paper": HdpPaper()}
    encoder = _Encoder(run.text_tokenizer(), run.encoder)
    return Router(Bundle(Path(path), manifest, run.pool, ""), "pytorch", encoder, policies, pool)
