"""Another pool makes another bundle: a new folder with the graphs of an old one and a candidate more.

Writes pool.json, conformance.jsonl, the model card and the manifest anew and copies the rest. Needs neither torch nor
onnx; the runtime's own router says what the new bundle decides. Knows nothing about how a model vector was estimated.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from arllm.runtime.bundle import MANIFEST, Bundle, list_files, open_bundle, sha256_of
from arllm.runtime.errors import BundleIntegrityError, BundleSchemaError, ExportError, PoolError, VariantError
from arllm.runtime.pool import Candidate, Pool
from arllm.train.staging import staged_folder, write_json, write_jsonl

POOL, CONFORMANCE, CARD = "pool.json", "conformance.jsonl", "README.md"
HEADING = "## Candidates added later"


def check_addition(bundle: Bundle, candidate: Candidate, out: str | os.PathLike[str]) -> Pool:
    """The pool with the candidate in it, if it can be added; the candidate needs no model vector yet.

    Raises:
        PoolError: the pool holds this name.
        ExportError: ``out`` exists.
        VariantError: this host can't run every variant, so it can't say what the new bundle decides with it.
    """
    from arllm.runtime.session import why_not

    if candidate.name in bundle.pool.names:
        raise PoolError(
            f"{bundle.path}: the pool holds {candidate.name!r} already; give the newcomer another name, or train anew"
        )
    if Path(out).exists():
        raise ExportError(f"{out}: exists already; a bundle is never changed in place: choose another --out")
    for variant in bundle.manifest.variants.values():
        reason = why_not(variant)
        if reason:
            raise VariantError(
                f"{bundle.path}: variant {variant.name!r} can't run here: {reason}; what the new bundle decides with "
                "it must be recorded: add the candidate on a host that runs every variant"
            )
    return Pool((*bundle.pool.candidates, candidate), bundle.pool.unit)


def add_candidate(
    bundle: Bundle,
    candidate: Candidate,
    out: str | os.PathLike[str],
    note: str,
    offsets: Sequence[float] | None = None,
    *,
    addition: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> Bundle:
    """Write the bundle ``out``: the given one with ``candidate``, which has a model vector, in its pool.

    Graphs, tokenizer and parity.json are copied. Cost bounds are those of the new whole pool. ``conformance.jsonl``
    is recorded anew, over its own texts, for every variant. On any failure nothing is left behind.

    Args:
        note: a sentence or two for the model card.
        offsets: the candidate's row (1 + D logits) of every policy's calibration; None = the default row.
        addition: what the manifest's ``source.additions`` says beside the name: where the vector comes from.

    Raises:
        PoolError: the pool holds this name, or the model vector is missing or of another width.
        ExportError: ``out`` exists, or the offsets are of another width or have no calibration to go into.
        BundleError: a file of the old bundle is missing, changed or malformed.
        VariantError: this host can't run every variant.
    """
    out = Path(out)
    pool = check_addition(bundle, candidate, out)
    width = pool.vectors().shape[1]
    manifest: dict[str, Any] = json.loads(json.dumps(dict(bundle.manifest.raw)))
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    manifest |= {"name": out.name, "created": now}
    manifest["cost"] |= {"minimum": float(pool.costs[0]), "maximum": float(pool.costs[-1])}
    parent = {"name": bundle.manifest.name, "digest": bundle.digest}
    entry = {"name": candidate.name, **(addition or {}), "added": now, "to": parent}
    manifest["source"]["additions"] = [*manifest["source"].get("additions", []), entry]
    if offsets is not None:
        _set_offsets(manifest["policies"], candidate.name, offsets, 1 + width)
    with staged_folder(out) as staging:
        progress(f"copying {bundle.path}")
        _copy(bundle, staging)
        write_json(staging / POOL, pool.to_json())
        card = _card(bundle, candidate, note)
        (staging / CARD).write_text(card, encoding="utf-8")
        write_json(staging / MANIFEST, manifest | {"files": list_files(staging)})
        progress(f"recording what it decides with {', '.join(bundle.manifest.variants)}")
        write_jsonl(staging / CONFORMANCE, _conformance(bundle, staging))
        write_json(staging / MANIFEST, manifest | {"files": list_files(staging)})
        open_bundle(staging)  # what this version wrote, it must be able to read
    return open_bundle(out, verify=False)


def _copy(bundle: Bundle, staging: Path) -> None:
    """The files that stay as they are; each still has the hash by which the old manifest knows it."""
    for path, (sha256, _) in bundle.manifest.files.items():
        if path in (POOL, CONFORMANCE, CARD):
            continue
        target = staging / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.path / path, target)
        if sha256_of(target) != sha256:
            raise BundleIntegrityError(
                f"{bundle.path / path}: its sha256 differs from the manifest's: it was changed"
            )


def _set_offsets(policies: dict[str, Any], name: str, offsets: Sequence[float], width: int) -> None:
    if len(offsets) != width:
        raise ExportError(f"candidate {name!r} has {len(offsets)} calibration offsets, the bundle's have {width}")
    calibrations = [p["calibration"] for p in policies.values() if "calibration" in p]
    if not calibrations:
        raise ExportError(f"candidate {name!r} has calibration offsets, but no policy of the bundle is calibrated")
    for calibration in calibrations:
        calibration["offsets"][name] = [float(v) for v in offsets]


def _conformance(bundle: Bundle, staging: Path) -> list[dict[str, Any]]:
    """The lines of conformance.jsonl, over the texts or vectors of the old file, by the new bundle's routers."""
    from arllm.runtime.conformance import rows, vector_rows
    from arllm.runtime.router import Router

    path = bundle.path / CONFORMANCE
    key = "query_vector" if bundle.manifest.tokens is None else "text"
    probes: list[Any] = []
    try:
        for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n"):  # splitlines() also cuts at U+2028
            probe = json.loads(line)[key]
            if not isinstance(probe, str if key == "text" else list):
                raise TypeError(f"{key} is {type(probe).__name__}")
            probes.append(probe)
    except OSError as error:
        raise BundleSchemaError(f"{path}: can't be read: {error.strerror}") from None
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise BundleSchemaError(f"{path}: line {len(probes) + 1} is malformed or has no {key}: {error!r}") from None
    routers = {name: Router.load(staging, variant=name, verify=False) for name in bundle.manifest.variants}
    return vector_rows(routers, probes) if bundle.manifest.tokens is None else rows(routers, probes)


def _card(bundle: Bundle, candidate: Candidate, note: str) -> str:
    """The old model card with the candidate at its end; the figures above it are of the pool without it."""
    path = bundle.path / CARD
    card = path.read_text(encoding="utf-8") if CARD in bundle.manifest.files else f"# {bundle.manifest.name}\n"
    entry = (
        f"- `{candidate.name}`, cost {candidate.cost:g} {bundle.pool.unit}, added to `{bundle.manifest.name}` "
        f"(digest `{bundle.digest[:16]}`). {note}\n"
    )
    if HEADING in card:
        return f"{card.rstrip()}\n{entry}"
    return (
        f"{card.rstrip()}\n\n{HEADING}\n\nEverything above was written before, and measured without, these "
        "candidates. Nothing was retrained for them; cost bounds are those of the whole pool, they included.\n\n"
        f"{entry}"
    )
