"""What the audio encoder learns from: utterances come in, batches of mel windows with the mouth's true shapes go out.

Windows, their order and what a frame hears outside the speech are those of `compositor.features` at 25 fps with silence
at the edges; one embedding then serves all 16 frames that look at it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compositor.audio import BANDS, SAMPLE_RATE, SILENCE_MEL, Mel, Samples, mel_spectrogram
from compositor.features import FIRST_WINDOW, LAST_WINDOW, WINDOW_COLUMNS, Windows, frame_count, window_starts
from training.augmentation import augment
from training.phonemes import BILABIALS, Phone
from training.speech import Utterance
from training.visemes import CLOSED, FPS, OPENING, Shapes, mouth_shapes

WINDOWS_A_FRAME: Final = LAST_WINDOW - FIRST_WINDOW + 1
MIDDLE_FRAMES: Final = 2
"""The middle of the window that starts with frame k, 94 ms later, is nearest to the middle of frame k + 2."""
_PADDING_S: Final = (0.1, 0.6)  # of silence before and after an utterance

Sound = Callable[[Samples, np.random.Generator], Samples]


@dataclass(frozen=True)
class Clip:
    """Speech as it is heard, and the mouth that belongs to it: `shapes` (frames, 5)."""

    samples: Samples
    phones: tuple[Phone, ...]
    shapes: Shapes

    @property
    def frames(self) -> int:
        return len(self.shapes)


@dataclass(frozen=True)
class Batch:
    """Clips side by side. `windows` [w,1,80,16], the first one silence; `rows` [f,16] of windows that each frame hears;
    `shapes` [f,5]; `weights` [f] of frames; `follows` [f], false on a clip's first frame."""

    windows: Tensor
    rows: Tensor
    shapes: Tensor
    weights: Tensor
    follows: Tensor


def make_clip(utterance: Utterance, random: np.random.Generator, sound: Sound = augment) -> Clip:
    """The utterance with silence around it, made to sound by `sound`, and its mouth."""
    before, after = (round(random.uniform(*_PADDING_S) * SAMPLE_RATE) for _ in range(2))
    samples = sound(np.pad(utterance.samples, (before, after)), random)
    shift = before / SAMPLE_RATE
    phones = tuple(Phone(phone.symbol, phone.start_s + shift, phone.end_s + shift) for phone in utterance.phones)
    return Clip(samples, phones, mouth_shapes(phones, frame_count(len(samples), FPS)))


def unchanged(samples: Samples, random: np.random.Generator) -> Samples:
    """A Sound: the samples as they are."""
    return samples


def clip_windows(samples: Samples, frames: int) -> Windows:
    """The windows that start with each frame of a clip, (frames, 1, 80, 16); the last ones move back to the end."""
    mel = mel_spectrogram(samples)
    own = [window_starts(frame, FPS)[-FIRST_WINDOW] for frame in range(frames)]
    return _cut(mel, np.minimum(own, len(mel) - WINDOW_COLUMNS))


def frame_rows(frames: int) -> NDArray[np.int64]:
    """Which of a clip's windows each frame hears, (frames, 16), counted from 1; 0 is silence, outside the clip."""
    window = np.arange(frames)[:, None] + np.arange(FIRST_WINDOW, LAST_WINDOW + 1)[None, :]
    return np.where((window >= 0) & (window < frames), window + 1, 0)


def make_batch(clips: Sequence[Clip]) -> Batch:
    """Clips as one batch, each at least 0.2 s long."""
    silence = np.full((1, 1, BANDS, WINDOW_COLUMNS), SILENCE_MEL, np.float32)
    windows, rows, at = [silence], list[NDArray[np.int64]](), 0
    for clip in clips:
        windows.append(clip_windows(clip.samples, clip.frames))
        own = frame_rows(clip.frames)
        rows.append(np.where(own > 0, own + at, 0))
        at += clip.frames
    first = [np.arange(clip.frames) > 0 for clip in clips]
    return Batch(
        windows=torch.from_numpy(np.concatenate(windows)),
        rows=torch.from_numpy(np.concatenate(rows)),
        shapes=torch.from_numpy(np.concatenate([clip.shapes for clip in clips])),
        weights=torch.from_numpy(np.concatenate([_frame_weights(clip) for clip in clips])),
        follows=torch.from_numpy(np.concatenate(first)),
    )


def training_batches(
    utterances: Sequence[Utterance], clips_a_batch: int, seed: int, first_step: int, steps: int
) -> Iterator[Batch]:
    """Batches `first_step` to `steps`; each is the same whatever step the training starts from.

    All utterances come once before one comes again, every time in another order and with other sounds.
    """
    for step in range(first_step, steps):
        clips = list[Clip]()
        for number in range(step * clips_a_batch, (step + 1) * clips_a_batch):
            epoch, place = divmod(number, len(utterances))
            order = np.random.default_rng([seed, 3, epoch]).permutation(len(utterances))
            random = np.random.default_rng([seed, 4, number])
            clips.append(make_clip(utterances[int(order[place])], random))
        yield make_batch(clips)


def _cut(mel: Mel, starts: NDArray[np.int64]) -> Windows:
    columns = starts[:, None] + np.arange(WINDOW_COLUMNS)[None, :]
    return np.ascontiguousarray(mel[columns].transpose(0, 2, 1)[:, None])


def _frame_weights(clip: Clip) -> NDArray[np.float32]:
    """1 a frame, 3 where lips close for a phone: those frames are few and are what one sees."""
    weights = np.ones(clip.frames, np.float32)
    seconds = (np.arange(clip.frames) + 0.5) / FPS
    for phone in clip.phones:
        if phone.symbol in BILABIALS:
            near = np.abs(seconds - phone.middle_s) < 1.5 / FPS
            weights[near & (clip.shapes[:, OPENING] < CLOSED)] = 3.0
    return weights
