"""Models built by hand for tests and benchmarks: a mouth that follows loudness, and the encoder that tells it of it.

Both keep the interface of the model family, so they pass through every stage as trained ones do; built from plain ONNX
operators, without training. An embedding has 512 elements: element 32 * c + b is the level of coarse band b (0..31, low
to high, mean of 2.5 neighbouring mel bands) at mel column c (0..15) of the window, from 0 (digital silence) to 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

from lipsync import avatar_motion, avatar_palette
from lipsync.avatar_drawing import Array, Colour
from lipsync.avatar_features import (
    CHIN_SHARE,
    CHIN_Y,
    MAX_GAP,
    MOUTH_HALF_WIDTH,
    MOUTH_Y,
    NARROWING,
    SAG,
    TEETH_REACH,
    UPPER_SHARE,
    Mouth,
    lip_curves,
)
from lipsync.avatar_graph import Graph, Value

BANDS = 32
COLUMNS = 16
EMBEDDINGS = 16
OWN_EMBEDDING = 9  # of the 16, the one whose window starts at the frame's own start

_ROI = 320
_ROI_PER_UNIT = avatar_motion.ROI_PER_UNIT  # ROI pixels a drawing unit
_TOP, _BOTTOM, _LEFT, _RIGHT = 152, 316, 32, 288  # the part of the ROI that ever moves
_LIPS = (164, 238, 92, 228)  # top, bottom, left, right: where the lips at rest are looked for
# Mean speech-band levels. The mouth begins to open at QUIET and is fully open at LOUD; what stays above QUIET for the
# whole 0.8 s that a frame sees is taken for noise, up to NOISY.
QUIET, NOISY, LOUD = 0.22, 0.32, 0.48


def loudness_encoder() -> onnx.ModelProto:
    """The encoder of `mouth_model`: `mel_spectrogram` FP32 [n,1,80,16] in [-4,4] -> `audio_features` FP32 [n,512].

    See the module's docstring for what the elements are.
    """
    graph = Graph("loudness_encoder")
    mel = graph.input("mel_spectrogram", ["n", 1, 80, COLUMNS])
    bands = graph.add("MatMul", _band_means(80), mel)
    levels = graph.add("Transpose", bands * 0.125 + 0.5, perm=[0, 1, 3, 2])
    graph.output("audio_features", levels.reshape(0, BANDS * COLUMNS), ["n", BANDS * COLUMNS])
    return graph.model()


# What loudness is made of: about 150 to 1500 Hz, the first formant most. Vowels rather than hiss.
_SPEECH_BANDS = np.array([0.85 ** max(0, band - 4) if 1 <= band < 16 else 0 for band in range(BANDS)], np.float32)


def _band_means(mel_bands: int) -> Array:
    """Rows that average `mel_bands` into BANDS coarse ones of equal width, float32 [BANDS, mel_bands]."""
    edges = np.arange(BANDS + 1) * mel_bands / BANDS
    low, high = edges[:-1, None], edges[1:, None]
    band = np.arange(mel_bands)[None, :]
    share = np.clip(np.minimum(high, band + 1) - np.maximum(low, band), 0, None)
    means: Array = (share / share.sum(axis=1, keepdims=True)).astype(np.float32)
    return means


def loudness_weights() -> Array:
    """Weights [8192, 1] over a frame's 16 embeddings that give its smoothed mean level of the speech bands.

    Mel columns are 12.5 ms apart and the frame begins at column 0 of its own embedding.
    """
    weights = np.zeros((EMBEDDINGS, COLUMNS, BANDS), np.float32)
    for column in range(-6, 9):
        share = 1 + np.cos(np.pi * (column - 1.5) / 8)  # some 90 ms wide about the frame's middle: jaws have mass
        frames_ago = max(0, -(column // 3))  # windows start some three columns apart
        weights[OWN_EMBEDDING - frames_ago, column + 3 * frames_ago] = share * _SPEECH_BANDS
    flat: Array = (weights / weights.sum()).reshape(-1, 1)
    return flat


def _opening(graph: Graph, audio: Value) -> Value:
    """How far the mouth opens, [n,1,1,1] in [0, 1], from audio features [n,32,16,16]."""
    level = graph.add("MatMul", audio.reshape(0, EMBEDDINGS * COLUMNS * BANDS), loudness_weights())
    one = np.zeros((COLUMNS, BANDS), np.float32)
    one[:4] = _SPEECH_BANDS
    levels = graph.add("MatMul", audio.reshape(0, EMBEDDINGS, COLUMNS * BANDS), (one / one.sum()).reshape(-1, 1))
    floor = (graph.add("ReduceMin", levels, axes=[1], keepdims=1).reshape(0, 1) + 0.03).clip(QUIET, NOISY)
    return ((level - floor) / (LOUD - floor)).clip().reshape(0, 1, 1, 1)


def mouth_model() -> onnx.ModelProto:
    """The avatar's model: `visual` FP32 [n,6,320,320], `audio` FP32 [n,32,16,16] -> `output` FP32 [n,3,320,320].

    Finds the drawn lips in the ROI, warps the lower face by the opening and paints what shows between the lips. At
    silence the output is the ROI itself. Channels 3-5 (the masked ROI) matter for nothing.
    """
    graph = Graph("avatar_mouth")
    visual = graph.input("visual", ["n", 6, _ROI, _ROI])
    audio = graph.input("audio", ["n", 2 * EMBEDDINGS, 16, 16])
    roi = visual.part(1, 0, 3)
    moved = _moved_face(graph, roi, _opening(graph, audio))
    middle = roi.part(2, _TOP, _BOTTOM)
    middle = graph.add("Concat", middle.part(3, 0, _LEFT), moved, middle.part(3, _RIGHT, _ROI), axis=3)
    output = graph.add("Concat", roi.part(2, 0, _TOP), middle, roi.part(2, _BOTTOM, _ROI), axis=2)
    graph.output("output", output.clip(), ["n", 3, _ROI, _ROI])
    return graph.model()


def _moved_face(graph: Graph, roi: Value, opening: Value) -> Value:
    """The part of the ROI that moves, with the mouth opened: [n,3,_BOTTOM-_TOP,_RIGHT-_LEFT]."""
    still = roi.part(2, _TOP, _BOTTOM).part(3, _LEFT, _RIGHT)
    x, y, tilt = _find_lips(roi)
    columns = np.arange(_LEFT, _RIGHT, dtype=np.float32).reshape(1, 1, 1, -1) * np.float32(1 / _ROI_PER_UNIT)
    rows = np.arange(_TOP, _BOTTOM, dtype=np.float32).reshape(1, 1, -1, 1) * np.float32(1 / _ROI_PER_UNIT)
    across, down = columns - x * (1 / _ROI_PER_UNIT), rows - y * (1 / _ROI_PER_UNIT)
    # Drawing units about the middle of the lips at rest, turned with the head.
    u, v = across + tilt * down, down - tilt * across
    gap = opening * MAX_GAP
    # Two passes: the mouth opens at its full width, then its corners come together.
    wide = _Lips.at(u * (1 / MOUTH_HALF_WIDTH), opening)
    shift = _fall(graph, u, v, wide, gap)
    opened = _resample(graph, still, 2, (rows - shift) * _ROI_PER_UNIT - float(_TOP))
    s = u / ((1.0 - NARROWING * opening) * MOUTH_HALF_WIDTH)
    near = (1.0 - s * s * 0.3).clip() * (1.0 - v * v * (1 / 1600)).clip()
    inwards = u * near * (opening * NARROWING)
    warped = _resample(graph, opened, 3, (columns + inwards + tilt * shift) * _ROI_PER_UNIT - float(_LEFT))
    painted = _paint_cavity(warped, u, v, _Lips.at(s, opening), gap)
    # uint8 conversion downstream truncates: half a level makes it round. At silence the ROI passes unchanged.
    return still + (opening * 10.0).clip() * (painted + 0.5 / 255 - still)


@dataclass(frozen=True)
class _Lips:
    """The lines of the lips at each pixel: `s` across in half-widths, the others down in drawing units."""

    s: Value
    rest: Value
    upper: Value
    lower: Value

    @classmethod
    def at(cls, s: Value, opening: Value) -> _Lips:
        squared = (s * s).clip()
        root = (1.0 - squared).sqrt()
        parting = (opening * MAX_GAP) * (root * root.sqrt().sqrt())
        beyond = (1.45 - 0.45 * s * s).clip()
        sag = (opening * SAG) * squared * beyond
        rest = squared * float(_LINE[0]) + float(_LINE[1])
        for factor in _LINE[2:]:
            rest = rest * squared + float(factor)
        upper = rest + sag - UPPER_SHARE * parting
        return cls(s, rest, upper, upper + parting)


def _resample(graph: Graph, image: Value, axis: int, source: Value) -> Value:
    """The image [n,3,h,w] taken at fractional positions `source` [n,1,h,w] along one axis, linearly.

    GatherElements along each axis in turn takes a tenth of the time that GridSample takes in ONNX Runtime.
    """
    last = (_BOTTOM - _TOP if axis == 2 else _RIGHT - _LEFT) - 1
    source = source.clip(0.0, last - 0.001)
    floor = graph.add("Floor", source)
    # The second clip is for NaN: as an index it would fail the whole batch, so also the rows of other sessions.
    first = graph.add("Clip", graph.add("Cast", floor, to=TensorProto.INT64), np.int64(0), np.int64(last - 1))
    first = graph.add("Concat", first, first, first, axis=1)
    second = first + np.asarray(1, np.int64)
    before, after = (graph.add("GatherElements", image, index, axis=axis) for index in (first, second))
    return before + (source - floor) * (after - before)


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


def _measured_lips() -> tuple[float, npt.NDArray[np.float64]]:
    """Height of the lips' centroid and the line between the lips about it (polynomial in s squared), drawing units."""
    top, line, _, bottom = lip_curves(Mouth())
    thickness = bottom[:, 1] - top[:, 1]
    centre = float(np.sum((bottom[:, 1] + top[:, 1]) / 2 * thickness) / np.sum(thickness))
    s = np.linspace(-1, 1, len(line))
    return centre, np.polyfit(s**2, line[:, 1] - centre, 5)


