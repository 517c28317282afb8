"""What a report says of GPUs and of the server's version, with an nvidia-smi of our own."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lipsync.bench import machine


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No version that an earlier test asked for, and none of ours for later ones."""
    machine.tritonserver_version.cache_clear()
    yield
    machine.tritonserver_version.cache_clear()


def nvidia_smi(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.defpath}")


@pytest.mark.parametrize("script", ["exit 9", "true"])
def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    nvidia_smi(tmp_path, script, monkeypatch)
    assert machine.gpu() == "none at hand (GPU figures not taken)"


def test_without_a_driver_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert machine.gpu() == "none at hand (GPU figures not taken)"


@pytest.mark.parametrize(
    ("cuda", "rest"),
    [(True, ""), (False, " (GPU figures not taken: the installed onnxruntime has no CUDA provider)")],
)
def test_gpus_are_named_and_whether_models_run_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda: bool, rest: str
) -> None:
    nvidia_smi(tmp_path, "echo 'NVIDIA A, 80 MiB, 1.2'; echo 'NVIDIA B, 40 MiB, 1.2'", monkeypatch)
    monkeypatch.setattr(machine, "_has_cuda", lambda: cuda)
    assert machine.gpu() == f"NVIDIA A, 80 MiB, 1.2; NVIDIA B, 40 MiB, 1.2{rest}"


def test_a_server_that_is_not_there_has_no_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIPSYNC_TRITON_HOME", str(tmp_path))
    assert machine.tritonserver_version() == "unknown"


@pytest.mark.triton
def test_the_server_tells_its_version(triton_home: Path) -> None:
    assert re.fullmatch(r"2\.\d+\.\d+", machine.tritonserver_version())
