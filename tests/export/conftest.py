"""Fixtures of the export tests: encoders of several shapes, each traced once, and one thread for tiny tensors."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from arllm.runtime.tokens import TokenSpec
from arllm.train.backbones import FULL, SLIDING, GemmaSpec, nano_spec
from arllm.train.encoder import EncoderSpec, QueryEncoder

BACKBONES = {
    "nano": nano_spec(300, layers=2),
    "layerless": nano_spec(300, layers=0),
    # Gemma-3-270M with a small vocabulary and two of its layers.
    "gemma3-270m": GemmaSpec(
        vocab_size=300,
        hidden_size=640,
        intermediate_size=2048,
        num_layers=2,
        num_heads=4,
        num_kv_heads=1,
        head_dim=256,
        window=257,
        layer_types=(SLIDING, FULL),
        query_pre_attn_scalar=256,
        max_positions=32_768,
    ),
    # Key/value heads shared by pairs, a window that binds early, scaled global positions.
    "grouped": dataclasses.replace(
        nano_spec(300, layers=3, width=64),
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        window=8,
        layer_types=(SLIDING, FULL, SLIDING),
        rope_factor=4.0,
    ),
}


@dataclass(frozen=True)
class Traced:
    """An encoder with random weights, in evaluation mode, and the folder of its fp32 graph."""

    encoder: QueryEncoder
    folder: Path


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Traced]:
    """Name of a backbone → its traced encoder. Read-only."""
    from arllm.export import graphs

    @functools.cache
    def trace(name: str) -> Traced:
        torch.manual_seed(len(name))
        spec = EncoderSpec(BACKBONES[name], TokenSpec(512, (1,), (2,), 0), ("a", "b", "c"), 8)
        encoder = QueryEncoder(spec).eval()
        with torch.no_grad():  # norms start at zero offset; trained ones don't
            for key, parameter in encoder.named_parameters():
                if "norm" in key:
                    parameter.normal_(0.0, 0.3)
            encoder.pair_density.random_(0, 20)
            encoder.familiar.copy_(torch.tensor([6.0, 13.0]))  # around the mean of 9.5
        folder = tmp_path_factory.mktemp("graphs") / name
        folder.mkdir()
        graphs.export_encoder(encoder, folder)
        return Traced(encoder, folder)

    return trace
