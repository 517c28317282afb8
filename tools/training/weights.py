"""Moves trained weights between PyTorch modules and the ONNX graphs of `lipsync.architecture`, by their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn

from compositor.errors import InvalidInput

# A batch normalisation's vectors: their names in the graph and in PyTorch.
_VECTORS: Final = {"scale": "weight", "shift": "bias", "mean": "running_mean", "variance": "running_var"}


def fill(graph: onnx.ModelProto, module: nn.Module) -> onnx.ModelProto:
    """A copy of the graph with the module's weights; the graph's own constants (scales, shapes) stay.

    Raises InvalidInput where a weight of one has no place of the same shape in the other.
    """
    filled = onnx.ModelProto()
    filled.CopyFrom(graph)
    state = dict(module.state_dict())
    for initializer in filled.graph.initializer:
        name = torch_name(initializer.name)
        if name not in state and initializer.name.endswith("/scales"):
            continue
        values = _taken(state, name, tuple(initializer.dims))
        initializer.CopyFrom(numpy_helper.from_array(values, initializer.name))
    left = sorted(name for name in state if not name.endswith("num_batches_tracked"))
    if left:
        raise InvalidInput(f"weights: the graph has no place for {left[0]}; give a graph of the same layers")
    return filled


def read(graph: onnx.ModelProto, module: nn.Module) -> None:
    """Loads the graph's weights into the module. Raises InvalidInput where names or shapes differ."""
    values = {torch_name(tensor.name): numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    state = {
        name: value if name.endswith("num_batches_tracked") else torch.from_numpy(_same(values, name, value).copy())
        for name, value in module.state_dict().items()
    }
    module.load_state_dict(state)


def torch_name(name: str) -> str:
    """`stage1/conv/bn/scale` -> `stage1.conv.bn.weight`."""
    *path, last = name.split("/")
    if path and path[-1] == "bn":
        last = _VECTORS.get(last, last)
    return ".".join([*path, last])


def _taken(state: dict[str, Tensor], name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    value = state.pop(name, None)
    if value is None or tuple(value.shape) != shape:
        raise InvalidInput(f"weights: {name} is missing or not {list(shape)}; give a graph of the same width")
    return np.ascontiguousarray(value.detach().cpu().numpy(), np.float32)


def _same(values: Mapping[str, NDArray[np.float32]], name: str, like: Tensor) -> NDArray[np.float32]:
    value = values.get(name)
    if value is None or value.shape != tuple(like.shape):
        raise InvalidInput(f"weights: {name} is missing or not {list(like.shape)}; give a graph of the same width")
    return value
