"""Sentences as they are sent to the service, with the mouth that belongs to each: spoken lines in, WAV bytes out.

Around each sentence there is silence, enough that some of it lies more than 300 ms from all speech. Needs no torch.
"""

from __future__ import annotations

import io
import wave
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from compositor.audio import SAMPLE_RATE, Samples
from compositor.features import frame_count
from training.augmentation import add_noise, white
from training.phonemes import PAUSE, Phone
from training.speech import Utterance
from training.visemes import FPS, Shapes, mouth_shapes

BEFORE_S: Final = 0.8
AFTER_S: Final = 1.0
NOISE_DB: Final = 20.0
"""How far steady white noise lies below the speech."""
_VOWELS: Final = frozenset(["aa", "ae", "ah", "ao", "eh", "er", "ih", "iy", "uh", "uw"])
_STEADY_S: Final = 0.24  # the shortest vowel that has a steady part
_TURNING_SHARE: Final = 0.25  # at either end of a vowel, in which the mouth comes and goes (`visemes`)


@dataclass(frozen=True)
class Take:
    """A sentence to send: mono float32 `samples` at 16 kHz, its phones, and the true mouth of each frame at 25 fps."""

    text: str
    voice: str
    samples: Samples
    phones: tuple[Phone, ...]
    shapes: Shapes


def make_take(utterance: Utterance) -> Take:
    """The utterance with silence before and after it."""
    before, after = round(BEFORE_S * SAMPLE_RATE), round(AFTER_S * SAMPLE_RATE)
    samples = np.pad(utterance.samples, (before, after))
    phones = tuple(Phone(phone.symbol, phone.start_s + BEFORE_S, phone.end_s + BEFORE_S) for phone in utterance.phones)
    shapes = mouth_shapes(phones, frame_count(len(samples), FPS))
    return Take(utterance.line.text, utterance.line.voice.name, samples, phones, shapes)


def with_noise(take: Take, seed: int) -> Take:
    """The take with steady white noise NOISE_DB below its speech, in the silence around it too."""
    noise = white(len(take.samples), np.random.default_rng([seed, 9]))
    noisy = add_noise(take.samples.astype(np.float64), NOISE_DB, noise)
    return replace(take, samples=np.clip(noisy, -1, 1).astype(np.float32))


def steady_frames(take: Take) -> list[int]:
    """Frames in the middle of long vowels, where the mouth holds still: each wholly within a vowel's middle half, as
    are both its neighbours. Diphthongs glide, and vowels below 240 ms have no such part."""
    frames = list[int]()
    for phone in take.phones:
        if phone.symbol in _VOWELS and phone.length_s >= _STEADY_S:
            turning_s = _TURNING_SHARE * phone.length_s
            first, last = (phone.start_s + turning_s) * FPS, (phone.end_s - turning_s) * FPS
            frames += [k for k in range(int(first), int(last) + 1) if k - 1 >= first and k + 2 <= last]
    return frames


def speech_frames(take: Take) -> list[int]:
    """The frames in which something is said."""
    said = [phone for phone in take.phones if phone.symbol != PAUSE]
    middles = (np.arange(len(take.shapes)) + 0.5) / FPS
    return [k for k, at in enumerate(middles) if any(phone.start_s <= at < phone.end_s for phone in said)]


def wav(samples: Samples) -> bytes:
    """A RIFF WAV file, PCM16 mono at 16 kHz."""
    with io.BytesIO() as file:
        with wave.open(file, "wb") as writer:
            writer.setnchannels(1)
            writer.setsampwidth(2)
            writer.setframerate(SAMPLE_RATE)
            writer.writeframes(np.round(np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
        return file.getvalue()
