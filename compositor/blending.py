"""Puts a predicted mouth onto its background: pixels in, pixels out.

The model family's paste resizes the 328x328 crop (the prediction set into its 4 px border) to the crop rectangle and
overwrites it. `hard` is exactly that; `feather` fades the outermost ring of the rectangle into the background.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

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


Weights = NDArray[np.uint16]


@functools.lru_cache(maxsize=256)
def _ring(width: int, height: int) -> tuple[int, list[tuple[Weights, Weights]]]:
    """The faded ring of a rectangle: its width, and for each of its `_strips` (weight of the mouth, of the background).

    Weights are in 1/256 and rise as a raised cosine of the distance from the nearest edge.
    """
    ring = max(1, round(min(width, height) * FEATHER))
    x = np.minimum(np.arange(width), np.arange(width)[::-1])
    y = np.minimum(np.arange(height), np.arange(height)[::-1])
    depth = np.minimum(y[:, None], x[None, :])
    ramp = np.clip((depth + 0.5) / ring, 0, 1)
    weight = np.repeat(np.round((1 - np.cos(np.pi * ramp)) * 128).astype(np.uint16), 3, axis=1)
    strips = [np.ascontiguousarray(strip) for strip in _strips(weight, Box(0, 0, width, height), ring)]
    return ring, [(strip, 256 - strip) for strip in strips]


def _strips(pixels: NDArray[Any], box: Box, ring: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """The ring of `box` in a contiguous picture as two views: (top, bottom) and, between them, (left, right).

    Two views of two strips each, because a call of numpy costs more than the pixels of a strip.
    """
    row, item = pixels.strides[0], pixels.itemsize
    pixel = 3 * item
    begin = box.y * row + box.x * pixel
    across, down = (box.width - ring) * pixel, (box.height - ring) * row
    shape = (2, ring, box.width * 3)
    level = np.ndarray(shape, pixels.dtype, pixels.data, begin, (down, row, item))
    shape = (box.height - 2 * ring, 2, ring * 3)
    upright = np.ndarray(shape, pixels.dtype, pixels.data, begin + ring * row, (row, across, item))
    return level, upright


def _feather(out: Pixels, background: Pixels, box: Box) -> None:
    """Fades the ring of `box` in `out` into the background, which has the same shape."""
    ring, weights = _ring(box.width, box.height)
    strips = zip(_strips(out, box, ring), _strips(background, box, ring), weights, strict=True)
    for mouth, rest, (weight, complement) in strips:
        faded = np.multiply(mouth, weight)
        faded += np.multiply(rest, complement)
        faded += 128
        faded >>= 8
        np.copyto(mouth, faded, casting="unsafe")


def paste(background: Pixels, crop: Pixels, box: Box, blend: Blend) -> Pixels:
    """A copy of `background` with the mouth in it.

    background: contiguous BGR uint8 (height, width, 3), not changed. crop: BGR uint8 (328, 328, 3), the prediction set
    into the border of the crop it was made from. box: the crop rectangle in the background's coordinates. The resize
    is INTER_CUBIC, as the model family's own paste.
    """
    out: Pixels = background.copy()
    target = out[box.y : box.bottom, box.x : box.right]
    cv2.resize(crop, (box.width, box.height), dst=target, interpolation=cv2.INTER_CUBIC)
    if blend == "feather" and min(box.width, box.height) > 1:
        _feather(out, background, box)
    return out


@functools.lru_cache(maxsize=64)
def _mouth_region(width: int, height: int) -> NDArray[np.float32]:
    """Where in a crop rectangle the mouth and chin are, float32 (height, width) in [0, 1]: an ellipse that ends softly.

    The family's crops reach from the brows to below the chin, the mouth at two thirds of their height.
    """
    y, x = (np.arange(height)[:, None] + 0.5) / height, (np.arange(width)[None, :] + 0.5) / width
    radius = np.hypot((x - 0.5) / 0.45, (y - 0.68) / 0.36)
    ramp = np.clip((1 - radius) / 0.3, 0, 1)
    return ((1 - np.cos(np.pi * ramp)) / 2).astype(np.float32)


def mix(idle: Pixels, pasted: Pixels, box: Box, weight: float, *, borrowed: bool) -> Pixels:
    """`idle` with `weight` of `pasted`: two pictures BGR uint8 of one shape that differ within `box`.

    borrowed: the pasted mouth was made for another frame, so only mouth and chin are taken: everything else, the eyes
    above all, would shine through from there.
    """
    if not borrowed:
        return np.asarray(cv2.addWeighted(pasted, weight, idle, 1 - weight, 0), np.uint8)
    out: Pixels = idle.copy()
    region = (slice(box.y, box.bottom), slice(box.x, box.right))
    share = _mouth_region(box.width, box.height) * np.float32(weight)
    out[region] = cv2.blendLinear(pasted[region], idle[region], share, 1 - share)
    return out


def cut_crop(frame: Pixels, box: Box) -> Pixels:
    """The crop of a frame as the model wants it: BGR uint8 (328, 328, 3), INTER_CUBIC."""
    face = frame[box.y : box.bottom, box.x : box.right]
    crop: Pixels = cv2.resize(face, (CROP_SIZE, CROP_SIZE), interpolation=cv2.INTER_CUBIC).astype(np.uint8, copy=False)
    return crop


def merge_planes(planes: Pixels) -> Pixels:
    """Planes uint8 (3, height, width) as pixels uint8 (height, width, 3)."""
    _, height, width = planes.shape
    # One byte off any alignment: where it finds one, OpenCV writes past the caches, and the resize that follows would
    # wait for memory (190 us instead of 80 for 328 to 183 px).
    pixels = np.empty(1 + planes.size, np.uint8)[1:].reshape(height, width, 3)
    return np.asarray(cv2.merge(list(planes), pixels), np.uint8)


def split_planes(pixels: Pixels) -> Pixels:
    """Pixels uint8 (height, width, 3) as planes uint8 (3, height, width)."""
    return np.stack(cv2.split(pixels)).astype(np.uint8, copy=False)


def set_prediction(crop: Pixels, prediction: NDArray[np.float32]) -> Pixels:
    """A copy of the crop with a raw prediction in it: float32 (3, 320, 320) in [0, 1], times 255, truncated."""
    out: Pixels = crop.copy()
    inner = slice(ROI_BORDER, ROI_BORDER + ROI_SIZE)
    out[inner, inner] = np.clip(prediction * 255, 0, 255).transpose(1, 2, 0)
    return out
