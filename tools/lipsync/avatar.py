"""The drawn avatar: frame numbers in, pictures, crop rectangles and a tenant's source directory out.

A character of our own, drawn by code; it knows nothing of Triton, tenants on disk or audio.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from lipsync.avatar_drawing import Array, Canvas
from lipsync.avatar_features import CHIN_SHARE, CHIN_Y, MOUTH_Y, Mouth, paint_eyes, paint_mouth
from lipsync.avatar_head import paint_back_hair, paint_head
from lipsync.avatar_scene import paint_body, paint_room

Image = npt.NDArray[np.uint8]

FPS = 25
_SUPERSAMPLING = 2  # sprite pixels a frame pixel
_HEAD_SCALE = 1.08  # frame pixels of a 720-line frame a drawing unit
_HEAD_X, _HEAD_Y = 640.0, 306.0
_NECK_Y = 150.0  # the point about which the head tilts
_PARALLAX = 12.0  # how far the middle of the face moves at yaw or pitch 1, drawing units
RECT_Y = 40.0  # the rectangle's centre below the middle of the face
_RECT_SIDE = 304.0
ROI_PER_UNIT = _HEAD_SCALE * 328 / _RECT_SIDE  # pixels of the 320x320 ROI a drawing unit
# One filter for all rows halves the time of writing; the name is missing in OpenCV before 4.12.
_PNG_FILTER = [cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP] if hasattr(cv2, "IMWRITE_PNG_FILTER") else []
_PNG_OPTIONS = [cv2.IMWRITE_PNG_COMPRESSION, 1, *_PNG_FILTER]
_BLINK = (0.30, 0.86, 1.0, 0.72, 0.26)


@dataclass(frozen=True)
class Pose:
    """The figure's state in one frame: lengths in drawing units, yaw and pitch in [-1, 1], blink 0 (open) to 1."""

    x: float
    y: float
    tilt_rad: float
    yaw: float
    pitch: float
    breath: float
    hair_rad: float
    blink: float
    gaze_x: float
    gaze_y: float
    brow: float


def pose(frame: int, *, frames: int = 150, seed: int = 0) -> Pose:
    """The pose of a frame. All motion rests at both ends of the loop, so playing it to and fro is smooth."""
    rng = np.random.default_rng(seed)
    sign = rng.choice([-1.0, 1.0], 2)
    share = frame / max(frames - 1, 1)
    seconds = max(frames - 1, 1) / FPS

    def wave(period_s: float, phase: float = 0.0) -> float:
        # Whole half-periods over the loop, and a phase that is bent to zero slope at both ends.
        halves = max(1, round(2 * seconds / period_s))
        eased = share + phase * np.sin(np.pi * share) ** 2
        return float(np.cos(np.pi * halves * eased))

    sway = sign[0] * (0.75 * wave(5.2) + 0.25 * wave(2.5, 0.04))
    nod = 0.6 * wave(3.1, 0.03) + 0.4 * wave(1.9, -0.02)
    turn = sign[0] * (0.7 * wave(4.3, 0.05) + 0.3 * wave(6.5))
    return Pose(
        x=5.5 * sway,
        y=2.6 * nod,
        tilt_rad=float(np.deg2rad(1.3)) * sign[1] * wave(4.6, -0.05),
        yaw=0.8 * turn,
        pitch=0.55 * nod,
        breath=wave(3.6),
        hair_rad=float(np.deg2rad(0.8)) * sign[1] * wave(4.6, -0.09),
        blink=_blink(frame, frames, rng),
        gaze_x=-1.6 * turn + 1.0 * wave(2.2, 0.06),
        gaze_y=-0.8 * nod,
        brow=1.3 * wave(3.3, 0.07),
    )


def _blink(frame: int, frames: int, rng: np.random.Generator) -> float:
    shares = np.array([0.17, 0.52, 0.84]) + rng.uniform(-0.03, 0.03, 3)
    for share in shares if frames >= 75 else shares[1:2]:
        step = frame - round(float(share) * (frames - 1)) + 2
        if 0 <= step < len(_BLINK):
            return _BLINK[step]
    return 0.0


