"""How near a picture is to the truth, and whether a patch in it shows its edge. Pixels in, numbers out; pure."""

from __future__ import annotations

from typing import Final, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from compositor.blending import Pixels
from compositor.geometry import Box

_FULL_SCALE: Final = 255.0
# Wang, Bovik, Sheikh and Simoncelli, Image Quality Assessment: From Error Visibility to Structural Similarity, 2004.
_SSIM_SIDE, _SSIM_SIGMA = 11, 1.5
_SSIM_MEAN, _SSIM_VARIANCE = (0.01 * _FULL_SCALE) ** 2, (0.03 * _FULL_SCALE) ** 2

_Plane: TypeAlias = NDArray[np.float64]


def cut(picture: Pixels, box: Box) -> Pixels:
    """The part of a picture."""
    return picture[box.y : box.bottom, box.x : box.right]


def psnr_db(first: Pixels, second: Pixels) -> float:
    """The peak signal-to-noise ratio of two pictures of one shape, dB; infinite where they are equal."""
    error = np.mean((first.astype(np.float64) - second) ** 2)
    return float(10 * np.log10(_FULL_SCALE**2 / error)) if error > 0 else float("inf")


def ssim(first: Pixels, second: Pixels) -> float:
    """The mean structural similarity of two BGR pictures' luminance, at most 1; as published, with a Gaussian window of
    11x11 pixels and sigma 1.5."""
    x, y = (cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY).astype(np.float64) for picture in (first, second))
    mean_x, mean_y = _windowed(x), _windowed(y)
    variance_x, variance_y = _windowed(x * x) - mean_x**2, _windowed(y * y) - mean_y**2
    covariance = _windowed(x * y) - mean_x * mean_y
    above = (2 * mean_x * mean_y + _SSIM_MEAN) * (2 * covariance + _SSIM_VARIANCE)
    below = (mean_x**2 + mean_y**2 + _SSIM_MEAN) * (variance_x + variance_y + _SSIM_VARIANCE)
    return float(np.mean(above / below))


def colour_step(picture: Pixels, original: Pixels, box: Box) -> float:
    """The mean colour step that a patch adds along the border of `box`, in levels of 0 to 255.

    The step is the difference of the pixels on either side of the border; that of the original picture is taken off
    before the absolute value, so that an edge of the picture itself is none. The box lies within the picture by at
    least a pixel.
    """
    added = picture.astype(np.int16) - original.astype(np.int16)
    inside = (
        added[box.y, box.x : box.right],
        added[box.bottom - 1, box.x : box.right],
        added[box.y : box.bottom, box.x],
        added[box.y : box.bottom, box.right - 1],
    )
    outside = (
        added[box.y - 1, box.x : box.right],
        added[box.bottom, box.x : box.right],
        added[box.y : box.bottom, box.x - 1],
        added[box.y : box.bottom, box.right],
    )
    return float(np.abs(np.concatenate(inside) - np.concatenate(outside)).mean())


def _windowed(values: _Plane) -> _Plane:
    """Means under the window wherever it lies wholly within the picture."""
    half = _SSIM_SIDE // 2
    blurred = cv2.GaussianBlur(values, (_SSIM_SIDE, _SSIM_SIDE), _SSIM_SIGMA)
    return np.asarray(blurred, np.float64)[half:-half, half:-half]
