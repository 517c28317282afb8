"""Reads how far the avatar's mouth is open in a picture of it: pixels in, an opening out, as one would with a ruler.

Down the middle of the mouth two things are always seen, whatever is between the lips: the dark line that ends the upper
lip, and the shine on the lower one. How far they are apart, less how far they are apart in a closed mouth, is the gap.
Pure; knows of the avatar only where its mouth lies in a frame, and of no model.
"""

from __future__ import annotations

from functools import cache
from typing import Final, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from compositor.blending import CROP_SIZE, ROI_BORDER, Pixels
from compositor.geometry import Box
from lipsync.avatar_features import MAX_GAP, MOUTH_Y
from lipsync.avatar_motion import Shot

MOUTH_AREA: Final = Box(72, 160, 176, 152)
"""Where in the ROI the drawn mouth and chin move."""
UNREADABLE: Final = 1.0
"""The opening of a mouth whose lips cannot be found: what is no mouth shall count as a mistake, never as closed."""

_Maps: TypeAlias = tuple[NDArray[np.float32], NDArray[np.float32]]
# All lengths are in drawing units: 1.08 pixels of a 720-line frame.
_STEP: Final = 0.5
_ACROSS: Final = np.arange(-6, 6.1, 2)  # the columns that are averaged
_DOWN: Final = np.arange(-8, 48, _STEP)  # below the mouth's middle
_UPPER: Final = slice(int(np.searchsorted(_DOWN, -3)), int(np.searchsorted(_DOWN, 4)))
"""Where the upper lip ends, closed or open: it moves by 3 units, and what is below it may be as dark as its line."""
_CLOSED_GAP: Final = 7.0  # from the line's upper edge to the shine's middle in a closed mouth
# Levels of grey, and of red above green, as the palette has them: the line is at most 80, the upper lip 115, the shine
# 170; lips are 85 to 108 redder than green, skin at most 60, teeth 10.
_LINE_LEVEL: Final = 97.0
_LINE_HALF: Final = 1.4  # from the line's upper edge to its middle
_SHINE_LEVEL: Final = 140.0
_LIP_RED: Final = 82.0
_SHINE_RED: Final = (66.0, 80.0)  # below: none of it; above: all of it
_SHINE_ABOVE: Final = (26, 4)  # steps of the lip's lower edge: the lip is 10 to 16 units thick
_SHINE_HALF: Final = 5  # steps on either side of its middle
_BGR_TO_GREY: Final = np.array([0.114, 0.587, 0.299], np.float32)


class MouthGauge:
    """Reads openings in whole frames of one shot."""

    def __init__(self, shot: Shot) -> None:
        self._shot = shot
        self._maps = cache(self._find)

    def opening(self, picture: Pixels, frame: int) -> float:
        """The opening in a frame, BGR uint8 of the shot's size, in the units of `Mouth.opening`: 0 closed, 1 widest.

        frame: which of the shot's, for the pose. May come out a little below 0 or above 1. UNREADABLE where no lower
        lip is found.
        """
        columns = cv2.remap(picture, *self._maps(frame), cv2.INTER_LINEAR)
        bgr = columns.astype(np.float32).mean(axis=1)
        grey, red = bgr @ _BGR_TO_GREY, bgr[:, 2] - bgr[:, 1]
        lower = _shine(grey, red)
        return UNREADABLE if lower is None else (lower - _line(grey) - _CLOSED_GAP) / MAX_GAP

    def _find(self, frame: int) -> _Maps:
        """Pixels of the frame (x, y) along each of the columns, (rows, columns) both."""
        pose = self._shot.pose(frame)
        points = [[self._shot.to_frame(pose, float(x), float(y) + MOUTH_Y) for x in _ACROSS] for y in _DOWN]
        at = np.array(points, np.float32) - np.float32(0.5)
        return np.ascontiguousarray(at[..., 0]), np.ascontiguousarray(at[..., 1])


def mouth_area(rect: tuple[int, int, int, int]) -> Box:
    """MOUTH_AREA of a crop rectangle, x1, y1, x2, y2, in frame pixels."""
    x1, y1, x2, y2 = rect
    across, down = (x2 - x1) / CROP_SIZE, (y2 - y1) / CROP_SIZE
    x, y = round(x1 + (MOUTH_AREA.x + ROI_BORDER) * across), round(y1 + (MOUTH_AREA.y + ROI_BORDER) * down)
    return Box(x, y, round(MOUTH_AREA.width * across), round(MOUTH_AREA.height * down))


def _line(grey: NDArray[np.float32]) -> float:
    """Where the upper lip ends: its first fall below the line's level, else just above its darkest row."""
    rows, levels = _DOWN[_UPPER], grey[_UPPER]
    row = int(np.argmax(levels < _LINE_LEVEL))
    if row == 0:
        return float(rows[int(np.argmin(levels))]) - _LINE_HALF
    return float(rows[row] - _STEP * (_LINE_LEVEL - levels[row]) / (levels[row - 1] - levels[row]))


def _shine(grey: NDArray[np.float32], red: NDArray[np.float32]) -> float | None:
    """The middle of the shine on the lower lip: the brightest red part just above where the lip ends in skin."""
    lip = np.flatnonzero(red > _LIP_RED)
    if len(lip) == 0 or lip[-1] < _UPPER.stop:
        return None
    bottom = int(lip[-1])
    within = slice(max(0, bottom - _SHINE_ABOVE[0]), bottom - _SHINE_ABOVE[1])
    low, high = _SHINE_RED
    shine = np.maximum(grey - _SHINE_LEVEL, 0) * np.clip((red - low) / (high - low), 0, 1)
    smooth = np.convolve(shine, np.hanning(7) / 3, "same")
    row = within.start + int(np.argmax(smooth[within]))
    near = slice(row - min(row, _SHINE_HALF), row + _SHINE_HALF + 1)
    return float(np.average(_DOWN[near], weights=shine[near])) if smooth[row] > 1 else None
