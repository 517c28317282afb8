from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from compositor.audio import SAMPLE_RATE

torch = pytest.importorskip("torch", reason="the training extra is not installed")

from training.encoder import MouthReader  # noqa: E402
from training.encoder_report import report_encoder, with_noise  # noqa: E402


def test_noise_lies_20_db_below_the_speech() -> None:
    tone = (0.3 * np.sin(2 * np.pi * 500 * np.arange(SAMPLE_RATE) / SAMPLE_RATE)).astype(np.float32)
    noise = with_noise(tone, np.random.default_rng(0)) - tone
    assert 10 * np.log10(np.mean(tone**2) / np.mean(noise**2)) == pytest.approx(20, abs=0.2)


@pytest.mark.skipif(not (shutil.which("flite") and shutil.which("espeak-ng")), reason="no synthesisers are installed")
def test_every_case_and_voice_has_its_figures(tmp_path: Path) -> None:
    torch.manual_seed(0)
    reports = list[tuple[str, int, int]]()
    model = MouthReader(0.125).eval()
    figures = report_encoder(model, 40, 0, tmp_path, lambda *at: reports.append(at))
    assert [done for stage, done, _ in reports if stage == "measure"] == [1, 2, 3, 4]
    assert all(done <= total for _, done, total in reports)
    voices = [name for name in figures if name.startswith("voice ")]
    assert 1 <= len(voices) <= 2
    assert figures["known voices"]["frames"] == sum(figures[name]["frames"] for name in voices)
    assert figures["unseen voice"] != figures["unseen voice, noise at 20 dB"]
