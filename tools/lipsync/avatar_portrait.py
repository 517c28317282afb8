"""The still parts of the avatar: room, body, back hair and the head without its eyes and mouth, each painted once.

Drawing units: one is a frame pixel of the head at scale 1; the origin is the middle of the face, y down.
"""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

from lipsync.avatar_drawing import Array, Canvas, colour, ellipse, mirrored, mix, ribbon, spline

SKIN = colour("f2c3a1")
SKIN_LIGHT = colour("fddcc0")
SKIN_SHADE = colour("dc9c7c")
SKIN_DEEP = colour("b96f56")
BLUSH = colour("ee8f7c")
HAIR = colour("4b2b28")
HAIR_DEEP = colour("2e191b")
HAIR_LIGHT = colour("9a5f45")
JACKET = colour("1f6f78")
JACKET_DEEP = colour("124951")
JACKET_LIGHT = colour("38929a")
BLOUSE = colour("fbf1e4")
BLOUSE_SHADE = colour("dcc4b2")
GOLD = colour("e9b95c")

_FACE_RIGHT = [(0, -152), (58, -144), (96, -110), (111, -58), (112, -8), (106, 36), (92, 78), (66, 112), (32, 132), (0, 137)]
_FRINGE = [
    (-112, 28), (-128, -10), (-136, -62), (-124, -120), (-90, -166), (-36, -192), (28, -194), (86, -172), (124, -124),
    (136, -64), (128, -10), (113, 28), (109, -6), (105, -42), (92, -80), (66, -110), (34, -128), (10, -112), (-26, -90),
    (-66, -68), (-94, -42), (-106, -8),
]  # fmt: skip


def paint_room(width: int, height: int) -> npt.NDArray[np.uint8]:
    """The background, uint8 BGR [height, width, 3]: a warm wall with an arch, out-of-focus leaves and a vignette."""
    room = Canvas.blank(0, 0, 1280, 720, width / 1280)
    room.pixels = np.zeros((height, width, 4), np.float32)
    room.lay(np.ones((height, width), np.float32), room.ramp((160, 0), (1180, 720), colour("fbe6cf"), colour("e2a98a")))
    room.fill(ellipse(640, 330, 330, 300), colour("fff3e0"), 0.85, blur=46)
    arch = spline([(905, 760), (905, 330), (935, 205), (1030, 140), (1125, 205), (1155, 330), (1155, 760)])
    room.fill(arch, colour("c98a6e"), 0.40, blur=7)
    room.fill(arch + np.float32([14, 12]), colour("f7cfa9"), 0.75, blur=7)
    room.fill(ellipse(1090, 300, 62, 62), colour("fff0d2"), 0.55, blur=14)
    room.fill(np.float32([[-20, 590], [1300, 590], [1300, 740], [-20, 740]]), colour("b9775d"), 0.30, blur=26)
    for x, y, length, turn, tone in _LEAVES:
        tip = (x + length * np.cos(turn), y + length * np.sin(turn))
        middle = ((x + tip[0]) / 2 - 16 * np.sin(turn), (y + tip[1]) / 2 + 16 * np.cos(turn))
        curve = spline([(x, y), middle, tip], closed=False)
        leaf_colour = mix(colour("55705a"), colour("b8b07e"), tone)
        room.fill(ribbon(curve, [4, length * 0.22, length * 0.27, length * 0.16, 2]), leaf_colour, 0.88, blur=3 + 4 * tone)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    distance = ((x / width - 0.5) * 2) ** 2 * 0.8 + ((y / height - 0.44) * 2) ** 2 * 0.62
    shade = (1 - 0.26 * np.clip(distance - 0.25, 0, 2) ** 1.25)[..., None]
    grain = np.random.default_rng(7).random((height, width, 1), np.float32)
    return np.clip(room.pixels[..., :3] * shade * 255 + grain, 0, 255).astype(np.uint8)


_LEAVES = [
    (70, 740, 330, -1.30, 0.9), (20, 700, 300, -0.95, 0.7), (110, 760, 380, -1.72, 0.55), (150, 760, 270, -0.98, 0.35),
    (40, 760, 300, -1.95, 0.25), (90, 770, 230, -0.62, 0.1), (60, 770, 250, -1.42, 0.0),
]  # fmt: skip


