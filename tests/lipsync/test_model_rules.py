"""Each rule refuses the file that breaks it with one line of file, fault and remedy, and lets sound ones through."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from compositor.errors import InvalidInput
from lipsync.architecture import audio_encoder, do_nothing, do_nothing_encoder, unet
from lipsync.model_interface import AVATAR, ENCODER, Interface, UploadedModel
from lipsync.model_rules import Rules, graphs, make_dynamic

Change = Callable[[onnx.ModelProto], object]


def examine(data: bytes, interface: Interface = AVATAR, **names: str) -> UploadedModel:
    return Rules(interface, "up/model.onnx").examine(data, names)[0]


def refused(data: bytes, interface: Interface = AVATAR, **names: str) -> str:
    with pytest.raises(InvalidInput) as caught:
        examine(data, interface, **names)
    message = caught.value.message
    assert message.startswith(f"{interface.title}: up/model.onnx, ")
    assert message.count("; ") == 1
    assert "\n" not in message
    return message


def changed(change: Change, model: onnx.ModelProto | None = None) -> bytes:
    model = model or do_nothing()
    change(model)
    return model.SerializeToString()


def external(tensor: onnx.TensorProto) -> onnx.TensorProto:
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")
    return tensor


def stray(name: str = "stray") -> onnx.TensorProto:
    return helper.make_tensor(name, TensorProto.FLOAT, [1], [0.0])


def constant_node(**attribute: object) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["stray"], name="stray", **attribute)  # type: ignore[arg-type]


def nested(innermost: onnx.NodeProto, depth: int) -> onnx.NodeProto:
    """`innermost` inside `depth` If nodes."""
    result = [helper.make_tensor_value_info("stray", TensorProto.FLOAT, [1])]
    otherwise = helper.make_graph([constant_node(value=stray())], "otherwise", [], result)
    node = innermost
    for _ in range(depth):
        branch = helper.make_graph([node], "branch", [], result)
        node = helper.make_node("If", ["condition"], ["stray"], then_branch=branch, else_branch=otherwise)
    return node


def bottomless(depth: int) -> bytes:
    """A graph within a node within a graph ..., deeper than the library itself would write; on the wire each message is
    its field's tag, its length as a varint, and its content."""

    def field(number: int, content: bytes) -> bytes:
        length, digits = len(content), []
        while True:
            length, digit = length >> 7, length & 0x7F
            digits.append(digit | (0x80 if length else 0))
            if not length:
                return bytes([number << 3 | 2, *digits]) + content

    graph = b""
    for _ in range(depth):
        graph = field(1, field(5, field(6, graph)))
    return field(7, graph)


def with_dims(index: int, *dims: int | str) -> Change:
    """Replaces the shape of an input (0, 1) or the output (-1)."""

    def change(model: onnx.ModelProto) -> None:
        value = model.graph.output[0] if index < 0 else model.graph.input[index]
        element = value.type.tensor_type.elem_type
        value.CopyFrom(helper.make_tensor_value_info(value.name, element, dims))

    return change


def with_elements(index: int, element: int) -> Change:
    def change(model: onnx.ModelProto) -> None:
        (model.graph.output[0] if index < 0 else model.graph.input[index]).type.tensor_type.elem_type = element

    return change


@pytest.mark.parametrize("build", [do_nothing, lambda: unet(0.1)])
def test_sound_avatar_models_pass(build: Callable[[], onnx.ModelProto]) -> None:
    data = build().SerializeToString()
    digest = hashlib.sha256(data).hexdigest()
    assert examine(data) == UploadedModel(("visual", "audio"), "output", 17, 8, "dynamic", digest, len(data))


@pytest.mark.parametrize("build", [do_nothing_encoder, lambda: audio_encoder(0.1)])
def test_sound_encoders_pass(build: Callable[[], onnx.ModelProto]) -> None:
    found = examine(build().SerializeToString(), ENCODER)
    assert (found.inputs, found.output) == (("mel_spectrogram",), "audio_features")


def test_tensors_are_recognised_by_shape_not_by_name_or_order() -> None:
    def swap(model: onnx.ModelProto) -> None:
        first, second = model.graph.input
        model.graph.input.extend([second, first])
        del model.graph.input[:2]

    assert examine(changed(swap)).inputs == ("visual", "audio")


@pytest.mark.parametrize(("opset", "ir"), [(11, 6), (17, 8), (21, 10)])
def test_versions_that_production_reads_pass(opset: int, ir: int) -> None:
    def change(model: onnx.ModelProto) -> None:
        model.opset_import[0].version, model.ir_version = opset, ir

    found = examine(changed(change))
    assert (found.opset, found.ir) == (opset, ir)


def test_weights_listed_among_the_inputs_pass() -> None:
    def list_weights(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))

    assert examine(changed(list_weights)).inputs == ("visual", "audio")


