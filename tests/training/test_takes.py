from __future__ import annotations

import numpy as np
import pytest

from compositor.pcm import read_wav
from training.augmentation import speech_level
from training.metrics import Track, silent_frames
from training.phonemes import Phone
from training.speech import VOICES, Line, Utterance
from training.takes import AFTER_S, BEFORE_S, NOISE_DB, make_take, speech_frames, steady_frames, wav, with_noise
from training.visemes import OPENING


@pytest.fixture
def utterance() -> Utterance:
    samples = (0.3 * np.sin(2 * np.pi * 220 * np.arange(16_000) / 16_000)).astype(np.float32)
    phones = (Phone("pau", 0, 0.1), Phone("aa", 0.1, 0.5), Phone("m", 0.5, 0.6), Phone("ow", 0.6, 1.0))
    return Utterance(Line("ahmo", VOICES[0], 1.0, 170), samples, phones)


def test_a_take_has_its_mouth_when_it_has_its_speech(utterance: Utterance) -> None:
    take = make_take(utterance)
    assert len(take.samples) == round((BEFORE_S + 1 + AFTER_S) * 16_000)
    assert len(take.shapes) == round((BEFORE_S + 1 + AFTER_S) * 25)
    assert not take.samples[: round(BEFORE_S * 16_000)].any()
    assert take.phones[1] == Phone("aa", BEFORE_S + 0.1, BEFORE_S + 0.5)
    assert take.shapes[int((BEFORE_S + 0.3) * 25), OPENING] > 0.8
    assert take.shapes[int((BEFORE_S + 0.55) * 25), OPENING] < 0.06


def test_some_of_its_silence_lies_away_from_speech(utterance: Utterance) -> None:
    take = make_take(utterance)
    opening = take.shapes[:, OPENING]
    silent = silent_frames(Track(opening, opening, take.phones))
    assert silent.sum() > 20
    assert not silent[speech_frames(take)].any()


def test_noise_is_as_loud_as_it_says_and_everywhere(utterance: Utterance) -> None:
    take = make_take(utterance)
    noisy = with_noise(take, 3)
    added = noisy.samples - take.samples
    loudness = np.sqrt(np.mean(added[:8000].astype(np.float64) ** 2))
    assert 20 * np.log10(speech_level(take.samples.astype(np.float64)) / loudness) == pytest.approx(NOISE_DB, abs=0.3)
    assert np.array_equal(with_noise(take, 3).samples, noisy.samples)
    assert noisy.phones == take.phones


def test_steady_frames_keep_away_from_the_ends_of_vowels_and_from_diphthongs(utterance: Utterance) -> None:
    frames = steady_frames(make_take(utterance))
    begin, end = BEFORE_S + 0.1, BEFORE_S + 0.5
    assert len(frames) >= 2
    assert all((k - 1) / 25 >= begin + 0.1 - 1e-9 and (k + 2) / 25 <= end - 0.1 + 1e-9 for k in frames)


def test_a_wav_comes_back_as_it_was(utterance: Utterance) -> None:
    samples, rate = read_wav(wav(utterance.samples))
    assert rate == 16_000
    assert np.abs(samples - utterance.samples).max() < 1e-4
