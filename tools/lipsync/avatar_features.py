"""The moving features of the avatar's face: eyes with lids and gaze, brows, and a parametric mouth.

Each is painted on the head's canvas, in the drawing units of avatar_head; nothing here knows of frame numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lipsync.avatar_drawing import Array, Canvas, Points, ellipse, mix, ribbon, shifted, sided, spline
from lipsync.avatar_palette import (
    CAVITY,
    CAVITY_DEEP,
    EYE_CORNER,
    EYE_SHADE,
    EYE_WHITE,
    HAIR,
    HAIR_DEEP,
    IRIS,
    IRIS_LIGHT,
    IRIS_RIM,
    LASH,
    LASH_LOWER,
    LID_SHADOW,
    LIP_LINE,
    LIP_LOWER,
    LIP_RIDGE,
    LIP_SHINE,
    LIP_UPPER,
    PUPIL,
    SKIN,
    SKIN_DEEP,
    SKIN_LIGHT,
    SKIN_SHADE,
    TEETH,
    TONGUE,
    WHITE,
)

EYE_X, EYE_Y = 51.0, -27.0
MOUTH_Y = 74.0
MOUTH_HALF_WIDTH = 39.0
TEETH_REACH = 0.86  # of the half-width
MAX_GAP = 28.0  # between the lips at opening 1
NARROWING = 0.12  # of the mouth at opening 1
SAG = 4.5  # that the corners sink at opening 1, drawing units: less of a grin
UPPER_SHARE = 0.10  # of the gap that the upper lip rises; the rest is the jaw's
CHIN_SHARE = 0.42  # of the gap that the chin falls
CHIN_Y = 137.0


@dataclass(frozen=True)
class Mouth:
    """A mouth's shape: every part in [0, 1]; the default is the mouth at rest with a soft smile."""

    opening: float = 0.0
    width: float = 0.5
    rounding: float = 0.0
    teeth: float = 0.6
    tongue: float = 0.5

    @property
    def gap(self) -> float:
        """Distance between the lips in the middle, drawing units."""
        return MAX_GAP * self.opening

    @property
    def half_width(self) -> float:
        """Half the distance of the mouth's corners, drawing units."""
        return (
            MOUTH_HALF_WIDTH
            * (1 + 0.2 * (self.width - 0.5))
            * (1 - 0.30 * self.rounding)
            * (1 - NARROWING * self.opening)
        )


def paint_eyes(head: Canvas, *, blink: float, gaze_x: float, gaze_y: float, brow: float) -> None:
    """Paint both eyes and brows. `blink` 0 (open) to 1 (shut); gaze and brow in drawing units (brow up positive)."""
    for side in (-1, 1):
        area = ellipse(side * EYE_X, EYE_Y - 12, 42, 44)
        part = head.window(area, 0)
        _paint_brow(part, side, brow - 1.5 * blink)
        _paint_eye(part, side, blink, gaze_x, gaze_y)


def _paint_brow(part: Canvas, side: int, lift: float) -> None:
    points = [(23, -66 - lift), (42, -72.5 - 0.9 * lift), (64, -73 - 0.8 * lift), (88, -61 - 0.7 * lift)]
    curve = spline(sided(points, side), closed=False)
    part.fill(ribbon(curve, [2.4, 7.6, 8.0, 6.0, 1.0]), mix(HAIR, SKIN_DEEP, 0.25), 0.92, blur=1.0)
    part.fill(ribbon(shifted(curve, 0, 1.2), [1, 4, 3, 0.5]), HAIR_DEEP, 0.40, blur=1.0)


def _eye_curves(side: int) -> tuple[Points, Points]:
    """The open upper and the lower lid, both from the inner to the outer corner."""
    upper = [(23.5, 4), (30, -6.5), (42, -14.6), (56, -15.6), (70, -9.8), (79.5, -1)]
    lower = [(23.5, 4), (32, 8.4), (44, 10.6), (57, 10.4), (70, 6.2), (79.5, -1)]
    first, second = (shifted(spline(sided(lid, side), closed=False), 0, EYE_Y) for lid in (upper, lower))
    return first, second


