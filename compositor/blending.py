"""Puts a predicted mouth onto its background: pixels in, pixels out.

The model family's paste resizes the 328x328 crop (the prediction set into its 4 px border) to the crop rectangle and
overwrites it. `hard` is exactly that; `feather` fades the outermost ring of the rectangle into the background.
"""

from __future__ import annotations

import functools
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from .geometry import Box

Blend = Literal["feather", "hard"]

CROP_SIZE = 328
"""Side of the square that a crop rectangle is resized to, in pixels."""
ROI_BORDER = 4
"""Border of the crop around the ROI: the model sees and predicts crop[4:324, 4:324]."""
ROI_SIZE = CROP_SIZE - 2 * ROI_BORDER
FEATHER = 1 / 20
"""Width of the faded ring as a share of the rectangle's shorter side: 9 px at 182 px, 15 px at 300 px, where
lite-avatar takes 10 px at 320."""

Pixels = NDArray[np.uint8]


@functools.lru_cache(maxsize=256)
def _ring(width: int, height: int) -> list[tuple[tuple[slice, slice], NDArray[np.float32], NDArray[np.float32]]]:
    """The four strips of the faded ring: (where, weight of the mouth, weight of the background).

    The weight rises as a raised cosine of the distance from the nearest edge; the strips do not overlap.
    """
    ring = max(1, round(min(width, height) * FEATHER))
    x = np.minimum(np.arange(width), np.arange(width)[::-1])
    y = np.minimum(np.arange(height), np.arange(height)[::-1])
    depth = np.minimum(y[:, None], x[None, :])
    ramp = np.clip((depth + 0.5) / ring, 0, 1)
    weight = ((1 - np.cos(np.pi * ramp)) / 2).astype(np.float32)
    middle = slice(ring, height - ring)
    strips = (
        (slice(0, ring), slice(0, width)),
        (slice(height - ring, height), slice(0, width)),
        (middle, slice(0, ring)),
        (middle, slice(width - ring, width)),
    )
    return [(strip, np.ascontiguousarray(weight[strip]), np.ascontiguousarray(1 - weight[strip])) for strip in strips]


def paste(background: Pixels, crop: Pixels, box: Box, blend: Blend) -> Pixels:
    """A copy of `background` with the mouth in it.

    background: BGR uint8 (height, width, 3), not changed. crop: BGR uint8 (328, 328, 3), the prediction set into the
    border of the crop it was made from. box: the crop rectangle in the background's coordinates. The resize is
    INTER_CUBIC, as the model family's own paste.
    """
    out: Pixels = background.copy()
    rows, columns = slice(box.y, box.bottom), slice(box.x, box.right)
    target = out[rows, columns]
    cv2.resize(crop, (box.width, box.height), dst=target, interpolation=cv2.INTER_CUBIC)
    if blend == "feather":
        source = background[rows, columns]
        for strip, weight, rest in _ring(box.width, box.height):
            cv2.blendLinear(target[strip], source[strip], weight, rest, target[strip])
    return out


def cut_crop(frame: Pixels, box: Box) -> Pixels:
    """The crop of a frame as the model wants it: BGR uint8 (328, 328, 3), INTER_CUBIC."""
    face = frame[box.y : box.bottom, box.x : box.right]
    crop: Pixels = cv2.resize(face, (CROP_SIZE, CROP_SIZE), interpolation=cv2.INTER_CUBIC).astype(np.uint8, copy=False)
    return crop


def set_prediction(crop: Pixels, prediction: NDArray[np.float32]) -> Pixels:
    """A copy of the crop with a raw prediction in it: float32 (3, 320, 320) in [0, 1], times 255, truncated."""
    out: Pixels = crop.copy()
    inner = slice(ROI_BORDER, ROI_BORDER + ROI_SIZE)
    out[inner, inner] = np.clip(prediction * 255, 0, 255).transpose(1, 2, 0)
    return out
