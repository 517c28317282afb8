"""The avatar's U-Net as it is trained and shipped: the family's interface and shape, without layers at 320x320.

At a small width nearly all the time goes into the layers at full resolution, however few their channels. So here four
pixels are one with four times the channels (space to depth), the family's levels 1-5 follow at a reduced width, and the
last convolution predicts four pixels at once: what to add to the picture in channels 0-2, which shows the face at rest.
All that does not move thus stays as sharp as it was. Nothing is added outside of the rectangle that is black in
channels 3-5: there they show what is wanted, and the border of the one to the other would leave its traces.

Upsampling does not align corners, as the family's does: so a layer does the same to a part of the picture as to the
whole one but for the part's border, and most of the training needs no more than the part where the mouth is.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias, cast

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from lipsync.architecture import AUDIO_SHAPE, BATCH, MOUTH_SHAPE, VISUAL_SHAPE
from lipsync.fusing import MASK
from lipsync.graph_builder import GraphBuilder
from training.networks import AudioBranch, Double, InvertedResidual, Normalised, wide

_FEWEST = 16  # channels; ONNX Runtime takes as long for fewer on processors with AVX-512
_ENCODER = (32, 64, 128, 256, 512)
_DECODER = (128, 64, 32, 32)


Part: TypeAlias = tuple[slice, slice]
"""Rows and columns of a ROI, whole CELLs of pixels."""
CELL: Final = 32  # pixels of a side that one value of the narrowest layer stands for
WHOLE: Final[Part] = (slice(0, VISUAL_SHAPE[1]), slice(0, VISUAL_SHAPE[2]))


class PackedUNet(nn.Module):
    """visual [n,6,320,320] in [0,1] and audio [n,32,16,16] -> output [n,3,320,320] in [0,1], all float32."""

    def __init__(self, width: float = 0.25) -> None:
        super().__init__()
        self.width = width
        self.audio = AudioBranch(width)
        levels = [_wide(channels, width) for channels in _ENCODER]
        inputs = [4 * VISUAL_SHAPE[0], *levels]
        self.encoder = nn.ModuleList(Double(inputs[i], levels[i], 1 if i == 0 else 2) for i in range(5))
        self.fuse = nn.ModuleList([Double(2 * levels[4], levels[4]), Double(levels[4], levels[3])])
        self.decoder, below = nn.ModuleList(), levels[3]
        for channels, skip in zip(_DECODER, levels[3::-1], strict=True):
            self.decoder.append(Double(below + skip, _wide(channels, width)))
            below = _wide(channels, width)
        self.head = nn.Conv2d(below, 4 * MOUTH_SHAPE[0], 1)
        inside = torch.from_numpy(np.prod(np.broadcast_arrays(*_inside()), axis=0))
        self.register_buffer("inside", inside, persistent=False)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(cast(Tensor, self.head.bias))

    def forward(self, visual: Tensor, audio: Tensor) -> Tensor:
        """The picture, clipped to [0,1]."""
        return self.predict(visual, audio).clamp(0, 1)

    def predict(self, visual: Tensor, audio: Tensor, part: Part = WHOLE) -> Tensor:
        """The picture before clipping, which has a gradient everywhere. `visual` holds no more than the part."""
        skips, x = list[Tensor](), pack(visual)
        for block in self.encoder:
            x = block(x)
            skips.append(x)
        rows, columns = (slice(side.start // CELL, side.stop // CELL) for side in part)
        x = torch.cat([skips.pop(), self.audio(audio)[:, :, rows, columns]], 1)
        for block in self.fuse:
            x = block(x)
        for block in self.decoder:
            x = functional.interpolate(x, scale_factor=2, mode="bilinear")
            x = block(torch.cat([x, skips.pop()], 1))
        rows, columns = part
        inside = cast(Tensor, self.inside)[:, :, rows, columns]
        return visual[:, : MOUTH_SHAPE[0]] + inside * unpack(self.head(x))


def _inside() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """1 where channels 3-5 are black, else 0: by rows [1,1,320,1] and by columns [1,1,1,320]."""
    rows, columns = (np.zeros(size, np.float32) for size in MOUTH_SHAPE[1:])
    rows[MASK[0]], columns[MASK[1]] = 1, 1
    return rows.reshape(1, 1, -1, 1), columns.reshape(1, 1, 1, -1)


def _wide(channels: int, width: float) -> int:
    return max(_FEWEST, wide(channels, width))


def pack(x: Tensor) -> Tensor:
    """[n,c,2h,2w] -> [n,4c,h,w] in the order of ONNX's SpaceToDepth."""
    n, c, h, w = x.shape
    parts = x.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4)
    return parts.reshape(n, 4 * c, h // 2, w // 2)


def unpack(x: Tensor) -> Tensor:
    """[n,4c,h,w] -> [n,c,2h,2w]: the opposite of `pack`, ONNX's DepthToSpace (mode DCR)."""
    n, c, h, w = x.shape
    parts = x.reshape(n, 2, 2, c // 4, h, w).permute(0, 3, 4, 1, 5, 2)
    return parts.reshape(n, c // 4, 2 * h, 2 * w)


def packed_graph(module: PackedUNet) -> onnx.ModelProto:
    """The module with its weights as ONNX, batch normalisations folded into their convolutions: `visual` and `audio`
    -> `output` as the family has them, opset 17, symbolic batch."""
    writer = _Writer("packed_unet")
    visual = writer.graph.input("visual", (BATCH, *VISUAL_SHAPE))
    heard = _write_audio(writer, module.audio, writer.graph.input("audio", (BATCH, *AUDIO_SHAPE)))
    skips, x = list[str](), writer.graph.node("SpaceToDepth", [visual], "pack", blocksize=2)
    for number, block in enumerate(module.encoder):
        x = writer.double(f"encoder/{number}", cast(Double, block), x)
        skips.append(x)
    x = writer.graph.node("Concat", [skips.pop(), heard], "fuse/concat", axis=1)
    for number, block in enumerate(module.fuse):
        x = writer.double(f"fuse/{number}", cast(Double, block), x)
    for number, block in enumerate(module.decoder):
        x = writer.grow(f"decoder/{number}/up", x)
        x = writer.graph.node("Concat", [x, skips.pop()], f"decoder/{number}/concat", axis=1)
        x = writer.double(f"decoder/{number}", cast(Double, block), x)
    bias = cast(Tensor, module.head.bias)
    x = writer.convolution("head", module.head, x, _array(module.head.weight), _array(bias))
    change = writer.graph.node("DepthToSpace", [x], "unpack", blocksize=2)
    sides = zip(("rows", "columns"), _inside(), strict=True)
    inside = writer.graph.node("Mul", [writer.graph.constant(f"inside/{name}", side) for name, side in sides], "inside")
    change = writer.graph.node("Mul", [change, inside], "change")
    bounds = (("first", 0), ("last", MOUTH_SHAPE[0]), ("axis", 1))
    indices = [writer.graph.constant(f"rest/{name}", np.array([value], np.int64)) for name, value in bounds]
    rest = writer.graph.node("Slice", [visual, *indices], "rest")
    limits = [writer.graph.constant(f"clip/{name}", np.float32(value)) for name, value in (("low", 0), ("high", 1))]
    picture = writer.graph.node("Add", [rest, change], "picture")
    writer.graph.node("Clip", [picture, *limits], "clip", output="output")
    writer.graph.output("output", (BATCH, *MOUTH_SHAPE))
    return writer.graph.model()


def _write_audio(writer: _Writer, branch: AudioBranch, x: str) -> str:
    x = writer.inverted("audio/ir1", branch.ir1, x)
    x = writer.inverted("audio/ir2", branch.ir2, x)
    x = writer.normalised("audio/conv3", branch.conv3, x, relu=True)
    x = writer.inverted("audio/ir4", branch.ir4, x)
    x = writer.normalised("audio/conv5", branch.conv5, x, relu=True)
    return writer.inverted("audio/ir7", branch.ir7, writer.inverted("audio/ir6", branch.ir6, x))


class _Writer:
    """Writes the family's blocks as nodes; tensors go by name."""

    def __init__(self, name: str) -> None:
        self.graph = GraphBuilder(name)

    def convolution(
        self, name: str, conv: nn.Conv2d, x: str, weight: NDArray[np.float32], bias: NDArray[np.float32]
    ) -> str:
        inputs = [x, self.graph.constant(f"{name}/weight", weight), self.graph.constant(f"{name}/bias", bias)]
        pad = cast(tuple[int, int], conv.padding)
        shape: dict[str, Any] = {"kernel_shape": list(conv.kernel_size), "strides": list(conv.stride)}
        return self.graph.node("Conv", inputs, name, pads=[*pad, *pad], group=conv.groups, **shape)

    def normalised(self, name: str, block: Normalised, x: str, *, relu: bool) -> str:
        conv, norm = block.conv, block.bn
        mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
        scale = norm.weight / torch.sqrt(variance + norm.eps)
        offset = -mean if conv.bias is None else conv.bias - mean
        weight = conv.weight * scale[:, None, None, None]
        x = self.convolution(name, conv, x, _array(weight), _array(offset * scale + norm.bias))
        return self.graph.node("Relu", [x], f"{name}/relu") if relu else x

    def inverted(self, name: str, block: InvertedResidual, x: str) -> str:
        y = self.normalised(f"{name}/expand", block.expand, x, relu=True)
        y = self.normalised(f"{name}/depthwise", block.depthwise, y, relu=True)
        y = self.normalised(f"{name}/project", block.project, y, relu=False)
        return self.graph.node("Add", [x, y], f"{name}/add") if block.residual else y

    def double(self, name: str, block: Double, x: str) -> str:
        return self.inverted(f"{name}/ir2", block.ir2, self.inverted(f"{name}/ir1", block.ir1, x))

    def grow(self, name: str, x: str) -> str:
        """Twice the size, bilinear between the pixels' middles."""
        scales = self.graph.constant(f"{name}/scales", np.array([1, 1, 2, 2], np.float32))
        modes = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
        return self.graph.node("Resize", [x, "", scales], name, **modes)


def _array(value: Tensor) -> NDArray[np.float32]:
    return np.ascontiguousarray(value.detach().cpu().numpy(), np.float32)
