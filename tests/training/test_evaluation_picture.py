from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="the training extra is not installed")

from training.evaluation import Observed
from training.evaluation_picture import Moment, choose_moments, draw_evaluation
from training.phonemes import Phone
from training.recordings import Recording
from training.takes import Take
from training.visemes import OPENING, mouth_shapes


def take(*symbols: str) -> Take:
    phones = tuple(Phone(symbol, 0.2 * k, 0.2 * k + 0.2) for k, symbol in enumerate(symbols))
    return Take(" ".join(symbols), "nobody", np.zeros(16_000, np.float32), phones, mouth_shapes(phones, 25))


def observed(of: Take) -> Observed:
    true, nothing = of.shapes[:, OPENING], np.zeros(25)
    return Observed(of, 0.9 * true, true, nothing, nothing, nothing, np.zeros((25, 2)))


def test_moments_come_from_different_takes_as_far_as_there_are_any() -> None:
    takes = [take("pau", "p", "aa", "pau"), take("pau", "b", "aa", "m"), take("pau", "iy", "pau", "pau")]
    assert choose_moments(takes, ["p", "aa", "m", "zh", "pau"]) == [
        Moment(0, 7, "p"),
        Moment(1, 12, "aa"),
        Moment(1, 17, "m"),
        Moment(1, 2, "pau"),
    ]


def test_a_picture_with_everything_and_one_with_little(tmp_path: Path) -> None:
    one = observed(take("pau", "p", "aa", "pau"))
    crop = np.full((308, 308, 3), 90, np.uint8)
    word = (Recording("Front Left", np.zeros(16_000, np.float32)), np.zeros(25, np.float32))
    noisy = np.zeros(25, np.float32)
    everything, little = tmp_path / "everything.png", tmp_path / "little.png"
    draw_evaluation(everything, [("known", one, None), ("other", one, noisy)], [word], [("p", (crop, crop + 90))] * 9)
    draw_evaluation(little, [("known", one, None)], [], [("p", (crop, crop))])
    large, small = (cv2.imread(str(path)) for path in (everything, little))
    assert large is not None
    assert small is not None
    assert large.shape[0] > small.shape[0]
    assert large.shape[1] == small.shape[1]
    # The crops' greys are in it, the frame's and the truth's.
    assert {90, 180} <= set(np.unique(large[large.shape[0] // 2 :, :, 0]).tolist())
