"""What the latency benchmarks run: encoders with random weights, nano as a bundle and as a PyTorch router, and texts.

Latency does not depend on the weights' values, so that nothing has to be trained or downloaded. Texts come from
``../shared/data/prompts`` where a checkout has it; elsewhere they are made up, and the results say so.
"""

from __future__ import annotations

import copy
import gzip
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from arllm.export import authored, authored_int8, graphs, quantize
from arllm.runtime.bundle import MANIFEST, SHIPPED, list_files, open_bundle
from arllm.runtime.calibration import Calibration
from arllm.runtime.pool import Candidate, Pool
from arllm.runtime.quality import Hdp
from arllm.runtime.router import Router
from arllm.runtime.tokens import TextTokenizer, TokenSpec
from arllm.train import synthetic
from arllm.train.backbones import FULL, SLIDING, GemmaSpec, nano_spec
from arllm.train.encoder import EncoderSpec, QueryEncoder
from arllm.train.nir import build_nir
from arllm.train.options import TrainOptions
from arllm.train.run_router import run_router
from arllm.train.rundir import HeldOut, Run

LENGTHS = (16, 64, 256, 512)  # tokens of a query
CANDIDATES = 16
PROMPTS = Path(__file__).resolve().parents[2].parent / "shared/data/prompts/chat_prompts.jsonl.gz"

# EmbeddingGemma-300m's config.json but for the vocabulary: of 262,144 rows a query reads as many as it has tokens.
EMBEDDINGGEMMA = GemmaSpec(
    vocab_size=32_768,
    hidden_size=768,
    intermediate_size=1152,
    num_layers=24,
    num_heads=3,
    num_kv_heads=1,
    head_dim=256,
    window=257,
    layer_types=((SLIDING,) * 5 + (FULL,)) * 4,
    query_pre_attn_scalar=256,
    max_positions=2048,
)


def random_encoder(spec: GemmaSpec, max_tokens: int) -> QueryEncoder:
    """A query encoder of this backbone, as wide behind it as the bundle that ships."""
    torch.manual_seed(0)
    tokens = TokenSpec(max_tokens, (1,), (2,), 0)
    return QueryEncoder(EncoderSpec(spec, tokens, tuple(f"d{i}" for i in range(38)), 32)).eval()


def random_ids(vocabulary: int, length: int, count: int, seed: int = 0) -> list[NDArray[np.int64]]:
    """Queries of ``length`` random tokens, (length,) int64 each."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocabulary, size=length) for _ in range(count)]


def export_graphs(encoder: QueryEncoder, folder: Path, note: Callable[[str], None]) -> dict[str, Path]:
    """The graphs ``traced-fp32``, ``traced-int8``, ``authored-fp32``, ``authored-int8`` under ``folder``.

    A finished folder is used again, while what wrote it is the same: weights are random, but seeded.
    """
    wanted = mark(encoder.spec)
    paths = {f"{kind}-{p}": folder / f"{kind}-{p}" for kind in ("traced", "authored") for p in ("fp32", "int8")}
    finished = folder / "finished"
    if not finished.is_file() or finished.read_text(encoding="utf-8") != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        for path in paths.values():
            path.mkdir(parents=True)
        note("tracing")
        quantize.quantize_encoder(graphs.export_encoder(encoder, paths["traced-fp32"]), paths["traced-int8"])
        note("authoring; rounding the int8 weights takes a minute or so")
        authored.export_authored(encoder, paths["authored-fp32"])
        calibration = random_ids(encoder.spec.backbone.vocab_size, 64, 24, seed=1)
        authored_int8.export_authored_int8(encoder, paths["authored-int8"], calibration)
        finished.write_text(wanted, encoding="utf-8")
    return {name: path / "encoder.onnx" for name, path in paths.items()}


def mark(spec: EncoderSpec | GemmaSpec) -> str:
    """A hash of all that a graph comes from: the encoder's shape, the code of export, the versions."""
    code = [path.read_bytes() for path in sorted(Path(authored.__file__).parent.glob("*.py"))]
    said = json.dumps([spec.to_json(), torch.__version__, onnx.__version__]).encode()
    return hashlib.sha256(b"".join([said, *code])).hexdigest()


# --- nano -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Nano:
    """nano's shape with some layers: bundles to load from, and the same network in PyTorch."""

    title: str
    bundles: dict[str, tuple[Path, str]]  # arm → (bundle folder, variant)
    run: Run
    pool: Pool

    def torch_router(self) -> Router:
        return run_router(self.run, "pytorch", self.pool)


def pool_of(count: int, base: Pool) -> Pool:
    """``base`` cut or filled up to ``count`` candidates; those added stand between its cheapest and its dearest."""
    found = list(base.candidates[:count])
    while len(found) < count:
        twin = base.candidates[len(found) % len(base.candidates)]
        found.append(Candidate(f"{twin.name} ({len(found)})", twin.cost, twin.vector, {}))
    return Pool(tuple(found), base.unit)


