"""Wraps an uploaded avatar graph so that a request carries a frame number and audio instead of 2.4 MB of pixels.

An ONNX graph with the family's interface goes in, one with the service's interface comes out: the tenant's crops become
an initializer (or an input, for long tenants), and cutting the ROI, masking, scaling, truncating to uint8 and setting
the prediction into the crop's border happen in the graph. The uploaded nodes and weights stay as they are.

Everything around the model works on bytes, and on colour planes as the model does; DequantizeLinear and QuantizeLinear
are one pass each where Cast and Mul are two. Crops come and mouths go as planes, because a Transpose costs ten times
what the compositor takes to merge them, and one before the model is pushed on into the uploaded graph by ONNX Runtime's
optimizer, which leaves element-wise layers in a layout that made one model 12 times slower.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from compositor.blending import CROP_SIZE, ROI_BORDER, ROI_SIZE
from compositor.errors import InvalidInput

from .model_rules import graphs

CropsMode = Literal["resident", "sent"]

PREFIX = "lipsync/"
MASK = (slice(5, 310), slice(5, 315))
"""Rows and columns of the ROI that are blacked in channels 3-5: cv2's rectangle (5, 5, 310, 305)."""
_TRUNCATION = 0.4999
"""Levels taken off before QuantizeLinear rounds to the nearest, which truncates. Not 0.5: that would fall on a tie for
whole levels, and rounding goes to the even one. So 1 of 10,000 values comes out one level above the truncated one."""
_INTERFACE = {"frame_index", "crop", "audio", "mouth", "finite"}
_MIN_IR = 8


class _Wrapper:
    """Collects nodes and initializers under names that cannot meet the uploaded graph's."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def constant(self, name: str, value: NDArray[np.generic]) -> str:
        """The name of a constant, which is stored once however often it is asked for."""
        if all(stored.name != PREFIX + name for stored in self.initializers):
            self.initializers.append(numpy_helper.from_array(value, PREFIX + name))
        return PREFIX + name

    def add(self, operator: str, inputs: list[str], name: str, **attributes: Any) -> str:
        output = name if name in ("mouth", "finite") else PREFIX + name
        self.nodes.append(helper.make_node(operator, inputs, [output], PREFIX + name + "_node", **attributes))
        return output

    def slice(self, tensor: str, name: str, axes: list[int], starts: list[int], ends: list[int]) -> str:
        bounds = {"starts": starts, "ends": ends, "axes": axes}
        constants = [self.constant(f"{name}_{key}", np.array(value, np.int64)) for key, value in bounds.items()]
        return self.add("Slice", [tensor, *constants], name)


def fuse(
    model: onnx.ModelProto,
    names: tuple[str, str, str],
    frames: int,
    mode: CropsMode,
    crops_file: str,
) -> onnx.ModelProto:
    """The graph that Triton serves for a tenant.

    model: the uploaded graph, batch axis dynamic, opset 11 to 21. names: its (visual, audio, output). frames: how many
    crops there are. crops_file: the file beside the model that holds them, uint8 (frames, 3, 328, 328); the graph
    refers to it as external data, so that Triton maps it, and protobuf's 2 GB do not bound a tenant.

    Inputs: `frame_index` INT32 [n, 1] (resident) or `crop` UINT8 [n, 3, 328, 328] (sent), and `audio` FP32
    [n, 32, 16, 16]. Outputs: `mouth` UINT8 [n, 3, 328, 328] and `finite` BOOL [n, 1], false where the prediction held
    a NaN or an infinity.
    """
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    _check_free(model)
    visual, audio, output = names
    uploaded = onnx.GraphProto()
    uploaded.CopyFrom(model.graph)
    _rename(uploaded, {visual: PREFIX + "visual", audio: "audio", output: PREFIX + "prediction"}, _INTERFACE)

    wrapper = _Wrapper()
    crop = _gather(wrapper, frames, crops_file) if mode == "resident" else "crop"
    _present(wrapper, crop, PREFIX + "visual")
    wrapper.nodes.extend(uploaded.node)
    _finish(wrapper, crop, PREFIX + "prediction")

    tensor = helper.make_tensor_value_info
    planes: list[str | int | None] = ["batch", 3, CROP_SIZE, CROP_SIZE]
    index, sent = tensor("frame_index", TensorProto.INT32, ["batch", 1]), tensor("crop", TensorProto.UINT8, planes)
    graph = helper.make_graph(
        wrapper.nodes,
        "lipsync_tenant",
        [index if mode == "resident" else sent, tensor("audio", TensorProto.FLOAT, ["batch", 32, 16, 16])],
        [tensor("mouth", TensorProto.UINT8, planes), tensor("finite", TensorProto.BOOL, ["batch", 1])],
        [*wrapper.initializers, *uploaded.initializer],
        sparse_initializer=uploaded.sparse_initializer,
    )
    imports = [helper.make_opsetid("", opset)]
    ir_version = max(_MIN_IR, model.ir_version)
    return helper.make_model(graph, opset_imports=imports, ir_version=ir_version, producer_name="triton-lipsync")


def canonical(model: onnx.ModelProto, renamed: dict[str, str]) -> onnx.ModelProto:
    """A copy of an uploaded graph whose inputs and outputs are renamed as `renamed` says: present name -> wanted."""
    out = onnx.ModelProto()
    out.CopyFrom(model)
    _check_free(model)
    _rename(out.graph, renamed, set(renamed.values()))
    return out


def _check_free(model: onnx.ModelProto) -> None:
    """Raises InvalidInput where a node or tensor has a name that ours could meet."""
    taken = set[str]()
    for graph in graphs(model):
        for node in graph.node:
            taken |= {node.name, *node.input, *node.output}
        taken |= {value.name for value in (*graph.input, *graph.output)}
        taken |= {tensor.name for tensor in graph.initializer}
        taken |= {sparse.values.name for sparse in graph.sparse_initializer}
    clash = min((name for name in taken if name.startswith(PREFIX)), default=None)
    if clash is not None:
        raise InvalidInput(
            f"avatar model: the name {clash[:100]!r} uses the reserved prefix {PREFIX!r}; rename it", field="model"
        )


def _gather(wrapper: _Wrapper, frames: int, crops_file: str) -> str:
    """The crops of the requested frames; an index out of range is clipped, for its batch is shared with others."""
    crops = TensorProto(
        name=PREFIX + "crops",
        data_type=TensorProto.UINT8,
        dims=[frames, 3, CROP_SIZE, CROP_SIZE],
        data_location=TensorProto.EXTERNAL,
    )
    size = frames * CROP_SIZE * CROP_SIZE * 3
    for key, value in (("location", crops_file), ("offset", "0"), ("length", str(size))):
        crops.external_data.add(key=key, value=value)
    wrapper.initializers.append(crops)
    flat = wrapper.add("Reshape", ["frame_index", wrapper.constant("flat", np.array([-1], np.int64))], "index_flat")
    # Clip takes integers only from opset 12 on; frame numbers are exact in float32.
    number = wrapper.add("Cast", [flat], "index_float", to=TensorProto.FLOAT)
    low = wrapper.constant("first", np.array(0, np.float32))
    high = wrapper.constant("last", np.array(frames - 1, np.float32))
    clipped = wrapper.add("Clip", [number, low, high], "index_clipped")
    index = wrapper.add("Cast", [clipped], "index", to=TensorProto.INT64)
    return wrapper.add("Gather", [PREFIX + "crops", index], "crop", axis=0)


def _present(wrapper: _Wrapper, crop: str, visual: str) -> None:
    """crop -> the 6-channel visual input: the ROI in [0, 1], and the same with the mouth's rectangle black."""
    low, high = ROI_BORDER, ROI_BORDER + ROI_SIZE
    seen = wrapper.slice(crop, "roi", [2, 3], [low, low], [high, high])
    mask = np.ones((1, 1, ROI_SIZE, ROI_SIZE), np.bool_)
    mask[:, :, MASK[0], MASK[1]] = False
    masked = wrapper.add("Where", [wrapper.constant("mask", mask), seen, _black(wrapper)], "roi_masked")
    both = wrapper.add("Concat", [seen, masked], "both", axis=1)
    scale = [_level(wrapper), _black(wrapper)]
    wrapper.nodes.append(helper.make_node("DequantizeLinear", [both, *scale], [visual], visual + "_node"))


