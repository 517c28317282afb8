"""The field's networks as ONNX with seeded random weights: a width and a seed come in, a ModelProto goes out.

The layers are those of the SyncTalk_2D family; where descriptions leave room, the published sizes decide (12,186,935
and 2,812,672 parameters as torch counts them, 4.886 G and 93 M multiply-accumulates), and the docstrings say so.
Nothing here reads or writes a file, and it needs no library but onnx and numpy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx

from compositor.errors import InvalidInput
from lipsync.graph_builder import GraphBuilder
from lipsync.seeded_weights import Array, Filters, Moments, SeededWeights

BATCH = "batch"
VISUAL_SHAPE = (6, 320, 320)
AUDIO_SHAPE = (32, 16, 16)
MOUTH_SHAPE = (3, 320, 320)
MEL_SHAPE = (1, 80, 16)
EMBEDDING_SHAPE = (512,)

# Pixels are in [0, 1] with a black rectangle in half of the channels; embeddings and the mel's [-4, 4] are about unit
# sized.
_PIXELS = Moments(0.4, 0.1)
_EMBEDDINGS = Moments(0.4, 0.4)
_MEL = Moments(0.0, 4.0)
_WIDEST = 4.0
_BN_EPSILON = 1e-5


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the graph: its name, its channels, and what its values are expected to look like."""

    name: str
    channels: int
    moments: Moments


def unet(width: float = 1.0, seed: int = 0) -> onnx.ModelProto:
    """The avatar model: visual FP32 [n,6,320,320] and audio FP32 [n,32,16,16] -> output FP32 [n,3,320,320] in (0, 1).

    `width` scales every channel count inside (to multiples of 8, at least 8), not the interface. The same arguments
    give the same bytes on every platform. Opset 17, IR 8, symbolic batch.

    Settled by the parameter count: the audio branch's two plain 3x3 convolutions have a bias although a BatchNorm
    follows (no other convolution before a BatchNorm has one); the encoder has six stages, of which the first keeps
    320x320; the second block of every DC is residual. BatchNormalization nodes are written, not folded, so that the
    count is the true one; ONNX Runtime folds them when it loads the model.

    Raises InvalidInput on a width outside (0, 4] or a seed outside 0..2**63-1.
    """
    net = _Network("unet", width, seed)
    visual = net.input("visual", VISUAL_SHAPE, _PIXELS)
    audio = _audio_branch(net, net.input("audio", AUDIO_SHAPE, _EMBEDDINGS))

    skips = [net.inverted_residual("encoder/level0/ir", visual, net.wide(32))]
    for level, channels in enumerate((32, 64, 128, 256, 512), start=1):
        skips.append(net.double(f"encoder/level{level}", skips[-1], net.wide(channels), stride=2))

    x = net.concat("fuse/concat", skips.pop(), audio)
    x = net.double("fuse/double1", x, net.wide(512))
    x = net.double("fuse/double2", x, net.wide(256))
    for level, channels in zip(range(4, -1, -1), (128, 64, 32, 32, 16), strict=True):
        x = net.up(f"decoder/level{level}", x, skips.pop(), net.wide(channels))

    x = net.convolution("head/conv", x, MOUTH_SHAPE[0], kernel=1, bias=True)
    net.graph.node("Sigmoid", [x.name], "head/sigmoid", output="output")
    net.graph.output("output", (BATCH, *MOUTH_SHAPE))
    return net.graph.model()


def _audio_branch(net: _Network, audio: _Tensor) -> _Tensor:
    """32x16x16 -> 512x10x10. Padding 3 of the strided convolution is what makes 16 into 10."""
    x = net.inverted_residual("audio/ir1", audio, net.wide(64))
    x = net.inverted_residual("audio/ir2", x, net.wide(128))
    x = net.relu("audio/conv3/relu", net.normalised("audio/conv3", x, net.wide(256), kernel=3, bias=True))
    x = net.inverted_residual("audio/ir4", x, x.channels, residual=True)
    strided = net.normalised("audio/conv5", x, net.wide(512), kernel=3, stride=(2, 2), padding=3, bias=True)
    x = net.relu("audio/conv5/relu", strided)
    x = net.inverted_residual("audio/ir6", x, x.channels, residual=True)
    return net.inverted_residual("audio/ir7", x, x.channels, residual=True)


