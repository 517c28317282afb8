"""`python -m training evaluate` through the real service, with a small avatar and the constructed models."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest

pytest.importorskip("matplotlib", reason="the training extra is not installed")

from lipsync import trained
from lipsync.avatar import Avatar
from lipsync.avatar_model import loudness_encoder, mouth_model
from training import evaluate as module
from training.evaluate import Selection, evaluate_models
from training.filming import prepare_repository
from training.model_card import BEGIN, END
from training.phonemes import Phone
from training.recordings import Recording
from training.speech import UNSEEN_VOICE, make_lines
from training.takes import Take, steady_frames
from training.visemes import mouth_shapes

prepare_small = functools.partial(prepare_repository, frames=6, width=640, height=360)
PHONES = (
    Phone("pau", 0, 0.6),
    Phone("aa", 0.6, 1.0),
    Phone("m", 1.0, 1.3),
    Phone("ae", 1.3, 1.6),
    Phone("pau", 1.6, 2.6),
)


def hummed() -> Take:
    """A chord where there are vowels: what the constructed models open their mouth for."""
    seconds = np.arange(round(2.6 * 16_000)) / 16_000
    chord = 0.15 * sum(np.sin(2 * np.pi * pitch * seconds) for pitch in (220, 440, 660, 880, 1320))
    heard = ((seconds > 0.6) & (seconds < 1.0)) | ((seconds > 1.3) & (seconds < 1.6))
    return Take("ahm", "chord", (chord * heard).astype(np.float32), PHONES, mouth_shapes(PHONES, 65))


def silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


@pytest.mark.skipif(not shutil.which("flite"), reason="flite is not installed")
def test_slow_speech_is_held_out_known_and_has_held_vowels(tmp_path: Path) -> None:
    """What jitter is measured on."""
    lines = [line for line in make_lines("held_out", 60) if line.voice.synthesiser == "flite"]
    takes = module._slow_takes(Selection(60, 0, 1, tmp_path / "speech"), silent)
    assert [(take.text, take.voice) for take in takes] == [(line.text, line.voice.name) for line in lines]
    assert len(takes) > 0
    assert UNSEEN_VOICE.name not in {take.voice for take in takes}
    assert sum(len(steady_frames(take)) for take in takes) > 5


@pytest.mark.triton
def test_it_leaves_a_report_a_picture_and_a_card(
    triton_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    avatar, encoder, output = tmp_path / "avatar.onnx", tmp_path / "encoder.onnx", tmp_path / "output"
    onnx.save(mouth_model(), avatar)
    onnx.save(loudness_encoder(), encoder)
    monkeypatch.setattr(module, "_takes", lambda *_: [hummed(), hummed()])
    monkeypatch.setattr(module, "_slow_takes", lambda *_: [hummed()])
    monkeypatch.setattr(module, "recordings", lambda: [Recording("word", hummed().samples)])
    monkeypatch.setattr(module, "Avatar", functools.partial(Avatar, frames=6, width=640, height=360))
    monkeypatch.setattr(module, "prepare_repository", prepare_small)
    output.mkdir()
    (output / trained.CARD).write_text(f"# A card\n{BEGIN}\n{END}\n")

    reached = evaluate_models(avatar, encoder, output, Selection(100, 0, 2, tmp_path / "speech"), silent)

    report = json.loads((output / trained.REPORT).read_text())
    known = report["cases"]["known voices"]
    assert known["sentences"] == 2
    assert 0.4 < known["correlation"] < 0.98, "it follows loudness, and a hum is no speech"
    assert known["silence_closed"] == 1
    assert known["mouth_psnr_db"] > 20
    assert report["recorded_speech"]["correlation_with_loudness"] > 0.5
    assert report["jitter"]["frames"] > 0
    assert [target["what"] for target in report["targets"]] == [target.what for target in reached]
    assert str(tmp_path) not in (output / trained.REPORT).read_text()
    assert "| both models together |" in (output / trained.CARD).read_text()
    picture = cv2.imread(str(output / trained.PICTURE))
    assert picture is not None
    assert picture.shape[1] == 1260
