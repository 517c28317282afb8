"""Recorded human speech through the service: there is no true mouth for it, but loudness to lay beside the opening."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from compositor.audio import SAMPLE_RATE, Samples, resample
from compositor.pcm import read_wav
from training.metrics import Openings
from training.visemes import FPS

FOLDER: Final = Path("/usr/share/sounds/alsa")
"""Where Debian's package alsa-utils puts words that a person spoke."""
_NO_SPEECH: Final = {"Noise.wav"}
_AROUND_S: Final = 0.6  # of silence before and after
_QUIETEST_DB: Final = -60.0


@dataclass(frozen=True)
class Recording:
    """A recorded word: mono float32 `samples` at 16 kHz with silence around them."""

    name: str
    samples: Samples


def recordings(folder: Path = FOLDER) -> Iterator[Recording]:
    """The recorded words in a folder; none where it is missing."""
    for path in sorted(folder.glob("*.wav")):
        if path.name not in _NO_SPEECH:
            samples = resample(*read_wav(path.read_bytes()))
            yield Recording(path.stem.replace("_", " "), np.pad(samples, round(_AROUND_S * SAMPLE_RATE)))


def loudness_db(samples: Samples, frames: int) -> NDArray[np.float64]:
    """The root mean square of each video frame's samples, dB of full scale, at least -60: (frames,)."""
    size = SAMPLE_RATE // FPS
    padded = np.zeros(frames * size)
    padded[: len(samples)] = samples[: frames * size]
    level = np.sqrt(np.mean(padded.reshape(frames, size) ** 2, axis=1))
    return np.asarray(20 * np.log10(np.maximum(level, 10 ** (_QUIETEST_DB / 20))))


def recording_figures(words: list[tuple[Recording, Openings]]) -> dict[str, Any]:
    """How opening and loudness go together over all recordings, as plain data; a mouth is not loudness, so 1 is not
    the aim."""
    openings = np.concatenate([opening for _, opening in words])
    loudness = np.concatenate([loudness_db(word.samples, len(opening)) for word, opening in words])
    moves = bool(np.ptp(openings) > 0 and np.ptp(loudness) > 0)
    return {
        "recordings": [word.name for word, _ in words],
        "correlation_with_loudness": float(np.corrcoef(openings, loudness)[0, 1]) if moves else 0.0,
        "widest": float(openings.max()),
    }