def audio_encoder(width: float = 1.0, seed: int = 0) -> onnx.ModelProto:
    """The audio encoder: mel_spectrogram FP32 [n,1,80,16] -> audio_features FP32 [n,512].

    `width`, `seed`, the form of the file and the errors are those of `unet`; the 512 of the output never scale.
    Settled by the parameter count: every convolution has a bias, and the 256-channel stage has one residual block where
    the others have two. Every stage ends in ReLU, the last one too, so features are not negative.
    """
    net = _Network("audio_encoder", width, seed)
    x = net.input("mel_spectrogram", MEL_SHAPE, _MEL)
    # channels, stride, residual blocks that follow
    stages = ((32, (1, 1), 2), (64, (3, 1), 2), (128, (3, 3), 2), (256, (3, 2), 1))
    for stage, (channels, stride, residuals) in enumerate(stages, start=1):
        x = net.stacked(f"stage{stage}/conv", x, net.wide(channels), stride=stride)
        for block in range(1, residuals + 1):
            x = net.stacked(f"stage{stage}/residual{block}", x, x.channels, residual=True)
    features = EMBEDDING_SHAPE[0]
    x = net.stacked("stage5/conv", x, features, padding=0)
    x = net.stacked("stage5/mix", x, features, kernel=1, padding=0)
    net.graph.node("Flatten", [x.name], "flatten", output="audio_features", axis=1)
    net.graph.output("audio_features", (BATCH, *EMBEDDING_SHAPE))
    return net.graph.model()


def do_nothing() -> onnx.ModelProto:
    """A model of `unet`'s interface that costs two copies: output = visual[:, 0:3] + 0 * audio[:, 0, 0, 0].

    For benchmarks of everything around the model. Both inputs are really read: a NaN in the audio's first element
    shows.
    """
    graph = GraphBuilder("do_nothing")
    visual = graph.input("visual", (BATCH, *VISUAL_SHAPE))
    audio = graph.input("audio", (BATCH, *AUDIO_SHAPE))
    first, third = _integers(graph, "zero", 0), _integers(graph, "three", 3)
    roi = graph.node("Slice", [visual, first, third, _integers(graph, "channel_axis", 1)], "roi")
    spatial = _integers(graph, "sample_axes", 1, 2, 3)
    begin, end = _integers(graph, "sample_begin", 0, 0, 0), _integers(graph, "sample_end", 1, 1, 1)
    sample = graph.node("Slice", [audio, begin, end, spatial], "audio_sample")
    nothing = graph.node("Mul", [sample, graph.constant("nothing", np.zeros((), np.float32))], "audio_silenced")
    graph.node("Add", [roi, nothing], "join", output="output")
    graph.output("output", (BATCH, *MOUTH_SHAPE))
    return graph.model()


def do_nothing_encoder() -> onnx.ModelProto:
    """A model of `audio_encoder`'s interface that costs one copy: the first 512 of the 1280 mel values."""
    graph = GraphBuilder("do_nothing_encoder")
    mel = graph.input("mel_spectrogram", (BATCH, *MEL_SHAPE))
    flat = graph.node("Flatten", [mel], "flatten", axis=1)
    bounds = [_integers(graph, "begin", 0), _integers(graph, "end", *EMBEDDING_SHAPE), _integers(graph, "axis", 1)]
    graph.node("Slice", [flat, *bounds], "head", output="audio_features")
    graph.output("audio_features", (BATCH, *EMBEDDING_SHAPE))
    return graph.model()


def _integers(graph: GraphBuilder, name: str, *values: int) -> str:
    return graph.constant(name, np.array(values, np.int64))


