"""The written networks are the field's: their published sizes, their shapes, and activations that hide no bug."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compositor.errors import InvalidInput
from lipsync.architecture import audio_encoder, do_nothing, do_nothing_encoder, unet
from lipsync.model_size import macs, parameters

Array = npt.NDArray[np.float32]
INTERFACES: dict[str, dict[str, tuple[int, ...]]] = {
    "avatar": {"visual": (6, 320, 320), "audio": (32, 16, 16), "output": (3, 320, 320)},
    "encoder": {"mel_spectrogram": (1, 80, 16), "audio_features": (512,)},
}
MODELS = [
    pytest.param(lambda: unet(0.25), "avatar", id="unet"),
    pytest.param(lambda: audio_encoder(0.5), "encoder", id="audio_encoder"),
    pytest.param(do_nothing, "avatar", id="do_nothing"),
    pytest.param(do_nothing_encoder, "encoder", id="do_nothing_encoder"),
]


def session(model: onnx.ModelProto) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def avatar_input(batch: int, seed: int = 0) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    return {
        "visual": random.random((batch, 6, 320, 320), np.float32),
        "audio": random.standard_normal((batch, 32, 16, 16), np.float32),
    }


def mel_input(batch: int) -> dict[str, Array]:
    mel = np.random.default_rng(0).uniform(-4, 4, (batch, 1, 80, 16))
    return {"mel_spectrogram": mel.astype(np.float32)}


def run(model: onnx.ModelProto, feed: dict[str, Array]) -> Array:
    (output,) = session(model).run(None, feed)
    result: Array = output
    return result


def inferred_shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    values = (*graph.input, *graph.value_info, *graph.output)
    return {value.name: tuple(d.dim_value for d in value.type.tensor_type.shape.dim[1:]) for value in values}


def weights_digest(model: onnx.ModelProto) -> str:
    return hashlib.sha256(b"".join(tensor.raw_data for tensor in model.graph.initializer)).hexdigest()


@pytest.mark.parametrize(
    ("build", "parameter_count", "gmacs"), [(unet, 12_186_935, 4.886), (audio_encoder, 2_812_672, 0.0931)]
)
def test_full_width_is_the_published_size(
    build: Callable[[], onnx.ModelProto], parameter_count: int, gmacs: float
) -> None:
    model = build()
    assert parameters(model) == parameter_count
    assert macs(model) / 1e9 == pytest.approx(gmacs, rel=1e-3)


@pytest.mark.parametrize(("build", "kind"), MODELS)
def test_interface_and_validity(build: Callable[[], onnx.ModelProto], kind: str) -> None:
    model = build()
    onnx.checker.check_model(model, full_check=True)
    assert (model.ir_version, [(entry.domain, entry.version) for entry in model.opset_import]) == (8, [("", 17)])
    found = {}
    for value in (*model.graph.input, *model.graph.output):
        tensor = value.type.tensor_type
        assert (tensor.elem_type, tensor.shape.dim[0].dim_param) == (onnx.TensorProto.FLOAT, "batch")
        found[value.name] = tuple(dim.dim_value for dim in tensor.shape.dim[1:])
    assert found == INTERFACES[kind]


def test_every_node_and_tensor_of_the_unet_has_a_path_for_a_name() -> None:
    graph = unet(0.25).graph
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    assert {"encoder/level2/ir1/expand/conv", "decoder/level4/up", "fuse/concat", "audio/conv5/bn"} <= set(names)
    assert all(name.split("/")[0] in {"audio", "encoder", "fuse", "decoder", "head"} for name in names)


def test_level_shapes_of_the_unet() -> None:
    shapes = inferred_shapes(unet())
    assert shapes["encoder/level0/ir/project/bn"] == (32, 320, 320)
    levels = [(32, 160, 160), (64, 80, 80), (128, 40, 40), (256, 20, 20), (512, 10, 10)]
    assert [shapes[f"encoder/level{level}/ir2/add"] for level in range(1, 6)] == levels
    assert shapes["audio/conv3/relu"] == (256, 16, 16)
    assert shapes["audio/ir7/add"] == (512, 10, 10)
    assert shapes["fuse/concat"] == (1024, 10, 10)
    assert shapes["fuse/double1/ir2/add"] == (512, 10, 10)
    assert shapes["fuse/double2/ir2/add"] == (256, 10, 10)
    assert [shapes[f"decoder/level{level}/concat"][0] for level in range(4, -1, -1)] == [512, 256, 128, 64, 64]
    levels = [(128, 20, 20), (64, 40, 40), (32, 80, 80), (32, 160, 160), (16, 320, 320)]
    assert [shapes[f"decoder/level{level}/ir2/add"] for level in range(4, -1, -1)] == levels


def test_level_shapes_of_the_audio_encoder() -> None:
    shapes = inferred_shapes(audio_encoder())
    stages = [(32, 80, 16), (64, 27, 16), (128, 9, 6), (256, 3, 3), (512, 1, 1)]
    assert [shapes[f"stage{stage}/conv/relu"] for stage in range(1, 6)] == stages


def test_upsampling_is_bilinear_with_aligned_corners() -> None:
    resizes = [node for node in unet(0.1).graph.node if node.op_type == "Resize"]
    modes = [{a.name: onnx.helper.get_attribute_value(a) for a in node.attribute} for node in resizes]
    assert modes == [{"mode": b"linear", "coordinate_transformation_mode": b"align_corners"}] * 5


@pytest.mark.parametrize("build", [unet, audio_encoder])
def test_bytes_depend_on_the_seed_alone(build: Callable[..., onnx.ModelProto]) -> None:
    first = build(0.25, 7).SerializeToString()
    assert build(0.25, 7).SerializeToString() == first
    assert build(0.25, 8).SerializeToString() != first


def test_weights_are_the_same_on_every_platform() -> None:
    # Pinned where they were first made: a change here changes every figure measured on the graph.
    assert weights_digest(unet(0.25, 3)) == "a50171fe369fdcdbaa47c03ea543e0c019feec149f7e0ad932f70e698a9893fa"
    assert weights_digest(audio_encoder(0.25, 3)) == "1025a8326f50505f0cfb6051b66dd3e923dd7ba5435a5867f95faf78af35e563"


@pytest.mark.parametrize(("build", "kind"), MODELS)
def test_rows_do_not_depend_on_their_batch(build: Callable[[], onnx.ModelProto], kind: str) -> None:
    feed = avatar_input(3) if kind == "avatar" else mel_input(3)
    runner = session(build())
    (together,) = runner.run(None, feed)
    assert together.dtype == np.float32
    assert together.shape == (3, *list(INTERFACES[kind].values())[-1])
    for row in range(3):
        (alone,) = runner.run(None, {name: value[row : row + 1] for name, value in feed.items()})
        np.testing.assert_allclose(alone[0], together[row], atol=1e-5)


@pytest.mark.parametrize(("width", "seed"), [(0.25, 0), (0.25, 1), (0.5, 2), (1.0, 0)])
def test_pictures_vary_with_everything_that_goes_in(width: float, seed: int) -> None:
    runner, feed = session(unet(width, seed)), avatar_input(1)
    (picture,) = runner.run(None, feed)
    assert np.isfinite(picture).all()
    assert picture.min() >= 0
    assert picture.max() <= 1
    for channel in picture[0]:
        assert 0.2 < channel.mean() < 0.8
        assert channel.std() > 0.02
    for name in feed:
        (other,) = runner.run(None, feed | {name: avatar_input(1, seed=1)[name]})
        assert np.abs(other - picture).mean() > 0.01, name


@pytest.mark.parametrize("width", [0.25, 1.0])
def test_activations_neither_explode_nor_die(width: float) -> None:
    model = unet(width, 1)
    levels = [f"encoder/level{i}/ir2/add" for i in range(1, 6)] + [f"decoder/level{i}/ir2/add" for i in range(5)]
    levels += ["audio/ir7/add", "fuse/double2/ir2/add"]
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, 1, None) for name in levels)
    activations = session(model).run(levels, avatar_input(1))
    assert all(0.3 < activation.std() < 4 for activation in activations)


@pytest.mark.parametrize("seed", [0, 1])
def test_features_vary_with_the_sound(seed: int) -> None:
    features = run(audio_encoder(1.0, seed), mel_input(2))
    assert np.isfinite(features).all()
    assert features.min() >= 0
    assert 0.05 < features.std() < 5
    assert np.abs(features[0] - features[1]).mean() > 0.05


@settings(deadline=None, max_examples=12)
@given(width=st.floats(0.01, 0.6), seed=st.integers(0, 2**63 - 1))
def test_any_width_keeps_the_interface(width: float, seed: int) -> None:
    model = unet(width, seed)
    onnx.checker.check_model(model)
    shapes = inferred_shapes(model)
    assert {name: shapes[name] for name in INTERFACES["avatar"]} == INTERFACES["avatar"]
    assert shapes["fuse/double1/ir2/add"][0] % 8 == 0


def test_narrower_is_smaller() -> None:
    sizes = [parameters(unet(width)) for width in (0.1, 0.25, 0.5, 1.0)]
    assert sizes == sorted(set(sizes))
    half, full = macs(unet(0.5)), macs(unet())
    assert 1.1e9 < half < full / 3


@pytest.mark.parametrize("build", [unet, audio_encoder])
@pytest.mark.parametrize("width", [0, -1, 4.1, float("nan"), float("inf"), "1"])
def test_width_out_of_range_is_refused(build: Callable[..., onnx.ModelProto], width: Any) -> None:
    with pytest.raises(InvalidInput, match=r"width: .* up to 4"):
        build(width)


@pytest.mark.parametrize("build", [unet, audio_encoder])
@pytest.mark.parametrize("seed", [-1, 2**63, 0.5, True, None])
def test_seed_out_of_range_is_refused(build: Callable[..., onnx.ModelProto], seed: Any) -> None:
    with pytest.raises(InvalidInput, match=r"seed: .* whole number"):
        build(0.25, seed)


def test_do_nothing_answers_the_first_three_channels() -> None:
    feed = avatar_input(2)
    np.testing.assert_array_equal(run(do_nothing(), feed), feed["visual"][:, :3])


def test_do_nothing_reads_the_audio() -> None:
    feed = avatar_input(2)
    feed["audio"][1, 0, 0, 0] = np.nan
    answer = run(do_nothing(), feed)
    assert np.isfinite(answer[0]).all()
    assert np.isnan(answer[1]).all()


def test_do_nothing_encoder_answers_the_first_values() -> None:
    feed = mel_input(2)
    answer = run(do_nothing_encoder(), feed)
    np.testing.assert_array_equal(answer, feed["mel_spectrogram"].reshape(2, 1280)[:, :512])


@pytest.mark.parametrize("build", [do_nothing, do_nothing_encoder])
def test_do_nothing_costs_nothing(build: Callable[[], onnx.ModelProto]) -> None:
    assert (parameters(build()), macs(build())) == (0, 0)
