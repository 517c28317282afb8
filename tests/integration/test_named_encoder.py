"""Tenants of one repository with audio encoders of their own: each hears through the one that it names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from compositor import jpeg
from lipsync.client import speak
from lipsync.graph_builder import GraphBuilder
from lipsync.preparation import Choices
from lipsync.repository import Serving, add_encoder, add_tenant
from lipsync.sentences import NUMBERS
from lipsync.sources import open_source

from ..conftest import running_stack, silent, write_small_source

pytestmark = pytest.mark.triton

LEVELS = {"audio_encoder": 0.2, "other": 0.8}
MIDDLE = slice(80, 120), slice(100, 140)  # of the moving crop, in every frame


def constant_encoder(level: float) -> onnx.ModelProto:
    """Hears `level` in everything."""
    graph = GraphBuilder("constant_encoder")
    flat = graph.node("Flatten", [graph.input("mel_spectrogram", ("n", 1, 80, 16))], "flatten", axis=1)
    nothing = graph.node("MatMul", [flat, graph.constant("zeros", np.zeros((1280, 512), np.float32))], "nothing")
    graph.node("Add", [nothing, graph.constant("level", np.float32(level))], "add", output="audio_features")
    graph.output("audio_features", ("n", 512))
    return graph.model()


def grey_by_ear() -> onnx.ModelProto:
    """Predicts a grey as bright as the mean of the audio features."""
    graph = GraphBuilder("grey_by_ear")
    visual, audio = graph.input("visual", ("n", 6, 320, 320)), graph.input("audio", ("n", 32, 16, 16))
    bounds = [graph.constant(name, np.array([value])) for name, value in (("begin", 0), ("end", 3), ("axis", 1))]
    roi = graph.node("Slice", [visual, *bounds], "roi")
    black = graph.node("Mul", [roi, graph.constant("zero", np.float32(0))], "black")
    mean = graph.node("ReduceMean", [audio], "mean", axes=[1, 2, 3], keepdims=1)
    graph.node("Add", [black, mean], "sum", output="output")
    graph.output("output", ("n", 3, 320, 320))
    return graph.model()


def test_each_tenant_hears_through_the_encoder_that_it_names(triton_home: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models"
    repository.mkdir()
    source = open_source(write_small_source(tmp_path / "source", grey_by_ear()))
    for encoder, level in LEVELS.items():
        onnx.save(constant_encoder(level), tmp_path / f"{encoder}.onnx")
        add_encoder(repository, encoder, tmp_path / f"{encoder}.onnx")
        add_tenant(repository, f"of_{encoder}", source, Choices(encoder=encoder), Serving(threads=1), silent)
    with running_stack(repository) as stack:
        for encoder, level in LEVELS.items():
            answers = speak(stack.service.address, f"of_{encoder}", NUMBERS.read_bytes())
            pictures = [jpeg.decode(each.frame.data) for each in answers if each.WhichOneof("event") == "frame"]
            assert len(pictures) == 101
            assert [picture[MIDDLE].mean() for picture in pictures] == pytest.approx([255 * level] * 101, abs=3)