def shipped_nano() -> Nano:
    """The bundle that ships, and a PyTorch network of its shape."""
    bundle = open_bundle("nano")
    variant = next(iter(bundle.manifest.variants))
    tokens = bundle.manifest.tokens
    assert tokens is not None
    return Nano(
        "nano as it ships",
        {f"arllm {variant}": (bundle.path, variant)},
        untrained_run(0, tokens.max_tokens),
        pool_of(CANDIDATES, bundle.pool),
    )


def layered_nano(layers: int, folder: Path, note: Callable[[str], None]) -> Nano:
    """nano with layers (``arllm train --layers``), random weights; bundles of authored and of traced graphs."""
    run = untrained_run(layers, 512)
    paths = export_graphs(run.encoder, folder / "graphs", note)
    bundles = {}
    for name, path in paths.items():
        bundles[f"arllm {name.replace('-', ' ')}"] = (_bundle(folder / "bundles" / name, path, name, run), name)
    return Nano(f"nano with {layers} layers", bundles, run, pool_of(CANDIDATES, run.pool))


def _bundle(folder: Path, graph: Path, name: str, run: Run) -> Path:
    """The bundle that ships with another encoder graph: tokenizer, pool, NIR and calibration stay."""
    source, inner = SHIPPED / "nano", folder / name
    shutil.rmtree(folder, ignore_errors=True)
    inner.mkdir(parents=True)
    for path in graph.parent.iterdir():
        shutil.copy(path, inner / path.name)
    for file in ("tokenizer.json", "pool.json"):
        shutil.copy(source / file, folder / file)
    manifest = json.loads((source / MANIFEST).read_text(encoding="utf-8"))
    variant = copy.deepcopy(manifest["variants"][0])
    shutil.copy(source / variant["graphs"]["nir"]["path"], inner / "nir.onnx")
    variant |= {"name": name, "precision": name.rpartition("-")[2]}
    variant["graphs"] = {
        kind: variant["graphs"][kind] | {"path": f"{name}/{kind}.onnx"} for kind in ("encoder", "nir")
    }
    manifest |= {"name": folder.name, "variants": [variant], "tokens": run.encoder.spec.tokens.to_json()}
    manifest["files"] = list_files(folder)
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def untrained_run(layers: int, max_tokens: int) -> Run:
    """A run of the shape of the bundle that ships, random weights, with ``layers`` layers."""
    bundle = open_bundle("nano")
    manifest = bundle.manifest
    assert manifest.tokens is not None
    assert manifest.domain_shares is not None
    assert manifest.mean_difficulty is not None
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_file(str(bundle.path / "tokenizer.json"))
    spec = EncoderSpec(
        nano_spec(tokenizer.get_vocab_size(), layers=layers),
        replace(manifest.tokens, max_tokens=max_tokens),
        manifest.domains,
        manifest.embedding_width,
    )
    nir = manifest.policies["nir"]
    return Run(
        encoder=QueryEncoder(spec).eval(),
        nir=build_nir(nir["shape"], spec.query_width, len(spec.domains)).eval(),
        hdp=Hdp.from_json(manifest.policies["hdp"], len(spec.domains)),
        calibration=Calibration.from_json(nir["calibration"], len(spec.domains)),
        domain_shares=manifest.domain_shares,
        mean_difficulty=manifest.mean_difficulty,
        tokenizer=tokenizer,
        pool=bundle.pool,
        options=TrainOptions(),
        source={},
        metrics={},
        heldout=HeldOut((), np.empty((0, len(bundle.pool.candidates)), dtype=np.float32)),
    )


# --- texts ----------------------------------------------------------------------------------------------------


def prompts(count: int | None = None) -> tuple[list[str], str]:
    """Texts of the realistic mix, a seeded sample of ``count``, and where they are from."""
    if PROMPTS.is_file():
        with gzip.open(PROMPTS, "rt", encoding="utf-8") as file:
            texts = [json.loads(line)["text"] for line in file]
        source = f"{len(texts):,} chat prompts of shared/data/prompts (Arena-Hard, FastChat, Open-Assistant)"
    else:
        texts, source = (
            [row["query"] for row in synthetic.generate(1000).queries],
            "SYNTHETIC texts: no shared/data/prompts here",
        )
    order = np.random.default_rng(0).permutation(len(texts))
    return [texts[i] for i in order[:count]], source


def texts_of(tokenizer: TextTokenizer, length: int, count: int, texts: Sequence[str]) -> list[str]:
    """``count`` texts that this tokenizer makes about ``length`` ids of, cut from ``texts`` strung together."""
    inner = tokenizer.tokenizer
    room = length - len(tokenizer.spec.prefix_ids) - len(tokenizer.spec.suffix_ids)
    found = []
    source = iter(texts)
    while len(found) < count:
        text, ids = "", 0
        while ids < room:
            text = f"{text}\n{next(source)}".strip()
            encoding = inner.encode(text, add_special_tokens=False)
            ids = len(encoding.ids)
        found.append(text[: encoding.offsets[room - 1][1]])
    return found
