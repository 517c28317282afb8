"""Whom the benchmark films: the drawn avatar with a camera's grain, in any size, and where its crop rectangles lie."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import onnx

from compositor.blending import Pixels
from compositor.geometry import Box
from lipsync.avatar import Avatar
from lipsync.avatar_features import Mouth

_GRAIN_LEVELS = 5.0
_GRAIN_PIXELS = 0.8
_OPEN = Mouth(opening=0.7)
_RECTS = Path(__file__).parent / "reference_crop_rects.json"


class Camera:
    """Adds sensor grain: drawn pictures are smoother than film, and their JPEGs less than half as large.

    5 levels with a correlation of 0.8 pixels make 97 kB of a 720p frame at quality 75.
    """

    def __init__(self, width: int, height: int, seed: int = 0) -> None:
        self._width, self._height = width, height
        self._random = np.random.default_rng(seed)
        # One field, larger than a frame and cut out anew for each: drawing numbers is slower than everything else.
        field = self._random.standard_normal((height + 64, width + 64, 3), np.float32)
        field = np.asarray(cv2.GaussianBlur(field, (0, 0), _GRAIN_PIXELS), np.float32)
        self._grain = np.round(field * (_GRAIN_LEVELS / field.std())).astype(np.int16)

    def film(self, picture: Pixels) -> Pixels:
        """A copy of a BGR picture uint8 (height, width, 3) with grain, another one each time."""
        y, x = self._random.integers(0, 64, 2).tolist()
        grain = self._grain[y : y + self._height, x : x + self._width]
        filmed: Pixels = cv2.add(picture, grain, dtype=cv2.CV_8U).astype(np.uint8, copy=False)
        return filmed


def footage(width: int, height: int, frames: int, drawn: int = 8) -> Iterator[Pixels]:
    """Frames of a listening avatar, of which `drawn` are drawn and the others are those again with other grain."""
    avatar, camera = Avatar(frames=frames, width=width, height=height), Camera(width, height)
    drawn = min(drawn, frames)
    pictures = [avatar.render(number * frames // drawn) for number in range(drawn)]
    for number in range(frames):
        yield camera.film(pictures[number * drawn // frames])


def speaking(width: int, height: int) -> Pixels:
    """One filmed frame with the mouth open, to cut mouths from."""
    avatar = Avatar(frames=1, width=width, height=height)
    return Camera(width, height, seed=1).film(avatar.render(0, _OPEN))


def centred_rects(width: int, height: int, frames: int, side: int) -> list[Box]:
    """Squares of `side` pixels around the avatar's mouth and chin, moving as the avatar does."""
    avatar = Avatar(frames=frames, width=width, height=height)
    boxes = []
    for number in range(frames):
        x1, y1, x2, y2 = avatar.crop_rect(number)
        x = min(max((x1 + x2 - side) // 2, 0), width - side)
        y = min(max((y1 + y2 - side) // 2, 0), height - side)
        boxes.append(Box(x, y, side, side))
    return boxes


def reference_rects(width: int = 1280, height: int = 720) -> list[Box]:
    """The 523 crop rectangles of a real tenant of the predecessor system (its public data), scaled to a frame."""
    data = json.loads(_RECTS.read_text())
    across, down = width / data["width"], height / data["height"]
    return [
        Box(int(x1 * across), int(y1 * down), int((x2 - x1) * across), int((y2 - y1) * down))
        for x1, y1, x2, y2 in data["rects"]
    ]


def write_source(folder: Path, frames: Iterator[Pixels], rects: Sequence[Box], model: onnx.ModelProto) -> Iterator[int]:
    """Writes a tenant's source directory frame by frame; gives the number of frames written so far."""
    (folder / "frames").mkdir(parents=True)
    (folder / "checkpoint").mkdir()
    corners = [[box.x, box.y, box.right, box.bottom] for box in rects]
    (folder / "crop_rects.json").write_text(json.dumps(corners))
    onnx.save(model, folder / "checkpoint" / "model_best.onnx")
    for number, frame in enumerate(frames):
        _, png = cv2.imencode(".png", frame, [cv2.IMWRITE_PNG_COMPRESSION, 1])
        (folder / "frames" / f"frame_{number:04d}.png").write_bytes(png.tobytes())
        yield number + 1
