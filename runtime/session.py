"""ONNX Runtime sessions: options, providers, threads, and what instruction sets this processor has."""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arllm.runtime.bundle import GRAPH_IO, Graph, Variant
from arllm.runtime.errors import BundleIntegrityError, BundleIOMismatchError, MissingExtraError, VariantError

try:
    import onnxruntime
except ImportError:
    raise MissingExtraError("onnxruntime", "cpu", "the runtime") from None

EXACT_SUMS = frozenset({"avx512_vnni", "arm64"})  # sum 8-bit products in 32 bits: integers right on one are on all
ONNX_TYPES = {
    "int64": "tensor(int64)",
    "float32": "tensor(float)",
    "float64": "tensor(double)",
    "bool": "tensor(bool)",
}


@functools.lru_cache(maxsize=1)
def instruction_sets() -> frozenset[str]:
    """Instruction sets that a variant can ask for, among ``avx2``, ``avx512_vnni`` and ``arm64``."""
    machine = platform.machine().lower()
    if machine in ("aarch64", "arm64"):
        return frozenset({"arm64"})
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore")
    except OSError:
        return frozenset()  # unknown: only variants that run everywhere are picked
    flags = set(cpuinfo.partition("flags")[2].partition("\n")[0].split())
    found = {name for name in ("avx2", "avx512_vnni") if name in flags}
    return frozenset(found)


def has_instruction_set(name: str) -> bool:
    """Whether integers that are right with the named instruction set, or with ``any``, are right here."""
    have = instruction_sets()
    return name == "any" or name in have or (name in EXACT_SUMS and bool(have & EXACT_SUMS))


def why_not(variant: Variant) -> str | None:
    """The reason why this machine can't run a variant as it was measured, or None where it can."""
    available = onnxruntime.get_available_providers()
    if variant.provider not in available:
        return f"needs {variant.provider}; this onnxruntime has {', '.join(available)}"
    if not has_instruction_set(variant.instruction_set):
        return f"its integers are right only with {variant.instruction_set}, which this processor lacks"
    return None


def pick_variant(variants: dict[str, Variant], wanted: str) -> Variant:
    """The wanted variant, or for ``auto`` the first in the manifest's order that this machine can run.

    Raises:
        VariantError: unknown, or not runnable here; says why for each.
    """
    if wanted != "auto":
        if wanted not in variants:
            raise VariantError(f"no variant {wanted!r}: the bundle has {', '.join(variants)}")
        reason = why_not(variants[wanted])
        if reason:
            raise VariantError(f"variant {wanted!r} can't run here: {reason}")
        return variants[wanted]
    reasons = []
    for variant in variants.values():
        reason = why_not(variant)
        if reason is None:
            return variant
        reasons.append(f"{variant.name}: {reason}")
    raise VariantError(f"no variant of the bundle can run here ({'; '.join(reasons)})")


class Session:
    """One graph, opened as the manifest says, its inputs and outputs checked against it."""

    def __init__(self, root: Path, graph: Graph, provider: str, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # A guest in somebody else's process: waiting threads sleep instead of burning the host's cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.enable_mem_pattern = False  # lengths differ from query to query: a pattern would never be reused
        path = self._path = root / graph.path
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
        except Exception as error:  # onnxruntime's exceptions share no public base
            detail = str(error).strip().splitlines()[0]
            raise BundleIntegrityError(f"{path}: ONNX Runtime can't open the graph: {detail}") from None
        active = self._session.get_providers()
        if active[0] != provider:
            raise VariantError(f"{path}: asked for {provider}, ONNX Runtime fell back to {active[0]}")
        for what, declared, live in (
            ("input", graph.inputs, self._session.get_inputs()),
            ("output", graph.outputs, self._session.get_outputs()),
        ):
            _check_io(path, what, declared, live)
        wanted, asked = GRAPH_IO[graph.kind]
        inputs, outputs = ({tensor.name for tensor in side} for side in (graph.inputs, graph.outputs))
        if inputs != wanted or not asked <= outputs:
            raise BundleIOMismatchError(
                f"{path}: as {graph.kind} it must take {', '.join(sorted(wanted))} and give "
                f"{', '.join(sorted(asked))}; it takes {', '.join(sorted(inputs))} and gives "
                f"{', '.join(sorted(outputs))}"
            )

    def run(self, output: str, inputs: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
        """One named output of the graph."""
        return self.run_many((output,), inputs)[0]

    def run_many(self, outputs: tuple[str, ...], inputs: dict[str, NDArray[Any]]) -> list[NDArray[np.float32]]:
        """Several named outputs of the graph, in the order asked for.

        Raises:
            BundleIOMismatchError: the graph does not take what the manifest promises (ids beyond its table, say).
        """
        try:
            results: list[NDArray[np.float32]] = self._session.run(outputs, inputs)
        except Exception as error:  # onnxruntime's exceptions share no public base
            detail = str(error).strip().splitlines()[0]
            raise BundleIOMismatchError(f"{self._path}: ONNX Runtime failed on the graph: {detail}") from None
        return results


def _check_io(path: Path, what: str, declared: tuple[Any, ...], live: list[Any]) -> None:
    want = {
        t.name: (ONNX_TYPES[t.dtype], len(t.dims), [d if isinstance(d, int) else "?" for d in t.dims])
        for t in declared
    }
    have = {t.name: (t.type, len(t.shape), [d if isinstance(d, int) else "?" for d in t.shape]) for t in live}
    for name in sorted(set(want) | set(have)):
        if want.get(name) != have.get(name):
            described = [
                "nothing" if side is None else f"{side[0]} of rank {side[1]}, dims {side[2]}"
                for side in (want.get(name), have.get(name))
            ]
            raise BundleIOMismatchError(
                f"{path}: {what} {name!r}: the manifest declares {described[0]}, the graph has {described[1]}"
            )
