"""The family's audio encoder and U-Net in PyTorch, to be trained.

Their layers are those of `lipsync.architecture`, name by name, so that `weights` passes weights between both.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional


def wide(channels: int, width: float) -> int:
    """A channel count at a width: the nearest multiple of 8, at least 8, as in `lipsync.architecture`."""
    return max(8, 8 * math.floor(channels * width / 8 + 0.5))


class Normalised(nn.Module):
    """Convolution, then batch normalisation."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        stride: int | tuple[int, int] = 1,
        padding: int | None = None,
        groups: int = 1,
        bias: bool = False,
    ) -> None:
        super().__init__()
        pad = kernel // 2 if padding is None else padding
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, pad, groups=groups, bias=bias)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.bn(self.conv(x)))


class InvertedResidual(nn.Module):
    """IR: 1x1 to twice the channels, 3x3 depthwise, 1x1 to `outputs`; the input is added when `residual`."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, *, residual: bool = False) -> None:
        super().__init__()
        hidden = 2 * inputs
        self.expand = Normalised(inputs, hidden, 1)
        self.depthwise = Normalised(hidden, hidden, 3, stride=stride, groups=hidden)
        self.project = Normalised(hidden, outputs, 1)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.expand(x))
        y = self.project(functional.relu(self.depthwise(y)))
        return x + y if self.residual else cast(Tensor, y)


class Double(nn.Module):
    """DC: an inverted residual that changes the shape, then one that keeps it."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.ir1 = InvertedResidual(inputs, outputs, stride)
        self.ir2 = InvertedResidual(outputs, outputs, residual=True)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.ir2(self.ir1(x)))


class AudioEncoder(nn.Module):
    """Mel windows float32 [n,1,80,16] in [-4,4] -> embeddings float32 [n,512], none negative."""

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        self.width = width
        # channels, stride, residual blocks that follow
        stages = ((32, (1, 1), 2), (64, (3, 1), 2), (128, (3, 3), 2), (256, (3, 2), 1))
        channels = 1
        for number, (outputs, stride, residuals) in enumerate(stages, start=1):
            stage, inputs, channels = nn.Module(), channels, wide(outputs, width)
            stage.conv = Normalised(inputs, channels, 3, stride=stride, bias=True)
            for block in range(1, residuals + 1):
                stage.add_module(f"residual{block}", Normalised(channels, channels, 3, bias=True))
            self.add_module(f"stage{number}", stage)
        self.stage5 = nn.Module()
        self.stage5.conv = Normalised(channels, 512, 3, padding=0, bias=True)
        self.stage5.mix = Normalised(512, 512, 1, bias=True)

    def forward(self, mel: Tensor) -> Tensor:
        x = mel
        for stage in self.children():
            for name, block in stage.named_children():
                y = block(x)
                x = functional.relu(y + x if name.startswith("residual") else y)
        return x.flatten(1)


class AudioBranch(nn.Module):
    """Audio features [n,32,16,16] -> [n,512 w,10,10]."""

    def __init__(self, width: float) -> None:
        super().__init__()
        c64, c128, c256, c512 = (wide(channels, width) for channels in (64, 128, 256, 512))
        self.ir1 = InvertedResidual(32, c64)
        self.ir2 = InvertedResidual(c64, c128)
        self.conv3 = Normalised(c128, c256, 3, bias=True)
        self.ir4 = InvertedResidual(c256, c256, residual=True)
        self.conv5 = Normalised(c256, c512, 3, stride=2, padding=3, bias=True)
        self.ir6 = InvertedResidual(c512, c512, residual=True)
        self.ir7 = InvertedResidual(c512, c512, residual=True)

    def forward(self, audio: Tensor) -> Tensor:
        x = functional.relu(self.conv3(self.ir2(self.ir1(audio))))
        x = functional.relu(self.conv5(self.ir4(x)))
        return cast(Tensor, self.ir7(self.ir6(x)))


class UNet(nn.Module):
    """visual [n,6,320,320] in [0,1] and audio [n,32,16,16] -> output [n,3,320,320] in (0,1), all float32."""

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        self.width = width
        self.audio = AudioBranch(width)
        self.encoder, self.fuse, self.decoder, self.head = (nn.Module() for _ in range(4))
        levels = [wide(channels, width) for channels in (32, 32, 64, 128, 256, 512)]
        first = nn.Module()
        first.ir = InvertedResidual(6, levels[0])
        self.encoder.level0 = first
        for level in range(1, 6):
            self.encoder.add_module(f"level{level}", Double(levels[level - 1], levels[level], 2))
        self.fuse.double1 = Double(2 * levels[5], levels[5])
        self.fuse.double2 = Double(levels[5], levels[4])
        below = levels[4]
        for level, channels in zip(range(4, -1, -1), (128, 64, 32, 32, 16), strict=True):
            outputs = wide(channels, width)
            self.decoder.add_module(f"level{level}", Double(below + levels[level], outputs))
            below = outputs
        self.head.conv = nn.Conv2d(below, 3, 1)

    def forward(self, visual: Tensor, audio: Tensor) -> Tensor:
        skips = [cast(Tensor, self.encoder.get_submodule("level0.ir")(visual))]
        for level in range(1, 6):
            skips.append(self.encoder.get_submodule(f"level{level}")(skips[-1]))
        x = torch.cat([skips.pop(), self.audio(audio)], 1)
        x = self.fuse.get_submodule("double2")(self.fuse.get_submodule("double1")(x))
        for level in range(4, -1, -1):
            x = functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
            x = self.decoder.get_submodule(f"level{level}")(torch.cat([x, skips.pop()], 1))
        return torch.sigmoid(self.head.get_submodule("conv")(x))
