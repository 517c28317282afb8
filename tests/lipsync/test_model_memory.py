"""What a model takes in memory, as measured when it is added: what Triton's process takes, or one clear refusal."""

from __future__ import annotations

import sys
from pathlib import Path

import onnx
import pytest

from compositor.catalogue import Catalogue
from compositor.errors import InvalidInput
from lipsync import architecture
from lipsync.bench.inference_models import Server
from lipsync.bench.process_memory import process_bytes
from lipsync.model_config import session_parameters
from lipsync.model_memory import backend_bytes
from lipsync.preparation import Choices
from lipsync.repository import Serving, add_tenant
from lipsync.sources import open_source
from lipsync.tritonserver import EmbeddedTriton

from .conftest import FRAMES, install_encoder, silent, write_source

MB = 1_000_000


def test_it_is_what_triton_s_process_takes(tmp_path: Path, triton_home: Path) -> None:
    """Within what the two processes differ in without a model."""
    install_encoder(tmp_path / "models")
    source = open_source(write_source(tmp_path / "source", architecture.unet(0.3)))
    for batch in (1, 4):
        choices = Choices(idle="background", max_batch_size=batch)
        add_tenant(tmp_path / "models", f"batch{batch}", source, choices, Serving("cpu", 1), silent)
    catalogue = Catalogue(tmp_path / "models")
    measured = {batch: catalogue.facts(f"batch{batch}").bytes for batch in (1, 4)}
    assert measured[4] > measured[1] + 50 * MB
    with EmbeddedTriton(tmp_path / "models") as triton:
        server = Server(triton)
        try:
            for batch, expected in measured.items():
                pid = server.load(f"batch{batch}")
                for _ in range(3):
                    server.infer(f"batch{batch}", batch, FRAMES)
                assert process_bytes(pid)["private"] == pytest.approx(expected, abs=30 * MB)
        finally:
            server.close()


def test_mapped_crops_are_not_counted(tmp_path: Path) -> None:
    install_encoder(tmp_path / "models")
    for frames in (2, 48):
        source = open_source(write_source(tmp_path / f"source{frames}", frames=frames))
        add_tenant(tmp_path / "models", f"t{frames}", source, Choices(idle="background"), Serving("cpu", 1), silent)
    few, many = (Catalogue(tmp_path / "models").facts(name).bytes for name in ("t2", "t48"))
    assert many == pytest.approx(few, abs=5 * MB), "15 MB of crops"


def saved(folder: Path) -> Path:
    path = folder / "model.onnx"
    onnx.save(architecture.do_nothing(), path)
    return path


def test_a_model_that_does_not_load_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(InvalidInput, match=r"does not run as it is to be served, at a batch of 4 \(\w+: ") as caught:
        backend_bytes(path, 4, session_parameters(1))
    assert "\n" not in caught.value.message


def test_a_model_that_needs_more_than_allowed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(architecture.unet(0.3), path)
    with pytest.raises(InvalidInput, match="use a smaller --max-batch-size"):
        backend_bytes(path, 8, session_parameters(1), memory_limit_bytes=200 * MB)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("sleep 300", "it took longer than 0.5 s"),
        ("kill -9 $$", "its process ended with -9"),
        ("echo '{}'", "no figure was given"),
        ("""echo '{"private_bytes": -1}'""", "its process ended with 0"),
    ],
)
def test_a_child_that_gives_no_figure_is_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, fault: str
) -> None:
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\n{line}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(InvalidInput, match=fault):
        backend_bytes(saved(tmp_path), 1, session_parameters(1), timeout_s=0.5 if "sleep" in line else 30)
