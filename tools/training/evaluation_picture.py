"""Draws an evaluation as one picture: openings over time beside the truth, and frames beside what they should be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from training.evaluation import Observed, Pair
from training.metrics import Openings
from training.phonemes import PAUSE
from training.recordings import Recording, loudness_db
from training.takes import Take
from training.visemes import CLOSED, FPS, closures

_SHOWN: Final = ("p", "aa", "m", "iy", "b", "ao", "f", "w", "s", "ae", "v", "uw", "th", PAUSE)
"""What the contact sheet shows, one moment of each: closures between vowels, teeth on the lip, rounding, silence."""
_BLUE, _GREY, _ORANGE = "#1f6f9f", "#b9b9b9", "#d9822b"
_WORDS: Final = 4
_COLUMNS: Final = 7
_INCHES, _OVERLAY_INCHES, _BLOCK_INCHES, _DOTS_AN_INCH = 14, 2.3, 3.9, 90


@dataclass(frozen=True)
class Moment:
    """A frame of one of several takes, and the phone that is said in it."""

    take: int
    frame: int
    phone: str


def choose_moments(takes: Sequence[Take], phones: Sequence[str] = _SHOWN) -> list[Moment]:
    """The middle of a phone of each kind, each from another take as far as there are any."""
    moments = list[Moment]()
    for number, symbol in enumerate(phones):
        order = [(number + step) % len(takes) for step in range(len(takes))]
        found = (
            Moment(take, int(phone.middle_s * FPS), symbol)
            for take in order
            for phone in takes[take].phones
            if phone.symbol == symbol
        )
        if (moment := next(found, None)) is not None:
            moments.append(moment)
    return moments


def draw_evaluation(
    path: Path,
    overlays: Sequence[tuple[str, Observed, Openings | None]],
    words: Sequence[tuple[Recording, Openings]],
    pairs: Sequence[tuple[str, Pair]],
) -> None:
    """Writes the picture as PNG.

    overlays: titles, takes, and perhaps their openings in noise. words: recorded speech and its openings. pairs: frames
    that came back and the truth, each with its phone.
    """
    rows = len(overlays) + (1 if words else 0)
    blocks = -(-len(pairs) // _COLUMNS)
    heights = [_OVERLAY_INCHES * rows, _BLOCK_INCHES * blocks]
    figure = Figure(figsize=(_INCHES, sum(heights)), layout="constrained")
    upper, lower = np.asarray(figure.subfigures(2, 1, height_ratios=heights))
    axes = upper.subplots(rows, 1, squeeze=False)[:, 0]
    for axis, overlay in zip(axes, overlays, strict=False):
        _overlay(axis, *overlay)
    if words:
        _loudness(axes[-1], words[:_WORDS])
    _sheet(lower, pairs, blocks)
    figure.savefig(path, dpi=_DOTS_AN_INCH)


def _overlay(axis: Axes, title: str, observed: Observed, noisy: Openings | None) -> None:
    seconds = (np.arange(len(observed.truth)) + 0.5) / FPS
    axis.fill_between(seconds, observed.truth, color=_GREY, linewidth=0, label="truth")
    if noisy is not None:
        axis.plot(seconds, noisy, color=_ORANGE, linewidth=1, label="frames, speech in noise at 20 dB")
    axis.plot(seconds, observed.predicted, color=_BLUE, linewidth=1.6, label="frames that came back")
    for phone in closures(observed.take.phones):
        axis.axvline(phone.middle_s, color="black", linewidth=0.6, linestyle=":")
    for phone in observed.take.phones:
        if phone.symbol != PAUSE:
            axis.text(phone.middle_s, 1.0, phone.symbol, fontsize=7, ha="center", va="top")
    axis.set_title(f"{title}: {observed.take.text}", fontsize=9, loc="left")
    _scale(axis, float(seconds[-1]))
    axis.legend(fontsize=7, loc="center right")


def _loudness(axis: Axes, words: Sequence[tuple[Recording, Openings]]) -> None:
    opening = np.concatenate([own for _, own in words])
    loud = np.concatenate([loudness_db(word.samples, len(own)) for word, own in words])
    seconds = (np.arange(len(opening)) + 0.5) / FPS
    axis.fill_between(seconds, (loud + 60) / 60, color=_GREY, linewidth=0, label="loudness, -60 to 0 dB")
    axis.plot(seconds, opening, color=_BLUE, linewidth=1.6, label="frames that came back")
    names = ", ".join(word.name for word, _ in words)
    axis.set_title(f"recorded human speech (alsa-utils): {names}", fontsize=9, loc="left")
    _scale(axis, float(seconds[-1]) * 1.17)  # room for the legend
    axis.legend(fontsize=7, loc="center right")


def _scale(axis: Axes, seconds: float) -> None:
    axis.axhline(CLOSED, color="black", linewidth=0.5)
    axis.set_xlim(0, seconds)
    axis.set_ylim(-0.05, 1.05)
    axis.set_ylabel("opening", fontsize=8)
    axis.tick_params(labelsize=7)


def _sheet(figure: Any, pairs: Sequence[tuple[str, Pair]], blocks: int) -> None:
    """The frames above, the truth below."""
    axes = figure.subplots(2 * blocks, _COLUMNS, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for number, (phone, pair) in enumerate(pairs):
        block, column = divmod(number, _COLUMNS)
        for row, (picture, what) in enumerate(zip(pair, ("frame", "truth"), strict=True)):
            axis = axes[2 * block + row, column]
            axis.imshow(_lower_face(picture), interpolation="lanczos")
            axis.set_title(f"{phone}: {what}", fontsize=8, pad=2)


def _lower_face(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Nose to chin, RGB."""
    height, width = picture.shape[:2]
    part = picture[int(0.42 * height) :, int(0.17 * width) : int(0.83 * width)]
    return np.asarray(cv2.cvtColor(part, cv2.COLOR_BGR2RGB), np.uint8)
