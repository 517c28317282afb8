"""How the avatar moves and where its face lies: frame numbers in, poses and crop rectangles out; no drawing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lipsync.avatar_drawing import Array

FPS = 25
HEAD_SCALE = 1.08  # frame pixels of a 1280x720 frame a drawing unit
HEAD_Y = 306.0  # the middle of the face in a 720-line frame, at rest
PARALLAX = 12.0  # how far the middle of the face moves at yaw or pitch 1, drawing units
RECT_Y = 40.0  # the rectangle's centre below the middle of the face, drawing units
RECT_SIDE = 304.0  # pixels of a 1280x720 frame
ROI_PER_UNIT = HEAD_SCALE * 328 / RECT_SIDE  # pixels of the 320x320 ROI a drawing unit
_NECK_Y = 150.0  # the point about which the head tilts, drawing units
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


@dataclass(frozen=True)
class Shot:
    """One take: `frames` frames of `width` x `height` pixels, moving as `seed` has it."""

    frames: int = 150
    width: int = 1280
    height: int = 720
    seed: int = 0

    @property
    def scale(self) -> float:
        """Frame pixels a drawing unit."""
        return HEAD_SCALE * self._zoom

    @property
    def origin(self) -> tuple[float, float]:
        """The middle of the face at rest, frame pixels."""
        return self.width / 2, self.height - (720 - HEAD_Y) * self._zoom

    @property
    def _zoom(self) -> float:
        return min(self.width / 1280, self.height / 720)

    def pose(self, frame: int) -> Pose:
        """The pose of a frame."""
        return pose(frame, frames=self.frames, seed=self.seed)

    def crop_rect(self, frame: int) -> tuple[int, int, int, int]:
        """The square around the face as a tracker gives it: (x1, y1, x2, y2), exclusive ends, inside the frame."""
        x, y = self.to_frame(self.pose(frame), 0.0, RECT_Y)
        jitter = np.random.default_rng([self.seed, frame]).uniform(-1, 1, 3)
        side = round((RECT_SIDE + 1.2 * jitter[2]) * self._zoom)
        x1 = round(x + 0.7 * jitter[0] * self._zoom - side / 2)
        y1 = round(y + 0.7 * jitter[1] * self._zoom - side / 2)
        return x1, y1, x1 + side, y1 + side

    def to_frame(self, state: Pose, x: float, y: float) -> tuple[float, float]:
        """Where a point of the face (drawing units) lies in the frame (pixels)."""
        closeness = float(depth(np.full((1, 1), x, np.float32), np.full((1, 1), y, np.float32))[0, 0])
        at = np.array([x + state.yaw * PARALLAX * closeness, y + state.pitch * PARALLAX * closeness, 1.0])
        across, down = turn(state.x, state.y, state.tilt_rad) @ at
        origin_x, origin_y = self.origin
        return origin_x + self.scale * float(across), origin_y + self.scale * float(down)


def turn(x: float, y: float, turn_rad: float) -> npt.NDArray[np.float64]:
    """The affine motion (2x3) that turns about the neck and then moves by x, y."""
    cos, sin = np.cos(turn_rad), np.sin(turn_rad)
    return np.array([[cos, -sin, x + sin * _NECK_Y], [sin, cos, y + _NECK_Y - cos * _NECK_Y]])


def depth(x: Array, y: Array) -> Array:
    """How far a point of the head lies before its middle: 1 at the face's middle, 0 at the rim of the skull."""
    away = (x / np.float32(170)) ** 2 + ((y - np.float32(10)) / np.float32(215)) ** 2
    closeness: Array = np.maximum(1 - away, 0).astype(np.float32)
    return closeness
