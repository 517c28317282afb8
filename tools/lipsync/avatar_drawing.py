"""Drawing primitives of the avatar: splines, colours and a canvas with soft, anti-aliased painting.

Takes shapes in drawing units and gives premultiplied BGRA pixels; knows nothing of faces, frames or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Points = npt.NDArray[np.float32]
Colour = tuple[float, float, float]
Outline = Sequence[tuple[float, float]]

_SHIFT_BITS = 4
_EDGE_SIGMA = 0.7  # canvas pixels; OpenCV's own anti-aliasing of polygons leaves steps


def colour(hex_rgb: str) -> Colour:
    """`"f0c2a0"` as (blue, green, red) in [0, 1]."""
    red, green, blue = (int(hex_rgb[i : i + 2], 16) / 255.0 for i in (0, 2, 4))
    return blue, green, red


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """The colour `share` of the way from `first` to `second`."""
    b, g, r = (a + (z - a) * share for a, z in zip(first, second, strict=True))
    return b, g, r


def spline(points: Outline, *, closed: bool = True, steps: int = 12) -> Points:
    """A smooth curve through `points` (Catmull-Rom, uniform), float32 [m, 2]."""
    knots = np.asarray(points, np.float32)
    if closed:
        padded = np.vstack([knots[-1:], knots, knots[:2]])
    else:
        padded = np.vstack([2 * knots[:1] - knots[1:2], knots, 2 * knots[-1:] - knots[-2:-1]])
    t = (np.arange(steps, dtype=np.float32) / steps)[:, None]
    parts = []
    for a, b, c, d in zip(padded[:-3], padded[1:-2], padded[2:-1], padded[3:], strict=True):
        parts.append(0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3))
    if not closed:
        parts.append(knots[-1:])
    return np.vstack(parts).astype(np.float32)


def polygon(points: Outline) -> Points:
    """The points as they are, float32 [m, 2]."""
    return np.asarray(points, np.float32)


def shifted(points: Points, x: float, y: float) -> Points:
    """The points moved by x, y."""
    return (points + np.array([x, y], np.float32)).astype(np.float32)


def sided(points: Outline, side: int) -> list[tuple[float, float]]:
    """Points given for the viewer's right, or mirrored to the left where `side` is -1."""
    return [(side * x, y) for x, y in points]


def mirrored(points: Outline) -> list[tuple[float, float]]:
    """A closed outline from its right half, listed from top to bottom along x >= 0."""
    return [*points, *((-x, y) for x, y in reversed(points) if x > 0)]


def ellipse(x: float, y: float, radius_x: float, radius_y: float, turn_rad: float = 0.0, *, steps: int = 48) -> Points:
    """The outline of an ellipse, float32 [steps, 2]."""
    angle = np.linspace(0, 2 * np.pi, steps, endpoint=False)
    across, down = radius_x * np.cos(angle), radius_y * np.sin(angle)
    cos, sin = np.cos(turn_rad), np.sin(turn_rad)
    return np.stack([x + across * cos - down * sin, y + across * sin + down * cos], axis=1).astype(np.float32)


def ribbon(curve: Points, widths: Sequence[float]) -> Points:
    """A tapered stroke along `curve`: the outline of full widths `widths`, spread evenly over the curve."""
    tangent = np.gradient(curve, axis=0)
    normal = np.stack([-tangent[:, 1], tangent[:, 0]], axis=1)
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-6)
    half = np.interp(np.linspace(0, 1, len(curve)), np.linspace(0, 1, len(widths)), widths)[:, None] / 2
    return np.vstack([curve + normal * half, (curve - normal * half)[::-1]]).astype(np.float32)