def _paint_eye(part: Canvas, side: int, blink: float, gaze_x: float, gaze_y: float) -> None:
    upper, lower = _eye_curves(side)
    shut = shifted(lower, 0, -1.5)
    lid = (upper + (shut - upper) * np.float32(blink)).astype(np.float32)
    aperture = part.mask(np.vstack([lid, lower[::-1]]))
    if blink < 0.97:
        part.lay(aperture, part.ramp((0, EYE_Y - 14), (0, EYE_Y + 6), EYE_SHADE, EYE_WHITE))
        part.fill(ellipse(side * 27.5, EYE_Y + 3, 4, 4), EYE_CORNER, 0.7, blur=1.2, clip=aperture)
        _paint_iris(part, side * EYE_X + gaze_x, EYE_Y - 2.6 + gaze_y, aperture)
        lid_shadow = ribbon(shifted(lid, 0, 3.2), [4, 8, 8, 4])
        part.fill(lid_shadow, LID_SHADOW, 0.42, blur=1.8, clip=aperture)
    if blink > 0.02:
        covered = part.mask(np.vstack([upper, lid[::-1]])) * (1 - aperture)
        shade, light = mix(SKIN, SKIN_SHADE, 0.65), mix(SKIN, SKIN_LIGHT, 0.4)
        part.lay(covered, part.ramp((0, EYE_Y - 18), (0, EYE_Y + 10), shade, light))
    _paint_lashes(part, side, upper, lower, lid, blink)


def _paint_iris(part: Canvas, x: float, y: float, aperture: Array) -> None:
    part.fill(ellipse(x, y, 15.2, 15.2), IRIS_RIM, 1.0, blur=0.35, clip=aperture)
    part.fill(ellipse(x, y, 13.3, 13.3), IRIS, 1.0, blur=1.0, clip=aperture)
    part.fill(ellipse(x, y + 5.6, 9.2, 6.0), IRIS_LIGHT, 0.85, blur=2.0, clip=aperture)
    part.fill(ellipse(x, y, 6.7, 6.7), PUPIL, 1.0, blur=0.4, clip=aperture)
    part.fill(ellipse(x - 4.6, y - 5.0, 3.7, 3.7), WHITE, 0.98, blur=0.3, clip=aperture)
    part.fill(ellipse(x + 4.8, y + 4.6, 1.8, 1.8), WHITE, 0.70, blur=0.4, clip=aperture)


def _paint_lashes(part: Canvas, side: int, upper: Points, lower: Points, lid: Points, blink: float) -> None:
    crease = shifted(upper, 0, -6.2) + (lid - upper) * np.float32(0.16)
    part.fill(ribbon(crease[4:-3], [0.6, 2.0, 1.6, 0.6]), SKIN_DEEP, 0.75 * (1 - 0.45 * blink), blur=0.7)
    x, y = lid[-9]
    ends = (x + side * 6.0, y + 3.6 - 2.4 * blink), (x + side * 12.0, y + 3.2 - 2.2 * blink)
    wing = spline([(lid[-21, 0], lid[-21, 1]), (x, y), *ends], closed=False)
    lash = np.vstack([lid[:-9], wing[12:]])
    part.fill(ribbon(lash, [1.2, 3.4, 4.4, 4.8, 5.2, 5.0, 3.2, 0.5]), LASH, 0.97, blur=0.35)
    part.fill(ribbon(lower[6:], [0.4, 1.2, 1.7, 1.6]), LASH_LOWER, 0.60, blur=0.5)
    crease_below = ribbon(shifted(lower[8:-8], 0, 5.5), [0.5, 2.2, 0.5])
    part.fill(crease_below, SKIN_DEEP, 0.20, blur=1.5)


