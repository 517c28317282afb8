"""The avatar's constructed models: a mouth that follows loudness and the audio encoder that tells it the loudness.

Both keep the interface of the model family, so they pass through every stage as trained ones do; built from plain ONNX
operators, without training. An embedding has 512 elements: element 32 * c + b is the level of coarse band b (0..31, low
to high, mean of 2.5 neighbouring mel bands) at mel column c (0..15) of the window, from 0 (digital silence) to 1.
"""

from __future__ import annotations

import numpy as np
import onnx

from lipsync import avatar, avatar_features
from lipsync.avatar_drawing import Colour
from lipsync.avatar_features import CHIN_SHARE, CHIN_Y, MAX_GAP, MOUTH_HALF_WIDTH, MOUTH_Y, UPPER_SHARE, Mouth
from lipsync.avatar_graph import Graph, Value

BANDS = 32
COLUMNS = 16
EMBEDDINGS = 16
OWN_EMBEDDING = 9  # of the 16, the one whose window starts at the frame's own start

_ROI = 320
_ROI_PER_UNIT = avatar.ROI_PER_UNIT  # ROI pixels a drawing unit
_TOP, _BOTTOM, _LEFT, _RIGHT = 148, 316, 24, 296  # the part of the ROI that ever moves
_LIPS = (164, 238, 92, 228)  # top, bottom, left, right: where the lips at rest are looked for
_QUIET, _LOUD = 0.56, 0.74  # mean speech-band levels at which the mouth is shut and fully open


def loudness_encoder() -> onnx.ModelProto:
    """The demo's audio encoder: `mel_spectrogram` FP32 [n,1,80,16] in [-4,4] -> `audio_features` FP32 [n,512].

    See the module's docstring for what the elements are.
    """
    graph = Graph()
    mel = graph.input("mel_spectrogram")
    bands = graph.add("MatMul", _band_means(80), mel)
    levels = graph.add("Transpose", bands * 0.125 + 0.5, perm=[0, 1, 3, 2])
    features = levels.reshape(0, BANDS * COLUMNS)
    return graph.model(
        "loudness_encoder", {"mel_spectrogram": ["n", 1, 80, 16]}, {"audio_features": (features, ["n", BANDS * COLUMNS])}
    )


