from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compositor.audio import SAMPLE_RATE
from training.augmentation import add_noise, add_room, augment, brown, hum, limit_band, pink, speech_level, white

TONE = 0.3 * np.sin(2 * np.pi * 1000 * np.arange(SAMPLE_RATE) / SAMPLE_RATE)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 20_000))
def test_keeps_length_type_and_range_and_repeats_itself(seed: int, count: int) -> None:
    samples = np.resize(TONE, count).astype(np.float32)
    kept = samples.copy()
    first, again = (augment(samples, np.random.default_rng(seed)) for _ in range(2))
    assert first.shape == samples.shape
    assert first.dtype == np.float32
    assert np.isfinite(first).all()
    assert np.abs(first).max() <= 1
    assert np.array_equal(first, again)
    assert np.array_equal(samples, kept), "the caller's samples stay"


def test_another_generator_sounds_otherwise() -> None:
    samples = TONE.astype(np.float32)
    made = [augment(samples, np.random.default_rng(seed)) for seed in range(20)]
    assert len({array.tobytes() for array in made}) > 15


@pytest.mark.parametrize("snr_db", [0.0, 20.0, 40.0])
def test_noise_has_the_ratio_asked_for(snr_db: float) -> None:
    """Of the speech, not of the pauses around it."""
    signal = np.concatenate([np.zeros(SAMPLE_RATE), TONE, np.zeros(SAMPLE_RATE)])
    noisy = add_noise(signal, snr_db, white(len(signal), np.random.default_rng(0)))
    noise = noisy - signal
    assert 10 * np.log10(np.mean(TONE**2) / np.mean(noise**2)) == pytest.approx(snr_db, abs=0.1)


def test_silence_gets_faint_noise_only() -> None:
    noise = add_noise(np.zeros(8000), 20.0, white(8000, np.random.default_rng(0)))
    assert 0 < np.abs(noise).max() < 1e-3


def test_the_level_of_speech_ignores_pauses() -> None:
    alone = speech_level(TONE)
    assert alone == pytest.approx(0.3 / np.sqrt(2), rel=0.01)
    assert speech_level(np.concatenate([TONE, np.zeros(5 * SAMPLE_RATE)])) == pytest.approx(alone, rel=0.01)
    assert speech_level(np.zeros(10)) == 0


def test_a_band_limit_keeps_the_middle_and_takes_the_rest() -> None:
    seconds = np.arange(SAMPLE_RATE) / SAMPLE_RATE
    for hertz, share in ((1000, 1.0), (6500, 0.0), (30, 0.0)):
        tone = np.sin(2 * np.pi * hertz * seconds)
        left = limit_band(tone, 200, 3400)[2000:-2000]
        assert np.std(left) / np.std(tone) == pytest.approx(share, abs=0.03)


def test_filters_do_not_move_the_sound() -> None:
    click = np.zeros(4000)
    click[1000] = 1
    assert int(np.argmax(limit_band(click, 100, 5000))) == 1000
    assert int(np.argmax(np.abs(add_room(click, 0.3, 6, np.random.default_rng(0))))) == 1000


def test_a_room_rings_on_and_dies_away() -> None:
    click = np.zeros(8000)
    click[0] = 1
    heard = add_room(click, 0.3, 0, np.random.default_rng(0)) ** 2
    assert heard[1:].sum() == pytest.approx(1, rel=0.05), "as much as the direct sound"
    assert heard[1:800].sum() > 5 * heard[1600:2400].sum() > 0


@pytest.mark.parametrize(("colour", "falls"), [(white, 1.0), (pink, 10.0), (brown, 100.0)])
def test_noises_fall_off_as_named(colour: object, falls: float) -> None:
    assert callable(colour)
    power = np.abs(np.fft.rfft(colour(1 << 16, np.random.default_rng(0)))) ** 2
    hertz = np.fft.rfftfreq(1 << 16, 1 / SAMPLE_RATE)

    def around(middle: float) -> float:
        return float(power[(hertz > 0.8 * middle) & (hertz < 1.25 * middle)].mean())

    assert around(300) / around(3000) == pytest.approx(falls, rel=0.3)


def test_hum_is_mains_and_harmonics() -> None:
    spectrum = np.abs(np.fft.rfft(hum(4 * SAMPLE_RATE, np.random.default_rng(1))))
    assert int(np.argmax(spectrum)) / 4 in (50, 60)
