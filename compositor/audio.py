"""Speech to mel columns: mono samples at any rate come in, 16 kHz samples and the log-mel columns of the audio encoder
go out, whole clips or chunk by chunk. Pure: knows nothing of video frames, sessions or Triton."""

from __future__ import annotations

import functools
from typing import Final, TypeAlias

import numpy as np
import soxr
from numpy.typing import NDArray

from compositor.pcm import Samples, as_samples, check_rate, pcm16, pcm_float32, read_wav

__all__ = [
    "BANDS",
    "HOP",
    "SAMPLE_RATE",
    "SILENCE_MEL",
    "Mel",
    "MelStream",
    "Resampler",
    "Samples",
    "as_samples",
    "check_rate",
    "mel_spectrogram",
    "pcm16",
    "pcm_float32",
    "read_wav",
    "resample",
]

Mel: TypeAlias = NDArray[np.float32]
"""Normalised log-mel columns, (columns, 80) float32 in [-4, 4]."""
# The mel recipe of the model family (SyncTalk_2D, which took it from Wav2Lip). The encoder was trained on exactly this.
SAMPLE_RATE: Final = 16_000
FFT_SIZE: Final = 800
HOP: Final = 200  # samples from one column to the next: 80 columns a second
BANDS: Final = 80
BAND_LOW_HZ: Final = 55.0
BAND_HIGH_HZ: Final = 7600.0
PREEMPHASIS: Final = 0.97
MAGNITUDE_FLOOR: Final = 1e-5
REFERENCE_DB: Final = 20.0
FLOOR_DB: Final = -100.0
MEL_LIMIT: Final = 4.0
SILENCE_MEL: Final = -MEL_LIMIT  # digital silence, exactly

_BLOCK: Final = 1024  # columns transformed at once: the frames of a long clip would be 4 times the clip, in float64


class Resampler:
    """Mono samples from `rate` Hz to 16 kHz, in chunks of any size, by soxr's HQ filter; 16 kHz passes unchanged.

    The chunking changes not one bit of the result, and n samples give n * 16000 / rate, rounded. Output comes in
    blocks, up to 37 ms behind its input at 24 and 48 kHz, 40 ms at 22.05 and 44.1 kHz, 115 ms at 8 kHz.
    """

    def __init__(self, rate: int) -> None:
        check_rate(rate)
        self._stream = (
            None if rate == SAMPLE_RATE else soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")
        )
        self._ended = False

    def push(self, samples: Samples, last: bool = False) -> Samples:
        """The 16 kHz samples that `samples` complete; with `last`, all the rest. Nothing may be pushed after that."""
        if self._ended:
            raise RuntimeError("pushed to a resampler after its last samples")
        self._ended = last
        if self._stream is None:
            return samples.astype(np.float32)
        resampled: Samples = self._stream.resample_chunk(samples.astype(np.float32, copy=False), last=last)
        return resampled


def resample(samples: Samples, rate: int) -> Samples:
    """A whole clip, (n,) at `rate` Hz, at 16 kHz."""
    return Resampler(rate).push(samples, last=True)


def mel_spectrogram(samples: Samples) -> Mel:
    """Mel columns of a whole 16 kHz clip: 1 + n // 200 of them, column c centred on sample 200 c, zeros outside.

    Pre-emphasis, magnitude STFT (periodic Hann), Slaney mel bands, decibels, then [-100, 0] dB to [-4, 4].
    """
    emphasised, _ = _emphasise(samples, 0.0)
    edge = np.zeros(FFT_SIZE // 2)
    return _mel_columns(np.concatenate([edge, emphasised, edge]))


class MelStream:
    """`mel_spectrogram` in chunks of any size. Keeps under 800 samples between pushes."""

    def __init__(self) -> None:
        self._previous = 0.0
        self._tail: NDArray[np.float64] = np.zeros(FFT_SIZE // 2)

    def push(self, samples: Samples) -> Mel:
        """The columns that these 16 kHz samples complete, (m, 80): column c needs the 400 samples after its centre."""
        emphasised, self._previous = _emphasise(samples, self._previous)
        pending = np.concatenate([self._tail, emphasised])
        columns = _mel_columns(pending)
        self._tail = pending[len(columns) * HOP :].copy()
        return columns

    def finish(self) -> Mel:
        """The columns that only the end of the clip completes, (m, 80), with zeros after it."""
        return _mel_columns(np.concatenate([self._tail, np.zeros(FFT_SIZE // 2)]))


def _emphasise(samples: Samples, previous: float) -> tuple[NDArray[np.float64], float]:
    """Pre-emphasised samples, and the last sample to continue from."""
    exact = np.empty(1 + len(samples))
    exact[0], exact[1:] = previous, samples
    return exact[1:] - PREEMPHASIS * exact[:-1], float(exact[-1])


def _mel_columns(emphasised: NDArray[np.float64]) -> Mel:
    """Columns of all whole 800-sample frames, 200 apart; float64 inside, so that chunks and whole clips agree."""
    count = max(0, (len(emphasised) - FFT_SIZE) // HOP + 1)
    columns = np.empty((count, BANDS), np.float32)
    for start in range(0, count, _BLOCK):
        # A strided view by the bare constructor: sliding_window_view takes longer than the transform of a 20 ms chunk.
        shape, step = (min(_BLOCK, count - start), FFT_SIZE), emphasised.itemsize
        frames = np.ndarray(shape, np.float64, emphasised, start * HOP * step, (HOP * step, step))
        energy = np.abs(np.fft.rfft(frames * _hann())) @ _mel_filters()
        decibels = 20 * np.log10(np.maximum(energy, MAGNITUDE_FLOOR)) - REFERENCE_DB
        scaled = (decibels / -FLOOR_DB + 1) * (2 * MEL_LIMIT) - MEL_LIMIT
        columns[start : start + _BLOCK] = np.minimum(np.maximum(scaled, -MEL_LIMIT), MEL_LIMIT)
    return columns


@functools.cache
def _hann() -> NDArray[np.float64]:
    window: NDArray[np.float64] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(FFT_SIZE) / FFT_SIZE)
    window.setflags(write=False)
    return window


@functools.cache
def _mel_filters() -> NDArray[np.float64]:
    """(401, 80) triangles of equal area on Slaney's mel scale (Auditory Toolbox, 1998): linear to 1 kHz, then log."""
    break_mel, log_step = 1000 * 3 / 200, np.log(6.4) / 27
    low_mel = BAND_LOW_HZ * 3 / 200
    high_mel = break_mel + np.log(BAND_HIGH_HZ / 1000) / log_step
    mels = np.linspace(low_mel, high_mel, BANDS + 2)
    corners = np.where(mels < break_mel, mels * 200 / 3, 1000 * np.exp(log_step * (mels - break_mel)))
    lower, centre, upper = corners[:-2], corners[1:-1], corners[2:]
    hertz = np.arange(FFT_SIZE // 2 + 1)[:, None] * SAMPLE_RATE / FFT_SIZE
    triangles = np.minimum((hertz - lower) / (centre - lower), (upper - hertz) / (upper - centre)).clip(0)
    filters: NDArray[np.float64] = triangles * 2 / (upper - lower)
    filters.setflags(write=False)
    return filters
