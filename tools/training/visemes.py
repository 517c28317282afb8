"""Phones in time become mouth shapes in time, with coarticulation. Pure; knows nothing of audio or drawing.

Each phone pulls the mouth towards a shape of its own, the more the nearer it is, and lips that must meet do meet.

The blend of targets by dominance is Cohen and Massaro's (Modeling Coarticulation in Synthetic Visual Speech, 1993).
The shapes are chosen by eye for the avatar's mouth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from compositor.errors import InvalidInput
from lipsync.avatar_features import Mouth
from training.phonemes import BILABIALS, LABIODENTALS, PAUSE, PHONEMES, Phone

Shapes: TypeAlias = NDArray[np.float32]
"""Mouth parameters over time, (frames, 5) float32 in [0, 1], in the order of PARAMETERS."""
PARAMETERS: Final = ("opening", "width", "rounding", "teeth", "tongue")
OPENING, TEETH = PARAMETERS.index("opening"), PARAMETERS.index("teeth")
CLOSED: Final = 0.06
"""Openings below this look closed: the line that is drawn between the lips covers the gap of under 1.7 units."""
FPS: Final = 25


@dataclass(frozen=True)
class _Viseme:
    """The shape a phone pulls to, and how hard it pulls the opening and the other parts (1: as a vowel)."""

    shape: tuple[float, float, float, float, float]
    opening_pull: float = 1.0
    other_pull: float = 1.0


_REST: Final = Mouth()
#          opening width rounding teeth tongue
_SHAPES: Final = {
    "pau": _Viseme((0.0, _REST.width, _REST.rounding, _REST.teeth, _REST.tongue)),
    "aa": _Viseme((0.92, 0.45, 0.05, 0.45, 0.35)),
    "ae": _Viseme((0.78, 0.75, 0.0, 0.60, 0.45)),
    "ah": _Viseme((0.62, 0.50, 0.05, 0.50, 0.40)),
    "ao": _Viseme((0.76, 0.25, 0.60, 0.35, 0.30)),
    "ax": _Viseme((0.40, 0.50, 0.05, 0.55, 0.45), 0.7, 0.5),
    "eh": _Viseme((0.60, 0.70, 0.0, 0.60, 0.50)),
    "er": _Viseme((0.40, 0.35, 0.45, 0.60, 0.50)),
    "ih": _Viseme((0.40, 0.70, 0.0, 0.65, 0.55)),
    "iy": _Viseme((0.32, 0.95, 0.0, 0.75, 0.60)),
    "uh": _Viseme((0.38, 0.30, 0.60, 0.45, 0.35)),
    "uw": _Viseme((0.26, 0.10, 1.0, 0.25, 0.30)),
    "w": _Viseme((0.14, 0.05, 1.0, 0.20, 0.30)),
    "p": _Viseme((0.0, 0.45, 0.05, 0.60, 0.50), 1.0, 0.3),
    "b": _Viseme((0.0, 0.45, 0.05, 0.60, 0.50), 1.0, 0.3),
    "m": _Viseme((0.0, 0.45, 0.05, 0.60, 0.50), 1.0, 0.3),
    "f": _Viseme((0.13, 0.50, 0.05, 1.0, 0.40), 1.0, 0.7),
    "v": _Viseme((0.13, 0.50, 0.05, 1.0, 0.40), 1.0, 0.7),
    "th": _Viseme((0.24, 0.55, 0.0, 0.70, 1.0), 0.8, 0.8),
    "dh": _Viseme((0.24, 0.55, 0.0, 0.70, 1.0), 0.8, 0.8),
    "s": _Viseme((0.16, 0.75, 0.0, 0.95, 0.50), 1.0, 0.8),
    "z": _Viseme((0.16, 0.75, 0.0, 0.95, 0.50), 1.0, 0.8),
    "sh": _Viseme((0.20, 0.25, 0.65, 0.95, 0.45), 1.0, 1.0),
    "zh": _Viseme((0.20, 0.25, 0.65, 0.95, 0.45), 1.0, 1.0),
    "ch": _Viseme((0.18, 0.30, 0.55, 0.95, 0.50), 1.0, 0.9),
    "jh": _Viseme((0.18, 0.30, 0.55, 0.95, 0.50), 1.0, 0.9),
    "t": _Viseme((0.20, 0.60, 0.0, 0.80, 0.75), 0.6, 0.4),
    "d": _Viseme((0.20, 0.60, 0.0, 0.80, 0.75), 0.6, 0.4),
    "n": _Viseme((0.22, 0.60, 0.0, 0.70, 0.80), 0.6, 0.4),
    "l": _Viseme((0.30, 0.55, 0.0, 0.60, 0.95), 0.6, 0.5),
    "r": _Viseme((0.24, 0.30, 0.50, 0.55, 0.50), 0.7, 0.7),
    "y": _Viseme((0.24, 0.90, 0.0, 0.70, 0.60), 0.6, 0.6),
    "k": _Viseme((0.30, 0.55, 0.0, 0.60, 0.40), 0.4, 0.3),
    "g": _Viseme((0.30, 0.55, 0.0, 0.60, 0.40), 0.4, 0.3),
    "ng": _Viseme((0.32, 0.55, 0.0, 0.60, 0.40), 0.5, 0.3),
    "hh": _Viseme((0.40, 0.50, 0.0, 0.50, 0.40), 0.3, 0.1),
}
# Diphthongs glide: the first sound for the longer part, then the second.
_GLIDES: Final = {"ay": ("aa", "ih"), "aw": ("aa", "uh"), "ey": ("eh", "iy"), "ow": ("ao", "uw"), "oy": ("ao", "ih")}
_GLIDE_SHARE: Final = 0.58
assert set(_SHAPES) | set(_GLIDES) == PHONEMES

_REACH_S: Final = 0.032  # how far a phone's pull reaches beyond it, to 1/e or so
_CORE_S: Final = (0.042, 0.110)  # a closure lasts: more than a frame at 25 fps, or some frame would miss it
_CORE_SHARE: Final = 0.6  # of a closure's phone that the lips are shut
_CLOSING_S: Final = 0.085  # that lips take to shut, and to part
_HUSH_S: Final = 0.06  # after the last sound, and before the first, lips are still parting or closing
_HUSHING_S: Final = 0.12


def mouth_shapes(phones: Sequence[Phone], frames: int, fps: int = FPS) -> Shapes:
    """The mouth in the middle of each video frame, frame k spanning [k, k + 1) / fps seconds.

    Before the first phone and after the last one there is silence. Raises InvalidInput on an unknown symbol.
    """
    return shapes_at(phones, (np.arange(frames) + 0.5) / fps)


def shapes_at(phones: Sequence[Phone], seconds: NDArray[np.float64]) -> Shapes:
    """The mouth at each of `seconds`, (n,): a Shapes of n rows, continuous in time."""
    segments = _segments(phones)
    shapes = _blend(segments, seconds)
    for phone in segments:
        if phone.symbol in LABIODENTALS:
            grip = _closure(phone, seconds)
            for part in (OPENING, TEETH):
                shapes[:, part] += grip * (_SHAPES[phone.symbol].shape[part] - shapes[:, part])
    for phone in segments:
        if phone.symbol in BILABIALS:
            shapes[:, OPENING] *= 1 - _closure(phone, seconds)
        elif phone.symbol == PAUSE:
            shapes[:, OPENING] *= 1 - _window(seconds, phone.start_s + _HUSH_S, phone.end_s - _HUSH_S, _HUSHING_S)
    return np.clip(shapes, 0, 1).astype(np.float32)


def mouths(shapes: Shapes) -> list[Mouth]:
    """Each row of the shapes as a mouth to draw."""
    return [Mouth(**dict(zip(PARAMETERS, row, strict=True))) for row in np.asarray(shapes, np.float64).tolist()]


def closures(phones: Sequence[Phone]) -> list[Phone]:
    """The phones for which the lips close."""
    return [phone for phone in phones if phone.symbol in BILABIALS]


def _segments(phones: Sequence[Phone]) -> list[Phone]:
    """Phones with diphthongs as two, adjoining pauses as one, and silence for ever before and after."""
    glided = [Phone(PAUSE, -np.inf, phones[0].start_s if phones else np.inf)]
    for phone in phones:
        if phone.symbol not in PHONEMES:
            raise InvalidInput(f"phones: {phone.symbol!r} is no phoneme; use those of training.phonemes")
        if phone.symbol in _GLIDES:
            first, second = _GLIDES[phone.symbol]
            turn = phone.start_s + _GLIDE_SHARE * phone.length_s
            glided += [Phone(first, phone.start_s, turn), Phone(second, turn, phone.end_s)]
        else:
            glided.append(phone)
    glided.append(Phone(PAUSE, phones[-1].end_s if phones else np.inf, np.inf))
    merged = glided[:1]
    for phone in glided[1:]:
        if phone.symbol == merged[-1].symbol == PAUSE:
            merged[-1] = Phone(PAUSE, merged[-1].start_s, max(phone.end_s, merged[-1].end_s))
        else:
            merged.append(phone)
    return merged


def _blend(segments: Sequence[Phone], seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """The weighted mean of all shapes, (n, 5); weights fall off smoothly with the distance from the phone."""
    starts = np.array([phone.start_s for phone in segments])
    ends = np.array([phone.end_s for phone in segments])
    # A phone pulls fully in its middle half only, so that neighbours meet half way.
    margin = np.where(np.isfinite(ends - starts), (ends - starts) / 4, 0.0)
    before, after = (starts + margin)[None, :] - seconds[:, None], seconds[:, None] - (ends - margin)[None, :]
    away = np.maximum(0, np.maximum(before, after)) / _REACH_S
    nearness = np.exp(1 - np.sqrt(1 + away**2))
    shapes = np.array([_SHAPES[phone.symbol].shape for phone in segments])
    opening_pull = nearness * [_SHAPES[phone.symbol].opening_pull for phone in segments]
    other_pull = nearness * [_SHAPES[phone.symbol].other_pull for phone in segments]
    blended = other_pull @ shapes / other_pull.sum(axis=1, keepdims=True)
    blended[:, OPENING] = opening_pull @ shapes[:, OPENING] / opening_pull.sum(axis=1)
    return np.asarray(blended)


def _closure(phone: Phone, seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far the lips have come to the closure of a phone: 1 about its middle, smoothly 0 away from it."""
    half = float(np.clip(_CORE_SHARE * phone.length_s, *_CORE_S)) / 2
    return _window(seconds, phone.middle_s - half, phone.middle_s + half, _CLOSING_S)


def _window(seconds: NDArray[np.float64], start: float, end: float, slope_s: float) -> NDArray[np.float64]:
    """1 from `start` to `end`, falling to 0 over `slope_s` on either side as a raised cosine; 0 where end < start."""
    if end < start:
        return np.zeros(len(seconds))
    away = np.maximum(0, np.maximum(start - seconds, seconds - end)) / slope_s
    return np.asarray((1 + np.cos(np.pi * np.minimum(away, 1))) / 2)
