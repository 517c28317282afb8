"""The drawn avatar: frame numbers in, pictures, crop rectangles and a tenant's source directory out.

A character of our own, drawn by code; it knows nothing of Triton, of tenants once added, or of audio.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from lipsync.avatar_drawing import Canvas, ellipse
from lipsync.avatar_features import CHIN_SHARE, CHIN_Y, MOUTH_Y, Mouth, paint_eyes, paint_mouth
from lipsync.avatar_head import paint_back_hair, paint_head
from lipsync.avatar_model import mouth_model
from lipsync.avatar_motion import PARALLAX, Pose, Shot, depth, turn
from lipsync.avatar_scene import paint_body, paint_room

Image = npt.NDArray[np.uint8]

_SUPERSAMPLING = 2  # sprite pixels a frame pixel
_MARGIN = 14  # that a sprite may move out of its box, drawing units
# One filter for all rows halves the time of writing; the name is missing in older releases of OpenCV.
_PNG_FILTER = [cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP] if hasattr(cv2, "IMWRITE_PNG_FILTER") else []
_PNG_OPTIONS = [cv2.IMWRITE_PNG_COMPRESSION, 1, *_PNG_FILTER]


class Avatar:
    """The character in a shot. Building one paints the still parts, which takes about a second."""

    def __init__(self, *, frames: int = 150, width: int = 1280, height: int = 720, seed: int = 0) -> None:
        self.shot = Shot(frames, width, height, seed)
        sprite_scale = self.shot.scale * _SUPERSAMPLING
        self._room = paint_room(width, height)
        self._back_hair = _Sprite.of(paint_back_hair(sprite_scale))
        self._body = _Sprite.of(paint_body(sprite_scale))
        self._head = paint_head(sprite_scale)
        self._still_head = _Sprite.of(self._head)

    def pose(self, frame: int) -> Pose:
        """The pose of a frame."""
        return self.shot.pose(frame)

    def crop_rect(self, frame: int) -> tuple[int, int, int, int]:
        """The square around the face: (x1, y1, x2, y2) in frame pixels, exclusive ends."""
        return self.shot.crop_rect(frame)

    def render(self, frame: int, mouth: Mouth | None = None) -> Image:
        """Draw a frame, uint8 BGR [height, width, 3]; without `mouth` the lips rest in a soft smile."""
        state = self.pose(frame)
        picture: Image = self._room.copy()
        hair = turn(state.x * 0.75, state.y * 0.6, state.hair_rad + 0.4 * state.tilt_rad)
        self._draw(picture, self._back_hair, hair, -0.45 * state.yaw, -0.45 * state.pitch)
        self._draw(picture, self._body, turn(0.12 * state.x, -1.1 * state.breath, 0.0), 0.0, 0.0)
        head = self._living_head(state, mouth or Mouth())
        self._draw(picture, head, turn(state.x, state.y, state.tilt_rad), state.yaw, state.pitch)
        return picture

    def _living_head(self, state: Pose, mouth: Mouth) -> _Sprite:
        """The head with its eyes, brows and mouth. Only the part that changes is painted."""
        still = self._head.window(ellipse(0, 0, 96, 105) if mouth.opening == 0 else ellipse(0, 0, 400, 400), 0)
        face = Canvas(still.pixels.copy(), still.left, still.top, still.scale)
        if mouth.opening > 0:
            _drop_jaw(face, mouth)
        paint_eyes(face, blink=state.blink, gaze_x=state.gaze_x, gaze_y=state.gaze_y, brow=state.brow)
        paint_mouth(face, mouth)
        pixels = self._still_head.pixels.copy()
        top = round((face.top - self._head.top) * face.scale)
        left = round((face.left - self._head.left) * face.scale)
        height, width = face.pixels.shape[:2]
        pixels[top : top + height, left : left + width] = face.to_uint8()
        return _Sprite(pixels, self._head.left, self._head.top, self._head.scale)

    def _draw(self, picture: Image, sprite: _Sprite, motion: npt.NDArray[np.float64], yaw: float, pitch: float) -> None:
        """Draw a sprite through its motion (2x3, drawing units) and the parallax of a turned head."""
        scale, (origin_x, origin_y) = self.shot.scale, self.shot.origin
        x0 = max(0, int(origin_x + (sprite.left - _MARGIN) * scale))
        y0 = max(0, int(origin_y + (sprite.top - _MARGIN) * scale))
        x1 = min(self.shot.width, int(origin_x + (sprite.right + _MARGIN) * scale) + 1)
        y1 = min(self.shot.height, int(origin_y + (sprite.bottom + _MARGIN) * scale) + 1)
        back = cv2.invertAffineTransform(motion).astype(np.float32)
        across = ((np.arange(x0, x1) + 0.5 - origin_x) / scale).astype(np.float32)[None, :]
        down = ((np.arange(y0, y1) + 0.5 - origin_y) / scale).astype(np.float32)[:, None]
        x = back[0, 0] * across + (back[0, 1] * down + back[0, 2])
        y = back[1, 0] * across + (back[1, 1] * down + back[1, 2])
        if yaw or pitch:
            closeness = depth(x, y)
            x, y = x - np.float32(yaw * PARALLAX) * closeness, y - np.float32(pitch * PARALLAX) * closeness
        map_x = (x - np.float32(sprite.left)) * np.float32(sprite.scale) - np.float32(0.5)
        map_y = (y - np.float32(sprite.top)) * np.float32(sprite.scale) - np.float32(0.5)
        drawn = cv2.remap(sprite.pixels, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
        uncovered = cv2.cvtColor(255 - drawn[..., 3], cv2.COLOR_GRAY2BGR)
        under = picture[y0:y1, x0:x1]
        under[...] = cv2.add(cv2.multiply(under, uncovered, scale=1 / 255), cv2.cvtColor(drawn, cv2.COLOR_BGRA2BGR))


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