_CENTRE, _LINE = _measured_lips()
_LIPS_Y = _ROI / 2 + (_CENTRE - avatar_motion.RECT_Y) * _ROI_PER_UNIT
_FLOOR = (_BOTTOM - 4 - _LIPS_Y) / _ROI_PER_UNIT  # where the neck no longer moves, drawing units below the lips


def _fall(graph: Graph, u: Value, v: Value, lips: _Lips, gap: Value) -> Value:
    """How far the picture at each pixel has come down, drawing units: the jaw falls, the lower lip with it."""
    chin = CHIN_Y - _CENTRE
    fall = gap * CHIN_SHARE
    beside = (1.0 - u * u * (1 / 108**2)).clip()
    jaw = ((v + (_CENTRE - MOUTH_Y + 8)) / (fall + (chin + _CENTRE - MOUTH_Y))).smooth()
    neck = 1.0 - ((v - (fall + chin)) / ((_FLOOR - chin) - fall)).smooth()
    base = fall * beside * jaw * neck
    lip = graph.add("Max", lips.lower - lips.rest - base, 0.0)
    below = base + lip * (1.0 - ((v - lips.lower - 9.0) * (1 / 44)).smooth())
    above = (lips.upper - lips.rest) * (1.0 - ((lips.upper - v) * (1 / 22)).smooth())
    return graph.add("Where", graph.add("Less", v + v, lips.upper + lips.lower), above, below)


