"""A small notation for hand-built ONNX graphs: arithmetic on `Value` adds nodes to a `Graph`.

Takes numbers and operator names and gives a checked ModelProto; knows nothing of mouths or audio.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 17
IR_VERSION = 8
Tensor: TypeAlias = "npt.NDArray[np.float32] | npt.NDArray[np.int64]"
Operand: TypeAlias = "Value | float | Tensor"


@dataclass
class Graph:
    """Nodes and constants of a model in the making."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)

    def input(self, name: str) -> Value:
        """The graph's input of that name, to be declared again in `model`."""
        return Value(self, name)

    def constant(self, value: Operand) -> str:
        """The name of an operand; floats become float32 and each distinct constant is stored once."""
        if isinstance(value, Value):
            return value.name
        array = np.asarray(value, np.float32) if isinstance(value, float | int) else value
        known = (
            f"{array.dtype.str}{array.shape}{array.tobytes().hex()}"
            if array.size < 64
            else f"large_{len(self.constants)}"
        )
        if known not in self.constants:
            self.constants[known] = numpy_helper.from_array(array, f"c{len(self.constants)}")
        return self.constants[known].name

    def add(self, operator: str, *operands: Operand, **attributes: Any) -> Value:
        """Add one node of the default domain; its only output."""
        name = f"v{len(self.nodes)}"
        names = [self.constant(operand) for operand in operands]
        self.nodes.append(helper.make_node(operator, names, [name], **attributes))
        return Value(self, name)

    def model(
        self, name: str, inputs: dict[str, list[int | str]], outputs: dict[str, tuple[Value, list[int | str]]]
    ) -> onnx.ModelProto:
        """The finished model, checked: FP32 inputs and outputs by name and shape."""
        nodes = [*self.nodes, *(helper.make_node("Identity", [v.name], [out]) for out, (v, _) in outputs.items())]
        graph = helper.make_graph(
            nodes,
            name,
            [helper.make_tensor_value_info(key, TensorProto.FLOAT, shape) for key, shape in inputs.items()],
            [helper.make_tensor_value_info(key, TensorProto.FLOAT, shape) for key, (_, shape) in outputs.items()],
            list(self.constants.values()),
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        model.producer_name = "triton-lipsync"
        onnx.checker.check_model(model, full_check=True)
        return model


@dataclass(frozen=True)
class Value:
    """One tensor of a graph; arithmetic on it broadcasts as ONNX does."""

    graph: Graph
    name: str
    __array_ufunc__: ClassVar[None] = None  # numpy arrays on the left leave the arithmetic to us

    def __add__(self, other: Operand) -> Value:
        return self.graph.add("Add", self, other)

    __radd__ = __add__

    def __sub__(self, other: Operand) -> Value:
        return self.graph.add("Sub", self, other)

    def __rsub__(self, other: Operand) -> Value:
        return self.graph.add("Sub", other, self)

    def __mul__(self, other: Operand) -> Value:
        return self.graph.add("Mul", self, other)

    __rmul__ = __mul__

    def __truediv__(self, other: Operand) -> Value:
        return self.graph.add("Div", self, other)

    def clip(self, low: float = 0.0, high: float = 1.0) -> Value:
        """Elementwise bounds."""
        return self.graph.add("Clip", self, low, high)

    def sqrt(self) -> Value:
        """Elementwise square root."""
        return self.graph.add("Sqrt", self)

    def smooth(self) -> Value:
        """The smoothstep of the value clipped to [0, 1]."""
        t = self.clip()
        return t * t * (3.0 - 2.0 * t)

    def sum(self, *axes: int) -> Value:
        """The sum over axes, which stay as size 1."""
        return self.graph.add("ReduceSum", self, np.asarray(axes, np.int64), keepdims=1)

    def part(self, axis: int, start: int, stop: int) -> Value:
        """The slice [start, stop) of one axis."""
        bounds = (np.asarray([bound], np.int64) for bound in (start, stop, axis))
        return self.graph.add("Slice", self, *bounds)

    def reshape(self, *shape: int) -> Value:
        """The same elements in another shape; 0 keeps an axis."""
        return self.graph.add("Reshape", self, np.asarray(shape, np.int64))
