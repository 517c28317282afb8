"""Makes 16 kHz speech sound as rooms, lines and microphones make it: samples in, samples of the same length out.

Pure, and deterministic from its generator. Nothing here moves the speech in time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from compositor.audio import SAMPLE_RATE, Samples

_Signal: TypeAlias = NDArray[np.float64]
_ROOM_S: Final = 0.4  # of reverberation kept
_QUIETEST: Final = 1e-4  # root mean square below which there is no speech to relate noise to


def augment(samples: Samples, random: np.random.Generator) -> Samples:
    """The samples with, by chance, a room, a band limit, a gain and noise, in this order; float32 in [-1, 1]."""
    signal: _Signal = samples.astype(np.float64)
    if random.random() < 0.35:
        signal = add_room(signal, random.uniform(0.1, 0.5), random.uniform(0, 12), random)
    if random.random() < 0.3:
        signal = limit_band(signal, random.uniform(50, 300), random.uniform(3000, 7500))
    signal = signal * 10 ** (random.uniform(-18, 6) / 20)
    if random.random() < 0.6:
        colour = _COLOURS[int(random.integers(len(_COLOURS)))]
        signal = add_noise(signal, random.uniform(10, 40), colour(len(signal), random))
    return np.clip(signal, -1, 1).astype(np.float32)


def add_noise(signal: _Signal, snr_db: float, noise: _Signal) -> _Signal:
    """The signal and the noise, (n,) each, at a ratio of their powers; the signal's is that of `speech_level`."""
    level = speech_level(signal)
    if level < _QUIETEST:
        level = 10 * _QUIETEST
    loudness = np.sqrt(np.mean(noise**2)) if len(noise) else 0.0
    return signal + noise * (level / max(loudness, 1e-12) * 10 ** (-snr_db / 20))


def speech_level(signal: _Signal) -> float:
    """Root mean square of the louder 20 ms blocks, those within 20 dB of the loudest one."""
    block = SAMPLE_RATE // 50
    whole = len(signal) // block * block
    if whole == 0:
        return 0.0
    power = np.mean(np.asarray(signal[:whole], np.float64).reshape(-1, block) ** 2, axis=1)
    return float(np.sqrt(power[power >= power.max() / 100].mean()))


def add_room(signal: _Signal, decay_s: float, direct_db: float, random: np.random.Generator) -> _Signal:
    """The signal in a room: exponentially decaying noise, 60 dB in `decay_s`, `direct_db` below the direct sound."""
    seconds = np.arange(1, round(_ROOM_S * SAMPLE_RATE)) / SAMPLE_RATE
    tail = random.standard_normal(len(seconds)) * 10 ** (-3 * seconds / decay_s)
    tail *= 10 ** (-direct_db / 20) / np.sqrt(np.sum(tail**2))
    response = np.concatenate([[1.0], tail])
    size = 1 << (len(signal) + len(response) - 1).bit_length()
    spread = np.fft.irfft(np.fft.rfft(signal, size) * np.fft.rfft(response, size), size)[: len(signal)]
    return np.asarray(spread)


def limit_band(signal: _Signal, low_hz: float, high_hz: float) -> _Signal:
    """The signal between two frequencies, with the slopes of a sixth-order Butterworth filter and no delay."""
    size = 1 << len(signal).bit_length()
    hertz = np.fft.rfftfreq(size, 1 / SAMPLE_RATE)
    highs = 1 / np.sqrt(1 + (hertz / high_hz) ** 12)
    lows = 1 / np.sqrt(1 + (low_hz / np.maximum(hertz, 1e-3)) ** 12)
    return np.asarray(np.fft.irfft(np.fft.rfft(signal, size) * highs * lows, size)[: len(signal)])


def white(count: int, random: np.random.Generator) -> _Signal:
    """Noise of equal power at all frequencies."""
    return random.standard_normal(count)


def pink(count: int, random: np.random.Generator) -> _Signal:
    """Noise whose power falls by 3 dB an octave, as much of a room's does."""
    return _shaped(count, random, 0.5)


def brown(count: int, random: np.random.Generator) -> _Signal:
    """Noise whose power falls by 6 dB an octave: traffic, ventilation."""
    return _shaped(count, random, 1.0)


def hum(count: int, random: np.random.Generator) -> _Signal:
    """Mains hum with harmonics over some pink noise."""
    seconds = np.arange(count) / SAMPLE_RATE
    base = 50.0 if random.random() < 0.5 else 60.0
    tones = [np.sin(2 * np.pi * (base * n * seconds + random.random())) / n for n in range(1, 6)]
    return np.asarray(np.sum(tones, axis=0) + 0.5 * pink(count, random))


def _shaped(count: int, random: np.random.Generator, slope: float) -> _Signal:
    size = 1 << max(1, count).bit_length()
    hertz = np.fft.rfftfreq(size, 1 / SAMPLE_RATE)
    spectrum = np.fft.rfft(random.standard_normal(size)) / np.maximum(hertz, 20.0) ** slope
    noise = np.fft.irfft(spectrum, size)[:count]
    return np.asarray(noise / max(float(np.std(noise)), 1e-12))


_COLOURS: Final[tuple[Callable[[int, np.random.Generator], _Signal], ...]] = (white, pink, brown, hum)
