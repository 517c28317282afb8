"""Measures the avatar as a viewer sees it: sentences and a service go in, openings, pictures and figures come out.

Nothing is asked of the models. The mouth is read in the frames that came back, and read in the same way in the avatar
drawn with the true mouth, never compressed. Needs no torch.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from compositor import jpeg
from compositor.audio import Samples
from compositor.blending import CROP_SIZE, ROI_BORDER, Pixels
from compositor.errors import InvalidInput
from compositor.geometry import Box
from compositor.jpeg import Encoding
from lipsync.avatar import Avatar
from lipsync.avatar_features import Mouth
from training.filming import Film, Shown
from training.metrics import Openings, Track, measure, silent_frames
from training.mouth_in_pictures import MouthGauge, mouth_area
from training.picture_quality import colour_step, cut, psnr_db, ssim
from training.takes import Take, speech_frames, steady_frames
from training.visemes import FPS, OPENING, PARAMETERS, closures, mouths

Pair = tuple[Pixels, Pixels]
"""The crop of a frame that came back, and of the truth, BGR uint8 of one shape."""
_AROUND: Final = 2  # pixels around a crop rectangle that are compared too


class Truth:
    """The avatar drawn with true mouths, and the mouth read in it."""

    def __init__(self, avatar: Avatar) -> None:
        self._avatar = avatar
        self.gauge = MouthGauge(avatar.shot)
        # In silence the same pictures come again and again.
        self._drawn = functools.lru_cache(maxsize=2 * avatar.shot.frames)(self._draw)
        self.still = functools.cache(self._still)

    def crop(self, frame: int, mouth: Mouth) -> tuple[Pixels, float]:
        """The part of a frame within `window`, and the opening that is read in the whole of it."""
        # A thousandth of a part is a 33rd of a pixel.
        return self._drawn(frame, *(round(float(getattr(mouth, part)), 3) for part in PARAMETERS))

    def rect(self, frame: int) -> Box:
        """The crop rectangle."""
        x1, y1, x2, y2 = self._avatar.crop_rect(frame)
        return Box(x1, y1, x2 - x1, y2 - y1)

    def window(self, frame: int) -> Box:
        """The crop rectangle and a little around it: all that is compared of a frame."""
        rect = self.rect(frame)
        return Box(rect.x - _AROUND, rect.y - _AROUND, rect.width + 2 * _AROUND, rect.height + 2 * _AROUND)

    def mouth(self, frame: int) -> Box:
        """Where the mouth is, in the coordinates of `window`."""
        return mouth_area(self._avatar.crop_rect(frame)).inside(self.window(frame))

    def borders(self, frame: int) -> tuple[Box, Box]:
        """The edges that could show: of the crop rectangle and of the ROI in it, in the coordinates of `window`."""
        rect = self.rect(frame).inside(self.window(frame))
        edge = round(rect.width * ROI_BORDER / CROP_SIZE)
        return rect, Box(rect.x + edge, rect.y + edge, rect.width - 2 * edge, rect.height - 2 * edge)

    def _draw(self, frame: int, *parts: float) -> tuple[Pixels, float]:
        picture = self._avatar.render(frame, Mouth(**dict(zip(PARAMETERS, parts, strict=True))))
        return cut(picture, self.window(frame)).copy(), self.gauge.opening(picture, frame)

    def _still(self, frame: int) -> Pixels:
        """The original frame within `window`, as JPEG leaves it: the rest of a frame that comes back is just that."""
        picture = jpeg.decode(jpeg.encode(self._avatar.render(frame), Encoding()))
        return cut(picture, self.window(frame)).copy()


@dataclass(frozen=True)
class Observed:
    """A take as it came back, by frames, (n,) each: the openings read in the frames and in the truth; PSNR in dB and
    SSIM of the mouth's area; the PSNR that a mouth at rest would have; the colour steps at both `Truth.borders`,
    (n, 2). `kept`: pictures asked for."""

    take: Take
    predicted: Openings
    truth: Openings
    psnr_db: NDArray[np.float64]
    ssim: NDArray[np.float64]
    resting_psnr_db: NDArray[np.float64]
    steps: NDArray[np.float64]
    kept: dict[int, Pair] = field(default_factory=dict)

    @property
    def track(self) -> Track:
        return Track(self.predicted, self.truth, self.take.phones)


def observe(take: Take, film: Film, truth: Truth, keep: Collection[int] = ()) -> Observed:
    """Films a take and compares each frame with the truth; keeps the pictures of the frames in `keep`.

    Raises InvalidInput where other than one frame for each of the take's came back.
    """
    predicted, true, quality, kept = list[float](), list[float](), list[tuple[float, ...]](), dict[int, Pair]()
    for index, shown, mouth in _shown(take, film):
        expected, opening = truth.crop(shown.number, mouth)
        picture = cut(shown.picture, truth.window(shown.number))
        area, still = truth.mouth(shown.number), truth.still(shown.number)
        predicted.append(truth.gauge.opening(shown.picture, shown.number))
        true.append(opening)
        parts = cut(picture, area), cut(expected, area)
        steps = (colour_step(picture, still, border) for border in truth.borders(shown.number))
        quality.append((psnr_db(*parts), ssim(*parts), psnr_db(cut(still, area), parts[1]), *steps))
        if index in keep:
            kept[index] = (picture.copy(), expected)
    table = np.array(quality)
    read, expected_openings = np.array(predicted, np.float32), np.array(true, np.float32)
    return Observed(take, read, expected_openings, table[:, 0], table[:, 1], table[:, 2], table[:, 3:], kept)


def openings_of(samples: Samples, film: Film, gauge: MouthGauge) -> Openings:
    """The openings read in the frames of any speech, (frames,)."""
    return np.array([gauge.opening(shown.picture, shown.number) for shown in film(samples)], np.float32)


def figures(observed: Sequence[Observed], noisy: Sequence[Openings] | None = None) -> dict[str, Any]:
    """What a voice or several come to, as plain data. noisy: openings of the same takes spoken in noise.

    Pictures count while something is said, colour steps always.
    """
    tracks = [one.track for one in observed]
    drawn = [Track(one.predicted, one.take.shapes[:, OPENING], one.take.phones) for one in observed]
    true = measure([Track(track.truth, track.truth, track.phones) for track in tracks])
    found = {
        "sentences": len(observed),
        "seconds": sum(len(one.truth) for one in observed) / FPS,
        "closures": sum(len(closures(track.phones)) for track in tracks),
        "silent_frames": int(sum(silent_frames(track).sum() for track in tracks)),
        **asdict(measure(tracks)),
        "correlation_with_drawn_opening": measure(drawn).correlation,
        "closures_reached_by_the_truth": true.closures_reached,
        **_picture_figures(observed),
    }
    if noisy is not None:
        heard = [Track(own, one.truth, one.take.phones) for own, one in zip(noisy, observed, strict=True)]
        found["in_noise"] = asdict(measure(heard))
    return found


def _picture_figures(observed: Sequence[Observed]) -> dict[str, float]:
    said = [speech_frames(one.take) for one in observed]
    psnr, likeness, resting = (
        np.concatenate([values[frames] for values, frames in zip(column, said, strict=True)])
        for column in zip(*((one.psnr_db, one.ssim, one.resting_psnr_db) for one in observed), strict=True)
    )
    at_crop, at_roi = np.concatenate([one.steps for one in observed]).mean(axis=0)
    return {
        "mouth_psnr_db": float(psnr.mean()),
        "mouth_psnr_db_of_the_worst_percent": float(np.percentile(psnr, 1)),
        "mouth_psnr_db_of_a_resting_mouth": float(resting.mean()),
        "mouth_ssim": float(likeness.mean()),
        "colour_step_at_crop": float(at_crop),
        "colour_step_at_roi": float(at_roi),
    }


def jitter(observed: Sequence[Observed]) -> dict[str, Any]:
    """How the mouth trembles where it should hold still: the mean absolute second difference of the opening over the
    steady frames of long vowels, predicted and true, in openings a frame squared."""
    predicted, true = list[float](), list[float]()
    for one in observed:
        for k in steady_frames(one.take):
            predicted.append(abs(float(one.predicted[k - 1] - 2 * one.predicted[k] + one.predicted[k + 1])))
            true.append(abs(float(one.truth[k - 1] - 2 * one.truth[k] + one.truth[k + 1])))
    if not predicted:
        raise InvalidInput("jitter: no vowel is long enough; give slower speech")
    return {"frames": len(predicted), "predicted": float(np.mean(predicted)), "truth": float(np.mean(true))}


def _shown(take: Take, film: Film) -> Iterator[tuple[int, Shown, Mouth]]:
    """The frames of a take as they come back, each with its index and its true mouth."""
    true, index = mouths(take.shapes), -1
    for index, shown in enumerate(film(take.samples)):
        if index < len(true):
            yield index, shown, true[index]
    if index + 1 != len(true):
        raise InvalidInput(f"{take.text!r}: {index + 1} frames came back of {len(true)}; use a tenant of 25 fps")
