"""Which audio encoder `lipsync demo` gives its tenant. The rest of it: tests/integration/test_demo.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from compositor.manifest import sha256_of
from lipsync import trained
from lipsync.commands.demo import _encoder

from .conftest import install_encoder


@pytest.fixture
def models(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


def installed(models: Path, name: str) -> str:
    return sha256_of(models / name / "1" / "model.onnx")


def test_a_new_repository_shares_the_encoder_that_the_demo_brings(models: Path) -> None:
    assert [_encoder(models) for _ in range(2)] == ["audio_encoder"] * 2
    assert installed(models, "audio_encoder") == sha256_of(trained.ENCODER)


def test_another_encoder_stays_and_the_demo_has_its_own(models: Path) -> None:
    other = sha256_of(install_encoder(models))
    assert [_encoder(models) for _ in range(2)] == ["demo_encoder"] * 2
    assert installed(models, "demo_encoder") == sha256_of(trained.ENCODER)
    (models / "demo_encoder" / "1" / "model.onnx").write_bytes(b"of an older version")
    assert _encoder(models) == "demo_encoder"
    assert installed(models, "demo_encoder") == sha256_of(trained.ENCODER)
    assert installed(models, "audio_encoder") == other
