"""Counts of small graphs that can be done by hand."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from lipsync.graph_builder import GraphBuilder
from lipsync.model_size import macs, parameters


def small() -> onnx.ModelProto:
    graph = GraphBuilder("small")
    x = graph.input("x", ("batch", 4, 8, 8))
    weight = graph.constant("weight", np.zeros((6, 2, 3, 3), np.float32))
    bias = graph.constant("bias", np.zeros(6, np.float32))
    x = graph.node("Conv", [x, weight, bias], "conv", group=2, strides=[2, 2], pads=[1] * 4)
    vectors = [graph.constant(name, np.ones(6, np.float32)) for name in ("scale", "shift", "mean", "variance")]
    x = graph.node("BatchNormalization", [x, *vectors], "bn")
    x = graph.node("Flatten", [x], "flatten")
    dense = graph.constant("dense", np.zeros((96, 5), np.float32))
    graph.node("Gemm", [x, dense, graph.constant("offset", np.zeros(5, np.float32))], "gemm", output="y")
    graph.constant("unused", np.zeros(1000, np.float32))
    graph.output("y", ("batch", 5))
    return graph.model()


def test_parameters_leave_running_statistics_out() -> None:
    assert parameters(small()) == (6 * 2 * 9 + 6) + (6 + 6) + (96 * 5 + 5)


def test_macs_are_those_of_one_frame() -> None:
    model = small()
    assert macs(model) == (6 * 4 * 4) * (2 * 9) + 5 * 96
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_shared_weights_count_once() -> None:
    graph = GraphBuilder("shared")
    x, weight = graph.input("x", ("batch", 3)), graph.constant("w", np.zeros((3, 3), np.float32))
    x = graph.node("MatMul", [x, weight], "first")
    graph.node("MatMul", [x, weight], "second", output="y")
    graph.output("y", ("batch", 3))
    assert (parameters(graph.model()), macs(graph.model())) == (9, 18)


def test_a_shape_that_stays_unknown_is_said() -> None:
    graph = GraphBuilder("unknown")
    x = graph.input("x", ("batch", 3, "height", 4))
    graph.node("Conv", [x, graph.constant("w", np.zeros((1, 3, 1, 1), np.float32))], "conv", output="y")
    graph.output("y", ("batch", 1, "height", 4))
    with pytest.raises(ValueError, match="'y' is not known"):
        macs(graph.model())
