"""Half precision: the same interface, nearly the same picture, and half the weights."""

from __future__ import annotations

import numpy as np
import onnx

from lipsync import architecture
from lipsync.bench.half_precision import halved
from lipsync.fusing import fuse
from lipsync.preparation import session


def test_a_halved_graph_predicts_nearly_the_same() -> None:
    model = architecture.unet(0.1)
    half = halved(model)
    onnx.checker.check_model(half, full_check=True)
    random = np.random.default_rng(0)
    feed = {
        "visual": random.random((2, 6, 320, 320), np.float32),
        "audio": random.standard_normal((2, 32, 16, 16), np.float32),
    }
    expected, found = (session(each.SerializeToString()).run(["output"], feed)[0] for each in (model, half))
    assert found.dtype == np.float32
    assert 0 < np.abs(found - expected).mean() < 0.005 < 20 * expected.std()
    assert half.ByteSize() < 0.6 * model.ByteSize()
    assert list(half.graph.input) == list(model.graph.input)
    assert list(half.graph.output) == list(model.graph.output)


def test_a_halved_graph_can_be_fused() -> None:
    fused = fuse(halved(architecture.unet(0.1)), ("visual", "audio", "output"), 2, "sent", "crops.bin")
    onnx.checker.check_model(fused, full_check=True)