def paint_body(scale: float) -> Canvas:
    """Neck, shoulders and clothes."""
    body = Canvas.blank(-360, 70, 360, 450, scale)
    neck = spline(
        [(-47, 60), (-47, 130), (-50, 168), (-68, 192), (-150, 236), (-150, 330), (150, 330), (150, 236), (68, 192),
         (50, 168), (47, 130), (47, 60)], steps=10)  # fmt: skip
    cover = body.mask(neck)
    body.lay(cover, body.ramp((-70, 120), (90, 260), SKIN_LIGHT, SKIN_SHADE))
    body.fill(spline([(-62, 60), (62, 60), (60, 150), (30, 176), (-8, 180), (-44, 160)]), SKIN_DEEP, 0.62, blur=8, clip=cover)
    body.fill(spline([(30, 100), (60, 100), (66, 190), (40, 214)]), SKIN_DEEP, 0.35, blur=8, clip=cover)
    for side in (-1, 1):
        collar_bone = spline([(side * 16, 234), (side * 48, 224), (side * 92, 222)], closed=False)
        body.fill(ribbon(collar_bone, [2, 6, 1]), SKIN_DEEP, 0.38, blur=2, clip=cover)
        tendon = spline([(side * 36, 150), (side * 26, 200), (side * 13, 236)], closed=False)
        body.fill(ribbon(tendon, [1, 6, 3]), SKIN_DEEP, 0.24, blur=2.5, clip=cover)
    body.fill(ellipse(0, 243, 11, 8), SKIN_DEEP, 0.30, blur=4, clip=cover)
    _paint_blouse(body)
    _paint_jacket(body)
    return body


def _paint_blouse(body: Canvas) -> None:
    neckline = [(-126, 222), (-88, 232), (-58, 262), (-24, 282), (0, 286), (24, 282), (58, 262), (88, 232), (126, 222)]
    blouse = np.vstack([spline(neckline, closed=False), np.float32([[190, 470], [-190, 470]])])
    body.fill(blouse - np.float32([0, 5]), SKIN_DEEP, 0.45, blur=4, clip=body.mask(spline([(-90, 170), (90, 170), (120, 330), (-120, 330)])))
    cover = body.mask(blouse)
    body.lay(cover, body.ramp((-60, 260), (90, 440), BLOUSE, mix(BLOUSE, BLOUSE_SHADE, 0.75)))
    hem = spline([(x, y + 9) for x, y in neckline], closed=False)
    body.fill(ribbon(hem, [1.6] * 3), BLOUSE_SHADE, 0.9, clip=cover)
    for start, middle, end in (((-20, 300), (-10, 350), (-26, 450)), ((26, 310), (34, 370), (18, 450)), ((4, 320), (0, 380), (6, 450))):
        body.fill(ribbon(spline([start, middle, end], closed=False), [1, 9, 4]), BLOUSE_SHADE, 0.55, blur=4, clip=cover)


def _paint_jacket(body: Canvas) -> None:
    for side in (-1, 1):
        front = spline(
            [(side * 92, 204), (side * 150, 222), (side * 212, 248), (side * 250, 292), (side * 272, 370), (side * 290, 480),
             (side * 20, 480), (side * 34, 420), (side * 62, 330), (side * 84, 262)])  # fmt: skip
        cover = body.mask(front)
        body.fill(front - np.float32([side * 7, -2]), colour("8a5a48"), 0.35, blur=6)
        light, dark = (JACKET_LIGHT, JACKET) if side < 0 else (JACKET, JACKET_DEEP)
        body.lay(cover, body.ramp((side * 90, 210), (side * 190, 450), light, dark))
        arm = spline([(side * 196, 330), (side * 188, 400), (side * 194, 470)], closed=False)
        body.fill(ribbon(arm, [2, 12, 16]), JACKET_DEEP, 0.75, blur=5, clip=cover)
        body.fill(ribbon(spline([(side * 112, 214), (side * 214, 256), (side * 256, 320)], closed=False), [3, 14, 4]), JACKET_LIGHT, 0.35 if side > 0 else 0.6, blur=6, clip=cover)
        lapel = np.float32(
            [[side * 94, 206], [side * 118, 240], [side * 150, 300], [side * 122, 312], [side * 130, 336], [side * 44, 450],
             [side * 26, 450], [side * 58, 340], [side * 82, 264]])  # fmt: skip
        lapel_cover = body.mask(lapel)
        body.fill(lapel + np.float32([side * 5, 7]), JACKET_DEEP, 0.55, blur=5, clip=cover)
        body.lay(lapel_cover, body.ramp((side * 80, 220), (side * 90, 440), mix(light, JACKET_LIGHT, 0.45), mix(light, dark, 0.5)))
        edge = np.float32([[side * 94, 206], [side * 82, 264], [side * 58, 340], [side * 26, 450]])
        body.fill(ribbon(edge, [1.5, 2, 2, 2]), mix(JACKET_LIGHT, SKIN_LIGHT, 0.35), 0.6, clip=lapel_cover)


