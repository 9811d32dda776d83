"""``router.onnx`` of a bundle, fed as a host without this package feeds it: proof that it decides as the router does.

The router itself never opens this graph. What a port has to do stands here and in artifacts/README.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arllm.runtime.answer import Decision
from arllm.runtime.bundle import Bundle, Manifest, Variant
from arllm.runtime.calibration import Calibration
from arllm.runtime.decision import NUMERIC_TIE
from arllm.runtime.errors import VariantError
from arllm.runtime.pool import Pool
from arllm.runtime.session import Session

POLICY = "nir"  # the one that the graph holds
TOLERANCE = 1e-4  # of quality, absolute, on one host: the same graphs in one file


@dataclass(frozen=True, eq=False)
class Routed:
    """What the graph says of B queries and M candidates, these in the pool's order."""

    quality: NDArray[np.float64]  # (B, M)
    utility: NDArray[np.float64]  # (B, M), of candidates that are not allowed too
    choice: NDArray[np.int64]  # (B,), -1 where no candidate is allowed or beta is no preference
    familiarity: NDArray[np.float32]  # (B,)


class RouterGraph:
    """One ``router.onnx`` with the inputs that a pool fixes. Thread-safe."""

    def __init__(self, bundle: Bundle, variant: Variant, pool: Pool | None = None, threads: int = 1) -> None:
        """
        Args:
            pool: None = the bundle's own; another's candidates have model vectors.

        Raises:
            VariantError: the variant has no router.onnx, as bundles of schema 2 have none.
            BundleError: the graph can't be opened, or is not what the manifest says.
        """
        if variant.router is None:
            raise VariantError(f"{bundle.path}: variant {variant.name!r} has no router.onnx: export it anew")
        self._session = Session(bundle.path, variant.router, variant.provider, threads)
        self._pool = pool_inputs(bundle.manifest, bundle.pool if pool is None else pool)

    def run(
        self,
        input_ids: NDArray[np.int64],
        attention_mask: NDArray[np.int64],
        beta: NDArray[np.float64],
        mask: NDArray[np.bool_] | None = None,
    ) -> Routed:
        """Ids and mask (B, tokens), beta (B,), which candidates are allowed (M,), None = all."""
        inputs: dict[str, NDArray[Any]] = {"input_ids": input_ids, "attention_mask": attention_mask, "beta": beta}
        inputs |= self._pool if mask is None else {**self._pool, "candidate_mask": mask}
        results: list[Any] = list(self._session.run_many(("quality", "utility", "choice", "familiarity"), inputs))
        return Routed(*results)


def pool_inputs(manifest: Manifest, pool: Pool) -> dict[str, NDArray[Any]]:
    """The inputs of ``router.onnx`` that don't change from query to query; every candidate is allowed."""
    parameters = manifest.policies[POLICY]
    offsets = np.zeros((len(pool), 1 + len(manifest.domains)))
    if "calibration" in parameters:
        offsets = Calibration.from_json(parameters["calibration"], len(manifest.domains)).table(pool.names)
    return {
        "model_vectors": pool.vectors(),
        "offsets": offsets,
        "costs": pool.costs,
        "cost_bounds": np.array([manifest.cost_minimum, manifest.cost_maximum]),
        "candidate_mask": np.ones(len(pool), dtype=np.bool_),
    }


def compare(graph: RouterGraph, ids: NDArray[np.int64], decisions: Sequence[Decision]) -> tuple[float, list[str]]:
    """The largest difference of quality on one query, and what is wrong, against the router's decisions on it.

    ``decisions`` are of policy ``nir`` and the whole pool, each at a beta of its own. Choices may differ in a numeric
    tie of utilities.
    """
    worst, problems = 0.0, []
    row = ids[None]
    for decision in decisions:
        routed = graph.run(row, np.ones_like(row), np.array([decision.beta]))
        gap = float(np.max(np.abs(routed.quality[0] - decision.qualities)))
        worst = float(np.maximum(worst, gap))  # NaN where one is NaN
        where = f"router.onnx, beta {decision.beta:g}"
        if not gap <= TOLERANCE:
            problems.append(f"{where}: quality differs from the router's by {gap:.2g} (bound {TOLERANCE:g})")
        choice = int(routed.choice[0])
        model = decision.candidates[choice] if choice >= 0 else "nobody"
        lost = decision.utilities.max() - decision.utilities[choice] if choice >= 0 else np.inf
        if model != decision.model and not lost <= NUMERIC_TIE:
            problems.append(f"{where}: chose {model}, the router {decision.model}")
    return worst, problems
