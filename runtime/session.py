"""ONNX Runtime sessions: options, providers, threads, and what instruction sets this processor has."""

from __future__ import annotations

import contextlib
import functools
import itertools
import platform
import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from arllm.runtime.bundle import GRAPH_IO, Graph, Tensor, Variant
from arllm.runtime.constants import with_constant
from arllm.runtime.devices import cuda_devices
from arllm.runtime.errors import BundleIntegrityError, BundleIOMismatchError, MissingExtraError, VariantError

try:
    import onnxruntime
except ImportError:
    raise MissingExtraError("onnxruntime", "cpu", "the runtime") from None

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
CUDA_OPTIONS = {
    "use_tf32": "0",  # products of float32 cut to 10 bits are not what parity was measured on
    "arena_extend_strategy": "kSameAsRequested",  # a guest: no more of the card's memory than it needs
}
BFLOAT16_SINCE = (8, 0)  # compute capability of the first cards with products of that type
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
        mend = ': pip uninstall onnxruntime, then pip install "arllm[gpu]"' if variant.provider == CUDA else ""
        return f"needs {variant.provider}; this onnxruntime has {', '.join(available)}{mend}"
    if variant.provider == CUDA:
        return _why_not_cuda(variant)
    if not has_instruction_set(variant.instruction_set):
        return f"its integers are right only with {variant.instruction_set}, which this processor lacks"
    return None


def _why_not_cuda(variant: Variant) -> str | None:
    """Of the first device alone: it is the one that ONNX Runtime takes."""
    devices = cuda_devices()
    if not devices:
        return "the driver shows no CUDA device (nvidia-smi lists them; CUDA_VISIBLE_DEVICES may hide them)"
    if variant.precision == "bf16" and devices[0].capability < BFLOAT16_SINCE:
        have = ".".join(map(str, devices[0].capability))
        return f"bfloat16 needs compute capability 8.0; {devices[0].name} has {have}"
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


@functools.lru_cache(maxsize=1)
def _preload_cuda() -> None:
    """Let ONNX Runtime find the CUDA libraries that pip installed; it reports on stdout, which belongs to results."""
    if hasattr(onnxruntime, "preload_dlls"):
        with contextlib.redirect_stdout(sys.stderr):
            onnxruntime.preload_dlls()


