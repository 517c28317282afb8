"""Trains the avatar's U-Net on drawn pictures and cached audio features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from training.checkpoints import load_checkpoint, save_checkpoint
from training.encoder import rate_share
from training.packed import PackedUNet
from training.pictures import Pictures, picture_batches

MOUTH_AREA: Final = (slice(160, 312), slice(72, 248))
"""Rows and columns of the ROI where the drawn mouth and chin move."""
_MOUTH_WEIGHT: Final = 4.0  # of an error there
_EDGE_WEIGHT: Final = 2.0  # of the differences between neighbouring pixels: sharp lips and teeth
_SAVE_EVERY: Final = 50  # steps


@dataclass(frozen=True)
class AvatarOptions:
    """How to train; `pictures` a step."""

    width: float = 0.25
    steps: int = 6000
    pictures: int = 8
    learning_rate: float = 2e-3
    seed: int = 0
    bfloat16: bool = False


def train_avatar(
    pictures: Pictures, options: AvatarOptions, checkpoint: Path, report: Callable[[int, int, float], None]
) -> PackedUNet:
    """Trains from `checkpoint` if it exists, else from the start; saves there every few steps.

    `report(step, steps, loss)` is called after each step. Raises InvalidInput where the checkpoint is of other options.
    """
    torch.manual_seed(options.seed)
    model: PackedUNet = PackedUNet(options.width).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.01)
    first = load_checkpoint(checkpoint, model, optimizer, options)
    model.train()
    batches = picture_batches(pictures, options.pictures, options.seed, first, options.steps)
    for step, (visual, audio, target) in enumerate(batches, start=first + 1):
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * rate_share(step, options.steps)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bfloat16):
            output = model.predict(visual, audio)
        value = picture_loss(output.float(), target)
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % _SAVE_EVERY == 0 or step == options.steps:
            save_checkpoint(checkpoint, model, optimizer, options, step)
        report(step, options.steps, float(value.detach()))
    return model.eval()


def picture_loss(output: Tensor, target: Tensor) -> Tensor:
    """The mean absolute error of pixels and of their differences along rows and columns, [n,3,320,320] both.

    The mouth's area counts _MOUTH_WEIGHT times more.
    """
    error = output - target
    rows, columns = MOUTH_AREA
    mouth = error[:, :, rows, columns]
    return _mean(error) + _MOUTH_WEIGHT * _mean(mouth)


def _mean(error: Tensor) -> Tensor:
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + _EDGE_WEIGHT * edges
