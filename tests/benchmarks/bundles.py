"""Whole bundles by ``arllm bench``: nano, and one of EmbeddingGemma's shape with a trimmed vocabulary, as JSON.

    python tests/benchmarks/bundles.py --out out/bench/bundles.json [--seconds 60] [--smoke]

The second has EmbeddingGemma's layers and widths, random weights, and Gemma's genuine tokenizer of 262,144 pieces
(extra ``gemma3-270m``), cut to the 65,536 learned first: what it takes on disk, in memory and at a cold start
depends on no weight's value. It is exported once and kept in the benchmarks' cache.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import shapes
import torch
from environments import cache_folder
from record import arguments, note, record

from arllm.runtime.bundle import open_bundle
from arllm.runtime.errors import ArllmError
from arllm.train.encoder import EncoderSpec, QueryEncoder
from arllm.train.gemma_gguf import assemble, read_tokenizer
from arllm.train.nir import build_nir
from arllm.train.rundir import HeldOut, Run, write_run

PIECES = 65_536
MAX_TOKENS = 512
ARLLM = [sys.executable, "-c", "from arllm.cli import main; main()"]


def whole_gemma() -> Run:
    """An untrained run of EmbeddingGemma's whole shape. Raises ArllmError: Gemma's tokenizer is not installed."""
    tokenizer = read_tokenizer(assemble()[0])
    like = shapes.untrained_run(0, MAX_TOKENS)
    spec = like.encoder.spec
    tokens = replace(spec.tokens, prefix_ids=(2,), suffix_ids=(1,), pad_id=0)
    backbone = replace(shapes.EMBEDDINGGEMMA, vocab_size=tokenizer.get_vocab_size())
    spec = EncoderSpec(backbone, tokens, spec.domains, spec.embedding_width)
    torch.manual_seed(0)
    nir = build_nir(like.nir.shape, spec.query_width, len(spec.domains)).eval()
    texts = shapes.prompts(200)[0]
    heldout = HeldOut(tuple(texts), np.zeros((len(texts), len(like.pool.candidates)), np.float32))
    return replace(like, encoder=QueryEncoder(spec).eval(), tokenizer=tokenizer, nir=nir, heldout=heldout)


def gemma_bundle(folder: Path) -> Path:
    """The bundle in ``folder``, exported where the code that makes it has changed."""
    bundle, finished, wanted = folder / "bundle", folder / "finished", shapes.mark(shapes.EMBEDDINGGEMMA)
    if not finished.is_file() or finished.read_text(encoding="utf-8") != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "run").mkdir(parents=True)
        note("exporting a bundle of EmbeddingGemma's shape takes some minutes")
        write_run(whole_gemma(), folder / "run")
        command = [*ARLLM, "export", str(folder / "run"), "--out", str(bundle), "--variant", "cpu-int8"]
        command += ["--trim-vocabulary", str(PIECES), "--verify-queries", "40"]
        subprocess.run(command, check=True, stdout=sys.stderr)
        shutil.rmtree(folder / "run")
        finished.write_text(wanted, encoding="utf-8")
    return bundle


def measure(title: str, bundle: Path, seconds: float) -> dict[str, Any]:
    """``arllm bench`` in a process of its own, and the size on disk."""
    note(f"arllm bench: {title}")
    command = [*ARLLM, "bench", str(bundle), "--seconds", str(seconds), "--json"]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    size = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
    return {"title": title, "bytes": size, "bench": found}


def run(seconds: float, cache: Path, *, small: bool = False) -> dict[str, Any]:
    torch.set_grad_enabled(False)
    found: dict[str, Any] = {"bundles": [measure("nano", open_bundle("nano").path, seconds)]}
    if small:
        return found
    title = f"EmbeddingGemma's shape, int8, {PIECES:,} pieces"
    try:
        found["bundles"].append(measure(title, gemma_bundle(cache / "gemma-whole"), seconds))
    except (ArllmError, subprocess.CalledProcessError) as error:
        found["missing"] = f"{title}: {error}"
        note(found["missing"])
    return found


def main() -> None:
    given = arguments("Whole bundles, by arllm bench.", "seconds", 60, "of each bundle").parse_args()
    seconds = 2 if given.smoke else given.seconds
    record(given.out, lambda: run(seconds, cache_folder(), small=given.smoke))


if __name__ == "__main__":
    main()
