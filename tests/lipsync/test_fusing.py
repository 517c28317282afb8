"""The fused graph in ONNX Runtime against the family's own way: visual input, raw model and paste written out here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from compositor.errors import InvalidInput
from lipsync import architecture
from lipsync.fusing import CropsMode, canonical, fuse
from lipsync.graph_builder import GraphBuilder

from .conftest import Array, poked, run

NAMES = ("visual", "audio", "output")
COUNT = 4
CROPS = np.random.default_rng(5).integers(0, 256, (COUNT, 328, 328, 3), dtype=np.uint8)
AUDIO = np.random.default_rng(6).standard_normal((3, 32, 16, 16), dtype=np.float32)


def crafted(opset: int, names: tuple[str, str, str], inside: dict[str, str] | None = None) -> onnx.ModelProto:
    """0.5 ROI + 0.4 masked ROI + 0.1 |sin(sample)|; the tensors inside may be called by any name, too."""
    visual, audio, output = names
    own = {"roi": "roi", "masked": "masked", "sample": "sample", "half": "half", **(inside or {})}
    graph = GraphBuilder("crafted")
    graph.input(visual, ("n", 6, 320, 320))
    graph.input(audio, ("n", 32, 16, 16))

    def cut(tensor: str, part: str, axes: list[int], begins: list[int], ends: list[int]) -> str:
        bounds = {"begin": begins, "end": ends, "axes": axes}
        constants = [graph.constant(f"{part}_{key}", np.array(value)) for key, value in bounds.items()]
        return graph.node("Slice", [tensor, *constants], f"cut_{part}", output=own[part])

    roi, masked = cut(visual, "roi", [1], [0], [3]), cut(visual, "masked", [1], [3], [6])
    sample = cut(audio, "sample", [1, 2, 3], [7, 7, 7], [8, 8, 8])
    scaled = [
        graph.node("Mul", [roi, graph.constant(own["half"], np.float32(0.5))], "scale_roi"),
        graph.node("Mul", [masked, graph.constant("most", np.float32(0.4))], "scale_masked"),
    ]
    wave = graph.node("Abs", [graph.node("Sin", [sample], "sine")], "wave")
    scaled.append(graph.node("Mul", [wave, graph.constant("some", np.float32(0.1))], "scale_wave"))
    graph.node("Add", [graph.node("Add", scaled[:2], "picture"), scaled[2]], "sum", output=output)
    graph.output(output, ("n", 3, 320, 320))
    return graph.model(opset=opset, ir_version=10 if opset > 20 else 7)


def classical(model: onnx.ModelProto, names: tuple[str, str, str], crops: Array, audio: Array) -> Array:
    """FIELD.md's own way: the visual input in numpy, the model as it is, times 255, truncated, into the crop."""
    roi = crops[:, 4:324, 4:324].transpose(0, 3, 1, 2).astype(np.float32) / 255
    masked = roi.copy()
    masked[:, :, 5:310, 5:315] = 0
    (prediction,) = run(model, {names[0]: np.concatenate([roi, masked], axis=1), names[1]: audio})
    mouths: Array = crops.copy()
    mouths[:, 4:324, 4:324] = (prediction * 255).transpose(0, 2, 3, 1).astype(np.uint8)
    return mouths


def save(folder: Path, model: onnx.ModelProto) -> Path:
    """The fused model and, beside it, the crops that it refers to."""
    CROPS.transpose(0, 3, 1, 2).tofile(folder / "crops.bin")
    onnx.save(model, folder / "model.onnx")
    # Shape inference knows no sparse weights; the rest of the check and ONNX Runtime do.
    onnx.checker.check_model(folder / "model.onnx", full_check=not model.graph.sparse_initializer)
    return folder / "model.onnx"


def fused_mouths(
    folder: Path, model: onnx.ModelProto, names: tuple[str, str, str], mode: CropsMode, index: list[int], audio: Array
) -> tuple[Array, Array]:
    path = save(folder, fuse(model, names, COUNT, mode, "crops.bin"))
    feed: dict[str, Any] = {"audio": audio}
    if mode == "resident":
        feed["frame_index"] = np.array(index, np.int32)[:, None]
    else:
        feed["crop"] = np.ascontiguousarray(CROPS[index].transpose(0, 3, 1, 2))
    mouths, finite = run(path, feed)
    assert mouths.dtype == np.uint8
    assert finite.dtype == np.bool_
    assert finite.shape == (len(index), 1)
    return mouths.transpose(0, 2, 3, 1), finite[:, 0]


@pytest.mark.parametrize("mode", ["resident", "sent"])
def test_do_nothing_gives_the_classical_mouths_exactly(tmp_path: Path, mode: CropsMode) -> None:
    model, index = architecture.do_nothing(), [3, 0, 3]
    mouths, finite = fused_mouths(tmp_path, model, NAMES, mode, index, AUDIO)
    np.testing.assert_array_equal(mouths, classical(model, NAMES, CROPS[index], AUDIO))
    assert finite.all()