def _band_means(mel_bands: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Rows that average `mel_bands` into BANDS coarse ones of equal width, float32 [BANDS, mel_bands]."""
    edges = np.arange(BANDS + 1) * mel_bands / BANDS
    low, high = edges[:-1, None], edges[1:, None]
    band = np.arange(mel_bands)[None, :]
    share = np.clip(np.minimum(high, band + 1) - np.maximum(low, band), 0, None)
    return (share / share.sum(axis=1, keepdims=True)).astype(np.float32)


def _loudness_weights() -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Weights [8192, 1] over a frame's 16 embeddings that give its smoothed mean level of the speech bands.

    Mel columns are 12.5 ms apart and the frame begins at column 0 of its own embedding.
    """
    band = np.zeros(BANDS, np.float32)
    band[2:20] = 1  # about 150 to 2600 Hz: vowels rather than hiss
    weights = np.zeros((EMBEDDINGS, COLUMNS, BANDS), np.float32)
    weights[OWN_EMBEDDING - 1, :3] = np.float32([0.4, 0.6, 0.8])[:, None] * band
    weights[OWN_EMBEDDING, :6] = np.float32([1, 1, 1, 0.9, 0.6, 0.3])[:, None] * band
    return (weights / weights.sum()).reshape(-1, 1)


def mouth_model() -> onnx.ModelProto:
    """The avatar's model: `visual` FP32 [n,6,320,320], `audio` FP32 [n,32,16,16] -> `output` FP32 [n,3,320,320].

    Finds the drawn lips in the ROI, warps the lower face by the opening and paints what shows between the lips. At
    silence the output is the ROI itself. Channels 3-5 (the masked ROI) matter for nothing.
    """
    graph = Graph()
    visual, audio = graph.input("visual"), graph.input("audio")
    roi = visual.part(1, 0, 3)
    level = graph.add("MatMul", audio.reshape(0, EMBEDDINGS * COLUMNS * BANDS), _loudness_weights())
    opening = ((level - _QUIET) * (1 / (_LOUD - _QUIET))).clip().reshape(0, 1, 1, 1)
    moved = _moved_face(graph, roi, opening)
    middle = roi.part(2, _TOP, _BOTTOM)
    middle = graph.add("Concat", middle.part(3, 0, _LEFT), moved, middle.part(3, _RIGHT, _ROI), axis=3)
    output = graph.add("Concat", roi.part(2, 0, _TOP), middle, roi.part(2, _BOTTOM, _ROI), axis=2)
    return graph.model(
        "avatar_mouth",
        {"visual": ["n", 6, _ROI, _ROI], "audio": ["n", 2 * EMBEDDINGS, 16, 16]},
        {"output": (output.clip(), ["n", 3, _ROI, _ROI])},
    )


def _moved_face(graph: Graph, roi: Value, opening: Value) -> Value:
    """The part of the ROI that moves, with the mouth opened: [n,3,_BOTTOM-_TOP,_RIGHT-_LEFT]."""
    still = roi.part(2, _TOP, _BOTTOM).part(3, _LEFT, _RIGHT)
    x, y, tilt = _find_lips(roi)
    columns = np.arange(_LEFT, _RIGHT, dtype=np.float32).reshape(1, 1, 1, -1)
    rows = np.arange(_TOP, _BOTTOM, dtype=np.float32).reshape(1, 1, -1, 1)
    across, down = graph.add("Sub", columns, x), graph.add("Sub", rows, y)
    # Drawing units about the middle of the lips at rest, turned with the head.
    u = (across + tilt * down) * (1 / _ROI_PER_UNIT)
    v = (down - tilt * across) * (1 / _ROI_PER_UNIT)
    narrowing = 1.0 - 0.07 * opening
    s = u / (MOUTH_HALF_WIDTH * narrowing)
    gap = opening * MAX_GAP
    bow = (1.0 - s * s).clip(1e-6, 1.0)
    root = bow.sqrt()
    parting = gap * (root * root.sqrt() - 1e-6**0.75)
    rest = _rest_line((s * s).clip())
    upper, lower = rest - UPPER_SHARE * parting, rest + (1 - UPPER_SHARE) * parting
    shift_u, shift_v = _shifts(graph, u, v, s, gap, upper, lower, opening)
    source_x = columns + (shift_u - tilt * shift_v) * _ROI_PER_UNIT
    source_y = rows + (shift_v + tilt * shift_u) * _ROI_PER_UNIT
    grid = _grid(graph, source_x, source_y)
    warped = graph.add("GridSample", still, grid, mode="bilinear", padding_mode="border", align_corners=1)
    painted = _paint_cavity(warped, s, u, v, upper, lower, parting, gap)
    # uint8 conversion downstream truncates: half a level makes it round. At silence the ROI passes unchanged.
    return still + (opening * 10.0).clip() * (painted + 0.5 / 255 - still)


def _find_lips(roi: Value) -> tuple[Value, Value, Value]:
    """Middle (x, y in ROI pixels) and tilt (radians) of the lips, by the moments of their redness; each [n,1,1,1]."""
    top, bottom, left, right = _LIPS
    area = roi.part(2, top, bottom).part(3, left, right)
    redness = (0.52 * area.part(1, 2, 3) - area.part(1, 1, 2)).clip(0.0, 0.05)
    x = np.arange(left, right, dtype=np.float32).reshape(1, 1, 1, -1) - np.float32(_ROI / 2)
    y = np.arange(top, bottom, dtype=np.float32).reshape(1, 1, -1, 1) - np.float32(_LIPS_Y)
    mass = redness.sum(2, 3) + 1e-3
    mean_x = ((redness * x).sum(2, 3) / mass).clip(-12.0, 12.0)
    mean_y = ((redness * y).sum(2, 3) / mass).clip(-12.0, 12.0)
    dx, dy = x - mean_x, y - mean_y
    weighted = redness * dx
    tilt = ((weighted * dy).sum(2, 3) / ((weighted * dx).sum(2, 3) + 1.0)).clip(-0.06, 0.06)
    return mean_x + _ROI / 2, mean_y + _LIPS_Y, tilt


def _measured_lips() -> tuple[float, np.ndarray[tuple[int], np.dtype[np.float64]]]:
    """Height of the lips' centroid (drawing units) and the line between the lips about it, a polynomial in s squared."""
    top, line, _, bottom = avatar_features.lip_curves(Mouth())
    thickness = bottom[:, 1] - top[:, 1]
    centre = float(np.sum((bottom[:, 1] + top[:, 1]) / 2 * thickness) / np.sum(thickness))
    s = np.linspace(-1, 1, len(line))
    return centre, np.polyfit(s**2, line[:, 1] - centre, 5)


_CENTRE, _LINE = _measured_lips()
_LIPS_Y = _ROI / 2 + (_CENTRE - avatar.RECT_Y) * _ROI_PER_UNIT


def _rest_line(s_squared: Value) -> Value:
    line = s_squared * float(_LINE[0]) + float(_LINE[1])
    for factor in _LINE[2:]:
        line = line * s_squared + float(factor)
    return line


def _shifts(
    graph: Graph, u: Value, v: Value, s: Value, gap: Value, upper: Value, lower: Value, opening: Value
) -> tuple[Value, Value]:
    """Where each pixel comes from, as offsets in drawing units: the jaw falls, the lower lip with it."""
    chin = CHIN_Y - _CENTRE
    fall = gap * CHIN_SHARE
    beside = (1.0 - (u * (1 / 112)) * (u * (1 / 112))).clip()
    jaw = ((v + (_CENTRE - MOUTH_Y + 8)) / (fall + (chin + _CENTRE - MOUTH_Y))).smooth()
    neck = 1.0 - ((v - chin - fall) / (_FLOOR - chin - fall)).smooth()
    base = fall * beside * jaw * neck
    lip = (lower - _rest_line((s * s).clip()) - base).clip(0.0, 100.0)
    below = base + lip * (1.0 - ((v - lower - 9.0) * (1 / 44)).smooth())
    above = (upper - _rest_line((s * s).clip())) * (1.0 - ((upper - v) * (1 / 22)).smooth())
    open_middle = (upper + lower) * 0.5
    shift_v = graph.add("Where", graph.add("Less", v, open_middle), above, below)
    near = (1.0 - s * s * 0.3).clip() * (1.0 - v * v * (1 / 2500)).clip()
    return u * near * opening * 0.07, 0.0 - shift_v


_FLOOR = (_BOTTOM - 4 - _LIPS_Y) / _ROI_PER_UNIT  # where the neck no longer moves, drawing units below the lips


def _grid(graph: Graph, x: Value, y: Value) -> Value:
    """Sampling grid [n,h,w,2] in [-1,1] from ROI pixels."""
    wide = (x - float(_LEFT)) * (2 / (_RIGHT - _LEFT - 1)) - 1.0
    high = (y - float(_TOP)) * (2 / (_BOTTOM - _TOP - 1)) - 1.0
    return graph.add("Transpose", graph.add("Concat", wide, high, axis=1), perm=[0, 2, 3, 1])


def _paint_cavity(
    face: Value, s: Value, u: Value, v: Value, upper: Value, lower: Value, parting: Value, gap: Value
) -> Value:
    """Dark cavity, tongue, upper teeth and the lip's shadow, in the order and colours of the drawing."""
    depth = v - upper
    inside = (depth * 1.0 + 0.5).clip() * ((lower - v) * 1.0 + 0.5).clip() * (parting * 0.5).clip()
    mouth = _tint(avatar_features.CAVITY_DEEP) + (depth * (1 / 22)).smooth() * _difference(
        avatar_features.CAVITY_DEEP, avatar_features.CAVITY
    )
    tongue_y = gap * (1 - UPPER_SHARE) + (float(_LINE[-1]) + 0.5)
    across, down = u * (1 / 22), (v - tongue_y) * (1 / 9)
    tongue = ((1.25 - (across * across + down * down)) * 2.0).smooth() * 0.9
    mouth = mouth + tongue * (_tint(avatar_features.TONGUE) - mouth)
    edge = (gap * 0.55).clip(0.0, 7.5) * (1.0 - s * s * s * s)
    teeth = ((edge - depth) * 0.9 + 0.5).clip() * ((0.42 - s * s) * 8.0).clip() * (gap * 0.3 - 0.4).clip() * 0.95
    mouth = mouth + teeth * (_tint(avatar_features.TEETH) - mouth)
    shadow = (1.0 - depth * (1 / 4.0)).clip() * 0.55
    mouth = mouth + shadow * (_tint(avatar_features.CAVITY_DEEP) - mouth)
    return face + inside * (mouth - face)


def _tint(paint: Colour) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.asarray(paint, np.float32).reshape(1, 3, 1, 1)


def _difference(first: Colour, last: Colour) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return _tint(last) - _tint(first)
