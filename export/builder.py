"""Writing an ONNX graph node by node: a list of nodes and constants that names what it makes.

Knows nothing about what the graphs are of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

MICROSOFT = "com.microsoft"  # ONNX Runtime's own operators
IR_VERSION = 10  # of opset 20


class Builder:
    """A list of nodes and constants: calling it appends a node and returns the name of its output."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._constants: dict[tuple[Any, ...], str] = {}
        self._values: dict[str, str] = {}
        self._count = 0

    def __call__(self, op: str, *inputs: str, output: str | None = None, domain: str = "", **attributes: Any) -> str:
        name = output or self._name(op)
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=name, domain=domain, **attributes))
        return name

    def split(self, value: str, *widths: int) -> list[str]:
        """Parts of the last axis."""
        names = [self._name("Split") for _ in widths]
        self.nodes.append(helper.make_node("Split", [value, self.shape(*widths)], names, name=names[0], axis=-1))
        return names

    def weight(self, name: str, array: NDArray[Any]) -> str:
        self.initializers.append(numpy_helper.from_array(np.asarray(array, order="C"), name))
        return name

    def constant(self, value: Any, dtype: type) -> str:
        """A small constant, shared by all that ask for the same."""
        array: NDArray[Any] = np.asarray(value, dtype=dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.weight(self._name("constant"), array)
        return self._constants[key]

    def shape(self, *dims: int) -> str:
        """Dims of a Reshape: 0 keeps one, -1 takes the rest."""
        return self.constant(dims, np.int64)

    def once(self, key: str, write: Callable[[], str]) -> str:
        """A value that many places need, written where it is first asked for."""
        if key not in self._values:
            self._values[key] = write()
        return self._values[key]

    def branches(self, condition: str, yes: Callable[[], str], no: Callable[[], str]) -> str:
        """``If``: each side appends its nodes to a graph of its own and returns the name of its output."""
        outer, sides = self.nodes, []
        for side in (yes, no):
            self.nodes = []
            value = helper.make_tensor_value_info(side(), TensorProto.FLOAT, None)
            sides.append(helper.make_graph(self.nodes, self._name("branch"), [], [value]))
        self.nodes = outer
        return self("If", condition, then_branch=sides[0], else_branch=sides[1])

    def _name(self, op: str) -> str:
        self._count += 1
        return f"{op}_{self._count}"