def lip_curves(mouth: Mouth) -> tuple[Points, Points, Points, Points]:
    """Upper lip's outer and inner edge, lower lip's inner and outer edge, left to right, float32 [m, 2]."""
    s = np.linspace(-1, 1, 41, dtype=np.float32)
    x = s * mouth.half_width
    bow = 1 - s * s
    rest = MOUTH_Y + 2.4 - 8.5 * np.abs(s) ** 2.3 + 0.9 * np.exp(-((s / 0.24) ** 2)) + SAG * mouth.opening * s * s
    gap = mouth.gap * bow**0.625
    upper_inner = rest - UPPER_SHARE * gap
    lower_inner = rest + (1 - UPPER_SHARE) * gap
    fuller = 1 + 0.35 * mouth.rounding
    upper_outer = upper_inner - fuller * (9.4 * bow**0.8 - 2.7 * np.exp(-((s / 0.16) ** 2)))
    lower_outer = lower_inner + fuller * 12.0 * bow**0.55 * (1 - 0.12 * mouth.opening)
    curves = [np.stack([x, y], axis=1).astype(np.float32) for y in (upper_outer, upper_inner, lower_inner, lower_outer)]
    return curves[0], curves[1], curves[2], curves[3]


def paint_mouth(head: Canvas, mouth: Mouth) -> None:
    """Paint the lips and, where they are apart, what is seen between them."""
    top, upper, lower, bottom = lip_curves(mouth)
    part = head.window(np.vstack([top, bottom]), 14)
    part.fill(shifted(np.vstack([top, bottom[::-1]]), 0, 4), SKIN_SHADE, 0.40, blur=5)
    below = ribbon(shifted(bottom[9:-9], 0, 6), [2, 7, 2])
    part.fill(below, SKIN_DEEP, 0.42, blur=3.2)
    upper_lip = np.vstack([top, upper[::-1]])
    lower_lip = np.vstack([lower, bottom[::-1]])
    if mouth.opening > 0:
        _paint_cavity(part, mouth, upper, lower)
    part.fill(lower_lip, LIP_LOWER, 1.0, blur=0.45)
    part.fill(upper_lip, LIP_UPPER, 1.0, blur=0.45)
    lower_cover = part.mask(lower_lip)
    shine = shifted(lower[11:-13], -2, 5.4)
    part.fill(ribbon(shine, [0.6, 4.2, 3.4, 0.5]), LIP_SHINE, 0.62, blur=1.5, clip=lower_cover)
    part.fill(ribbon(bottom[4:-4], [1, 5, 1]), LIP_UPPER, 0.55, blur=2.0, clip=lower_cover)
    ridge = shifted(top[6:-6], 0, 0.2)
    part.fill(ribbon(ridge, [0.4, 1.3, 0.9, 1.3, 0.4]), LIP_RIDGE, 0.40, blur=0.7)
    part.fill(ribbon(upper[3:-3], [0.8, 2.2, 2.6, 2.2, 0.8]), LIP_LINE, 0.85, blur=0.5)
    for side, corner in ((-1, upper[0]), (1, upper[-1])):
        x, y = float(corner[0]), float(corner[1])
        dimple = [(x - side * 5, y + 1.6), (x, y), (x + side * 3.6, y - 2.6)]
        part.stroke(dimple, [0.8, 2.2, 0.6], LIP_LINE, 0.62, blur=0.8)


def _paint_cavity(part: Canvas, mouth: Mouth, upper: Points, lower: Points) -> None:
    cover = part.mask(np.vstack([upper, lower[::-1]]))
    middle = MOUTH_Y + mouth.gap * 0.4
    part.lay(cover, part.ramp((0, middle - 16), (0, middle + 16), CAVITY_DEEP, CAVITY))
    floor = float(lower[:, 1].max())
    part.fill(ellipse(0, floor + 5 - 9 * mouth.tongue, mouth.half_width * 0.62, 9), TONGUE, 0.9, blur=1.6, clip=cover)
    depth = min(7.5, 0.55 * mouth.gap) * mouth.teeth / 0.6
    if depth > 0:
        s = np.linspace(-1, 1, len(upper), dtype=np.float32)
        edge = upper.copy()
        edge[:, 1] += depth * np.clip(1 - (s / TEETH_REACH) ** 4, 0, 1)
        part.fill(np.vstack([upper, edge[::-1]]), TEETH, 0.95, blur=0.5, clip=cover)
    shadow = ribbon(upper, [2, 5, 5, 2])
    part.fill(shadow, CAVITY_DEEP, 0.45, blur=1.4, clip=cover)
