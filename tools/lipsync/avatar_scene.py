"""The still parts below and behind the avatar's head: the room, and neck, shoulders and clothes.

Room in pixels of a 1280x720 frame; body in drawing units: one is a frame pixel of the head at scale 1, the origin is
the middle of the face, y down.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lipsync.avatar_drawing import Canvas, colour, ellipse, mix, polygon, ribbon, shifted, sided, spline
from lipsync.avatar_palette import (
    BLOUSE,
    BLOUSE_SHADE,
    JACKET,
    JACKET_DEEP,
    JACKET_LIGHT,
    SKIN_DEEP,
    SKIN_LIGHT,
    SKIN_SHADE,
)

_ARCH = [(905, 760), (905, 330), (935, 205), (1030, 140), (1125, 205), (1155, 330), (1155, 760)]
# x, y of the stem, length, direction in radians, how far back (0 near, 1 far)
_LEAVES = [
    (70, 740, 330, -1.30, 0.9), (20, 700, 300, -0.95, 0.7), (110, 760, 380, -1.72, 0.55), (150, 760, 270, -0.98, 0.35),
    (40, 760, 300, -1.95, 0.25), (90, 770, 230, -0.62, 0.1), (60, 770, 250, -1.42, 0.0),
]  # fmt: skip
_NECK = [
    (-47, 60), (-47, 130), (-50, 168), (-68, 192), (-150, 236), (-150, 330), (150, 330), (150, 236), (68, 192),
    (50, 168), (47, 130), (47, 60),
]  # fmt: skip
_NECKLINE = [
    (-126, 212), (-84, 226), (-56, 258), (-26, 278), (0, 283), (26, 278), (56, 258), (84, 226), (126, 212),
]  # fmt: skip
_JACKET_FRONT = [
    (60, 176), (78, 184), (112, 204), (158, 222), (214, 248), (250, 292), (272, 370), (290, 480), (20, 480), (34, 420),
    (60, 334), (74, 262), (66, 210),
]  # fmt: skip
_LAPEL = [
    (58, 176), (76, 186), (104, 214), (128, 250), (150, 298), (122, 310), (130, 334), (44, 450), (26, 450), (58, 340),
    (74, 266), (68, 216),
]  # fmt: skip


def paint_room(width: int, height: int) -> npt.NDArray[np.uint8]:
    """The background, uint8 BGR [height, width, 3]: a warm wall with an arch, out-of-focus leaves and a vignette."""
    room = Canvas(np.zeros((height, width, 4), np.float32), 0, 720 - height * 1280 / width, width / 1280)
    room.lay(np.ones((height, width), np.float32), room.ramp((160, 0), (1180, 720), colour("fbe6cf"), colour("e2a98a")))
    room.fill(ellipse(640, 330, 330, 300), colour("fff3e0"), 0.85, blur=46)
    room.fill(spline(_ARCH), colour("c98a6e"), 0.40, blur=7)
    room.fill(shifted(spline(_ARCH), 14, 12), colour("f7cfa9"), 0.75, blur=7)
    room.fill(ellipse(1090, 300, 62, 62), colour("fff0d2"), 0.55, blur=14)
    room.fill(polygon([(-20, 590), (1300, 590), (1300, 740), (-20, 740)]), colour("b9775d"), 0.30, blur=26)
    for x, y, length, turn, far in _LEAVES:
        along, aside = np.array([np.cos(turn), np.sin(turn)]) * length, np.array([-np.sin(turn), np.cos(turn)]) * 16
        stem = np.array([x, y])
        points = [(float(p[0]), float(p[1])) for p in (stem, stem + along / 2 + aside, stem + along)]
        widths = [4, length * 0.22, length * 0.27, length * 0.16, 2]
        room.stroke(points, widths, mix(colour("55705a"), colour("b8b07e"), far), 0.88, blur=3 + 4 * far)
    return _with_vignette(room.pixels[..., :3])


def _with_vignette(picture: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    height, width = picture.shape[:2]
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    distance = ((x / width - 0.5) * 2) ** 2 * 0.8 + ((y / height - 0.44) * 2) ** 2 * 0.62
    darkness = np.clip(distance - 0.3, 0, 2)[..., None] ** 1.25
    shade = 1 - darkness * np.array([0.30, 0.22, 0.13], np.float32)  # blue goes first: warm corners
    room: npt.NDArray[np.uint8] = np.clip(picture * shade * 255 + 0.5, 0, 255).astype(np.uint8)
    return room


def paint_body(scale: float) -> Canvas:
    """Neck, shoulders and clothes."""
    body = Canvas.blank(-360, 70, 360, 450, scale)
    _paint_neck(body)
    _paint_blouse(body)
    for side in (-1, 1):
        _paint_jacket(body, side)
    return body


def _paint_neck(body: Canvas) -> None:
    cover = body.mask(spline(_NECK))
    body.lay(cover, body.ramp((-70, 120), (90, 260), SKIN_LIGHT, SKIN_SHADE))
    under_chin = spline([(-62, 60), (62, 60), (60, 150), (30, 176), (-8, 180), (-44, 160)])
    body.fill(under_chin, SKIN_DEEP, 0.62, blur=8, clip=cover)
    body.fill(spline([(30, 100), (60, 100), (66, 190), (40, 214)]), SKIN_DEEP, 0.35, blur=8, clip=cover)
    for side in (-1, 1):
        collar_bone = sided([(16, 234), (48, 224), (92, 222)], side)
        body.stroke(collar_bone, [2, 6, 1], SKIN_DEEP, 0.28, blur=2, clip=cover)
        tendon = sided([(36, 150), (26, 200), (13, 236)], side)
        body.stroke(tendon, [1, 6, 3], SKIN_DEEP, 0.14, blur=2.5, clip=cover)
    body.fill(ellipse(0, 243, 11, 8), SKIN_DEEP, 0.30, blur=4, clip=cover)


def _paint_blouse(body: Canvas) -> None:
    blouse = np.vstack([spline(_NECKLINE, closed=False), polygon([(190, 470), (-190, 470)])])
    throat = body.mask(spline([(-90, 170), (90, 170), (120, 330), (-120, 330)]))
    body.fill(shifted(blouse, 0, -5), SKIN_DEEP, 0.45, blur=4, clip=throat)
    cover = body.mask(blouse)
    body.lay(cover, body.ramp((-60, 260), (90, 440), BLOUSE, mix(BLOUSE, BLOUSE_SHADE, 0.75)))
    body.stroke([(x, y + 9) for x, y in _NECKLINE], [1.6, 1.6], BLOUSE_SHADE, 0.9, clip=cover)
    folds = [(-20, 300), (-10, 350), (-26, 450)], [(26, 310), (34, 370), (18, 450)], [(4, 320), (0, 380), (6, 450)]
    for fold in folds:
        body.stroke(fold, [1, 9, 4], BLOUSE_SHADE, 0.55, blur=4, clip=cover)


def _paint_jacket(body: Canvas, side: int) -> None:
    light, dark, shine = (JACKET_LIGHT, JACKET, 0.6) if side < 0 else (JACKET, JACKET_DEEP, 0.35)
    front = spline(sided(_JACKET_FRONT, side))
    cover = body.mask(front)
    body.fill(shifted(front, -7 * side, 2), colour("8a5a48"), 0.35, blur=6)
    body.lay(cover, body.ramp((side * 90, 210), (side * 190, 450), light, dark))
    sleeve, shoulder = [(196, 330), (188, 400), (194, 470)], [(112, 214), (214, 256), (256, 320)]
    body.stroke(sided(sleeve, side), [2, 12, 16], JACKET_DEEP, 0.75, blur=5, clip=cover)
    body.stroke(sided(shoulder, side), [3, 14, 4], JACKET_LIGHT, shine, blur=6, clip=cover)
    lapel = polygon(sided(_LAPEL, side))
    body.fill(shifted(lapel, 5 * side, 7), JACKET_DEEP, 0.55, blur=5, clip=cover)
    lapel_cover = body.mask(lapel)
    first, last = mix(light, JACKET_LIGHT, 0.45), mix(light, dark, 0.5)
    body.lay(lapel_cover, body.ramp((side * 80, 220), (side * 90, 440), first, last))
    edge = ribbon(polygon(sided([(60, 180), (68, 216), (74, 266), (58, 340), (26, 450)], side)), [1.5, 2, 2, 2])
    body.fill(edge, mix(JACKET_LIGHT, SKIN_LIGHT, 0.35), 0.6, clip=lapel_cover)