def paint_back_hair(scale: float) -> Canvas:
    """The hair behind neck and shoulders."""
    hair = Canvas.blank(-200, -210, 200, 260, scale)
    outline = spline(
        [(0, -190), (80, -172), (126, -118), (140, -50), (142, 20), (152, 80), (158, 130), (142, 176), (104, 198),
         (66, 190), (40, 150), (-40, 150), (-66, 190), (-104, 198), (-142, 176), (-158, 130), (-152, 80), (-142, 20),
         (-140, -50), (-126, -118), (-80, -172)])  # fmt: skip
    cover = hair.mask(outline)
    hair.lay(cover, hair.ramp((-150, -120), (130, 190), mix(HAIR, HAIR_LIGHT, 0.22), HAIR_DEEP))
    hair.fill(spline([(-70, 20), (70, 20), (84, 150), (40, 210), (-40, 210), (-84, 150)]), HAIR_DEEP, 0.85, blur=14, clip=cover)
    for side, strength in ((-1, 0.8), (1, 0.45)):
        for start, middle, end, width in (
            ((118, -20), (128, 70), (112, 176), 11.0), ((134, 10), (146, 96), (132, 170), 7.0), ((106, 40), (104, 110), (82, 184), 6.0)
        ):  # fmt: skip
            lock = spline([(side * start[0], start[1]), (side * middle[0], middle[1]), (side * end[0], end[1])], closed=False)
            hair.fill(ribbon(lock, [0.5, width, 0.5]), HAIR_LIGHT, strength * 0.6, blur=2.4, clip=cover)
            hair.fill(ribbon(lock + np.float32([side * -9, 4]), [0.5, width * 0.6, 0.5]), HAIR_DEEP, 0.7, blur=1.6, clip=cover)
    return hair


def paint_head(scale: float) -> Canvas:
    """Ears, face, nose, brows and front hair; eyes and mouth are drawn for each frame."""
    head = Canvas.blank(-165, -215, 165, 175, scale)
    for side in (-1, 1):
        _paint_ear(head, side)
    face = spline(mirrored(_FACE_RIGHT))
    cover = head.mask(face)
    head.lay(cover, head.ramp((-80, -90), (96, 130), SKIN_LIGHT, mix(SKIN, SKIN_SHADE, 0.55)))
    _shade_face(head, cover)
    _paint_nose(head)
    _paint_fringe(head, cover)
    return head


def _paint_ear(head: Canvas, side: int) -> None:
    ear = spline([(side * x, y) for x, y in [(104, -24), (118, -34), (129, -26), (130, -4), (123, 20), (113, 34), (104, 30)]])
    cover = head.mask(ear)
    head.lay(cover, np.broadcast_to(np.float32(mix(SKIN, SKIN_SHADE, 0.25 if side < 0 else 0.6)), (*cover.shape, 3)))
    inner = spline([(side * x, y) for x, y in [(110, -16), (119, -24), (124, -14), (119, 6), (112, 18)]])
    head.fill(inner, SKIN_DEEP, 0.5, blur=2.5, clip=cover)
    head.fill(ellipse(side * 117, 42, 4.6, 4.6), mix(GOLD, SKIN_DEEP, 0.45), 1.0)
    head.fill(ellipse(side * 116.6, 41.4, 3.6, 3.6), GOLD, 1.0, blur=0.4)
    head.fill(ellipse(side * 117 - 1.6, 40.0, 1.2, 1.2), colour("fffbe8"), 0.95, blur=0.3)


def _shade_face(head: Canvas, cover: Array) -> None:
    edge = np.clip(cover - head.mask(spline(mirrored(_FACE_RIGHT)) * np.float32([0.93, 0.955]) - np.float32([9, 6]), 13), 0, 1)
    head.lay((edge * cover * 0.62).astype(np.float32), SKIN_SHADE)
    head.fill(spline([(20, 142), (70, 124), (104, 70), (122, 10), (122, 150)]), SKIN_DEEP, 0.20, blur=12, clip=cover)
    for side in (-1, 1):
        head.fill(ellipse(side * 70, 34, 27, 19, side * -0.25), BLUSH, 0.42, blur=12, clip=cover)
        head.fill(ellipse(side * 51, -30, 34, 19), SKIN_DEEP, 0.20, blur=8, clip=cover)
        head.fill(spline([(side * 12, -40), (side * 20, -52), (side * 26, -34), (side * 16, -14)]), SKIN_DEEP, 0.22, blur=5, clip=cover)
    head.fill(ellipse(-62, 14, 20, 10, -0.35), colour("fff0e0"), 0.5, blur=7, clip=cover)
    head.fill(ellipse(60, 14, 15, 8, 0.35), colour("ffeedd"), 0.25, blur=7, clip=cover)
    head.fill(ellipse(-14, -96, 52, 24), colour("fff0e0"), 0.30, blur=14, clip=cover)
    head.fill(ellipse(-4, 116, 20, 9), colour("fff0e0"), 0.36, blur=6, clip=cover)


