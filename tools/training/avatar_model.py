"""Trains the avatar's U-Net on drawn pictures and cached audio features.

A U-Net left to itself takes thousands of steps before its pictures depend on what it hears. So it learns in three
stages. Its audio branch first learns to tell the mouth's shape, without pictures; then all of it learns the part of the
picture where the mouth is, a third of the work; last the whole picture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lipsync.architecture import AUDIO_SHAPE
from training.checkpoints import load_checkpoint, save_checkpoint
from training.encoder import rate_share
from training.networks import AudioBranch
from training.packed import WHOLE, PackedUNet, Part
from training.pictures import Moments, Pictures, picture_batches
from training.visemes import PARAMETERS

MOUTH_AREA: Final = (slice(160, 312), slice(72, 248))
"""Rows and columns of the ROI where the drawn mouth and chin move."""
_MOUTH_WEIGHT: Final = 4.0  # of an error there
_EDGE_WEIGHT: Final = 2.0  # of the differences between neighbouring pixels: sharp lips and teeth
MOUTH_PART: Final = (slice(128, 320), slice(64, 256))
"""What the net sees of the ROI for most of the training: that area and what is around it."""
_HEARD: Final = 64  # moments a step of listening
_SAVE_EVERY: Final = 50  # steps


@dataclass(frozen=True)
class AvatarOptions:
    """How to train: `listening` steps of the audio branch alone, then `steps` of `pictures` each and `again` as many as
    that at half the rate, the last `whole` of both on whole pictures. `blur` is the share of audio features left out by
    chance, so that no single one counts."""

    width: float = 0.25
    listening: int = 800
    steps: int = 3000
    again: int = 1800
    whole: int = 300
    pictures: int = 16
    learning_rate: float = 4e-3
    blur: float = 0.1
    seed: int = 0
    bfloat16: bool = False
    data: str = ""
    """What is trained on, as for the encoder."""


def train_avatar(
    pictures: Pictures, options: AvatarOptions, checkpoint: Path, report: Callable[[str, int, int, float], None]
) -> PackedUNet:
    """Trains from `checkpoint` if it exists, else from the start; saves there every few steps.

    `report(stage, step, steps, loss)` is called after each step. Raises InvalidInput where the checkpoint is of other
    options.
    """
    torch.manual_seed(options.seed)
    model: PackedUNet = PackedUNet(options.width).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.01)
    first = load_checkpoint(checkpoint, model, optimizer, options)
    model.train()
    if first == 0:
        listen(model.audio, pictures.moments, options, report)
    steps = options.steps + options.again
    batches = picture_batches(pictures, options.pictures, options.seed, first, steps)
    for step, (visual, audio, target) in enumerate(batches, start=first + 1):
        part, rate = plan(step, options)
        _set_rate(optimizer, rate)
        torch.manual_seed(options.seed + step)  # what is left out is the same from wherever training goes on
        optimizer.zero_grad(set_to_none=True)
        rows, columns = part
        seen = visual[:, :, rows, columns].contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bfloat16):
            output = model.predict(seen, functional.dropout(audio, options.blur), part)
        value = picture_loss(output.float(), target[:, :, rows, columns], part)
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % _SAVE_EVERY == 0 or step == steps:
            save_checkpoint(checkpoint, model, optimizer, options, step)
        report("pictures", step, steps, float(value.detach()))
    return model.eval()


def plan(step: int, options: AvatarOptions) -> tuple[Part, float]:
    """What of the pictures step `step` (from 1) sees, and its learning rate."""
    peak, total = options.learning_rate, options.steps
    if step > options.steps:
        step, peak, total = step - options.steps, peak / 2, options.again
    return WHOLE if step > total - options.whole else MOUTH_PART, peak * rate_share(step, total)


def listen(
    branch: AudioBranch, moments: Moments, options: AvatarOptions, report: Callable[[str, int, int, float], None]
) -> None:
    """Teaches the audio branch to tell mouth shapes, with a linear layer that is then thrown away."""
    head = nn.Linear(branch(torch.zeros(2, *AUDIO_SHAPE)).flatten(1).shape[1], len(PARAMETERS))
    optimizer = torch.optim.AdamW([*branch.parameters(), *head.parameters()], options.learning_rate / 2)
    for step in range(1, options.listening + 1):
        _set_rate(optimizer, options.learning_rate / 2 * rate_share(step, options.listening))
        chosen = np.random.default_rng([options.seed, 8, step]).choice(len(moments), min(_HEARD, len(moments)))
        audio = torch.from_numpy(moments.features[chosen].astype(np.float32))
        optimizer.zero_grad(set_to_none=True)
        told = head(branch(functional.dropout(audio, options.blur)).flatten(1))
        value = functional.mse_loss(told, torch.from_numpy(moments.shapes[chosen].astype(np.float32)))
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        report("listen", step, options.listening, float(value.detach()))


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def picture_loss(output: Tensor, target: Tensor, part: Part = WHOLE) -> Tensor:
    """The mean absolute error of pixels and of their differences along rows and columns, [n,3,h,w] both, of a part.

    The mouth's area counts _MOUTH_WEIGHT times more.
    """
    error = output - target
    sides = zip(MOUTH_AREA, part, strict=True)
    rows, columns = (slice(area.start - whole.start, area.stop - whole.start) for area, whole in sides)
    mouth = error[:, :, rows, columns]
    return _mean(error) + _MOUTH_WEIGHT * _mean(mouth)


def _mean(error: Tensor) -> Tensor:
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + _EDGE_WEIGHT * edges
