from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lipsync.avatar import Avatar, write_source
from lipsync.avatar_features import MOUTH_Y, Mouth, lip_curves
from lipsync.avatar_motion import Shot, pose

FRAMES = 150


@pytest.fixture(scope="module")
def avatar() -> Avatar:
    return Avatar(frames=FRAMES)


@pytest.fixture(scope="module")
def small() -> Avatar:
    return Avatar(frames=FRAMES, width=640, height=360)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("avatar") / "source"
    write_source(directory, frames=4, width=640, height=360)
    return directory


def test_source_holds_frames_rectangles_and_model(source: Path) -> None:
    names = sorted(path.name for path in (source / "frames").iterdir())
    assert names == [f"frame_{i:04d}.png" for i in range(4)]
    images = [cv2.imread(str(source / "frames" / name)) for name in names]
    assert all(image is not None and image.shape == (360, 640, 3) and image.dtype == np.uint8 for image in images)
    rects = json.loads((source / "crop_rects.json").read_text())
    assert len(rects) == 4
    assert all(len(rect) == 4 and all(type(v) is int for v in rect) for rect in rects)
    onnx.checker.check_model(onnx.load(str(source / "checkpoint" / "model_best.onnx")), full_check=True)


def test_same_arguments_give_the_same_files(source: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    write_source(tmp_path / "again", frames=4, width=640, height=360, progress=lambda *at: calls.append(at))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
    for path in (p for p in source.rglob("*") if p.is_file()):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(source)).read_bytes()


def test_another_seed_moves_otherwise() -> None:
    first, second = ([pose(i, seed=seed) for i in range(FRAMES)] for seed in (0, 1))
    assert first != second


def test_renders_at_the_asked_size(avatar: Avatar) -> None:
    picture = avatar.render(0)
    assert picture.shape == (720, 1280, 3)
    assert picture.dtype == np.uint8


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 1000),
    frames=st.integers(1, 300),
    size=st.sampled_from([(1280, 720), (640, 360), (720, 1280), (1920, 1080)]),
    data=st.data(),
)
def test_rectangles_are_squares_inside_the_frame_on_the_face(
    seed: int, frames: int, size: tuple[int, int], data: st.DataObject
) -> None:
    width, height = size
    shot = Shot(frames, width, height, seed)
    frame = data.draw(st.integers(0, frames - 1))
    x1, y1, x2, y2 = shot.crop_rect(frame)
    side = 304 * min(width / 1280, height / 720)
    assert x2 - x1 == y2 - y1
    assert x2 - x1 == pytest.approx(side, abs=0.01 * side + 1)
    assert 0 <= x1 < x2 <= width
    assert 0 <= y1 < y2 <= height
    mouth_x, mouth_y = shot.to_frame(shot.pose(frame), 0.0, MOUTH_Y)
    assert (x1 + x2) / 2 == pytest.approx(mouth_x, abs=0.03 * side)
    assert y1 + 0.55 * side < mouth_y < y1 + 0.70 * side


def test_the_head_moves_and_the_rectangles_follow(avatar: Avatar) -> None:
    rects = np.array([avatar.crop_rect(i) for i in range(FRAMES)])
    centres = (rects[:, :2] + rects[:, 2:]) / 2
    assert np.ptp(centres[:, 0]) > 15
    assert np.ptp(centres[:, 1]) > 6
    assert np.abs(np.diff(centres, axis=0)).max() < 4, "smoothly"
    assert len(set(rects[:, 2] - rects[:, 0])) > 1, "sizes vary a little, as a tracker's do"


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), frames=st.integers(75, 300))
def test_motion_rests_at_both_ends_of_the_loop(seed: int, frames: int) -> None:
    for end, beside in ((0, 1), (frames - 1, frames - 2)):
        first, second = (pose(i, frames=frames, seed=seed) for i in (end, beside))
        assert abs(first.x - second.x) < 0.06
        assert abs(first.yaw - second.yaw) < 0.012
        assert abs(first.tilt_rad - second.tilt_rad) < 0.0006


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), frames=st.integers(100, 300))
def test_blinks_two_or_three_times_and_each_shuts_the_eyes(seed: int, frames: int) -> None:
    blinks = np.array([pose(i, frames=frames, seed=seed).blink for i in range(frames)])
    starts = np.flatnonzero((blinks[1:] > 0) & (blinks[:-1] == 0))
    assert 2 <= len(starts) <= 3
    assert all(blinks[start : start + 6].max() == 1.0 for start in starts)
    assert blinks[0] == blinks[-1] == 0


def test_a_blink_hides_the_irises(small: Avatar) -> None:
    def green(frame: int) -> int:
        x1, y1, x2, y2 = small.crop_rect(frame)
        blue, green, red = np.moveaxis(small.render(frame)[y1:y2, x1:x2].astype(int), 2, 0)
        return int(((green > red + 20) & (green > blue)).sum())

    shut = max(range(FRAMES), key=lambda i: small.pose(i).blink)
    assert green(shut - 10) > 60
    assert green(shut) < 0.1 * green(shut - 10)


def test_frames_differ_and_the_room_stands_still(small: Avatar) -> None:
    first, later = small.render(0), small.render(40)
    changed = np.abs(first.astype(int) - later).max(axis=2) > 2
    assert changed.mean() > 0.01
    assert not changed[:, :120].any()


def test_a_wider_opening_shows_more_of_the_cavity_and_lowers_the_chin(small: Avatar) -> None:
    x1, y1, x2, y2 = small.crop_rect(20)
    shown, faces = [], []
    for opening in (0.0, 0.25, 0.5, 0.75, 1.0):
        face = small.render(20, Mouth(opening=opening))[y1:y2, x1:x2].astype(int)
        shown.append(int((np.abs(face - small.render(20)[y1:y2, x1:x2])[90:120, 60:92].max(axis=2) > 40).sum()))
        faces.append(face)
    assert shown == sorted(shown)
    assert shown[0] == 0
    assert shown[-1] > 300
    assert np.array_equal(faces[0][:60], faces[-1][:60]), "the upper face stays"
    assert not np.array_equal(faces[0][132:], faces[-1][132:]), "the chin moves"


@given(opening=st.floats(0, 1), width=st.floats(0, 1), rounding=st.floats(0, 1))
def test_lips_never_cross(opening: float, width: float, rounding: float) -> None:
    top, upper, lower, bottom = lip_curves(Mouth(opening=opening, width=width, rounding=rounding))
    heights = np.stack([curve[:, 1] for curve in (top, upper, lower, bottom)])
    assert np.isfinite(heights).all()
    assert (np.diff(heights, axis=0) > -1e-3).all()


@given(width=st.floats(0, 1), rounding=st.floats(0.1, 1))
def test_rounding_narrows_the_mouth(width: float, rounding: float) -> None:
    assert Mouth(width=width, rounding=rounding).half_width < Mouth(width=width).half_width
