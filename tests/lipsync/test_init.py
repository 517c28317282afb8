"""The package itself: what it sets for all that it imports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import onnx

from lipsync import architecture

RUN = "import sys, lipsync, onnxruntime; onnxruntime.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider'])"


def test_onnx_runtime_makes_no_notes_for_its_maker(tmp_path: Path) -> None:
    onnx.save(architecture.do_nothing_encoder(), tmp_path / "encoder.onnx")
    home = tmp_path / "home"
    home.mkdir()
    # Where it sees CI it is silent anyway.
    kept = {name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")}
    kept = {name: value for name, value in kept.items() if not name.startswith("XDG_")}
    done = subprocess.run([sys.executable, "-c", RUN, tmp_path / "encoder.onnx"], env={**kept, "HOME": str(home)})
    assert done.returncode == 0
    assert list(home.rglob("*")) == []