def test_the_true_graph_gives_the_classical_mouths(tmp_path: Path) -> None:
    model, index = architecture.unet(0.25), [1, 2]
    mouths, finite = fused_mouths(tmp_path, model, NAMES, "resident", index, AUDIO[:2])
    expected = classical(model, NAMES, CROPS[index], AUDIO[:2])
    different = mouths.astype(int) - expected
    assert np.abs(different).max() <= 1
    assert np.count_nonzero(different) < different.size / 1000
    border = np.ones((328, 328), bool)
    border[4:324, 4:324] = False
    np.testing.assert_array_equal(mouths[:, border], CROPS[index][:, border])
    assert finite.all()
    assert len(np.unique(mouths[:, 4:324, 4:324])) > 5, "the model says something"


@pytest.mark.parametrize("mode", ["resident", "sent"])
@pytest.mark.parametrize("opset", [11, 17, 21])
@pytest.mark.parametrize(
    ("names", "inside"),
    [
        (("input", "audio_input", "out"), {}),
        (("mouth", "visual", "audio"), {"roi": "finite", "masked": "crop", "half": "frame_index"}),
        (("audio", "mouth", "finite"), {"roi": "output", "sample": "frame_index"}),
    ],
    ids=["plain", "ours", "crossed"],
)
def test_any_names_and_opsets(
    tmp_path: Path, names: tuple[str, str, str], inside: dict[str, str], opset: int, mode: CropsMode
) -> None:
    model, index = crafted(opset, names, inside), [2, 0, 1]
    before = model.SerializeToString()
    mouths, _ = fused_mouths(tmp_path, model, names, mode, index, AUDIO)
    different = mouths.astype(int) - classical(model, names, CROPS[index], AUDIO)
    assert np.abs(different).max() <= 1
    assert np.count_nonzero(different) < different.size / 1000
    assert model.SerializeToString() == before, "the uploaded graph is not changed"
    fused = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    assert [(entry.domain, entry.version) for entry in fused.opset_import] == [("", opset)]
    assert 8 <= fused.ir_version <= 10


