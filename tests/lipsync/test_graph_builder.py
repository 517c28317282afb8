"""A written graph is valid, runs, and refuses what would make it ambiguous."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto

from lipsync.graph_builder import GraphBuilder


def test_a_small_graph_runs() -> None:
    graph = GraphBuilder("scaled")
    x = graph.input("x", ("batch", 3))
    scaled = graph.node("Mul", [x, graph.constant("factor", np.array([1, 2, 3], np.float32))], "scale")
    graph.node("Cast", [scaled], "cast", output="y", to=TensorProto.UINT8)
    graph.output("y", ("batch", 3), TensorProto.UINT8)
    model = graph.model()
    onnx.checker.check_model(model, full_check=True)
    assert (model.ir_version, model.opset_import[0].version) == (8, 17)
    (y,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": np.ones((2, 3), np.float32)})
    assert y.tolist() == [[1, 2, 3]] * 2


def test_an_optional_input_is_left_out_by_an_empty_name() -> None:
    graph = GraphBuilder("grown")
    x = graph.input("x", (1, 1, 2, 2))
    graph.node("Resize", [x, "", graph.constant("scales", np.array([1, 1, 2, 2], np.float32))], "grow", output="y")
    graph.output("y", (1, 1, 4, 4))
    onnx.checker.check_model(graph.model(), full_check=True)


def test_constants_that_are_not_contiguous_keep_their_values() -> None:
    graph = GraphBuilder("constant")
    value = np.arange(6, dtype=np.float32).reshape(2, 3).T
    graph.constant("c", value)
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(graph.model().graph.initializer[0]), value)


def test_a_scalar_stays_a_scalar() -> None:
    graph = GraphBuilder("scalar")
    graph.constant("s", np.float32(2))
    assert list(graph.model().graph.initializer[0].dims) == []


def test_a_name_is_given_once() -> None:
    graph = GraphBuilder("twice")
    graph.input("x", (1,))
    with pytest.raises(ValueError, match="'x' is empty or already taken"):
        graph.constant("x", np.zeros(1, np.float32))
    with pytest.raises(ValueError, match="'' is empty"):
        graph.node("Relu", ["x"], "")


def test_an_output_must_exist() -> None:
    with pytest.raises(ValueError, match="no node makes the output 'y'"):
        GraphBuilder("empty").output("y", (1,))
