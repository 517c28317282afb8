"""Arithmetic notation for hand-built ONNX graphs: operators on a `Value` add nodes to its `Graph`.

Takes numbers and operator names and gives a checked ModelProto; knows nothing of mouths or audio.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx

from lipsync.graph_builder import GraphBuilder

Tensor: TypeAlias = "npt.NDArray[np.float32] | npt.NDArray[np.int64] | np.int64"
Operand: TypeAlias = "Value | float | Tensor"


class Graph:
    """A graph in the making; nodes and constants are named in the order of their making."""

    def __init__(self, name: str) -> None:
        self._builder = GraphBuilder(name)
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._nodes = 0

    def input(self, name: str, shape: Sequence[int | str]) -> Value:
        """Declare an FP32 input; a str in `shape` is a symbolic dimension."""
        return Value(self, self._builder.input(name, shape))

    def output(self, name: str, value: Value, shape: Sequence[int | str]) -> None:
        """Declare `value` to be the FP32 output `name`."""
        self._builder.output(self._builder.node("Identity", [value.name], name), shape)

    def add(self, operator: str, *operands: Operand, **attributes: Any) -> Value:
        """Add one node of the default domain; its only output."""
        names = [self._name_of(operand) for operand in operands]
        self._nodes += 1
        return Value(self, self._builder.node(operator, names, f"v{self._nodes}", **attributes))

    def model(self) -> onnx.ModelProto:
        """The finished model, checked."""
        model = self._builder.model()
        onnx.checker.check_model(model, full_check=True)
        return model

    def _name_of(self, operand: Operand) -> str:
        if isinstance(operand, Value):
            return operand.name
        array = np.asarray(operand, np.float32 if isinstance(operand, float | int) else None)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self._builder.constant(f"c{len(self._constants)}", array)
        return self._constants[key]


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
