"""What the avatar's model learns from: frames of speech become crops of the drawn avatar with the mouths that belong to
them, beside the audio features that the service would give, on disk and in batches.

Crops are cut as at inference. Channels 0-2 of `visual` never show the target's mouth, or the answer would leak: they
show the same frame of the avatar at rest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from torch import Tensor

from compositor.audio import SAMPLE_RATE
from compositor.blending import CROP_SIZE, ROI_BORDER, ROI_SIZE, Pixels, cut_crop
from compositor.errors import InvalidInput
from compositor.features import Embeddings, Features, Windows, clip_features
from compositor.geometry import Box
from lipsync.avatar import Avatar
from lipsync.fusing import MASK
from training.encoder_data import Clip, make_clip
from training.networks import AudioEncoder
from training.speech import Utterance
from training.visemes import Shapes, mouths

Visual: TypeAlias = NDArray[np.float32]
"""Visual input, (6, 320, 320) in [0, 1]: a ROI, and the target's own with the mouth's rectangle black."""
_ROI: Final = slice(ROI_BORDER, ROI_BORDER + ROI_SIZE)
_SAVE_EVERY: Final = 50


@dataclass(frozen=True)
class Moments:
    """Frames of speech to draw: `frames` (n,) of the avatar, mouth `shapes` (n, 5), audio `features` (n,32,16,16)."""

    frames: NDArray[np.int64]
    shapes: Shapes
    features: NDArray[np.float16]

    def __len__(self) -> int:
        return len(self.frames)


@dataclass(frozen=True)
class Pictures:
    """Drawn moments: `crops` (n, 328, 328, 3) uint8 BGR, mapped from disk, and `resting` (m, 328, 328, 3), each of the
    avatar's m frames with its mouth at rest."""

    moments: Moments
    crops: Pixels
    resting: Pixels


def choose_moments(
    utterances: Sequence[Utterance], encoder: AudioEncoder, avatar_frames: int, each: int, seed: int = 0
) -> Moments:
    """`each` frames of every utterance as it sounds once augmented, each on a frame of the avatar drawn by chance."""
    frames, shapes, features = list[NDArray[np.int64]](), list[Shapes](), list[Features]()
    for number, utterance in enumerate(utterances):
        random = np.random.default_rng([seed, 6, number])
        clip = make_clip(utterance, random)
        chosen = np.sort(random.choice(clip.frames, min(each, clip.frames), replace=False))
        frames.append(random.integers(0, avatar_frames, len(chosen)))
        shapes.append(clip.shapes[chosen])
        features.append(audio_features(encoder, clip)[chosen])
    joined = np.concatenate(features).astype(np.float16)
    return Moments(np.concatenate(frames), np.concatenate(shapes), joined)


def keep_moments(path: Path, encoder: AudioEncoder, choose: Callable[[], Moments]) -> Moments:
    """What `choose` gives, from the file `path` if it was kept there for an encoder of the same weights."""
    digest = hashlib.sha256()
    for value in encoder.state_dict().values():
        digest.update(value.cpu().numpy().tobytes())
    if path.exists():
        with np.load(path) as kept:
            if str(kept["encoder"]) == digest.hexdigest():
                return Moments(kept["frames"], kept["shapes"], kept["features"])
    moments = choose()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        kept_for = np.array(digest.hexdigest())
        np.savez(file, encoder=kept_for, frames=moments.frames, shapes=moments.shapes, features=moments.features)
    return moments


def audio_features(encoder: AudioEncoder, clip: Clip) -> Features:
    """The features of all frames of a clip, (frames, 32, 16, 16), exactly as the service makes them."""

    def encode(windows: Windows) -> Embeddings:
        with torch.no_grad():
            return np.asarray(encoder(torch.from_numpy(windows)).numpy(), np.float32)

    encoder.eval()
    return clip_features(clip.samples, SAMPLE_RATE, encode)


