"""Trains the audio encoder: mel windows to embeddings from which the mouth's shape can be read.

Beside the encoder two small heads are trained and not shipped. One reads a frame's 16 embeddings, as the U-Net will;
the other reads the mouth in the middle of a window from its embedding alone, so that embeddings hold it plainly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from training.checkpoints import load_checkpoint, save_checkpoint
from training.encoder_data import (
    MIDDLE_FRAMES,
    WINDOWS_A_FRAME,
    Batch,
    Clip,
    Sound,
    make_batch,
    make_clip,
    training_batches,
    unchanged,
)
from training.metrics import Track
from training.networks import AudioEncoder
from training.speech import Utterance
from training.visemes import OPENING, PARAMETERS, Shapes

_NOTED: Final = 32  # values that the head keeps of an embedding
_HIDDEN: Final = 128
_OVERSHOOT: Final = 0.05  # of the sigmoid beyond [0, 1], so that a mouth can be quite closed
_SAVE_EVERY: Final = 50  # steps
_PART_WEIGHTS: Final = (4.0, 1.0, 1.0, 0.5, 0.5)  # of the mouth's parameters in the loss


@dataclass(frozen=True)
class EncoderOptions:
    """How to train. `clips` are utterances a step, some 100 windows each; `bfloat16` halves the time where the
    processor knows it and moves results in their third digit."""

    width: float = 0.25
    steps: int = 2400
    clips: int = 6
    learning_rate: float = 2e-3
    seed: int = 0
    bfloat16: bool = False
    data: str = ""
    """What is trained on, in a few words: a checkpoint of other data is refused."""


class MouthReader(nn.Module):
    """The encoder with its two heads."""

    def __init__(self, width: float) -> None:
        super().__init__()
        self.encoder = AudioEncoder(width)
        self.note = nn.Linear(512, _NOTED)
        self.hidden = nn.Linear(WINDOWS_A_FRAME * _NOTED, _HIDDEN)
        self.shape = nn.Linear(_HIDDEN, len(PARAMETERS))
        self.own_shape = nn.Linear(512, len(PARAMETERS))

    def forward(self, windows: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Mouth shapes of frames [f,5] and of windows' middles [w,5], from -0.05 to 1.05.

        windows: [w,1,80,16]. rows: [f,16], the windows that each frame hears.
        """
        embeddings = self.encoder(windows).float()
        noted = functional.relu(self.note(embeddings))
        hidden = functional.relu(self.hidden(noted[rows].flatten(1)))
        return _unit(self.shape(hidden)), _unit(self.own_shape(embeddings))


def train_encoder(
    utterances: Sequence[Utterance],
    options: EncoderOptions,
    checkpoint: Path,
    report: Callable[[int, int, float], None],
) -> MouthReader:
    """Trains from `checkpoint` if it exists, else from the start; saves there every few steps.

    `report(step, steps, loss)` is called after each step. Raises InvalidInput where the checkpoint is of other options.
    """
    torch.manual_seed(options.seed)
    model: MouthReader = MouthReader(options.width).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.01)
    first = load_checkpoint(checkpoint, model, optimizer, options)
    model.train()
    batches = training_batches(utterances, options.clips, options.seed, first, options.steps)
    for step, batch in enumerate(batches, start=first + 1):
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * rate_share(step, options.steps)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bfloat16):
            shapes, own = model(batch.windows, batch.rows)
        value = loss(shapes.float(), own.float(), batch)
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % _SAVE_EVERY == 0 or step == options.steps:
            save_checkpoint(checkpoint, model, optimizer, options, step)
        report(step, options.steps, float(value.detach()))
    return model.eval()


def rate_share(step: int, steps: int) -> float:
    """The share of the learning rate at a step: up to 1 over the first twentieth, then down to 0 as a cosine."""
    warm = max(1, steps // 20)
    if step <= warm:
        return step / warm
    return float(0.5 + 0.5 * np.cos(np.pi * (step - warm) / max(1, steps - warm)))


def loss(shapes: Tensor, own: Tensor, batch: Batch) -> Tensor:
    """The weighted square error of both heads, and of how the opening changes from frame to frame.

    What is inside a closed mouth is not seen, so teeth and tongue count the more the wider it is open.
    """
    parts = torch.tensor(_PART_WEIGHTS).expand_as(batch.shapes).clone()
    parts[:, 3:] *= 0.1 + batch.shapes[:, OPENING, None]
    weights = parts * batch.weights[:, None]
    error = (weights * (shapes - batch.shapes) ** 2).sum(1).mean()
    change = (shapes - batch.shapes)[:, OPENING].diff()[batch.follows[1:]]
    # Window 0 is silence; window k + 1 starts with frame k of the batch.
    middle = torch.zeros_like(batch.follows)
    middle[:-MIDDLE_FRAMES] = batch.follows[1:-1] & batch.follows[2:]
    targets = batch.shapes.roll(-MIDDLE_FRAMES, 0)[middle]
    own_error = (weights.roll(-MIDDLE_FRAMES, 0)[middle] * (own[1:][middle] - targets) ** 2).sum(1).mean()
    return error + 2 * (change**2).mean() + 0.5 * own_error


def predict(model: MouthReader, clip: Clip) -> Shapes:
    """The mouth that the model, in evaluation mode, reads from a clip: (frames, 5) in [0, 1]."""
    batch = make_batch([clip])
    with torch.no_grad():
        shapes, _ = model(batch.windows, batch.rows)
    return cast(Shapes, shapes.clamp(0, 1).numpy())


def make_tracks(
    model: MouthReader, utterances: Sequence[Utterance], sound: Sound = unchanged, seed: int = 0
) -> list[Track]:
    """Predicted and true openings of utterances as `sound` makes them sound."""
    tracks = []
    for number, utterance in enumerate(utterances):
        clip = make_clip(utterance, np.random.default_rng([seed, 5, number]), sound)
        tracks.append(Track(predict(model, clip)[:, OPENING], clip.shapes[:, OPENING], clip.phones))
    return tracks


def _unit(x: Tensor) -> Tensor:
    return torch.sigmoid(x) * (1 + 2 * _OVERSHOOT) - _OVERSHOOT
