"""What makes the published path slow, one step at a time: padding, second encoder, pair loop, runtime, int8.

    python tests/benchmarks/published_path.py --out out/bench/published.json [--rounds 3] [--smoke]

The published path: two encoders in PyTorch fp32, every query padded to 2,048 tokens, then a Python loop over the
candidates through NIR. Each arm undoes one thing more than the one before it. Random weights of EmbeddingGemma's
shape; token ids are given, tokenization is left out of all arms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import engines
import numpy as np
import shapes
import torch
from environments import cache_folder
from interleave import interleaved
from record import arguments, note, record
from torch import Tensor, nn

from arllm.export import authored_nir
from arllm.train.backbones import GemmaSpec, build_model
from arllm.train.nir import InteractionNir

PADDED = 2048
DOMAINS = 3  # of the published query vector; difficulty is the fourth entry

# Arm → what it no longer does, and by which factor of the table the step to it is called.
STEPS = {
    "as published": "",
    "no padding": "padding",
    "one encoder": "second encoder",
    "all pairs at once": "loop over pairs",
    "ONNX Runtime, authored fp32": "runtime",
    "ONNX Runtime, authored int8": "int8",
}


class PublishedEncoder(nn.Module):
    """Backbone, unmasked mean over all positions, two hidden layers, classifier; dropout is off when it serves."""

    def __init__(self, spec: GemmaSpec, outputs: int) -> None:
        super().__init__()
        self.backbone = build_model(spec)
        width = spec.hidden_size
        self.fc1, self.fc2, self.classifier = nn.Linear(width, 768), nn.Linear(768, 768), nn.Linear(768, outputs)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        pooled = self.backbone(input_ids=ids, attention_mask=mask).last_hidden_state.mean(dim=1)
        logits: Tensor = self.classifier(torch.relu(self.fc2(torch.relu(self.fc1(pooled)))))
        return logits


def padded(ids: Any) -> tuple[Tensor, Tensor]:
    row = torch.zeros((1, PADDED), dtype=torch.int64)
    mask = torch.zeros_like(row)
    row[0, : len(ids)], mask[0, : len(ids)] = torch.from_numpy(ids), 1
    return row, mask


def alone(ids: Any) -> tuple[Tensor, Tensor]:
    row = torch.from_numpy(ids)[None]
    return row, torch.ones_like(row)


def arms_of(spec: GemmaSpec, cache: Path, threads: int) -> dict[str, Callable[[Any], object]]:
    """The steps, each a function of ids (L,) int64 that ends with a quality for every candidate.

    The encoder that all candidates share has more domains than the published ones; NIR reads the first entries.
    """
    torch.manual_seed(0)
    domain, difficulty = (PublishedEncoder(spec, outputs).eval() for outputs in (DOMAINS, 1))
    nir = InteractionNir(DOMAINS + 1, DOMAINS).eval()
    models = torch.rand(shapes.CANDIDATES, DOMAINS)
    both = shapes.random_encoder(spec, PADDED)
    small = shapes.export_graphs(both, cache / f"gemma-{spec.num_layers}", note)  # those of engines.py
    graph = cache / "published-nir"
    graph.mkdir(exist_ok=True)
    scorer = engines.session(authored_nir.export_nir(nir, graph), threads)
    vectors = models.numpy()

    def two(inputs: Callable[[Any], tuple[Tensor, Tensor]]) -> Callable[[Any], Tensor]:
        def encode(ids: Any) -> Tensor:
            row, mask = inputs(ids)
            return torch.cat([domain(row, mask).softmax(-1), difficulty(row, mask).sigmoid()], dim=-1)

        return encode

    def one(ids: Any) -> Tensor:
        return both(*alone(ids)).query_vector[:, : DOMAINS + 1]

    def loop(encode: Callable[[Any], Tensor]) -> Callable[[Any], object]:
        def run(ids: Any) -> object:
            with torch.inference_mode():
                vector = encode(ids)
                return [torch.sigmoid(nir(vector, model[None])).item() for model in models]

        return run

    def at_once(ids: Any) -> object:
        with torch.inference_mode():
            return torch.sigmoid(nir.all_pairs(one(ids), models)).numpy()

    def exported(path: Path) -> Callable[[Any], object]:
        encoder = engines.session(path, threads)

        def run(ids: Any) -> object:
            inputs = {"input_ids": ids[None], "attention_mask": np.ones_like(ids)[None]}
            vector = encoder.run(["query_vector"], inputs)[0][:, : DOMAINS + 1]
            return scorer.run(["quality"], {"query_vectors": vector, "model_vectors": vectors})[0]

        return run

    functions = (
        loop(two(padded)),
        loop(two(alone)),
        loop(one),
        at_once,
        exported(small["authored-fp32"]),
        exported(small["authored-int8"]),
    )
    return dict(zip(STEPS, functions, strict=True))


def run(rounds: int, lengths: Sequence[int], cache: Path, *, small: bool = False) -> dict[str, Any]:
    spec = shapes.EMBEDDINGGEMMA
    if small:
        spec = replace(spec, num_layers=2, layer_types=spec.layer_types[4:6])
    threads = engines.THREADS[0]
    functions = arms_of(spec, cache, threads)
    note(f"published path: {', '.join(map(str, lengths))} tokens")
    first, *others = functions
    queries = {length: shapes.random_ids(spec.vocab_size, length, engines.QUERIES) for length in lengths}
    # Padded, every query takes the same time: once a round stands for all lengths.
    arms = {(first, lengths[0]): engines.on(threads, functions[first], queries[lengths[0]])}
    arms |= {(name, n): engines.on(threads, functions[name], queries[n]) for name in others for n in lengths}
    found = interleaved(arms, rounds)
    times = {name: {str(n): found[name, n] for n in lengths} for name in others}
    times = {first: {str(n): found[first, lengths[0]] for n in lengths}} | times
    return {
        "rounds": rounds,
        "lengths": list(lengths),
        "layers": spec.num_layers,
        "threads": threads,
        "steps": STEPS,
        "times": times,
    }


def main() -> None:
    given = arguments("The published path, its factor split.", "rounds", 3, "of every length").parse_args()
    rounds = 2 if given.smoke else given.rounds
    lengths = shapes.LENGTHS[:2] if given.smoke else shapes.LENGTHS
    record(given.out, lambda: run(rounds, lengths, cache_folder(), small=given.smoke))


if __name__ == "__main__":
    main()
