"""Resampling and mel columns: equal to librosa's, and the same however the samples are cut into chunks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from compositor.audio import HOP, SAMPLE_RATE, MelStream, Resampler, mel_spectrogram, resample
from compositor.errors import InvalidInput

RATES = [8_000, 11_025, 16_000, 22_050, 24_000, 44_100, 48_000, 192_000]


def noise(count: int, seed: int = 0) -> NDArray[np.float32]:
    """Noise whose loudness swells and fades, with digital silence in between."""
    generator = np.random.default_rng(seed)
    envelope = np.sin(np.arange(count) / 1_700).clip(0) * 10 ** generator.uniform(-3, 0)
    samples: NDArray[np.float32] = (generator.uniform(-1, 1, count) * envelope).astype(np.float32)
    return samples


def chunks(samples: NDArray[np.float32], cuts: list[int]) -> Iterator[NDArray[np.float32]]:
    """The samples in chunks of the given sizes, which may be 0, again and again."""
    start, turn = 0, 0
    sizes = [*cuts, 1_000]
    while start < len(samples):
        size = sizes[turn % len(sizes)]
        yield samples[start : start + size]
        start, turn = start + size, turn + 1


CUTS = st.lists(st.integers(0, 3_000), max_size=6)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(RATES), st.integers(0, 30_000), CUTS)
def test_resampling_in_chunks_changes_no_bit(rate: int, count: int, cuts: list[int]) -> None:
    samples = noise(count)
    resampler = Resampler(rate)
    parts = [resampler.push(part) for part in chunks(samples, cuts)]
    parts.append(resampler.push(samples[:0], last=True))
    whole = resample(samples, rate)
    assert whole.dtype == np.float32
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert abs(len(whole) - count * SAMPLE_RATE / rate) <= 0.5


@pytest.mark.parametrize("rate", RATES)
def test_resampling_keeps_a_tone_in_its_place(rate: int) -> None:
    tone = np.sin(2 * np.pi * 440 * np.arange(rate) / rate).astype(np.float32) / np.float32(2)
    expected = np.sin(2 * np.pi * 440 * np.arange(SAMPLE_RATE) / SAMPLE_RATE) / 2
    got = resample(tone, rate)
    assert len(got) == SAMPLE_RATE
    np.testing.assert_allclose(got[800:-800], expected[800:-800], atol=1e-4)


def test_resampling_removes_what_16_khz_cannot_carry() -> None:
    shrill = np.sin(2 * np.pi * 11_000 * np.arange(48_000) / 48_000).astype(np.float32)
    assert np.abs(resample(shrill, 48_000)[800:-800]).max() < 1e-4


def test_16_khz_passes_unchanged_in_an_array_of_its_own() -> None:
    samples = noise(1_000)
    passed = resample(samples, SAMPLE_RATE)
    np.testing.assert_array_equal(passed, samples)
    assert not np.shares_memory(passed, samples)


@pytest.mark.parametrize("rate", [16_000, 24_000])
def test_nothing_is_pushed_after_the_last_samples(rate: int) -> None:
    resampler = Resampler(rate)
    resampler.push(noise(10), last=True)
    with pytest.raises(RuntimeError, match="after its last samples"):
        resampler.push(noise(10))


@pytest.mark.parametrize("rate", [-16_000, 0, 7_999, 192_001])
def test_rates_out_of_range_are_refused(rate: int) -> None:
    with pytest.raises(InvalidInput, match=rf"sample rate {rate} Hz is outside 8000\.\.192000 Hz") as caught:
        Resampler(rate)
    assert caught.value.field == "sample_rate"


def librosa_mel(samples: NDArray[np.float32]) -> NDArray[np.float64]:
    """The model family's recipe, by librosa: (columns, 80)."""
    import librosa

    emphasised = samples.astype(np.float64)
    emphasised[1:] -= 0.97 * emphasised[:-1].copy()
    spectrum = librosa.stft(
        emphasised, n_fft=800, hop_length=200, win_length=800, window="hann", center=True, pad_mode="constant"
    )
    filters = librosa.filters.mel(sr=16_000, n_fft=800, n_mels=80, fmin=55, fmax=7_600)
    decibels = 20 * np.log10(np.maximum(1e-5, filters @ np.abs(spectrum))) - 20
    mel: NDArray[np.float64] = np.clip(8 * (decibels + 100) / 100 - 4, -4, 4).T
    return mel


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # librosa's own
@settings(deadline=None, max_examples=40)
@given(st.integers(800, 40_000), st.integers(0, 2**32 - 1))
def test_mel_equals_librosas(count: int, seed: int) -> None:
    samples = noise(count, seed)
    np.testing.assert_allclose(mel_spectrogram(samples), librosa_mel(samples), atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_mel_of_full_scale_and_of_faint_sound_equals_librosas() -> None:
    square = np.sign(np.sin(np.arange(8_000) / 9)).astype(np.float32)
    for samples in (square, square * np.float32(1e-4), np.float32(0.5) + square / 4):
        mel = mel_spectrogram(samples)
        np.testing.assert_allclose(mel, librosa_mel(samples), atol=1e-5, rtol=0)
        assert mel.min() < mel.max()


def test_mel_of_digital_silence_is_exactly_minus_4() -> None:
    assert (mel_spectrogram(np.zeros(5_000, np.float32)) == -4).all()


@pytest.mark.parametrize("count", [0, 1, 199, 200, 399, 400, 401, 16_000, 250_000])
def test_mel_has_one_column_a_hop_and_one_more(count: int) -> None:
    mel = mel_spectrogram(noise(count))
    assert mel.shape == (1 + count // HOP, 80)
    assert mel.dtype == np.float32


def test_blocks_of_a_long_clip_join_seamlessly() -> None:
    samples = noise(450_000)
    late = mel_spectrogram(samples)[1_020:1_030]
    excerpt = samples[1_000 * HOP - 1 :]
    np.testing.assert_allclose(late, mel_spectrogram(excerpt[1:])[20:30], atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 20_000), CUTS, st.integers(0, 2**32 - 1))
def test_mel_in_chunks_equals_mel_of_the_whole(count: int, cuts: list[int], seed: int) -> None:
    samples = noise(count, seed)
    stream = MelStream()
    done = heard = 0
    parts = []
    for part in chunks(samples, cuts):
        parts.append(stream.push(part))
        heard, done = heard + len(part), done + len(parts[-1])
        assert done == max(0, (heard - 400) // HOP + 1)  # each column as soon as its audio is there
    parts.append(stream.finish())
    np.testing.assert_allclose(np.concatenate(parts), mel_spectrogram(samples), atol=1e-6, rtol=0)


def test_the_callers_samples_are_never_changed() -> None:
    samples = noise(5_000)
    before = samples.copy()
    samples.setflags(write=False)
    mel_spectrogram(samples)
    stream = MelStream()
    stream.push(samples)
    resample(samples, 16_000)
    resample(samples, 24_000)
    np.testing.assert_array_equal(samples, before)