class Avatar:
    """The character: `render` draws any frame, `crop_rect` gives its rectangle. Building one paints the still parts."""

    def __init__(self, *, frames: int = 150, width: int = 1280, height: int = 720, seed: int = 0) -> None:
        self.frames, self.width, self.height, self.seed = frames, width, height, seed
        self._zoom = min(width / 1280, height / 720)
        self._scale = _HEAD_SCALE * self._zoom
        sprite_scale = self._scale * _SUPERSAMPLING
        self._room = paint_room(width, height)
        self._back_hair = _Sprite.of(paint_back_hair(sprite_scale))
        self._body = _Sprite.of(paint_body(sprite_scale))
        self._head = paint_head(sprite_scale)

    def pose(self, frame: int) -> Pose:
        """The pose of a frame."""
        return pose(frame, frames=self.frames, seed=self.seed)

    def render(self, frame: int, mouth: Mouth | None = None) -> Image:
        """Draw a frame, uint8 BGR [height, width, 3]; without `mouth` the lips rest in a soft smile."""
        state, mouth = self.pose(frame), mouth or Mouth()
        picture: Image = self._room.copy()
        hair = _turn(state.x * 0.75, state.y * 0.6, state.hair_rad + 0.4 * state.tilt_rad)
        self._draw(picture, self._back_hair, hair, -0.45 * state.yaw, -0.45 * state.pitch)
        body = _turn(0.12 * state.x, -1.1 * state.breath, 0.0)
        self._draw(picture, self._body, body, 0.0, 0.0)
        head = Canvas(self._head.pixels.copy(), self._head.left, self._head.top, self._head.scale)
        if mouth.opening > 0:
            _drop_jaw(head, mouth)
        paint_eyes(head, blink=state.blink, gaze_x=state.gaze_x, gaze_y=state.gaze_y, brow=state.brow)
        paint_mouth(head, mouth)
        self._draw(picture, _Sprite.of(head), _turn(state.x, state.y, state.tilt_rad), state.yaw, state.pitch)
        return picture

    def crop_rect(self, frame: int) -> tuple[int, int, int, int]:
        """The square around the face as a tracker gives it: (x1, y1, x2, y2), exclusive ends, inside the frame."""
        state = self.pose(frame)
        x, y = self.to_frame(state, 0.0, RECT_Y)
        jitter = np.random.default_rng([self.seed, frame]).uniform(-1, 1, 3)
        side = round((_RECT_SIDE + 1.2 * jitter[2]) * self._zoom)
        x1 = round(x + (0.7 * jitter[0]) * self._zoom - side / 2)
        y1 = round(y + (0.7 * jitter[1]) * self._zoom - side / 2)
        x1, y1 = int(np.clip(x1, 0, self.width - side)), int(np.clip(y1, 0, self.height - side))
        return x1, y1, x1 + side, y1 + side

    def to_frame(self, state: Pose, x: float, y: float) -> tuple[float, float]:
        """Where a point of the face (drawing units) lies in the frame (pixels)."""
        depth = float(_depth(np.full((1, 1), x, np.float32), np.full((1, 1), y, np.float32))[0, 0])
        at = np.array([x + state.yaw * _PARALLAX * depth, y + state.pitch * _PARALLAX * depth, 1.0])
        across, down = _turn(state.x, state.y, state.tilt_rad) @ at
        origin_x, origin_y = self._origin
        return origin_x + self._scale * float(across), origin_y + self._scale * float(down)

    @property
    def _origin(self) -> tuple[float, float]:
        return self.width / 2 + (_HEAD_X - 640) * self._zoom, self.height - (720 - _HEAD_Y) * self._zoom

    def _draw(self, picture: Image, sprite: _Sprite, motion: npt.NDArray[np.float64], yaw: float, pitch: float) -> None:
        """Draw a sprite through its motion (2x3, drawing units) and the parallax of a turned head."""
        origin_x, origin_y = self._origin
        x0 = int(max(0, np.floor(origin_x + (sprite.left - 14) * self._scale)))
        y0 = int(max(0, np.floor(origin_y + (sprite.top - 14) * self._scale)))
        x1 = int(min(self.width, np.ceil(origin_x + (sprite.right + 14) * self._scale)))
        y1 = int(min(self.height, np.ceil(origin_y + (sprite.bottom + 14) * self._scale)))
        back = cv2.invertAffineTransform(motion)
        across = ((np.arange(x0, x1, dtype=np.float32) + 0.5 - origin_x) / self._scale).astype(np.float32)[None, :]
        down = ((np.arange(y0, y1, dtype=np.float32) + 0.5 - origin_y) / self._scale).astype(np.float32)[:, None]
        x = np.float32(back[0, 0]) * across + (np.float32(back[0, 1]) * down + np.float32(back[0, 2]))
        y = np.float32(back[1, 0]) * across + (np.float32(back[1, 1]) * down + np.float32(back[1, 2]))
        if yaw or pitch:
            depth = _depth(x, y)
            x, y = x - np.float32(yaw * _PARALLAX) * depth, y - np.float32(pitch * _PARALLAX) * depth
        map_x = (x - np.float32(sprite.left)) * np.float32(sprite.scale) - np.float32(0.5)
        map_y = (y - np.float32(sprite.top)) * np.float32(sprite.scale) - np.float32(0.5)
        drawn = cv2.remap(sprite.pixels, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
        alpha = cv2.cvtColor(255 - drawn[..., 3], cv2.COLOR_GRAY2BGR)
        under = picture[y0:y1, x0:x1]
        under[...] = cv2.add(cv2.multiply(under, alpha, scale=1 / 255), drawn[..., :3])


@dataclass(frozen=True)
class _Sprite:
    """Premultiplied uint8 BGRA pixels over a box of drawing units."""

    pixels: Image
    left: float
    top: float
    scale: float

    @classmethod
    def of(cls, canvas: Canvas) -> _Sprite:
        return cls(canvas.to_uint8(), canvas.left, canvas.top, canvas.scale)

    @property
    def right(self) -> float:
        return float(self.left + self.pixels.shape[1] / self.scale)

    @property
    def bottom(self) -> float:
        return float(self.top + self.pixels.shape[0] / self.scale)


def _turn(x: float, y: float, turn_rad: float) -> npt.NDArray[np.float64]:
    """The affine motion (2x3) that turns about the neck and then moves by x, y."""
    cos, sin = np.cos(turn_rad), np.sin(turn_rad)
    return np.array([[cos, -sin, x + sin * _NECK_Y], [sin, cos, y + _NECK_Y - cos * _NECK_Y]])


def _depth(x: Array, y: Array) -> Array:
    """How far a point of the head lies before its middle: 1 at the face's middle, 0 at the rim of the skull."""
    away = (x / np.float32(170)) ** 2 + ((y - np.float32(10)) / np.float32(215)) ** 2
    depth: Array = np.maximum(1 - away, 0).astype(np.float32)
    return depth


def _drop_jaw(head: Canvas, mouth: Mouth) -> None:
    """Pull the head's lower face down, as the jaw of an open mouth does."""
    height, width = head.pixels.shape[:2]
    x = (np.arange(width, dtype=np.float32) + 0.5) / head.scale + head.left
    y = (np.arange(height, dtype=np.float32) + 0.5) / head.scale + head.top
    fall = np.float32(CHIN_SHARE * mouth.gap)
    across = np.clip(1 - (np.abs(x) / 112) ** 2.5, 0, 1)[None, :]
    down = np.clip((y - (MOUTH_Y - 8)) / (CHIN_Y + fall - MOUTH_Y), 0, 1)[:, None]
    shift = fall * across * down * down * (3 - 2 * down) * head.scale
    map_x = np.broadcast_to(np.arange(width, dtype=np.float32)[None, :], (height, width)).astype(np.float32)
    map_y = (np.arange(height, dtype=np.float32)[:, None] - shift).astype(np.float32)
    head.pixels[...] = cv2.remap(head.pixels, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)


def write_source(
    directory: Path,
    *,
    frames: int = 150,
    width: int = 1280,
    height: int = 720,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a tenant's source directory: frames/frame_0000.png ..., crop_rects.json, checkpoint/model_best.onnx.

    `progress(done, total)` is called after each frame. The same arguments give the same files.
    """
    from lipsync.avatar_model import mouth_model

    (directory / "frames").mkdir(parents=True, exist_ok=True)
    (directory / "checkpoint").mkdir(exist_ok=True)
    avatar = Avatar(frames=frames, width=width, height=height, seed=seed)
    for frame in range(frames):
        _, png = cv2.imencode(".png", avatar.render(frame), _PNG_OPTIONS)
        (directory / "frames" / f"frame_{frame:04d}.png").write_bytes(png.tobytes())
        if progress is not None:
            progress(frame + 1, frames)
    rects = [avatar.crop_rect(frame) for frame in range(frames)]
    (directory / "crop_rects.json").write_text(json.dumps(rects))
    (directory / "checkpoint" / "model_best.onnx").write_bytes(mouth_model().SerializeToString())