def _level(wrapper: _Wrapper) -> str:
    """One grey level of 255."""
    return wrapper.constant("level", np.array(1 / 255, np.float32))


def _black(wrapper: _Wrapper) -> str:
    return wrapper.constant("black", np.array(0, np.uint8))


def _finish(wrapper: _Wrapper, crop: str, prediction: str) -> None:
    """prediction -> the crop with the prediction in it, and whether all of the prediction was finite."""
    # A mean is finite only if every value is; predictions are near [0, 1], their sum does not overflow.
    mean = wrapper.add("GlobalAveragePool", [prediction], "mean")
    channels = wrapper.add("Flatten", [mean], "mean_flat", axis=1)
    total = wrapper.add("MatMul", [channels, wrapper.constant("ones", np.ones((3, 1), np.float32))], "total")
    zero = wrapper.add("Sub", [total, total], "zero_if_finite")
    wrapper.add("Not", [wrapper.add("IsNaN", [zero], "not_finite")], "finite")
    offset = wrapper.constant("truncation", np.array(_TRUNCATION / 255, np.float32))
    lowered = wrapper.add("Sub", [prediction, offset], "lowered")
    pixels = wrapper.add("QuantizeLinear", [lowered, _level(wrapper), _black(wrapper)], "levels")
    begin, end, side = ROI_BORDER, ROI_BORDER + ROI_SIZE, CROP_SIZE
    top = wrapper.slice(crop, "border_top", [2], [0], [begin])
    left = wrapper.slice(crop, "border_left", [2, 3], [begin, 0], [end, begin])
    right = wrapper.slice(crop, "border_right", [2, 3], [begin, end], [end, side])
    bottom = wrapper.slice(crop, "border_bottom", [2], [end], [side])
    middle = wrapper.add("Concat", [left, pixels, right], "middle", axis=3)
    wrapper.add("Concat", [top, middle, bottom], "mouth", axis=2)


def _rename(graph: onnx.GraphProto, renamed: dict[str, str], reserved: Collection[str]) -> None:
    """Renames tensors in place, in subgraphs too, and moves an uploaded name out of the way of a reserved one.

    Shapes noted for tensors inside are dropped: they are optional and carry the old names.
    """

    def new(name: str) -> str:
        return renamed.get(name, f"{PREFIX}uploaded/{name}" if name in reserved else name)

    del graph.value_info[:], graph.quantization_annotation[:]

    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [new(name) for name in names]
        for attribute in node.attribute:
            for subgraph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                _rename(subgraph, renamed, reserved)
    for value in (*graph.input, *graph.output):
        value.name = new(value.name)
    for initializer in (*graph.initializer, *(sparse.values for sparse in graph.sparse_initializer)):
        initializer.name = new(initializer.name)
