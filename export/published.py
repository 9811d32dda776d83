"""A NIR-only bundle from a published NIR checkpoint: it routes given query vectors (``Router.route_vector``).

Published NIR weights were fitted on the query vectors of the published encoders (unmasked means over 2,048
padded tokens). An encoder that pools differently gives other vectors for the same text, so this bundle holds no
encoder: whoever has the published vectors can route them, nobody feeds it others by accident.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arllm.export import authored_nir, parity
from arllm.export.bundle import Content, bundle_folder, finish
from arllm.export.variants import Written
from arllm.runtime.bundle import sha256_of
from arllm.runtime.errors import ExportError
from arllm.runtime.pool import Pool
from arllm.train.nir import load_published

Progress = Callable[[str], None]


def export_checkpoint(
    checkpoint: str | os.PathLike[str],
    domains: Sequence[str],
    pool: Pool,
    out: str | os.PathLike[str],
    *,
    name: str | None = None,
    note: str | None = None,
    vector_domains: Sequence[str] | None = None,
    progress: Progress = lambda message: print(message, file=sys.stderr),
) -> dict[str, Any]:
    """Export a published NIR checkpoint with a pool whose model vectors follow ``domains``.

    Args:
        name: the bundle's; None = that of the folder.
        note: a remark for the model card.
        vector_domains: what the pool file itself calls its vectors' entries, where it does.

    Raises:
        RunError: the checkpoint fits neither published shape.
        ExportError: the widths of checkpoint, domains and pool disagree, ``domains`` orders the pool's own names
            otherwise, or ``out`` exists.
        ParityError: the graph differs from PyTorch by more than its bound.
    """
    out, checkpoint = Path(out), Path(checkpoint)
    net = load_published(checkpoint)
    width = len(domains)
    if not width or len(set(domains)) != width or not all(domains):
        raise ExportError(f"--domains must name distinct domains, not {','.join(domains)!r}")
    if net.query_width != width + 1:
        raise ExportError(
            f"{checkpoint}: expects query vectors of {net.query_width} entries; {width} domains and the difficulty "
            f"make {width + 1}: name {net.query_width - 1} domains, in the order of its training"
        )
    vectors = pool.vectors()
    if net.model_width != width or vectors.shape[1] != width:
        raise ExportError(
            f"{checkpoint}: expects model vectors of {net.model_width} entries, the pool's have {vectors.shape[1]}, "
            f"--domains names {width}: all three must be equal"
        )
    if vector_domains is not None and set(vector_domains) == set(domains) and tuple(vector_domains) != tuple(domains):
        raise ExportError(
            f"--domains orders them {', '.join(domains)}, the pool's model vectors {', '.join(vector_domains)}: "
            "the checkpoint's order of training must be both"
        )
    rng = np.random.default_rng(0)
    probabilities = np.concatenate([rng.dirichlet(np.ones(width), 400), np.eye(width)])
    difficulty = rng.random((len(probabilities), 1))
    query_vectors = np.concatenate([probabilities, difficulty], axis=1).astype(np.float32)
    reference = parity.Reference(None, net, None, query_vectors, None, None, (), None)
    content = Content(
        name=name or out.name,
        source={
            "checkpoint": {"path": str(checkpoint), "sha256": sha256_of(checkpoint)},
            **({"note": note} if note else {}),
        },
        domains=tuple(domains),
        embedding_width=0,
        domain_shares=None,
        mean_difficulty=None,
        tokens=None,
        policies={"nir": {"shape": net.shape}, "hdp-paper": {}},
        pool=pool,
        metrics={},
    )
    with bundle_folder(out) as staging:
        folder = staging / "cpu-fp32"
        folder.mkdir()
        authored_nir.export_nir(net, folder)
        written = {"cpu-fp32": Written("authored", "NIR alone, without an encoder")}
        return finish(content, staging, written, reference, query_vectors[::40].tolist(), progress)
