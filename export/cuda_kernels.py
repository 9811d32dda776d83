"""What ONNX Runtime's CUDA provider can run, of the operators that our graphs use; and which nodes it would not get.

Source: docs/OperatorKernels.md of microsoft/onnxruntime at 001d12d2 (2026), section CUDAExecutionProvider; which
inputs a kernel reads from host memory, and the rule that moves nodes to the CPU: the kernels' registrations and
core/framework/fallback_cpu_capability.cc. Knows nothing about encoders or variants.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import TensorProto, helper

SMALL = 100  # elements: a constant up to this size does not keep a node off the CPU


def _codes(*names: str) -> frozenset[int]:
    return frozenset(int(TensorProto.DataType.Value(name)) for name in names)


HALVES = _codes("FLOAT16", "BFLOAT16")
FLOATS = HALVES | _codes("FLOAT", "DOUBLE")
WIDE = FLOATS | _codes("INT32", "INT64", "UINT32", "UINT64")
NUMBERS = WIDE | _codes("INT8", "INT16", "UINT8", "UINT16")
ANY = NUMBERS | _codes("BOOL")
INDEX = _codes("INT32", "INT64")
COMPARED = WIDE - _codes("BFLOAT16")

_FIXED = {"b": TensorProto.BOOL, "l": TensorProto.INT64, "s": TensorProto.INT64, "c": TensorProto.BOOL}
_HOST = frozenset("schi")  # read from, or written to, host memory


@dataclass(frozen=True)
class Kernel:
    """The kernel of one operator for the opset of our graphs.

    ``signature`` has a letter an input, the last one repeating, then ``>`` and the output's: ``T`` one type of
    ``types``, the same wherever it stands; ``i`` an index of 32 or 64 bits, ``h`` as T; ``b`` bool, ``l`` int64;
    ``s`` int64 and ``c`` bool. Of these ``s``, ``c``, ``h`` and ``i`` are read from host memory (``I`` is an index on
    the device). ``*`` is what the attribute ``to`` says.
    """

    versions: tuple[int, int]  # first and last opset
    signature: str
    types: frozenset[int]


LAST = 1_000
MICROSOFT = "com.microsoft"
KERNELS: Mapping[tuple[str, str], Kernel] = {
    ("", "Abs"): Kernel((13, LAST), "T>T", NUMBERS),
    ("", "Add"): Kernel((14, LAST), "TT>T", NUMBERS),
    ("", "And"): Kernel((7, LAST), "bb>b", ANY),
    ("", "Cast"): Kernel((19, 20), "T>*", ANY),
    ("", "Clip"): Kernel((13, LAST), "Thh>T", FLOATS - _codes("BFLOAT16") | _codes("INT64")),
    ("", "Concat"): Kernel((13, LAST), "T>T", ANY),
    ("", "CumSum"): Kernel((14, LAST), "Ti>T", COMPARED),
    ("", "Div"): Kernel((14, LAST), "TT>T", NUMBERS),
    ("", "Expand"): Kernel((13, LAST), "Ts>T", ANY),
    ("", "Gather"): Kernel((13, LAST), "TI>T", ANY),
    ("", "GatherND"): Kernel((13, LAST), "Tl>T", FLOATS | _codes("BOOL", "INT64")),
    ("", "Gelu"): Kernel((20, LAST), "T>T", FLOATS),
    ("", "Gemm"): Kernel((13, LAST), "T>T", FLOATS),
    ("", "GreaterOrEqual"): Kernel((16, LAST), "TT>b", COMPARED),
    ("", "Identity"): Kernel((19, LAST), "T>T", ANY),
    ("", "Less"): Kernel((13, LAST), "TT>b", COMPARED),
    ("", "MatMul"): Kernel((13, LAST), "TT>T", FLOATS),
    ("", "Max"): Kernel((13, LAST), "T>T", WIDE),
    ("", "Mod"): Kernel((13, LAST), "TT>T", WIDE),
    ("", "Mul"): Kernel((14, LAST), "TT>T", NUMBERS),
    ("", "Range"): Kernel((11, LAST), "h>T", _codes("DOUBLE", "FLOAT", "INT16", "INT32", "INT64")),
    ("", "ReduceMean"): Kernel((18, LAST), "Ts>T", FLOATS - _codes("BFLOAT16") | _codes("INT32")),
    ("", "ReduceSum"): Kernel((13, LAST), "Ts>T", FLOATS | INDEX),
    ("", "Relu"): Kernel((14, LAST), "T>T", FLOATS),
    ("", "Reshape"): Kernel((19, 20), "Ts>T", ANY),
    ("", "Shape"): Kernel((19, 20), "T>s", ANY),
    ("", "Sigmoid"): Kernel((13, LAST), "T>T", FLOATS),
    # Beside one type for all there is only float32 → float16 and back: no kernel of mixed bfloat16.
    ("", "SimplifiedLayerNormalization"): Kernel((1, LAST), "TT>T", FLOATS),
    ("", "Slice"): Kernel((13, LAST), "Ti>T", ANY),
    ("", "Softmax"): Kernel((13, LAST), "T>T", FLOATS),
    ("", "Split"): Kernel((18, LAST), "Ts>T", ANY),
    ("", "Sqrt"): Kernel((13, LAST), "T>T", FLOATS),
    ("", "Squeeze"): Kernel((13, 20), "Ts>T", ANY),
    ("", "Sub"): Kernel((14, LAST), "TT>T", NUMBERS),
    ("", "Tile"): Kernel((13, LAST), "Ts>T", FLOATS | INDEX),
    ("", "Transpose"): Kernel((13, 20), "T>T", ANY),
    ("", "Unsqueeze"): Kernel((13, 20), "Ts>T", ANY),
    ("", "Where"): Kernel((16, LAST), "bTT>T", FLOATS | INDEX | _codes("UINT8")),
    (MICROSOFT, "FusedMatMul"): Kernel((1, LAST), "TT>T", FLOATS),
    (MICROSOFT, "RotaryEmbedding"): Kernel((1, LAST), "TlTT>T", HALVES | _codes("FLOAT")),
}


def unsupported(model: onnx.ModelProto) -> list[str]:
    """One line for each node that would not run on the CUDA provider, and why; empty where all of them would.

    A node whose types have a kernel still goes to the CPU where all that it reads comes from host memory, as
    arithmetic on shapes does: such nodes are named too, since a strict session refuses them.
    """
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    types = tensor_types(model)
    small = {t.name for t in model.graph.initializer if _elements(t) <= SMALL}
    small |= {value.name for value in model.graph.input}
    host: set[str] = set()
    unknown: set[str] = set()  # what nodes make that are named already: the next ones are not to blame
    problems = []
    for node in model.graph.node:
        where = f"{node.name or node.output[0]} ({node.op_type})"
        kernel = KERNELS.get((node.domain, node.op_type))
        if kernel is None:
            problems.append(f"{where}: no such kernel is known")
            unknown.update(node.output)
            continue
        opset = opsets.get(node.domain, 0)
        if not kernel.versions[0] <= opset <= kernel.versions[1]:
            problems.append(f"{where}: its kernel of opset {opset} is not known")
        if any(name not in types for name in node.output):
            unknown.update(node.output)
        problems += [f"{where}: {reason}" for reason in _wrong_types(node, kernel, types, unknown)]
        read = _inputs(node, kernel)
        brought = any(name in host and letter not in _HOST for name, letter in read)
        if brought and all(name in small or (name in host and letter not in _HOST) for name, letter in read):
            problems.append(f"{where}: ONNX Runtime moves it to the CPU, since all that it reads is there")
            host.update(node.output)
        elif kernel.signature.endswith("s"):
            host.update(node.output)
    return problems


def tensor_types(model: onnx.ModelProto) -> dict[str, int]:
    """The element type of every value whose type can be told from ``KERNELS``."""
    graph = model.graph
    types = {value.name: int(value.type.tensor_type.elem_type) for value in graph.input}
    types.update({tensor.name: int(tensor.data_type) for tensor in graph.initializer})
    for node in graph.node:
        kernel = KERNELS.get((node.domain, node.op_type))
        if kernel is None:
            continue
        output = kernel.signature.partition(">")[2]
        if output == "*":
            found = next((attribute.i for attribute in node.attribute if attribute.name == "to"), None)
        elif output in _FIXED:
            found = _FIXED[output]
        else:
            found = next(iter(_bound(node, kernel, types)), None)
        if found is not None:
            types.update({name: int(found) for name in node.output if name})
    return types


def _bound(node: onnx.NodeProto, kernel: Kernel, types: Mapping[str, int]) -> list[int]:
    """The types that stand at T, in the order of the inputs."""
    return [types[name] for name, letter in _inputs(node, kernel) if letter in "Th" and name in types]


def _wrong_types(node: onnx.NodeProto, kernel: Kernel, types: Mapping[str, int], unknown: set[str]) -> Iterable[str]:
    bound = _bound(node, kernel, types)
    if len(set(bound)) > 1:
        yield f"reads {_names(bound)}, which no kernel takes together"
    for code in sorted(set(bound) - kernel.types):
        yield f"no kernel for {_names([code])}"
    for name, letter in _inputs(node, kernel):
        have = types.get(name)
        if have is None:
            if name not in unknown:
                yield f"the type of {name} is not known"
        elif letter in "Ii" and have not in INDEX:
            yield f"{name} is {_names([have])}, not an index"
        elif letter in _FIXED and have != _FIXED[letter]:
            yield f"{name} is {_names([have])}, not {_names([_FIXED[letter]])}"


def _inputs(node: onnx.NodeProto, kernel: Kernel) -> list[tuple[str, str]]:
    """The inputs that are given, each with its letter."""
    letters = kernel.signature.partition(">")[0]
    letters += letters[-1] * len(node.input)
    return [(name, letter) for name, letter in zip(node.input, letters, strict=False) if name]


def _names(codes: Iterable[int]) -> str:
    found = (helper.tensor_dtype_to_string(code).rpartition(".")[2].lower() for code in codes)
    return " and ".join(dict.fromkeys(found))


def _elements(tensor: Any) -> int:
    count = 1
    for dim in tensor.dims:
        count *= int(dim)
    return count
