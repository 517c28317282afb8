"""Counts what a model holds and what a frame costs: a ModelProto comes in, numbers go out. Nothing is run."""

from __future__ import annotations

import math
from collections.abc import Iterator

import onnx

# The inputs of an operator that torch would count as parameters; a BatchNorm's running statistics are buffers there.
_PARAMETER_INPUTS = {
    "Conv": (1, 2),
    "Gemm": (1, 2),
    "MatMul": (0, 1),
    "BatchNormalization": (1, 2),
}


def parameters(model: onnx.ModelProto) -> int:
    """The trainable numbers as torch counts them: weights and biases of convolutions and matrix products, scale and
    shift of BatchNorms. A model whose BatchNorms an exporter folded away holds fewer than it was trained with."""
    stored = {tensor.name: math.prod(tensor.dims) for tensor in model.graph.initializer}
    return sum(stored[name] for name in {name for node in model.graph.node for name in _trained(node)} & stored.keys())


def _trained(node: onnx.NodeProto) -> Iterator[str]:
    return (node.input[i] for i in _PARAMETER_INPUTS.get(node.op_type, ()) if i < len(node.input))


def macs(model: onnx.ModelProto) -> int:
    """Multiply-accumulates of convolutions and matrix products for one frame (batch 1), from inferred shapes.

    Raises onnx.shape_inference.InferenceError where shapes contradict each other, ValueError where one stays unknown.
    """
    single = onnx.ModelProto()
    single.CopyFrom(model)
    for value in single.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = 1
    graph = onnx.shape_inference.infer_shapes(single, strict_mode=True, data_prop=True).graph
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        shapes.setdefault(value.name, [dim.dim_value for dim in value.type.tensor_type.shape.dim])
    return sum(_node_macs(node, shapes) for node in graph.node)


def _node_macs(node: onnx.NodeProto, shapes: dict[str, list[int]]) -> int:
    if node.op_type == "Conv":
        # [out, in / groups, *kernel]: each output element sums over all but the first.
        terms = math.prod(shapes[node.input[1]][1:])
    elif node.op_type in ("Gemm", "MatMul"):
        transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
        terms = shapes[node.input[0]][-2 if transposed else -1]
    else:
        return 0
    elements = math.prod(shapes[node.output[0]])
    if not elements:
        raise ValueError(f"the shape of {node.output[0]!r} is not known")
    return elements * terms