def _paint_nose(head: Canvas) -> None:
    head.fill(spline([(7, -22), (12, 6), (21, 28), (15, 37), (4, 38), (6, 10)]), SKIN_DEEP, 0.26, blur=4.5)
    head.fill(spline([(-20, 36), (-10, 40), (0, 44), (10, 40), (20, 36), (14, 47), (0, 51), (-14, 47)]), SKIN_DEEP, 0.32, blur=3.5)
    head.fill(ribbon(spline([(-4, -34), (-5, 0), (-4, 22)], closed=False), [3, 6, 9]), colour("fff3e6"), 0.42, blur=3.5)
    head.fill(ellipse(-4, 25, 7.5, 6), colour("fff6ec"), 0.70, blur=3.2)
    for side in (-1, 1):
        wing = spline([(side * 16, 22), (side * 20.5, 30), (side * 17.5, 37), (side * 11, 38)], closed=False)
        head.fill(ribbon(wing, [0.6, 2.4, 0.8]), SKIN_DEEP, 0.62 if side > 0 else 0.46, blur=0.9)
        nostril = spline([(side * 4.5, 39), (side * 9, 37.2), (side * 13, 38.8)], closed=False)
        head.fill(ribbon(nostril, [0.8, 3.2, 1.0]), colour("7c3f35"), 0.75, blur=0.7)
    head.fill(spline([(-3.5, 48), (3.5, 48), (5, 60), (-5, 60)]), SKIN_SHADE, 0.42, blur=2.5)


def _paint_fringe(head: Canvas, face_cover: Array) -> None:
    outline = spline(_FRINGE)
    shadow = np.roll(head.mask(outline, 7), (round(13 * head.scale), round(4 * head.scale)), axis=(0, 1))
    head.lay(shadow * face_cover * np.float32(0.50), SKIN_DEEP)
    cover = head.mask(outline)
    head.lay(cover, head.ramp((-110, -170), (130, 10), mix(HAIR, HAIR_LIGHT, 0.30), mix(HAIR, HAIR_DEEP, 0.55)))
    part = (40.0, -150.0)
    for end_x, end_y, bend, width, light in _LOCKS:
        middle = ((part[0] + end_x) / 2 + bend * 0.55, (part[1] + end_y) / 2 - abs(bend))
        lock = spline([(part[0], part[1] - 8), middle, (end_x, end_y)], closed=False, steps=16)
        tone, opacity = (HAIR_LIGHT, light) if light > 0 else (HAIR_DEEP, -light)
        head.fill(ribbon(lock, [0.6, width, width * 0.8, 0.6]), tone, opacity, blur=1.5, clip=cover)
    crown = spline([(-104, -118), (-74, -150), (-28, -168), (18, -172), (16, -156), (-26, -150), (-66, -130), (-96, -98)])
    head.fill(crown, HAIR_LIGHT, 0.55, blur=9, clip=cover)
    head.fill(spline([(66, -160), (100, -134), (118, -96), (106, -96), (88, -126), (60, -148)]), HAIR_LIGHT, 0.40, blur=7, clip=cover)
    line = spline([(34, -130), (42, -160), (38, -193)], closed=False)
    head.fill(ribbon(line, [2.6, 2.2, 0.6]), HAIR_DEEP, 0.75, blur=0.9, clip=cover)
    rim = cv2.GaussianBlur(cover, (0, 0), 3.0 * head.scale)
    inner = np.clip(cover - rim, 0, 1)
    below = (np.arange(cover.shape[0]) / head.scale + head.top > -135).astype(np.float32)[:, None]
    head.lay((inner * 0.9 * below).astype(np.float32), HAIR_DEEP)


_LOCKS = [
    (-112, 14, -30, 9.0, 0.50), (-120, -30, -34, 7.0, -0.55), (-108, -50, -26, 6.0, 0.40), (-92, -44, -22, 5.0, -0.55),
    (-74, -62, -16, 6.0, 0.45), (-52, -72, -10, 4.0, -0.5), (-130, -70, -38, 8.0, 0.38), (-126, -100, -30, 6.0, -0.45),
    (116, 14, 26, 8.0, 0.32), (124, -30, 30, 6.0, -0.6), (106, -46, 18, 5.0, 0.32), (96, -76, 10, 4.0, -0.5),
    (130, -74, 32, 6.0, 0.28), (-28, -88, -6, 4.0, 0.4),
]  # fmt: skip