def test_names_in_subgraphs_and_sparse_weights_are_moved_too(tmp_path: Path) -> None:
    names = ("mouth", "audio", "output")
    graph = GraphBuilder("branching")
    graph.input("mouth", ("n", 6, 320, 320))
    graph.input("audio", ("n", 32, 16, 16))
    bounds = [graph.constant(key, np.array([value])) for key, value in (("begin", 0), ("end", 3), ("axis", 1))]
    branches = {}
    for branch, factor in (("then_branch", 0.25), ("else_branch", 0.75)):
        branches[branch] = helper.make_graph(
            [
                helper.make_node("Slice", ["mouth", *bounds], [f"crop_{branch}"]),
                helper.make_node("Mul", [f"crop_{branch}", f"frame_index_{branch}"], [f"finite_{branch}"]),
                helper.make_node("Identity", [f"finite_{branch}"], ["crop" if factor < 0.5 else "finite"]),
            ],
            branch,
            [],
            [helper.make_tensor_value_info("crop" if factor < 0.5 else "finite", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(np.float32(factor), f"frame_index_{branch}")],
        )
    corner = graph.node("ReduceMax", ["audio"], "corner", keepdims=0)
    loud = graph.node("Greater", [corner, graph.constant("limit", np.float32(1e6))], "loud")
    chosen = graph.node("If", [loud], "if", output="chosen", **branches)
    graph.node("Add", [chosen, graph.constant("nothing", np.zeros((), np.float32))], "sum_up")
    model = graph.model()
    # A sparse initializer of one of our names: all zeros but one element of the picture.
    values = numpy_helper.from_array(np.array([0.125], np.float32), "frame_index")
    indices = numpy_helper.from_array(np.array([5], np.int64), "frame_index_at")
    sparse = helper.make_sparse_tensor(values, indices, [3, 320, 320])
    model.graph.sparse_initializer.append(sparse)
    model.graph.node.append(helper.make_node("Add", ["sum_up", "frame_index"], ["output"], "add_sparse"))
    model.graph.output.append(helper.make_tensor_value_info("output", TensorProto.FLOAT, ["n", 3, 320, 320]))
    model.graph.value_info.append(helper.make_tensor_value_info("chosen", TensorProto.FLOAT, ["n", 3, 320, 320]))
    mouths, _ = fused_mouths(tmp_path, model, names, "resident", [1, 2], AUDIO[:2])
    np.testing.assert_array_equal(mouths, classical(model, names, CROPS[[1, 2]], AUDIO[:2]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [(0, 0, 0), (1, 160, 7), (2, 319, 319)])
def test_finite_is_false_for_the_row_that_is_not(tmp_path: Path, value: float, at: tuple[int, int, int]) -> None:
    audio = np.zeros((3, 32, 16, 16), np.float32)
    audio[1, 0, 0, 0] = value
    mouths, finite = fused_mouths(tmp_path, poked(at), NAMES, "resident", [0, 1, 2], audio)
    assert finite.tolist() == [True, False, True]
    alone, _ = fused_mouths(tmp_path, poked(at), NAMES, "resident", [0, 2], audio[[0, 2]])
    np.testing.assert_array_equal(mouths[[0, 2]], alone)


def test_predictions_beyond_the_range_are_clipped_and_finite(tmp_path: Path) -> None:
    audio = np.zeros((2, 32, 16, 16), np.float32)
    audio[:, 0, 0, 0] = (7, -7)
    mouths, finite = fused_mouths(tmp_path, poked((1, 0, 9)), NAMES, "resident", [0, 0], audio)
    assert finite.all()
    assert mouths[:, 4, 13, 1].tolist() == [255, 0]


def test_frame_numbers_are_clipped(tmp_path: Path) -> None:
    asked, meant = [-5, 10**6, -(2**31), 2**31 - 1, 2], [0, 3, 0, 3, 2]
    audio = np.zeros((5, 32, 16, 16), np.float32)
    mouths, _ = fused_mouths(tmp_path, architecture.do_nothing(), NAMES, "resident", asked, audio)
    np.testing.assert_array_equal(mouths, classical(architecture.do_nothing(), NAMES, CROPS[meant], audio))


def test_rows_do_not_depend_on_their_batch(tmp_path: Path) -> None:
    model = crafted(17, NAMES)
    together, _ = fused_mouths(tmp_path, model, NAMES, "resident", [0, 1, 2], AUDIO)
    for row in range(3):
        alone, _ = fused_mouths(tmp_path, model, NAMES, "resident", [row], AUDIO[row : row + 1])
        np.testing.assert_array_equal(together[row], alone[0])


def test_interfaces_are_the_contract(tmp_path: Path) -> None:
    def side(values: Any) -> dict[str, tuple[int, list[int | str]]]:
        return {
            value.name: (
                value.type.tensor_type.elem_type,
                [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim],
            )
            for value in values
        }

    resident = fuse(architecture.do_nothing(), NAMES, 9, "resident", "crops.bin").graph
    sent = fuse(architecture.do_nothing(), NAMES, 9, "sent", "crops.bin").graph
    audio = (TensorProto.FLOAT, ["batch", 32, 16, 16])
    planes = (TensorProto.UINT8, ["batch", 3, 328, 328])
    assert side(resident.input) == {"frame_index": (TensorProto.INT32, ["batch", 1]), "audio": audio}
    assert side(sent.input) == {"crop": planes, "audio": audio}
    for graph in (resident, sent):
        assert side(graph.output) == {"mouth": planes, "finite": (TensorProto.BOOL, ["batch", 1])}
    external = {t.name: t for t in resident.initializer if t.data_location == TensorProto.EXTERNAL}
    assert [list(tensor.dims) for tensor in external.values()] == [[9, 3, 328, 328]]
    assert not any(tensor.data_location == TensorProto.EXTERNAL for tensor in sent.initializer)
    stored = {entry.key: entry.value for entry in external["lipsync/crops"].external_data}
    assert stored == {"location": "crops.bin", "offset": "0", "length": str(9 * 328 * 328 * 3)}


@pytest.mark.parametrize("where", ["tensor", "node", "initializer", "subgraph"])
def test_the_reserved_prefix_is_refused(where: str) -> None:
    model = crafted(17, NAMES, {"roi": "lipsync/visual"} if where == "tensor" else {})
    if where == "node":
        model.graph.node[0].name = "lipsync/mouth_node"
    if where == "initializer":
        model.graph.initializer.append(numpy_helper.from_array(np.float32(1), "lipsync/mask"))
    if where == "subgraph":
        inner = helper.make_graph([helper.make_node("Identity", ["x"], ["lipsync/levels"])], "inner", [], [])
        model.graph.node[0].attribute.append(helper.make_attribute("body", inner))
    wraps: list[Callable[[], object]] = [lambda: fuse(model, NAMES, 1, "sent", ""), lambda: canonical(model, {})]
    for wrap in wraps:
        with pytest.raises(InvalidInput, match=r"'lipsync/.*reserved prefix 'lipsync/'; rename it") as caught:
            wrap()
        assert caught.value.field == "model"


def test_canonical_only_renames() -> None:
    names = ("mouth", "visual", "audio")
    model = crafted(11, names, {"roi": "output"})
    renamed = canonical(model, dict(zip(names, NAMES, strict=True)))
    onnx.checker.check_model(renamed, full_check=True)
    visual = np.random.default_rng(1).random((2, 6, 320, 320), dtype=np.float32)
    (expected,) = run(model, {"mouth": visual, "visual": AUDIO[:2]})
    (found,) = run(renamed, {"visual": visual, "audio": AUDIO[:2]})
    np.testing.assert_array_equal(found, expected)
    assert [value.name for value in renamed.graph.output] == ["output"]
