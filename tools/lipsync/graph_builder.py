"""Writes an ONNX graph node by node: names and numpy arrays come in, a ModelProto goes out. It knows nothing of any
network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

# Production's Triton 24.10 carries ONNX Runtime 1.19, which reads opsets up to 21 and IR versions up to 10;
# 17 and 8 are what the exporters of the field write, and every runtime since 1.13 reads them.
OPSET = 17
IR_VERSION = 8


class GraphBuilder:
    """One graph under construction. Every name given must be new; tensors are passed around by name."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._initializers: list[onnx.TensorProto] = []
        self._taken: set[str] = set()

    def input(self, name: str, shape: Sequence[int | str], dtype: int = TensorProto.FLOAT) -> str:
        """Declares a graph input; a str in `shape` is a symbolic dimension, `dtype` a TensorProto.DataType."""
        self._inputs.append(helper.make_tensor_value_info(self._new(name), dtype, shape))
        return name

    def output(self, name: str, shape: Sequence[int | str], dtype: int = TensorProto.FLOAT) -> None:
        """Declares the tensor `name`, which some node already makes, to be a graph output."""
        if name not in self._taken:
            raise ValueError(f"no node makes the output {name!r}")
        self._outputs.append(helper.make_tensor_value_info(name, dtype, shape))

    def constant(self, name: str, value: npt.NDArray[Any] | np.generic) -> str:
        """Stores `value` as an initializer (raw little-endian bytes) and returns its name."""
        self._initializers.append(numpy_helper.from_array(np.asarray(value), self._new(name)))
        return name

    def node(self, operator: str, inputs: Sequence[str], name: str, *, output: str = "", **attributes: Any) -> str:
        """Adds a node of the default domain with one output and returns that tensor's name (`name` unless `output` is
        given).

        An empty string in `inputs` leaves an optional input out.
        """
        made = self._new(output or name)
        self._nodes.append(helper.make_node(operator, list(inputs), [made], name=name, **attributes))
        return made

    def model(self, *, opset: int = OPSET, ir_version: int = IR_VERSION) -> onnx.ModelProto:
        """The finished model. Nothing in it depends on the clock, the machine or the version of a library."""
        graph = helper.make_graph(self._nodes, self._name, self._inputs, self._outputs, self._initializers)
        imports = [helper.make_opsetid("", opset)]
        return helper.make_model(graph, opset_imports=imports, ir_version=ir_version, producer_name="lipsync")

    def _new(self, name: str) -> str:
        if not name or name in self._taken:
            raise ValueError(f"the tensor name {name!r} is empty or already taken")
        self._taken.add(name)
        return name