def _paint_cavity(face: Value, u: Value, v: Value, lips: _Lips, gap: Value) -> Value:
    """Dark cavity, tongue, upper teeth, the lip's shadow and the corners, in the colours of the drawing."""
    depth, s = v - lips.upper, lips.s
    inside = (depth - 0.4).clip() * (lips.lower - v + 1.6).clip() * ((lips.lower - lips.upper) * 0.5).clip()
    deep, front = _tint(avatar_palette.CAVITY_DEEP), _tint(avatar_palette.CAVITY)
    mouth = deep + (depth * (1 / 22)).smooth() * (front - deep)
    tongue_y = gap * (1 - UPPER_SHARE) + (float(_LINE[-1]) + 0.5)
    across, down = u * (1 / 22), (v - tongue_y) * (1 / 9)
    tongue = ((1.25 - (across * across + down * down)) * 2.0).smooth() * 0.9
    mouth = mouth + tongue * (_tint(avatar_palette.TONGUE) - mouth)
    reach = s * s * (1 / TEETH_REACH**2)
    edge = (gap * 0.55).clip(0.0, 7.5) * (1.0 - reach * reach).clip()
    teeth = ((edge - depth) * 0.9 + 0.5).clip() * (edge * 0.5).clip() * 0.95
    mouth = mouth + teeth * (_tint(avatar_palette.TEETH) - mouth)
    shadow = (1.0 - depth * (1 / 4.0)).clip() * 0.55
    mouth = mouth + shadow * (deep - mouth)
    face = face + inside * (mouth - face)
    off_corner, off_line = (s * s - 0.95) * (1 / 0.16), (v + v - lips.upper - lips.lower) * (1 / 4.6)
    crease = (1.0 - off_corner * off_corner).clip() * (1.0 - off_line * off_line).clip() * (gap * 0.12).clip(0.0, 0.85)
    return face + crease * (_tint(avatar_palette.LIP_LINE) - face)


def _tint(paint: Colour) -> Array:
    return np.asarray(paint, np.float32).reshape(1, 3, 1, 1)
