"""Makes an input of an ONNX graph a constant by editing its protobuf; ONNX Runtime then folds what follows from it.

Needs no ``onnx``: of the format it knows the few fields that it touches. Knows nothing about sessions or bundles.
Source of the field numbers: onnx/onnx.proto.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

MODEL_GRAPH = 7
GRAPH_INITIALIZER, GRAPH_INPUT = 5, 11
VALUE_NAME = 1
TENSOR_DIMS, TENSOR_TYPE, TENSOR_NAME, TENSOR_RAW = 1, 2, 8, 9
FLOAT32 = 1
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types


def with_constant(model: bytes, name: str, value: NDArray[np.float32]) -> bytes:
    """The model with its input ``name`` replaced by an initializer of that name.

    Raises:
        ValueError: not an ONNX model.
        LookupError: its graph has no such input.
    """
    graphs = [payload for number, _, payload in _fields(memoryview(model)) if number == MODEL_GRAPH]
    if len(graphs) != 1:
        raise ValueError("not an ONNX model of one graph")
    graph = bytearray()
    dropped = 0
    for number, whole, payload in _fields(graphs[0]):
        if number == GRAPH_INPUT and _name(payload) == name:
            dropped += 1
        else:
            graph += whole
    if dropped != 1:
        raise LookupError(f"the graph has no input {name!r}")
    graph += _field(GRAPH_INITIALIZER, _tensor(name, value))
    others = b"".join(bytes(whole) for number, whole, _ in _fields(memoryview(model)) if number != MODEL_GRAPH)
    return others + _field(MODEL_GRAPH, bytes(graph))


def _tensor(name: str, value: NDArray[np.float32]) -> bytes:
    dims = b"".join(_varint(TENSOR_DIMS << 3 | VARINT) + _varint(size) for size in value.shape)
    kind = _varint(TENSOR_TYPE << 3 | VARINT) + _varint(FLOAT32)
    raw = np.ascontiguousarray(value, dtype="<f4").tobytes()
    return dims + kind + _field(TENSOR_NAME, name.encode()) + _field(TENSOR_RAW, raw)


def _name(value_info: memoryview) -> str | None:
    for number, _, payload in _fields(value_info):
        if number == VALUE_NAME:
            return bytes(payload).decode("utf-8", "replace")
    return None


def _field(number: int, payload: bytes) -> bytes:
    return _varint(number << 3 | BYTES) + _varint(len(payload)) + payload


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview, memoryview]]:
    """Field number, the whole field, and its payload (empty where it isn't length-delimited)."""
    at = 0
    while at < len(message):
        start = at
        key, at = _read_varint(message, at)
        payload = message[at:at]
        if key & 7 == VARINT:
            _, at = _read_varint(message, at)
        elif key & 7 == BYTES:
            size, at = _read_varint(message, at)
            payload, at = message[at : at + size], at + size
        elif key & 7 in (FIXED64, FIXED32):
            at += 8 if key & 7 == FIXED64 else 4
        else:
            raise ValueError("not an ONNX model")
        if at > len(message):
            raise ValueError("not an ONNX model")
        yield key >> 3, message[start:at], payload


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)


def _read_varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(message) and shift < 64:
        byte = message[at]
        at, value, shift = at + 1, value | (byte & 0x7F) << shift, shift + 7
        if byte < 0x80:
            return value, at
    raise ValueError("not an ONNX model")
