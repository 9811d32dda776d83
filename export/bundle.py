"""Building a bundle: stage the graphs, verify them, write manifest and model card, publish by one rename."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from arllm.export import authored_nir, conformance, cuda, latency, parity, routing, trimming
from arllm.export.card import model_card
from arllm.export.targets import target_of
from arllm.export.variants import DEFAULT, VARIANTS, Material, Written
from arllm.runtime.bundle import GRAPH_IO, MANIFEST, SCHEMA_VERSION, list_files, open_bundle
from arllm.runtime.conformance import rows as text_rows
from arllm.runtime.conformance import vector_rows
from arllm.runtime.errors import ExportError
from arllm.runtime.pool import Pool
from arllm.runtime.router import Router
from arllm.runtime.session import CPU
from arllm.runtime.tokens import TokenSpec
from arllm.train.rundir import Run, versions
from arllm.train.staging import staged_folder, write_json, write_jsonl

Progress = Callable[[str], None]
CALIBRATION = 256  # held-out queries, at most, on which integers are calibrated
PRODUCERS = ("arllm", "torch", "transformers", "optimum-onnx", "onnx", "onnxruntime", "tokenizers")
ONNX_DTYPES = {
    onnx.TensorProto.INT64: "int64",
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.DOUBLE: "float64",
    onnx.TensorProto.BOOL: "bool",
}


@dataclass(frozen=True, eq=False)
class Content:
    """What a bundle says of itself beside its graphs."""

    name: str
    source: Mapping[str, Any]
    domains: tuple[str, ...]
    embedding_width: int
    domain_shares: tuple[float, ...] | None
    mean_difficulty: float | None
    tokens: TokenSpec | None
    policies: Mapping[str, Mapping[str, Any]]
    pool: Pool
    metrics: Mapping[str, Any]
    evaluation: Mapping[str, Any] | None = None  # what `arllm eval --json` printed of this very router


def export_run(
    run: Run,
    out: str | os.PathLike[str],
    *,
    name: str | None = None,
    variants: Sequence[str] = DEFAULT,
    target: str = "auto",
    verify_queries: int = 2000,
    trim_vocabulary: str | None = None,
    note: str | None = None,
    evaluation: Mapping[str, Any] | None = None,
    progress: Progress = lambda message: print(message, file=sys.stderr),
) -> dict[str, Any]:
    """Export a run as a bundle folder ``out`` and return its parity report.

    Every variant is verified against PyTorch on up to ``verify_queries`` held-out queries and on texts of many
    lengths before the bundle appears under its name; on any failure nothing is left behind. ``target`` names the
    processor that integers are made for: see :mod:`arllm.export.targets`. ``trim_vocabulary`` is what
    :func:`arllm.export.trimming.trim` keeps: the bundle is then that of the trimmed run. A variant for CUDA is
    verified on this machine's card; without one, by its graph emulated on the CPU, and the manifest says that no card
    verified it.

    Raises:
        ParityError: a variant is past its bound.
        ExportError: ``out`` exists, a variant or the target is unknown, or its integers can't be verified here; not
            one variant runs here; the backbone has no CUDA variant.
    """
    out = Path(out)
    unknown = [v for v in variants if v not in VARIANTS]
    if unknown or not variants:
        raise ExportError(f"unknown variant {unknown[:1]}: choose among {', '.join(VARIANTS)}")
    folder = bundle_folder(out)  # refused before the work, not after it
    if trim_vocabulary is not None:
        run = trimming.trim(run, trim_vocabulary, verify_queries, progress)
    encoder = run.encoder
    backbone = dict(encoder.spec.source)
    content = Content(
        name=name or out.name,
        source={**run.source, **({"note": note} if note else {}), "backbone": backbone},
        domains=encoder.spec.domains,
        embedding_width=encoder.spec.embedding_width,
        tokens=encoder.spec.tokens,
        domain_shares=run.domain_shares,
        mean_difficulty=run.mean_difficulty,
        policies=run.policies,
        pool=run.pool,
        metrics=run.metrics,
        evaluation=evaluation,
    )
    verification, calibration = split_heldout(run, verify_queries)
    tokenizer = run.text_tokenizer()
    queries = [tokenizer.encode(run.heldout.queries[i])[0] for i in calibration]
    material = Material(encoder, queries, target_of(target))
    with folder as staging:
        reference = _reference(run, verification, progress)
        run.tokenizer.save(str(staging / "tokenizer.json"))
        progress("writing NIR")
        nir = authored_nir.export_nir(run.nir, staging)
        written = {}
        for variant in (v for v in VARIANTS if v in variants):
            progress(f"writing the encoder of {variant}")
            (staging / variant).mkdir()
            written[variant] = VARIANTS[variant].write(material, staging / variant)
            shutil.copyfile(nir, staging / variant / nir.name)
        nir.unlink()
        return finish(content, staging, written, reference, conformance.TEXTS, progress)


def finish(
    content: Content,
    staging: Path,
    written: Mapping[str, Written],
    reference: parity.Reference,
    probes: Sequence[Any],
    progress: Progress,
) -> dict[str, Any]:
    """The last steps of every bundle, whose graphs stand in ``staging``: manifest, verification, conformance, card.

    ``written`` says how the graphs of each variant came to be, in order of preference for "auto". ``probes`` are
    texts, or query vectors where the bundle has no encoder.
    """
    write_json(staging / "pool.json", content.pool.to_json())
    routed = content.tokens is not None and next(iter(content.policies)) == "nir"
    whole = [variant for variant in written if routed and VARIANTS[variant].provider == CPU]
    for variant in whole:
        routing.export_router(staging / variant, content)
    _write_manifest(content, staging, written, {}, {})
    opened = open_bundle(staging, verify=False)
    cards = {name: cuda.verified_on(variant) for name, variant in opened.manifest.variants.items()}
    runnable = [variant for variant in written if cards[variant] != []]
    if not runnable:
        raise ExportError(f"no card here runs {', '.join(written)}: name cpu-fp32 too, for a record of what is right")
    routers, reports = {}, {}
    for variant in written:
        progress(f"verifying {variant} against PyTorch on {len(reference.query_vectors)} queries")
        with tempfile.TemporaryDirectory() as scratch:
            if variant in runnable:
                router = routers[variant] = Router.load(staging, variant=variant, verify=False)
            else:
                progress(f"no card here runs {variant}: its graph is emulated on the CPU")
                router = cuda.stand_in(opened, variant, Path(scratch))
            reports[variant] = {
                "graph": written[variant].graph,
                "bytes": _size(staging / variant),
                **({} if cards[variant] is None else {"verified_on": cards[variant]}),
                **parity.measure(router, reference),
            }
        parity.check(reports[variant], variant, VARIANTS[variant].precision)
        if variant in whole:
            routing.verify_router(router, probes)
    if content.tokens is not None:
        progress("timing the encoders")
        sessions = {variant: parity.encoder_session(router) for variant, router in routers.items()}
        for variant, figures in latency.measure(sessions, reference.ids, content.tokens.max_tokens).items():
            reports[variant]["latency"] = figures
    rows = text_rows if content.tokens is not None else vector_rows
    write_jsonl(staging / "conformance.jsonl", rows(routers, probes))
    trimmed = {key: content.source[key] for key in (trimming.SOURCE_KEY,) if key in content.source}
    write_json(staging / "parity.json", {"betas": list(parity.BETAS), **trimmed, "variants": reports})
    default = next(iter(content.policies))
    summaries = {variant: parity.summary(report, default) for variant, report in reports.items()}
    (staging / "README.md").write_text(model_card(content, written, summaries), encoding="utf-8")
    first = sorted(written, key=lambda variant: not cards[variant])  # "auto" takes a card that was measured, if any
    _write_manifest(content, staging, {variant: written[variant] for variant in first}, summaries, cards)
    return reports


def split_heldout(run: Run, verify_queries: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the held-out queries to verify on, and of those to calibrate integers on: a quarter, or none.

    A run keeps no training query. What verifies must not have calibrated: the two share no query, unless there is
    but one.
    """
    order = np.random.default_rng(0).permutation(len(run.heldout.queries))
    layers = run.encoder.spec.backbone.num_layers
    count = max(1, min(CALIBRATION, len(order) // 4)) if layers else 0
    return order[: max(1, min(verify_queries, len(order) - count))], order[len(order) - count :]


def _reference(run: Run, picked: NDArray[np.int64], progress: Progress) -> parity.Reference:
    """PyTorch's answers on held-out queries, and on cuts and joins of them that cover every length."""
    tokenizer = run.text_tokenizer()
    texts = [run.heldout.queries[i] for i in picked]
    joined = "\n\n".join(texts[:200])
    lengths = [text for k in range(13) for text in (joined[: 2**k], joined[-(2**k) - 7 :])]
    blank = np.full((len(lengths), len(run.pool)), np.nan, dtype=np.float32)
    ids = [tokenizer.encode(text)[0] for text in (*texts, *lengths)]
    progress(f"encoding {len(ids)} texts with PyTorch")
    vectors, familiarity, pooled = parity.encode_reference(run.encoder, ids)
    correct = np.concatenate([run.heldout.correct[picked], blank])
    return parity.Reference(run.encoder, run.nir, run.hdp, vectors, familiarity, pooled, ids, correct)


def _write_manifest(
    content: Content,
    staging: Path,
    written: Mapping[str, Written],
    summaries: Mapping[str, Mapping[str, Any]],
    cards: Mapping[str, list[str] | None],
) -> None:
    costs: NDArray[np.float64] = content.pool.costs
    write_json(
        staging / MANIFEST,
        {
            "schema_version": SCHEMA_VERSION,
            "name": content.name,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "producer": versions(*PRODUCERS),
            "source": content.source,
            "query": {
                "domains": list(content.domains),
                "embedding_width": content.embedding_width,
                "domain_shares": None if content.domain_shares is None else list(content.domain_shares),
                "mean_difficulty": content.mean_difficulty,
            },
            "tokens": None if content.tokens is None else content.tokens.to_json(),
            "default_policy": next(iter(content.policies)),
            "policies": content.policies,
            "cost": {"unit": content.pool.unit, "minimum": float(costs.min()), "maximum": float(costs.max())},
            "variants": [
                {
                    "name": variant,
                    "provider": VARIANTS[variant].provider,
                    "precision": VARIANTS[variant].precision,
                    "instruction_set": how.instruction_set,
                    "graph": how.graph,
                    "graph_reason": how.reason,
                    "graphs": {
                        kind: _graph(staging, f"{variant}/{kind}.onnx")
                        for kind in GRAPH_IO
                        if (staging / variant / f"{kind}.onnx").is_file()
                    },
                    "parity": summaries.get(variant, {}),
                    **({} if cards.get(variant) is None else {"verified_on": cards[variant]}),
                }
                for variant, how in written.items()
            ],
            "files": list_files(staging),
        },
    )


def _graph(staging: Path, path: str) -> dict[str, Any]:
    graph = onnx.load(str(staging / path), load_external_data=False).graph

    def tensors(values: Any) -> list[dict[str, Any]]:
        return [
            {
                "name": value.name,
                "dtype": ONNX_DTYPES[value.type.tensor_type.elem_type],
                "dims": [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim],
            }
            for value in values
        ]

    return {"path": path, "inputs": tensors(graph.input), "outputs": tensors(graph.output)}


def bundle_folder(out: Path) -> AbstractContextManager[Path]:
    """A staging folder that becomes the bundle ``out``.

    Raises:
        ExportError: ``out`` exists: a bundle is immutable.
    """
    if out.exists():
        raise ExportError(f"{out}: exists already; a bundle is never changed in place: choose another --out")
    return staged_folder(out)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
