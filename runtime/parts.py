"""A router's parts out of an open bundle: encoder, policies, calibrations, a pool override completed.

Knows nothing about queries or decisions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from arllm.runtime.bundle import MANIFEST, Bundle, Variant
from arllm.runtime.calibration import Calibration, PoolCalibration
from arllm.runtime.encoder import QueryEncoder
from arllm.runtime.errors import BundleIOMismatchError, BundleSchemaError, CandidateError, PoolError
from arllm.runtime.pool import Candidate, Pool
from arllm.runtime.quality import Hdp, HdpPaper, Nir, Quality
from arllm.runtime.session import Opener
from arllm.runtime.tokens import TextTokenizer


def encoder(bundle: Bundle, variant: Variant, opener: Opener) -> QueryEncoder | None:
    """None in a NIR-only bundle.

    Raises:
        BundleError: the tokenizer or the graph can't be used.
    """
    manifest = bundle.manifest
    if variant.encoder is None or manifest.tokens is None:
        return None
    tokenizer = TextTokenizer.from_file(bundle.path / "tokenizer.json", manifest.tokens)
    session = opener(variant.encoder)
    width = next(t.dims[-1] for t in variant.encoder.outputs if t.name == "query_vector")
    if isinstance(width, int) and width != manifest.query_width:
        raise BundleIOMismatchError(
            f"{bundle.path / variant.encoder.path}: gives query vectors of {width} entries, the manifest's "
            f"domains, difficulty and embedding make {manifest.query_width}"
        )
    return QueryEncoder(tokenizer, session, variant.encoder, variant.batch_invariant)


def policies(bundle: Bundle, variant: Variant, opener: Opener) -> dict[str, Quality]:
    """The policies of the manifest, by name."""
    found: dict[str, Quality] = {}
    for name, parameters in bundle.manifest.policies.items():
        if name == "nir" and variant.nir is not None:
            found[name] = Nir(opener, variant.nir)
        elif name == "hdp":
            with _in_manifest(bundle, name):
                found[name] = Hdp.from_json(parameters, len(bundle.manifest.domains))
        elif name == "hdp-paper":
            found[name] = HdpPaper()
    return found


def calibrations(
    bundle: Bundle, names: Sequence[str], model_vectors: NDArray[np.float32]
) -> dict[str, PoolCalibration]:
    """The calibration of every policy that has one, over a pool: M names, model vectors (M, D)."""
    found = {}
    for name, parameters in bundle.manifest.policies.items():
        if "calibration" in parameters:
            with _in_manifest(bundle, name):
                calibration = Calibration.from_json(parameters["calibration"], len(bundle.manifest.domains))
            found[name] = PoolCalibration(calibration, calibration.table(names), model_vectors)
    return found


@contextlib.contextmanager
def _in_manifest(bundle: Bundle, policy: str) -> Iterator[None]:
    """Names the file and the policy in an error about its parameters."""
    try:
        yield
    except BundleSchemaError as error:
        raise BundleSchemaError(f"{bundle.path / MANIFEST}: policies.{policy}: {error}") from None


def with_bundle_vectors(given: Pool, bundled: Pool) -> Pool:
    """A pool override whose candidates all have model vectors, the bundle's where it gives none.

    Raises:
        PoolError: another unit. CandidateError: a candidate without a vector that the bundle doesn't know.
    """
    if given.unit != bundled.unit and "unspecified" not in (given.unit, bundled.unit):
        raise PoolError(
            f"the pool override's costs are in {given.unit!r}, the bundle's in {bundled.unit!r}: "
            "beta would lose its meaning; convert them"
        )
    known = {candidate.name: candidate for candidate in bundled.candidates}
    rows = []
    for candidate in given.candidates:
        vector = candidate.vector
        if vector is None:
            if candidate.name not in known:
                raise CandidateError(
                    f"candidate {candidate.name!r} of the pool override has no model vector and is not in the "
                    f"bundle ({', '.join(known)})"
                )
            vector = known[candidate.name].vector
        rows.append(Candidate(candidate.name, candidate.cost, vector, candidate.metadata))
    return Pool(tuple(rows), given.unit)
