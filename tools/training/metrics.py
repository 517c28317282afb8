"""How well a mouth follows the truth: openings over time come in, figures go out. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from training.phonemes import PAUSE, Phone
from training.visemes import CLOSED, FPS, closures

Openings = NDArray[np.float32]
"""Mouth openings, (frames,) float32 in [0, 1]."""
_MOST_LAG: Final = 5  # frames
_AWAY_S: Final = 0.3  # from speech, that silence is measured in


@dataclass(frozen=True)
class Track:
    """A clip's predicted and true openings, (frames,) each, at 25 fps, and its phones."""

    predicted: Openings
    truth: Openings
    phones: tuple[Phone, ...]


@dataclass(frozen=True)
class Figures:
    """`correlation` at lag 0 over all frames; `lag_frames` of the best one, positive where the prediction is late;
    shares of closures reached and of silent frames closed, None where there were none; mean absolute error."""

    correlation: float
    lag_frames: int
    closures_reached: float | None
    silence_closed: float | None
    mean_error: float
    frames: int


def measure(tracks: Sequence[Track]) -> Figures:
    """The figures of several clips together. A mouth counts as closed below CLOSED."""
    lags = range(-_MOST_LAG, _MOST_LAG + 1)
    best = max(lags, key=lambda lag: (correlation(tracks, lag), -abs(lag)))
    reached = [hit for track in tracks for hit in closures_reached(track)]
    silent = np.concatenate([track.predicted[silent_frames(track)] < CLOSED for track in tracks])
    errors = np.concatenate([np.abs(track.predicted - track.truth) for track in tracks])
    return Figures(
        correlation=correlation(tracks, 0),
        lag_frames=best,
        closures_reached=float(np.mean(reached)) if reached else None,
        silence_closed=float(np.mean(silent)) if len(silent) else None,
        mean_error=float(errors.mean()),
        frames=len(errors),
    )


def correlation(tracks: Sequence[Track], lag: int) -> float:
    """Pearson's correlation of all predictions with the truth `lag` frames earlier; 0 where either never changes."""
    predicted = np.concatenate([_part(track.predicted, lag) for track in tracks])
    truth = np.concatenate([_part(track.truth, -lag) for track in tracks])
    if len(predicted) < 2 or np.ptp(predicted) == 0 or np.ptp(truth) == 0:
        return 0.0
    return float(np.corrcoef(predicted, truth)[0, 1])


def closures_reached(track: Track) -> list[bool]:
    """For each closure of the clip, whether a frame within one of its middle is closed."""
    reached = []
    for phone in closures(track.phones):
        frame = int(phone.middle_s * FPS)
        near = track.predicted[max(0, frame - 1) : frame + 2]
        if len(near):
            reached.append(bool(near.min() < CLOSED))
    return reached


def silent_frames(track: Track) -> NDArray[np.bool_]:
    """The frames that lie wholly more than 300 ms away from all speech, (frames,)."""
    starts = np.arange(len(track.truth)) / FPS
    silent = np.ones(len(starts), np.bool_)
    for phone in track.phones:
        if phone.symbol != PAUSE:
            silent &= (starts + 1 / FPS <= phone.start_s - _AWAY_S) | (starts >= phone.end_s + _AWAY_S)
    return silent


def _part(values: Openings, lag: int) -> Openings:
    return values[lag:] if lag >= 0 else values[:lag]
