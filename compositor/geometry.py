"""Rectangles, chroma subsampling and frame order: plain integers, shared by all that speaks of pictures."""

from __future__ import annotations

import enum
from typing import NamedTuple


class Box(NamedTuple):
    """A rectangle in pixels, its left upper corner and its size."""

    x: int
    y: int
    width: int
    height: int

    @property
    def right(self) -> int:
        """One past the last column."""
        return self.x + self.width

    @property
    def bottom(self) -> int:
        """One past the last row."""
        return self.y + self.height

    @property
    def area(self) -> int:
        return self.width * self.height

    def inside(self, outer: Box) -> Box:
        """This box in the coordinates of `outer`."""
        return Box(self.x - outer.x, self.y - outer.y, self.width, self.height)


class Subsampling(enum.Enum):
    """Chroma subsampling and, with it, the MCU's size in pixels."""

    S444 = "4:4:4"
    S422 = "4:2:2"
    S420 = "4:2:0"

    @property
    def mcu(self) -> tuple[int, int]:
        """(width, height) of one MCU in pixels: ITU-T T.81, A.2.3."""
        return _MCU[self]


_MCU = {Subsampling.S444: (8, 8), Subsampling.S422: (16, 8), Subsampling.S420: (16, 16)}


def ping_pong(position: int, frames: int) -> int:
    """The frame number at `position` of the endless order 0..N-1, N-2..1, 0..: no jump and no doubled end frame."""
    if frames == 1:
        return 0
    phase = position % (2 * frames - 2)
    return phase if phase < frames else 2 * frames - 2 - phase
