from __future__ import annotations

import numpy as np
import pytest

from compositor.geometry import Box
from training.picture_quality import colour_step, cut, psnr_db, ssim


@pytest.fixture
def picture() -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    rows, columns = np.mgrid[0:60, 0:80]
    return np.stack([2 * rows, 3 * columns, rows + columns], axis=2).astype(np.uint8)


def test_noise_of_known_strength_has_its_ratio() -> None:
    grey = np.full((50, 50, 3), 100, np.uint8)
    assert psnr_db(grey, grey) == float("inf")
    assert psnr_db(grey, grey + np.uint8(10)) == pytest.approx(28.13, abs=0.01)


def test_equal_pictures_are_alike_and_a_shifted_mean_hardly_less(
    picture: np.ndarray[tuple[int, ...], np.dtype[np.uint8]],
) -> None:
    assert ssim(picture, picture) == pytest.approx(1)
    assert ssim(picture, picture + np.uint8(2)) > 0.99


def test_unlike_structures_are_told_by_it() -> None:
    random = np.random.default_rng(0)
    first, second = (random.integers(0, 256, (60, 60, 3), dtype=np.uint8) for _ in range(2))
    assert abs(ssim(first, second)) < 0.1
    grey = np.full_like(first, 128)
    # Two flat pictures differ in their means only: the formula is then (2 x y + c) / (x^2 + y^2 + c), c = 2.55^2.
    assert ssim(grey, grey // 2) == pytest.approx((2 * 128 * 64 + 6.5025) / (128**2 + 64**2 + 6.5025), abs=1e-6)


def test_a_patch_of_another_shade_shows_its_step_and_the_pictures_own_edges_do_not(
    picture: np.ndarray[tuple[int, ...], np.dtype[np.uint8]],
) -> None:
    box = Box(20, 10, 30, 25)
    assert colour_step(picture, picture, box) == 0
    patched = picture.copy()
    cut(patched, box)[...] += np.uint8(5)
    assert colour_step(patched, picture, box) == 5
    # Half the border three levels up, half three down: no bias, and yet a step.
    uneven = picture.astype(np.int16)
    uneven[box.y : box.bottom, 20:35] += 3
    uneven[box.y : box.bottom, 35:50] -= 3
    assert colour_step(np.clip(uneven, 0, 255).astype(np.uint8), picture, box) == pytest.approx(3)


def test_what_is_deep_inside_a_patch_is_no_step(picture: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> None:
    patched = picture.copy()
    cut(patched, Box(25, 15, 10, 10))[...] = 0
    assert colour_step(patched, picture, Box(20, 10, 30, 25)) == 0
