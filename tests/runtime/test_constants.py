"""Tests of runtime/constants.py: an input becomes a constant, nothing else changes, what is no model is refused."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from arllm.runtime.constants import with_constant

onnx = pytest.importorskip("onnx", reason="the extra export brings onnx")


def model() -> bytes:
    """y = x @ w + b, with x and w as inputs."""
    real = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["xw"]), onnx.helper.make_node("Add", ["xw", "b"], ["y"])],
        "affine",
        [
            onnx.helper.make_tensor_value_info("x", real, ["batch", 2]),
            onnx.helper.make_tensor_value_info("w", real, [2, "out"]),
        ],
        [onnx.helper.make_tensor_value_info("y", real, ["batch", "out"])],
        [onnx.numpy_helper.from_array(np.array([0.5], dtype=np.float32), "b")],
    )
    opset = [onnx.helper.make_opsetid("", 20)]
    data: bytes = onnx.helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()
    return data


@pytest.mark.parametrize("width", [1, 3, 200])
def test_the_graph_computes_with_the_constant(width: int) -> None:
    rng = np.random.default_rng(0)
    w: NDArray[np.float32] = rng.random((2, width), dtype=np.float32)
    x: NDArray[np.float32] = rng.random((4, 2), dtype=np.float32)
    session = onnxruntime.InferenceSession(with_constant(model(), "w", w), providers=["CPUExecutionProvider"])
    assert [tensor.name for tensor in session.get_inputs()] == ["x"]
    np.testing.assert_allclose(session.run(["y"], {"x": x})[0], x @ w + 0.5, rtol=1e-6)


def test_the_rest_of_the_model_stays_as_it_was() -> None:
    w = np.arange(6, dtype=np.float64).reshape(3, 2).T  # neither float32 nor contiguous
    before, after = onnx.load_from_string(model()), onnx.load_from_string(with_constant(model(), "w", w))
    onnx.checker.check_model(after, full_check=True)
    added = after.graph.initializer.pop()
    assert (added.name, list(added.dims)) == ("w", [2, 3])
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(added), w)
    del before.graph.input[1]
    assert after == before


@pytest.mark.parametrize("name", ["b", "y", "nothing", ""])
def test_what_is_no_input_is_refused(name: str) -> None:
    with pytest.raises(LookupError, match="the graph has no input"):
        with_constant(model(), name, np.zeros((2, 1), dtype=np.float32))


@given(st.binary(max_size=60))
def test_bytes_that_are_no_model_are_refused(data: bytes) -> None:
    with pytest.raises((ValueError, LookupError)):
        with_constant(data, "w", np.zeros((2, 1), dtype=np.float32))


@given(st.integers(10, 200))  # behind the graph stand 6 bytes, the opset, which a reader can miss
def test_a_model_that_was_cut_is_refused(cut: int) -> None:
    data = model()
    with pytest.raises((ValueError, LookupError)):
        with_constant(data[: -min(cut, len(data))], "w", np.zeros((2, 1), dtype=np.float32))
