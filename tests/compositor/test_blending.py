from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from compositor import blending
from compositor.geometry import Box


def noise(height: int, width: int, seed: int) -> NDArray[np.uint8]:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.asarray(cv2.GaussianBlur(image, (0, 0), 2), np.uint8)


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def reference_paste(frame: NDArray[np.uint8], box: Box, prediction: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The model family's own steps, written out: crop, set the prediction, resize, overwrite."""
    x1, y1, x2, y2 = box.x, box.y, box.x + box.width, box.y + box.height
    crop = cv2.resize(frame[y1:y2, x1:x2], (328, 328), interpolation=cv2.INTER_CUBIC)
    crop[4:324, 4:324] = np.array(prediction.transpose(1, 2, 0) * 255, dtype=np.uint8)
    out: NDArray[np.uint8] = frame.copy()
    out[y1:y2, x1:x2] = cv2.resize(crop, (box.width, box.height), interpolation=cv2.INTER_CUBIC)
    return out


@pytest.mark.parametrize("box", [Box(40, 30, 182, 182), Box(0, 0, 300, 290), Box(100, 60, 328, 328), Box(3, 5, 77, 91)])
def test_hard_is_the_reference_paste(box: Box) -> None:
    frame = noise(480, 640, 1)
    prediction = noise(320, 320, 2).transpose(2, 0, 1).astype(np.float32) / 255
    crop = blending.set_prediction(blending.cut_crop(frame, box), prediction)
    ours = blending.paste(frame, crop, box, "hard")
    assert psnr(ours, reference_paste(frame, box, prediction)) >= 45


@hypothesis_settings(max_examples=40, deadline=None)
@given(st.integers(20, 300), st.integers(20, 300), st.integers(0, 50), st.integers(0, 50))
def test_only_the_rectangle_changes_and_feather_meets_both_sides(width: int, height: int, x: int, y: int) -> None:
    background = noise(360, 360, 3)
    before = background.copy()
    crop = noise(328, 328, 4)
    box = Box(x, y, width, height)
    hard, soft = (blending.paste(background, crop, box, blend) for blend in ("hard", "feather"))
    assert np.array_equal(background, before)
    outside = np.ones((360, 360), bool)
    outside[y : box.bottom, x : box.right] = False
    assert np.array_equal(hard[outside], background[outside])
    assert np.array_equal(soft[outside], background[outside])
    middle = (slice(y + height // 3, y + 2 * height // 3), slice(x + width // 3, x + 2 * width // 3))
    assert np.array_equal(soft[middle], hard[middle])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 120), st.integers(1, 120), st.integers(0, 9), st.integers(0, 9), st.integers(0, 2**32 - 1))
def test_feather_is_the_weighted_mean_of_both_sides(width: int, height: int, x: int, y: int, seed: int) -> None:
    background, crop, box = noise(130, 130, seed), noise(328, 328, seed + 1), Box(x, y, width, height)
    hard, soft = (blending.paste(background, crop, box, blend) for blend in ("hard", "feather"))
    ring = max(1, round(min(width, height) / 20))
    rows, columns = np.mgrid[:height, :width]
    depth = np.minimum(np.minimum(rows, rows[::-1]), np.minimum(columns, columns[:, ::-1]))
    weight = ((1 - np.cos(np.pi * np.clip((depth + 0.5) / ring, 0, 1))) / 2)[:, :, None]
    inside = (slice(y, box.bottom), slice(x, box.right))
    mean = hard[inside] * weight + background[inside] * (1 - weight)
    if min(width, height) > 1:
        assert np.abs(soft[inside] - mean).max() < 1.5
    else:
        assert np.array_equal(soft, hard)


def test_feather_softens_the_seam() -> None:
    background = np.full((300, 300, 3), 100, np.uint8)
    crop = np.full((328, 328, 3), 200, np.uint8)
    box = Box(50, 50, 200, 200)
    hard, soft = (blending.paste(background, crop, box, blend) for blend in ("hard", "feather"))

    def steepest(image: NDArray[np.uint8]) -> int:
        return int(np.abs(np.diff(image[150, :, 0].astype(int))).max())

    assert steepest(hard) == 100
    assert steepest(soft) <= 25
    row = soft[150, 50:70, 0].astype(int)
    assert (np.diff(row) >= 0).all()


def test_set_prediction_truncates_and_keeps_the_border() -> None:
    crop = np.full((328, 328, 3), 7, np.uint8)
    out = blending.set_prediction(crop, np.full((3, 320, 320), 0.999, np.float32))
    assert (out[4:324, 4:324] == 254).all()
    assert (out[:4] == 7).all()
    assert (out[:, 324:] == 7).all()
    assert (crop == 7).all()


@given(st.integers(20, 200), st.integers(20, 200), st.floats(0, 1))
def test_a_borrowed_mouth_brings_nothing_of_the_upper_face(width: int, height: int, weight: float) -> None:
    idle, pasted, box = noise(260, 260, 1), noise(260, 260, 2), Box(30, 40, width, height)
    mixed = blending.mix(idle, pasted, box, weight, borrowed=True)
    mouth = (40 + height // 3, 30)
    assert np.array_equal(mixed[: mouth[0] - 1], idle[: mouth[0] - 1])
    assert np.array_equal(mixed[box.bottom :], idle[box.bottom :])
    middle = (40 + round(0.68 * height), 30 + width // 2)
    expected = idle[middle].astype(float) * (1 - weight) + pasted[middle].astype(float) * weight
    assert np.abs(mixed[middle] - expected).max() < 2


@given(st.integers(1, 40), st.integers(1, 40))
def test_merged_planes_are_the_pixels_and_stay_in_the_caches(width: int, height: int) -> None:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    merged = blending.merge_planes(blending.split_planes(pixels))
    assert np.array_equal(merged, pixels)
    assert merged.flags.c_contiguous
    # Into caches or past them: OpenCV decides by whether a pixel can begin at a multiple of its vectors' 32 bytes.
    assert merged.ctypes.data % 32 % 3 != 0