class Session:
    """One graph, opened as the manifest says, its inputs and outputs checked against it.

    On CUDA no node may run elsewhere: ONNX Runtime refuses a graph of which one would. NIR alone runs on the CPU
    whatever the variant's provider: a card would take longer to be told its few thousand numbers.

    Raises:
        VariantError: the provider can't be used, or not for every node.
        BundleError: the graph can't be read, or is not what the manifest says.
    """

    def __init__(
        self,
        root: Path,
        graph: Graph,
        provider: str,
        threads: int,
        *,
        spin: bool = False,
        constants: Mapping[str, NDArray[np.float32]] | None = None,
    ) -> None:
        """Open a graph.

        Args:
            threads: of one inference.
            spin: they wait for work awake, on the host's cores; else they sleep.
            constants: inputs that become part of the graph: what they alone decide is computed here, once.
        """
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin)))
        options.enable_mem_pattern = False  # lengths differ from query to query: a pattern would never be reused
        path = self._path = root / graph.path
        if graph.kind == "nir":
            provider = CPU
        constants = constants or {}
        inputs = _without(path, graph.inputs, constants)
        settled = {d for t in graph.inputs if t.name in constants for d in t.dims if isinstance(d, str)}
        chosen: Any = provider
        if provider == CUDA:
            _preload_cuda()
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
            chosen = (provider, CUDA_OPTIONS)
        try:
            source: str | bytes = str(path)
            if constants:
                source = path.read_bytes()
                for name, value in constants.items():
                    source = with_constant(source, name, value)
                # External data is sought beside the file, and bytes have no place.
                options.add_session_config_entry(
                    "session.model_external_initializers_file_folder_path", str(path.parent)
                )
            # Without enable_fallback=0 a provider that fails is replaced, with a note on stdout.
            self._session = onnxruntime.InferenceSession(source, options, providers=[chosen], enable_fallback=0)
        except LookupError as error:
            raise BundleIOMismatchError(f"{path}: {error.args[0]}") from None
        except Exception as error:  # onnxruntime's exceptions share no public base
            detail = str(error).strip().splitlines()[0]
            if provider == CUDA:
                raise VariantError(
                    f"{path}: ONNX Runtime can't run every node of the graph on CUDA: {detail}. Where its CUDA "
                    'libraries are missing: pip install "onnxruntime-gpu[cuda,cudnn]"'
                ) from None
            raise BundleIntegrityError(f"{path}: ONNX Runtime can't open the graph: {detail}") from None
        active = self._session.get_providers()
        if active[0] != provider:
            raise VariantError(f"{path}: asked for {provider}, ONNX Runtime fell back to {active[0]}")
        for what, declared, live in (
            ("input", inputs, self._session.get_inputs()),
            ("output", graph.outputs, self._session.get_outputs()),
        ):
            _check_io(path, what, declared, live, settled)
        wanted, asked = GRAPH_IO[graph.kind]
        takes, gives = ({tensor.name for tensor in side} for side in (graph.inputs, graph.outputs))
        if takes != wanted or not asked <= gives:
            raise BundleIOMismatchError(
                f"{path}: as {graph.kind} it must take {', '.join(sorted(wanted))} and give "
                f"{', '.join(sorted(asked))}; it takes {', '.join(sorted(takes))} and gives "
                f"{', '.join(sorted(gives))}"
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


class Opener(Protocol):
    """Opens a graph of the variant, as :class:`Session` does."""

    def __call__(self, graph: Graph, *, constants: Mapping[str, NDArray[np.float32]] | None = None) -> Session: ...


def _without(
    path: Path, declared: tuple[Tensor, ...], constants: Mapping[str, NDArray[np.float32]]
) -> tuple[Tensor, ...]:
    """The declared inputs that are left; a constant must fit the declaration of its own."""
    for name in sorted(constants.keys() - {tensor.name for tensor in declared}):
        raise BundleIOMismatchError(f"{path}: input {name!r}: the manifest declares nothing, the graph must take it")
    for tensor in declared:
        value = constants.get(tensor.name)
        if value is not None and (
            tensor.dtype != "float32"
            or len(tensor.dims) != value.ndim
            or any(isinstance(d, int) and d != size for d, size in zip(tensor.dims, value.shape, strict=True))
        ):
            raise BundleIOMismatchError(
                f"{path}: input {tensor.name!r}: the manifest declares {tensor.dtype} of dims {list(tensor.dims)}, "
                f"the pool gives float32 of {list(value.shape)}"
            )
    return tuple(tensor for tensor in declared if tensor.name not in constants)


def _check_io(path: Path, what: str, declared: tuple[Tensor, ...], live: list[Any], settled: Collection[str]) -> None:
    """``settled``: symbols that a constant gave a size; ONNX Runtime may have found it out."""
    symbols = {t.name: t.dims for t in declared}
    want = {t.name: (ONNX_TYPES[t.dtype], len(t.dims), _fixed(t.dims)) for t in declared}
    have = {}
    for t in live:
        named = symbols.get(t.name, ())
        dims = [name if name in settled else d for name, d in itertools.zip_longest(named, t.shape)][: len(t.shape)]
        have[t.name] = (t.type, len(t.shape), _fixed(dims))
    for name in sorted(set(want) | set(have)):
        if want.get(name) != have.get(name):
            described = [
                "nothing" if side is None else f"{side[0]} of rank {side[1]}, dims {side[2]}"
                for side in (want.get(name), have.get(name))
            ]
            raise BundleIOMismatchError(
                f"{path}: {what} {name!r}: the manifest declares {described[0]}, the graph has {described[1]}"
            )


def _fixed(dims: Iterable[str | int | None]) -> list[str | int]:
    return [d if isinstance(d, int) else "?" for d in dims]