def test_dimensions_that_an_exporter_left_open_pass() -> None:
    assert examine(changed(with_dims(-1, "batch", 3, "height", "width"))).output == "output"


@pytest.mark.parametrize("indices", [(0, 1, -1), (0,), (-1,)])
def test_a_batch_of_one_is_found(indices: tuple[int, ...]) -> None:
    shapes = {0: (1, 6, 320, 320), 1: (1, 32, 16, 16), -1: (1, 3, 320, 320)}
    model = do_nothing()
    for index in indices:
        with_dims(index, *shapes[index])(model)
    assert examine(model.SerializeToString()).batch == "fixed"


def _replace_nodes(model: onnx.ModelProto, *nodes: onnx.NodeProto) -> None:
    del model.graph.node[:]
    model.graph.node.extend(nodes)


BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the file is empty"),
    "garbage": (b"\xff\xd8\xff\xe0 this is a JPEG", "not an ONNX file"),
    "text": (b"version https://git-lfs.github.com/spec/v1\n", "not an ONNX file|no graph"),
    "truncated": (unet(0.1).SerializeToString()[:-1000], "cut short"),
    "no graph": (changed(lambda m: m.ClearField("graph")), "no graph"),
    "no nodes": (changed(lambda m: m.graph.ClearField("node")), "no graph"),
    "no opset": (changed(lambda m: m.ClearField("opset_import")), "which opset"),
    "two opsets": (changed(lambda m: m.opset_import.append(helper.make_opsetid("ai.onnx", 16))), "which opset"),
    "old opset": (changed(lambda m: setattr(m.opset_import[0], "version", 10)), "opset 10 is outside 11 to 21; .*17"),
    "new opset": (changed(lambda m: setattr(m.opset_import[0], "version", 22)), "opset 22 is outside .* opset 17"),
    "new IR": (changed(lambda m: setattr(m, "ir_version", 11)), "IR version 11 is newer than 10"),
    "external initializer": (
        changed(lambda m: m.graph.initializer.append(external(stray()))),
        "'stray' lies in another file .external data.; save the model as one file",
    ),
    "external names only": (
        changed(lambda m: external(m.graph.initializer[0]).ClearField("data_location")),
        "external data",
    ),
    "external sparse values": (
        changed(
            lambda m: m.graph.sparse_initializer.append(
                onnx.SparseTensorProto(values=external(stray()), indices=stray("indices"), dims=[4])
            )
        ),
        "external data",
    ),
    "external sparse indices": (
        changed(
            lambda m: m.graph.sparse_initializer.append(
                onnx.SparseTensorProto(values=stray(), indices=external(stray("indices")), dims=[4])
            )
        ),
        "'indices' lies in another file",
    ),
    "external constant": (
        changed(lambda m: m.graph.node.append(constant_node(value=external(stray())))),
        "external data",
    ),
    "external sparse constant": (
        changed(
            lambda m: m.graph.node.append(
                constant_node(
                    sparse_value=onnx.SparseTensorProto(values=external(stray()), indices=stray("indices"), dims=[4])
                )
            )
        ),
        "external data",
    ),
    "external in a subgraph": (
        changed(lambda m: m.graph.node.append(nested(constant_node(value=external(stray())), 12))),
        "external data",
    ),
    "custom operator": (
        changed(lambda m: m.graph.node.append(helper.make_node("Steal", [], ["x"], name="thief", domain="evil"))),
        "the node 'thief' needs the operator evil.Steal",
    ),
    "contributed operator": (
        changed(lambda m: m.graph.node.append(helper.make_node("FusedConv", [], ["x"], domain="com.microsoft"))),
        "com.microsoft.FusedConv",
    ),
    "custom operator in a subgraph": (
        changed(lambda m: m.graph.node.append(nested(helper.make_node("Steal", [], ["stray"], domain="evil"), 3))),
        "evil.Steal",
    ),
    "bottomless": (bottomless(5000), "not an ONNX file"),
    "local function": (
        changed(lambda m: m.functions.append(onnx.FunctionProto(name="f", domain="local"))),
        "local functions",
    ),
    "training": (changed(lambda m: m.training_info.add()), "training information"),
    "unknown operator": (
        changed(lambda m: _replace_nodes(m, helper.make_node("Teleport", ["visual", "audio"], ["output"]))),
        "not a valid ONNX model .*Teleport",
    ),
    "dangling": (
        changed(lambda m: _replace_nodes(m, helper.make_node("Relu", ["nowhere"], ["output"]))),
        "not a valid ONNX model",
    ),
    "half precision in": (changed(with_elements(0, TensorProto.FLOAT16)), "input visual is FLOAT16, not float32"),
    "double in": (changed(with_elements(1, TensorProto.DOUBLE)), "input audio is DOUBLE"),
    "half precision out": (changed(with_elements(-1, TensorProto.FLOAT16)), "output output is FLOAT16"),
    "small pictures": (
        changed(with_dims(0, "n", 6, 160, 160)),
        r"no input has the shape \[n,6,320,320\] of visual, found visual \[n,6,160,160\], audio .*; export visual",
    ),
    "wrong audio": (changed(with_dims(1, "n", 16, 32, 32)), r"\[n,32,16,16\] of audio, found .*\[n,16,32,32\]"),
    "wrong output": (changed(with_dims(-1, "n", 4, 320, 320)), r"no output has the shape \[n,3,320,320\]"),
    "no shape": (changed(lambda m: m.graph.output[0].type.tensor_type.ClearField("shape")), "not a valid ONNX model"),
    "no batch axis": (changed(with_dims(0, 6, 320, 320)), r"found visual \[6,320,320\]"),
    "batch of four": (changed(with_dims(0, 4, 6, 320, 320)), "batch size is fixed at 4; export with dynamic_axes"),
    "missing input": (changed(lambda m: m.graph.input.pop()), "not a valid ONNX model|has 1 inputs"),
    "extra input": (
        changed(lambda m: m.graph.input.append(helper.make_tensor_value_info("speed", 1, [1]))),
        r"it has 3 inputs \(visual .*, speed \[1\]\) instead of 2",
    ),
    "shadowed input": (
        changed(lambda m: m.graph.initializer.append(helper.make_tensor("audio", 1, [1, 32, 16, 16], np.zeros(8192)))),
        "it has 1 inputs",
    ),
    "encoder": (do_nothing_encoder().SerializeToString(), r"it has 1 inputs \(mel_spectrogram"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused(name: str) -> None:
    data, fault = BROKEN[name]
    with pytest.raises(InvalidInput, match=fault):
        examine(data)
    refused(data)


def test_an_avatar_model_is_no_encoder() -> None:
    assert "it has 2 inputs" in refused(do_nothing().SerializeToString(), ENCODER)


def test_an_odd_tensor_name_is_refused() -> None:
    def rename(model: onnx.ModelProto) -> None:
        model.graph.node[-1].output[0] = model.graph.output[0].name = 'out"\nput'

    assert "other characters" in refused(changed(rename))


def open_inputs(model: onnx.ModelProto) -> None:
    """Both inputs of unknown size, so that either could be the picture."""
    for index in (0, 1):
        with_dims(index, "a", "b", "c", "d")(model)


def test_names_settle_what_shapes_leave_open() -> None:
    data = changed(open_inputs)
    assert "several inputs fit visual [n,6,320,320]: visual, audio; say which" in refused(data)
    assert examine(data, visual="visual", audio="audio").inputs == ("visual", "audio")
    assert "fits several roles" in refused(data, visual="visual", audio="visual")
    assert "no input 'picture' for visual" in refused(data, visual="picture")
    assert "no role 'mel'; name visual, audio, output" in refused(data, mel="visual")


def test_two_pictures_out_are_told_apart_by_name() -> None:
    def second(model: onnx.ModelProto) -> None:
        model.graph.node.append(helper.make_node("Relu", ["output"], ["rectified"]))
        model.graph.output.append(helper.make_tensor_value_info("rectified", 1, ["n", 3, 320, 320]))

    assert "several outputs fit output" in refused(changed(second))
    assert examine(changed(second), output="rectified").output == "rectified"


def test_make_dynamic_touches_shapes_only() -> None:
    model = unet(0.1)
    for index, shape in ((0, (1, 6, 320, 320)), (1, (1, 32, 16, 16)), (-1, (1, 3, 320, 320))):
        with_dims(index, *shape)(model)
    fixed = onnx.shape_inference.infer_shapes(model)
    assert len(fixed.graph.value_info) > 100
    found, parsed = Rules(AVATAR, "m").examine(fixed.SerializeToString(), {})
    make_dynamic(parsed, found, AVATAR)
    assert parsed.SerializeToString() == unet(0.1).SerializeToString()
    assert not parsed.graph.value_info


def test_graphs_are_found_at_any_depth() -> None:
    model = do_nothing()
    model.graph.node.append(nested(constant_node(value=stray()), 4))
    assert sum(1 for _ in graphs(model)) == 1 + 4 * 2


SOUND = do_nothing().SerializeToString()


@settings(deadline=None, max_examples=300)
@given(at=st.integers(0, len(SOUND) - 1), value=st.integers(0, 255), keep=st.integers(1, len(SOUND)))
def test_damaged_files_pass_or_are_refused_and_nothing_else(at: int, value: int, keep: int) -> None:
    data = bytearray(SOUND)
    data[at] = value
    with suppress(InvalidInput):
        examine(bytes(data[:keep]))
