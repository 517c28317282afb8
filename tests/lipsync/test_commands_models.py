"""`lipsync model build` and `lipsync encoder add`: what they write and say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
import pytest


def lipsync(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lipsync", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize(
    ("graph", "counts"),
    [
        ("unet", "12,186,935 parameters, 4.886 GMAC"),
        ("encoder", "2,812,672 parameters, 0.093 GMAC"),
        ("do-nothing", " parameters, 0.000 GMAC"),
        ("do-nothing-encoder", " parameters, 0.000 GMAC"),
    ],
)
def test_build_writes_a_valid_graph_and_counts_it(tmp_path: Path, graph: str, counts: str) -> None:
    path = tmp_path / "new" / "graph.onnx"
    done = lipsync("model", "build", graph, path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{path}: ")
    assert counts in done.stdout
    onnx.checker.check_model(onnx.load(path), full_check=True)


def test_an_encoder_is_installed_once(tmp_path: Path) -> None:
    path, models = tmp_path / "encoder.onnx", tmp_path / "models"
    assert lipsync("model", "build", "do-nothing-encoder", path).returncode == 0
    models.mkdir()
    done = lipsync("encoder", "add", path, "-r", models)
    assert (done.returncode, done.stdout) == (0, f"encoder audio_encoder installed in {models}\n"), done.stderr
    onnx.checker.check_model(onnx.load(models / "audio_encoder" / "1" / "model.onnx"))
    assert (models / "audio_encoder" / "config.pbtxt").is_file()
    again = lipsync("encoder", "add", path, "-r", models)
    assert again.returncode == 1
    assert again.stderr.startswith("error: ")
    assert lipsync("encoder", "add", path, "-r", models, "--replace").returncode == 0


def test_a_model_of_another_kind_is_no_encoder(tmp_path: Path) -> None:
    path = tmp_path / "avatar.onnx"
    assert lipsync("model", "build", "do-nothing", path).returncode == 0
    done = lipsync("encoder", "add", path, "-r", tmp_path / "models")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
