from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from training.recordings import Recording, loudness_db, recording_figures, recordings
from training.takes import wav


def beep(seconds: float, level: float) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return (level * np.sin(2 * np.pi * 400 * np.arange(round(16_000 * seconds)) / 16_000)).astype(np.float32)


def test_words_are_read_with_silence_around_them_and_noise_is_no_word(tmp_path: Path) -> None:
    for name in ("Front_Left.wav", "Noise.wav"):
        (tmp_path / name).write_bytes(wav(beep(0.5, 0.5)))
    (word,) = recordings(tmp_path)
    assert word.name == "Front Left"
    assert len(word.samples) == 8000 + 2 * 9600
    assert not word.samples[:9600].any()
    assert list(recordings(tmp_path / "nowhere")) == []


def test_loudness_is_that_of_each_frame() -> None:
    samples = np.concatenate([beep(0.4, 0.0), beep(0.4, 0.5)])
    loudness = loudness_db(samples, 21)
    assert loudness[:10] == pytest.approx(np.full(10, -60))
    assert loudness[11:19] == pytest.approx(np.full(8, 20 * np.log10(0.5 / np.sqrt(2))), abs=0.1)
    assert loudness[20] == pytest.approx(-60)


def test_a_mouth_that_follows_loudness_and_one_that_rests() -> None:
    word = Recording("word", np.concatenate([beep(0.4, 0.0), beep(0.4, 0.5)]))
    opening = np.repeat([0.0, 0.7], 10).astype(np.float32)
    found = recording_figures([(word, opening)])
    assert found["correlation_with_loudness"] > 0.99
    assert found["widest"] == pytest.approx(0.7)
    assert recording_figures([(word, np.zeros(20, np.float32))])["correlation_with_loudness"] == 0
