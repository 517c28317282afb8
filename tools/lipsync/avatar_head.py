"""The still parts of the avatar's head: the back hair, and ears, face, nose and front hair; no eyes, brows or mouth.

Drawing units: one is a frame pixel of the head at scale 1; the origin is the middle of the face, y down.
"""

from __future__ import annotations

import cv2
import numpy as np

from lipsync.avatar_drawing import (
    Array,
    Canvas,
    colour,
    ellipse,
    mirrored,
    mix,
    polygon,
    ribbon,
    shifted,
    sided,
    spline,
)
from lipsync.avatar_palette import (
    BLUSH,
    GOLD,
    HAIR,
    HAIR_DEEP,
    HAIR_LIGHT,
    NOSTRIL,
    SKIN,
    SKIN_DEEP,
    SKIN_LIGHT,
    SKIN_SHADE,
    SKIN_SHINE,
)

_BACK_HAIR_RIGHT = [
    (0, -186), (72, -172), (114, -122), (131, -56), (143, 2), (152, 60), (161, 112), (158, 156), (132, 190), (92, 204),
    (60, 200), (0, 204),
]  # fmt: skip
_FACE_RIGHT = [
    (0, -152), (58, -144), (96, -110), (111, -58), (112, -10), (106, 34), (90, 76), (63, 110), (30, 132), (0, 137),
]  # fmt: skip
_EAR = [(102, -22), (114, -32), (126, -29), (131, -10), (127, 14), (119, 33), (109, 38), (103, 26)]
_EAR_INNER = [(111, -10), (118, -22), (124, -18), (122, -2), (115, 14), (110, 16)]
_FRINGE = [
    (-117, -10), (-131, -26), (-138, -66), (-126, -122), (-92, -168), (-38, -195), (26, -198), (86, -176), (126, -126),
    (138, -66), (131, -26), (117, -10), (109, 4), (108, -14), (104, -46), (91, -84), (66, -114), (36, -133),
    (14, -118), (-22, -98), (-62, -78), (-92, -50), (-105, -18), (-109, 4),
]  # fmt: skip
# Locks from the parting: x, y of the end, bend, width, and strength of light (below 0: of shade)
_PARTING = (40.0, -150.0)
_LOCKS = [
    (-112, 8, -30, 9.0, 0.50), (-122, -24, -34, 7.0, -0.55), (-106, -44, -26, 6.0, 0.45), (-92, -54, -22, 5.0, -0.55),
    (-74, -72, -16, 6.0, 0.50), (-52, -82, -10, 4.0, -0.5), (-132, -70, -38, 8.0, 0.42), (-128, -100, -30, 6.0, -0.45),
    (112, 8, 26, 7.0, 0.36), (126, -26, 30, 6.0, -0.6), (106, -46, 18, 5.0, 0.40), (96, -78, 10, 4.0, -0.5),
    (132, -74, 32, 6.0, 0.34), (-28, -96, -6, 4.0, 0.4), (-118, -6, -32, 2.0, 0.6), (-66, -74, -14, 1.8, 0.6),
    (118, -10, 29, 1.8, 0.5), (-134, -50, -40, 2.0, 0.5), (80, -100, 6, 3.0, 0.35),
]  # fmt: skip
_CROWN_SHINE = [(-104, -118), (-74, -150), (-28, -168), (18, -172), (16, -156), (-26, -150), (-66, -130), (-96, -98)]
_SIDE_SHINE = [(66, -160), (100, -134), (118, -96), (106, -96), (88, -126), (60, -148)]


def paint_back_hair(scale: float) -> Canvas:
    """The hair behind neck and shoulders."""
    hair = Canvas.blank(-200, -210, 200, 260, scale)
    cover = hair.mask(spline(mirrored(_BACK_HAIR_RIGHT)))
    hair.lay(cover, hair.ramp((-150, -120), (130, 190), mix(HAIR, HAIR_LIGHT, 0.22), HAIR_DEEP))
    behind_neck = spline([(-70, 20), (70, 20), (84, 150), (40, 210), (-40, 210), (-84, 150)])
    hair.fill(behind_neck, HAIR_DEEP, 0.85, blur=14, clip=cover)
    locks = [
        ([(118, -20), (128, 70), (112, 176)], 11.0),
        ([(134, 10), (146, 96), (132, 170)], 7.0),
        ([(106, 40), (104, 110), (82, 184)], 6.0),
    ]
    for side, strength in ((-1, 0.48), (1, 0.27)):
        for points, width in locks:
            lock = spline(sided(points, side), closed=False)
            hair.fill(ribbon(lock, [0.5, width, 0.5]), HAIR_LIGHT, strength, blur=2.4, clip=cover)
            shade = ribbon(shifted(lock, -9 * side, 4), [0.5, width * 0.6, 0.5])
            hair.fill(shade, HAIR_DEEP, 0.7, blur=1.6, clip=cover)
    return hair


def paint_head(scale: float) -> Canvas:
    """Ears, face, nose and front hair; eyes, brows and mouth are drawn for each frame."""
    head = Canvas.blank(-165, -215, 165, 175, scale)
    for side in (-1, 1):
        _paint_ear(head, side)
    cover = head.mask(spline(mirrored(_FACE_RIGHT)))
    head.lay(cover, head.ramp((-80, -90), (96, 130), SKIN_LIGHT, mix(SKIN, SKIN_SHADE, 0.55)))
    _shade_face(head, cover)
    _paint_nose(head)
    _paint_fringe(head, cover)
    return head