@dataclass
class Canvas:
    """Premultiplied BGRA float32 `pixels` [h, w, 4]: drawing units from `left`, `top`, at `scale` pixels a unit."""

    pixels: Array
    left: float
    top: float
    scale: float

    @classmethod
    def blank(cls, left: float, top: float, right: float, bottom: float, scale: float) -> Canvas:
        """A transparent canvas over a box of drawing units."""
        shape = (round((bottom - top) * scale), round((right - left) * scale), 4)
        return cls(np.zeros(shape, np.float32), left, top, scale)

    def mask(self, outline: Points, blur: float = 0.0) -> Array:
        """Coverage [h, w] in [0, 1] of the outline's inside, softened by a Gaussian of sigma `blur` units."""
        mask = np.zeros(self.pixels.shape[:2], np.uint8)
        at = (outline - np.array([self.left, self.top], np.float32)) * self.scale - 0.5
        cv2.fillPoly(mask, [np.round(at * (1 << _SHIFT_BITS)).astype(np.int32)], 255, cv2.LINE_AA, _SHIFT_BITS)
        coverage: Array = mask.astype(np.float32) * np.float32(1 / 255)
        sigma = max(blur * self.scale, _EDGE_SIGMA)
        cv2.GaussianBlur(coverage, (0, 0), sigma, dst=coverage)
        return coverage

    def window(self, outline: Points, margin: float) -> Canvas:
        """The part of this canvas around an outline, as a view: painting it paints this canvas."""
        low = (outline.min(axis=0) - margin - (self.left, self.top)) * self.scale
        high = (outline.max(axis=0) + margin - (self.left, self.top)) * self.scale
        height, width = self.pixels.shape[:2]
        x0, y0 = (int(np.clip(np.floor(v), 0, size)) for v, size in zip(low, (width, height), strict=True))
        x1, y1 = (int(np.clip(np.ceil(v), 0, size)) for v, size in zip(high, (width, height), strict=True))
        view = self.pixels[y0:y1, x0:x1]
        return Canvas(view, self.left + x0 / self.scale, self.top + y0 / self.scale, self.scale)

    def lay(self, coverage: Array, paint: Colour | Array) -> None:
        """Paint over everything with coverage [h, w]; `paint` is one colour or an image [h, w, 3]."""
        planes = [paint[..., i] for i in range(3)] if isinstance(paint, np.ndarray) else paint
        # Merged arrays of equal shape: numpy is several times slower at broadcasting a last axis of four.
        self.pixels *= cv2.merge([1 - coverage] * 4)
        self.pixels += cv2.merge([*(coverage * np.float32(1) * plane for plane in planes), coverage])

    def fill(
        self, outline: Points, paint: Colour, opacity: float = 1.0, *, blur: float = 0.0, clip: Array | None = None
    ) -> None:
        """Paint an outline's inside; `clip` is a coverage [h, w] of this canvas that bounds it."""
        part = self.window(outline, 2 + 3 * blur)
        if part.pixels.size == 0:
            return
        coverage = part.mask(outline, blur) * np.float32(opacity)
        if clip is not None:
            x = round((part.left - self.left) * self.scale)
            y = round((part.top - self.top) * self.scale)
            coverage *= clip[y : y + coverage.shape[0], x : x + coverage.shape[1]]
        part.lay(coverage, paint)

    def stroke(
        self,
        points: Outline,
        widths: Sequence[float],
        paint: Colour,
        opacity: float = 1.0,
        *,
        blur: float = 0.0,
        clip: Array | None = None,
    ) -> None:
        """Paint a tapered stroke along the open spline through `points`."""
        self.fill(ribbon(spline(points, closed=False), widths), paint, opacity, blur=blur, clip=clip)

    def ramp(self, start: tuple[float, float], end: tuple[float, float], first: Colour, last: Colour) -> Array:
        """A linear gradient [h, w, 3] from `first` at point `start` to `last` at point `end`, eased."""
        height, width = self.pixels.shape[:2]
        x = np.arange(width, dtype=np.float32) / np.float32(self.scale) + np.float32(self.left)
        y = np.arange(height, dtype=np.float32) / np.float32(self.scale) + np.float32(self.top)
        dx, dy = end[0] - start[0], end[1] - start[1]
        t = ((x - start[0])[None, :] * dx + (y - start[1])[:, None] * dy) / (dx * dx + dy * dy)
        t = np.clip(t, 0, 1)
        t = (t * t * (3 - 2 * t)).astype(np.float32)[..., None]
        blend: Array = np.asarray(first, np.float32) * (1 - t) + np.asarray(last, np.float32) * t
        return blend

    def to_uint8(self) -> npt.NDArray[np.uint8]:
        """The pixels as uint8 [h, w, 4], still premultiplied."""
        pixels: npt.NDArray[np.uint8] = np.clip(self.pixels * 255 + 0.5, 0, 255).astype(np.uint8)
        return pixels