class _Network:
    """The family's building blocks over a graph under construction, with weights drawn in the order of the calls."""

    def __init__(self, name: str, width: float, seed: int) -> None:
        if not (isinstance(width, int | float) and math.isfinite(width) and 0 < width <= _WIDEST):
            raise InvalidInput(f"width: {width!r} is not a number above 0 and up to {_WIDEST:g}; 1 is the real model")
        if not (isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**63):
            raise InvalidInput(f"seed: {seed!r} is not a whole number from 0 to 2**63 - 1; give one, such as 0")
        self.graph = GraphBuilder(name)
        self._width = width
        self._weights = SeededWeights(seed)

    def wide(self, channels: int) -> int:
        """The channel count at this width: the nearest multiple of 8, at least 8."""
        return max(8, 8 * math.floor(channels * self._width / 8 + 0.5))

    def input(self, name: str, shape: tuple[int, ...], moments: Moments) -> _Tensor:
        return _Tensor(self.graph.input(name, (BATCH, *shape)), shape[0], moments)

    def convolution(
        self,
        name: str,
        x: _Tensor,
        channels: int,
        *,
        kernel: int,
        stride: tuple[int, int] = (1, 1),
        padding: int = 0,
        bias: bool = False,
    ) -> _Tensor:
        """A plain convolution without a BatchNorm; its output's moments are those that He weights give."""
        tensor, _, _ = self._convolve(name, x, channels, kernel, stride, padding, groups=1, bias=bias)
        return tensor

    def normalised(
        self,
        name: str,
        x: _Tensor,
        channels: int,
        *,
        kernel: int,
        stride: tuple[int, int] = (1, 1),
        padding: int | None = None,
        groups: int = 1,
        bias: bool = False,
    ) -> _Tensor:
        """Convolution (padding kernel // 2 unless given), then BatchNormalization."""
        pad = kernel // 2 if padding is None else padding
        y, filters, offset = self._convolve(f"{name}/conv", x, channels, kernel, stride, pad, groups=groups, bias=bias)
        drawn = self._weights.normalisation(filters, offset, x.moments)
        vectors = [("scale", drawn.scale), ("shift", drawn.shift), ("mean", drawn.mean), ("variance", drawn.variance)]
        inputs = [y.name, *(self.graph.constant(f"{name}/bn/{part}", value) for part, value in vectors)]
        made = self.graph.node("BatchNormalization", inputs, f"{name}/bn", epsilon=_BN_EPSILON)
        return _Tensor(made, channels, drawn.output)

    def relu(self, name: str, x: _Tensor) -> _Tensor:
        return replace(x, name=self.graph.node("Relu", [x.name], name), moments=x.moments.rectified())

    def add(self, name: str, x: _Tensor, y: _Tensor) -> _Tensor:
        made = self.graph.node("Add", [x.name, y.name], name)
        return _Tensor(made, x.channels, x.moments.plus(y.moments))

    def concat(self, name: str, x: _Tensor, y: _Tensor) -> _Tensor:
        made = self.graph.node("Concat", [x.name, y.name], name, axis=1)
        channels = x.channels + y.channels
        return _Tensor(made, channels, x.moments.beside(y.moments, y.channels / channels))

    def inverted_residual(
        self, name: str, x: _Tensor, channels: int, *, stride: int = 1, residual: bool = False
    ) -> _Tensor:
        """IR: 1x1 to twice the channels, 3x3 depthwise, 1x1 to `channels`; x is added when `residual`."""
        hidden = 2 * x.channels
        y = self.relu(f"{name}/expand/relu", self.normalised(f"{name}/expand", x, hidden, kernel=1))
        steps = (stride, stride)
        spatial = self.normalised(f"{name}/depthwise", y, hidden, kernel=3, stride=steps, groups=hidden)
        y = self.relu(f"{name}/depthwise/relu", spatial)
        y = self.normalised(f"{name}/project", y, channels, kernel=1)
        return self.add(f"{name}/add", x, y) if residual else y

    def double(self, name: str, x: _Tensor, channels: int, stride: int = 1) -> _Tensor:
        """DC: an inverted residual that changes the shape, then one that keeps it."""
        x = self.inverted_residual(f"{name}/ir1", x, channels, stride=stride)
        return self.inverted_residual(f"{name}/ir2", x, channels, residual=True)

    def up(self, name: str, x: _Tensor, skip: _Tensor, channels: int) -> _Tensor:
        """Up: bilinear x2 with aligned corners, concatenation [up, skip], DC."""
        scales = self.graph.constant(f"{name}/up/scales", np.array([1, 1, 2, 2], np.float32))
        modes = {"mode": "linear", "coordinate_transformation_mode": "align_corners"}
        grown = self.graph.node("Resize", [x.name, "", scales], f"{name}/up", **modes)
        return self.double(name, self.concat(f"{name}/concat", replace(x, name=grown), skip), channels)

    def stacked(
        self,
        name: str,
        x: _Tensor,
        channels: int,
        *,
        kernel: int = 3,
        stride: tuple[int, int] = (1, 1),
        padding: int | None = None,
        residual: bool = False,
    ) -> _Tensor:
        """The audio encoder's block: convolution with bias, BatchNorm, x added when `residual`, ReLU."""
        y = self.normalised(name, x, channels, kernel=kernel, stride=stride, padding=padding, bias=True)
        if residual:
            y = self.add(f"{name}/add", y, x)
        return self.relu(f"{name}/relu", y)

    def _convolve(
        self,
        name: str,
        x: _Tensor,
        channels: int,
        kernel: int,
        stride: tuple[int, int],
        padding: int,
        *,
        groups: int,
        bias: bool,
    ) -> tuple[_Tensor, Filters, Array | None]:
        filters = self._weights.filters(channels, x.channels // groups, kernel)
        inputs = [x.name, self.graph.constant(f"{name}/weight", filters.values())]
        offset = self._weights.vector(channels, -0.1, 0.1) if bias else None
        if offset is not None:
            inputs.append(self.graph.constant(f"{name}/bias", offset))
        shape: dict[str, Any] = {
            "kernel_shape": [kernel] * 2,
            "strides": list(stride),
            "pads": [padding] * 4,
            "group": groups,
        }
        made = self.graph.node("Conv", inputs, name, **shape)
        return _Tensor(made, channels, Moments(0.0, 2 * x.moments.variance)), filters, offset