def _paint_ear(head: Canvas, side: int) -> None:
    ear = spline(sided(_EAR, side))
    head.fill(ear, mix(SKIN, SKIN_SHADE, 0.25 if side < 0 else 0.6))
    head.fill(spline(sided(_EAR_INNER, side)), SKIN_DEEP, 0.5, blur=2.5, clip=head.mask(ear))
    head.fill(ellipse(side * 114, 37, 4.6, 4.6), mix(GOLD, SKIN_DEEP, 0.45))
    head.fill(ellipse(side * 114 - 0.4, 36.4, 3.6, 3.6), GOLD, blur=0.4)
    head.fill(ellipse(side * 114 - 1.6, 35.0, 1.2, 1.2), colour("fffbe8"), 0.95, blur=0.3)


def _shade_face(head: Canvas, cover: Array) -> None:
    # Light from the upper left: a smaller, blurred face moved there stays bright, the rim around it darkens.
    lit = head.mask(polygon([(0.93 * x - 9, 0.955 * y - 6) for x, y in spline(mirrored(_FACE_RIGHT))]), 13)
    head.lay((np.clip(cover - lit, 0, 1) * cover * 0.62).astype(np.float32), SKIN_SHADE)
    head.fill(spline([(20, 142), (70, 124), (104, 70), (122, 10), (122, 150)]), SKIN_DEEP, 0.20, blur=12, clip=cover)
    for side in (-1, 1):
        head.fill(ellipse(side * 70, 34, 27, 19, side * -0.25), BLUSH, 0.42, blur=12, clip=cover)
        head.fill(ellipse(side * 51, -30, 34, 19), SKIN_DEEP, 0.20, blur=8, clip=cover)
        inner_corner = spline(sided([(12, -40), (20, -52), (26, -34), (16, -14)], side))
        head.fill(inner_corner, SKIN_DEEP, 0.22, blur=5, clip=cover)
    head.fill(ellipse(-62, 14, 20, 10, -0.35), SKIN_SHINE, 0.5, blur=7, clip=cover)
    head.fill(ellipse(60, 14, 15, 8, 0.35), SKIN_SHINE, 0.25, blur=7, clip=cover)
    head.fill(ellipse(-14, -96, 52, 24), SKIN_SHINE, 0.30, blur=14, clip=cover)
    head.fill(ellipse(-4, 116, 20, 9), SKIN_SHINE, 0.36, blur=6, clip=cover)


def _paint_nose(head: Canvas) -> None:
    head.fill(spline([(7, -22), (12, 6), (21, 28), (15, 37), (4, 38), (6, 10)]), SKIN_DEEP, 0.26, blur=4.5)
    below = spline([(-20, 36), (-10, 40), (0, 44), (10, 40), (20, 36), (14, 47), (0, 51), (-14, 47)])
    head.fill(below, SKIN_DEEP, 0.32, blur=3.5)
    head.stroke([(-4, -34), (-5, 0), (-4, 22)], [3, 6, 9], SKIN_SHINE, 0.42, blur=3.5)
    head.fill(ellipse(-4, 25, 7.5, 6), SKIN_SHINE, 0.75, blur=3.2)
    for side in (-1, 1):
        wing = sided([(16, 22), (20.5, 30), (17.5, 37), (11, 38)], side)
        head.stroke(wing, [0.6, 2.4, 0.8], SKIN_DEEP, 0.62 if side > 0 else 0.46, blur=0.9)
        head.stroke(sided([(4.5, 39), (9, 37.2), (13, 38.8)], side), [0.8, 3.2, 1.0], NOSTRIL, 0.75, blur=0.7)
    head.fill(spline([(-3.5, 48), (3.5, 48), (5, 60), (-5, 60)]), SKIN_SHADE, 0.42, blur=2.5)


def _paint_fringe(head: Canvas, face_cover: Array) -> None:
    outline = spline(_FRINGE)
    head.fill(shifted(outline, 4, 13), SKIN_DEEP, 0.50, blur=7, clip=face_cover * (1 - head.mask(outline)))
    cover = head.mask(outline)
    head.lay(cover, head.ramp((-110, -170), (130, 10), mix(HAIR, HAIR_LIGHT, 0.30), mix(HAIR, HAIR_DEEP, 0.55)))
    x, y = _PARTING
    for end_x, end_y, bend, width, light in _LOCKS:
        middle = ((x + end_x) / 2 + bend * 0.55, (y + end_y) / 2 - abs(bend))
        tone = HAIR_LIGHT if light > 0 else HAIR_DEEP
        points = [(x, y - 8), middle, (end_x, end_y)]
        head.stroke(points, [0.6, width, width * 0.8, 0.6], tone, abs(light), blur=1.5, clip=cover)
    head.fill(spline(_CROWN_SHINE), HAIR_LIGHT, 0.55, blur=9, clip=cover)
    head.fill(spline(_SIDE_SHINE), HAIR_LIGHT, 0.40, blur=7, clip=cover)
    head.stroke([(36, -134), (43, -158), (41, -184)], [4.0, 2.6, 0.4], HAIR_DEEP, 0.7, blur=1.6, clip=cover)
    edge = np.clip(cover - cv2.GaussianBlur(cover, (0, 0), 3.0 * head.scale), 0, 1)
    rows = np.arange(cover.shape[0]) / head.scale + head.top
    head.lay((edge * 0.9 * (rows > -135)[:, None]).astype(np.float32), HAIR_DEEP)
