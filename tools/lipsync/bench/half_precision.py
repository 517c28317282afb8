"""A graph at half precision behind the same interface, for a GPU's figures: FP32 ModelProto in, FP16 inside out."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_KEEPS_FLOAT = {"Resize": (1, 2)}
"""Inputs that stay FP32 whatever the data's type, by operator: region and scales of Resize (opset 13 to 21)."""


def halved(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that casts its FP32 inputs to FP16, computes with FP16 weights, and casts its outputs back to FP32.

    model: one whose nodes have neither subgraphs nor casts nor constants of their own, as `architecture` makes them.
    """
    out = onnx.ModelProto()
    out.CopyFrom(model)
    graph = out.graph
    kept = {
        node.input[place]
        for node in graph.node
        for place in _KEEPS_FLOAT.get(node.op_type, ())
        if place < len(node.input)
    }
    for initializer in graph.initializer:
        if initializer.data_type == TensorProto.FLOAT and initializer.name not in kept:
            values = numpy_helper.to_array(initializer).astype(np.float16)
            initializer.CopyFrom(numpy_helper.from_array(values, initializer.name))
    inputs, outputs = ([value.name for value in values] for values in (graph.input, graph.output))
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [_half(name) if name in (*inputs, *outputs) else name for name in names]
    first = [helper.make_node("Cast", [name], [_half(name)], to=TensorProto.FLOAT16) for name in inputs]
    last = [helper.make_node("Cast", [_half(name)], [name], to=TensorProto.FLOAT) for name in outputs]
    nodes = [*first, *graph.node, *last]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    return out


def _half(name: str) -> str:
    return f"half/{name}"