def draw_pictures(
    avatar: Avatar, moments: Moments, directory: Path, report: Callable[[int, int], None] | None = None
) -> Pictures:
    """Draws the moments into `directory`, going on where it stopped. `report(done, total)` is called after each.

    Raises InvalidInput where the directory holds pictures of other moments.
    """
    directory.mkdir(parents=True, exist_ok=True)
    resting = np.stack([draw_crop(avatar, frame) for frame in range(avatar.shot.frames)])
    crops, done = _open(directory, moments)
    for number in range(done, len(moments)):
        (mouth,) = mouths(moments.shapes[number : number + 1])
        face = avatar.render(int(moments.frames[number]), mouth)
        crops[number] = _cut(avatar, int(moments.frames[number]), face)
        if (number + 1) % _SAVE_EVERY == 0 or number + 1 == len(moments):
            crops.flush()
            (directory / "done.json").write_text(json.dumps(number + 1))
        if report is not None:
            report(number + 1, len(moments))
    return Pictures(moments, crops, resting)


def draw_crop(avatar: Avatar, frame: int) -> Pixels:
    """The crop of a frame with the mouth at rest, (328, 328, 3) uint8 BGR."""
    return _cut(avatar, frame, avatar.render(frame))


def roi(crop: Pixels) -> NDArray[np.float32]:
    """A crop's ROI as the model sees it, (3, 320, 320) float32 BGR in [0, 1]."""
    planes: NDArray[np.float32] = crop[_ROI, _ROI].transpose(2, 0, 1).astype(np.float32)
    planes *= np.float32(1 / 255)
    return planes


def visual(reference: NDArray[np.float32], target: NDArray[np.float32]) -> Visual:
    """The model's visual input from two ROIs (3, 320, 320): one whole, and the target's with its rectangle black."""
    masked = target.copy()
    masked[:, MASK[0], MASK[1]] = 0
    return np.concatenate([reference, masked])


def picture_batches(
    pictures: Pictures, size: int, seed: int, first_step: int, steps: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches `first_step` to `steps`, the same from wherever training goes on: visual [n,6,320,320], audio
    [n,32,16,16] and the target [n,3,320,320].

    Channels 0-2 show the target's frame with the mouth at rest, as they do at inference.
    """
    count = len(pictures.moments)
    for step in range(first_step, steps):
        seen, heard, wanted = list[Visual](), list[Features](), list[NDArray[np.float32]]()
        for number in range(step * size, (step + 1) * size):
            epoch, place = divmod(number, count)
            index = int(np.random.default_rng([seed, 7, epoch]).permutation(count)[place])
            target = roi(pictures.crops[index])
            resting = roi(np.asarray(pictures.resting[int(pictures.moments.frames[index])]))
            seen.append(visual(resting, target))
            heard.append(pictures.moments.features[index].astype(np.float32))
            wanted.append(target)
        yield tuple(torch.from_numpy(np.stack(part)) for part in (seen, heard, wanted))  # type: ignore[misc]


def _cut(avatar: Avatar, frame: int, picture: Pixels) -> Pixels:
    x1, y1, x2, y2 = avatar.crop_rect(frame)
    return cut_crop(picture, Box(x1, y1, x2 - x1, y2 - y1))


def _open(directory: Path, moments: Moments) -> tuple[np.memmap[tuple[int, ...], np.dtype[np.uint8]], int]:
    """The crops on disk, (n, 328, 328, 3), and how many of them are drawn."""
    path, about = directory / "crops.npy", directory / "moments.npy"
    wanted = np.column_stack([moments.frames, moments.shapes]).astype(np.float32)
    if path.exists() and about.exists():
        if not np.array_equal(np.load(about), wanted):
            raise InvalidInput(f"pictures: {directory} holds those of other moments; give another directory")
        done = json.loads((directory / "done.json").read_text()) if (directory / "done.json").exists() else 0
        return open_memmap(path, mode="r+"), int(done)
    np.save(about, wanted)
    return open_memmap(path, "w+", np.uint8, (len(wanted), CROP_SIZE, CROP_SIZE, 3)), 0
