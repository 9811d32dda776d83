"""The run folder: what a training leaves behind, and reading it back. safetensors and JSON, no pickle.

    run.json  encoder.safetensors  nir.safetensors  tokenizer.json  pool.json  heldout.jsonl.gz  metrics.json

``heldout.jsonl.gz`` holds the validation queries with their outcomes: export verifies the variants on them.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from arllm.runtime.calibration import Calibration
from arllm.runtime.errors import RunError
from arllm.runtime.pool import Pool, read_pool_json
from arllm.runtime.quality import Hdp
from arllm.runtime.tokens import TextTokenizer
from arllm.train.encoder import EncoderSpec, QueryEncoder
from arllm.train.nir import Nir, build_nir
from arllm.train.options import TrainOptions
from arllm.train.staging import write_json

RUN_VERSION = 2


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Validation queries and their outcomes, columns in the pool's order; NaN = not evaluated."""

    queries: tuple[str, ...]
    correct: NDArray[np.float32]  # (N, M)


@dataclass(frozen=True, eq=False)
class Run:
    """A finished training."""

    encoder: QueryEncoder
    nir: Nir
    hdp: Hdp
    calibration: Calibration  # of NIR
    domain_shares: tuple[float, ...]  # of the training queries
    mean_difficulty: float  # of the training queries
    tokenizer: Tokenizer
    pool: Pool  # with model vectors
    options: TrainOptions
    source: Mapping[str, Any]  # outcome files and hashes, split sizes, seed
    metrics: Mapping[str, Any]
    heldout: HeldOut

    @property
    def policies(self) -> dict[str, dict[str, Any]]:
        """As a manifest has them, the default first."""
        return {
            "nir": {"shape": self.nir.shape, "calibration": self.calibration.to_json()},
            "hdp": self.hdp.to_json(),
            "hdp-paper": {},
        }

    def text_tokenizer(self) -> TextTokenizer:
        return TextTokenizer(self.tokenizer, self.encoder.spec.tokens)


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of the named distributions; a missing one is left out."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_run(run: Run, folder: Path) -> None:
    """Write every file of ``run`` into an existing folder; run.json comes last, as the mark of completeness."""
    save_file(_plain_state(run.encoder), folder / "encoder.safetensors")
    save_file(_plain_state(run.nir), folder / "nir.safetensors")
    run.tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "pool.json", run.pool.to_json())
    write_json(folder / "metrics.json", run.metrics)
    with gzip.open(folder / "heldout.jsonl.gz", "wt", encoding="utf-8") as file:
        for query, row in zip(run.heldout.queries, run.heldout.correct.tolist(), strict=True):
            correct = [None if value != value else value for value in row]
            file.write(json.dumps({"query": query, "correct": correct}, ensure_ascii=False) + "\n")
    write_json(
        folder / "run.json",
        {
            "run_version": RUN_VERSION,
            "versions": versions("arllm", "torch", "transformers", "tokenizers", "numpy"),
            "options": run.options.to_json(),
            "encoder": run.encoder.spec.to_json(),
            "nir": {"shape": run.nir.shape},
            "calibration": run.calibration.to_json(),
            "domain_shares": list(run.domain_shares),
            "mean_difficulty": run.mean_difficulty,
            "hdp": run.hdp.to_json(),
            "source": dict(run.source),
        },
    )


def read_run(path: str | os.PathLike[str]) -> Run:
    """Read a run folder.

    Raises:
        RunError: names the file that is missing or unusable.
    """
    folder = Path(path)
    if not (folder / "run.json").is_file():
        raise RunError(f"{folder}: no finished run here (no run.json); make one with `arllm train`")
    try:
        data = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        if data["run_version"] > RUN_VERSION:
            raise RunError("from a newer arllm: pip install --upgrade arllm")
        if data["run_version"] < RUN_VERSION:
            raise RunError("from an older arllm, whose runs hold less: train again")
        spec = EncoderSpec.from_json(data["encoder"])
        encoder = QueryEncoder(spec)
        encoder.load_state_dict(load_file(folder / "encoder.safetensors"))
        nir = build_nir(data["nir"]["shape"], spec.query_width, len(spec.domains))
        nir.load_state_dict(load_file(folder / "nir.safetensors"))
        return Run(
            encoder=encoder.eval(),
            nir=nir.eval(),
            hdp=Hdp.from_json(data["hdp"], len(spec.domains)),
            calibration=Calibration.from_json(data["calibration"], len(spec.domains)),
            domain_shares=_shares(data, len(spec.domains)),
            mean_difficulty=_share(data["mean_difficulty"], "mean_difficulty"),
            tokenizer=Tokenizer.from_file(str(folder / "tokenizer.json")),
            pool=read_pool_json(folder / "pool.json"),
            options=TrainOptions.from_json(data["options"]),
            source=data["source"],
            metrics=json.loads((folder / "metrics.json").read_text(encoding="utf-8")),
            heldout=_read_heldout(folder / "heldout.jsonl.gz"),
        )
    except RunError as error:
        raise RunError(f"{folder / 'run.json'}: {error}") from None
    except Exception as error:  # tokenizers raises Exception itself, safetensors and gzip have errors of their own
        raise RunError(f"{folder}: the run folder is damaged: {type(error).__name__}: {error}") from None


def _shares(data: Mapping[str, Any], domains: int) -> tuple[float, ...]:
    shares = tuple(_share(value, "domain_shares") for value in data["domain_shares"])
    if len(shares) != domains:
        raise RunError(f"domain_shares has {len(shares)} numbers, the encoder {domains} domains")
    return shares


def _share(value: Any, field: str) -> float:
    share = float(value)
    if not 0.0 <= share <= 1.0:  # false for NaN as well
        raise RunError(f"{field} must lie in [0, 1], not {value}")
    return share


def _read_heldout(path: Path) -> HeldOut:
    queries, rows = [], []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            queries.append(record["query"])
            rows.append([np.nan if value is None else value for value in record["correct"]])
    if not queries:
        raise ValueError(f"{path.name} is empty")
    return HeldOut(tuple(queries), np.array(rows, dtype=np.float32))


def _plain_state(module: Any) -> dict[str, Any]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
