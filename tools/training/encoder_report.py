"""Measures a trained encoder: figures for known voices, the unseen voice, and noise, as plain data for JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np

from compositor.audio import Samples
from training.augmentation import add_noise, white
from training.encoder import MouthReader, make_tracks
from training.encoder_data import Sound, unchanged
from training.metrics import measure
from training.speech import Split, make_lines, utterances

_NOISY_DB: Final = 20.0
_CASES: Final[tuple[tuple[str, Split, bool], ...]] = (
    ("known voices", "held_out", False),
    ("known voices, noise at 20 dB", "held_out", True),
    ("unseen voice", "unseen_voice", False),
    ("unseen voice, noise at 20 dB", "unseen_voice", True),
)


def report_encoder(
    model: MouthReader, sentences: int, seed: int, cache: Path, report: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """Figures of the mouth that the model's head reads, on sentences it was not trained on.

    `sentences` and `seed` are those of the training, which decide what was held out. Keys are the cases, then the
    voices one by one; values are `Figures` as dicts.
    """
    figures = dict[str, Any]()
    for done, (name, split, noisy) in enumerate(_CASES, start=1):
        lines = make_lines(split, sentences, seed)
        spoken = list(utterances(lines, cache, lambda spoken, total: report("speech", spoken, total)))
        sound: Sound = with_noise if noisy else unchanged
        tracks = make_tracks(model, spoken, sound, seed)
        figures[name] = asdict(measure(tracks))
        report("measure", done, len(_CASES))
        if split == "held_out" and not noisy:
            voices = sorted({line.voice.name for line in lines})
            for voice in voices:
                own = [track for track, line in zip(tracks, lines, strict=True) if line.voice.name == voice]
                figures[f"voice {voice}"] = asdict(measure(own))
    return figures


def with_noise(samples: Samples, random: np.random.Generator) -> Samples:
    """A Sound: steady white noise 20 dB below the speech."""
    noise = white(len(samples), random)
    return np.clip(add_noise(samples.astype(np.float64), _NOISY_DB, noise), -1, 1).astype(np.float32)
