from __future__ import annotations

import numpy as np
import pytest

from training.metrics import Track, closures_reached, correlation, measure, silent_frames
from training.phonemes import Phone
from training.visemes import OPENING, mouth_shapes

PHONES = (
    Phone("pau", 0.0, 0.8),
    Phone("aa", 0.8, 1.1),
    Phone("m", 1.1, 1.2),
    Phone("iy", 1.2, 1.5),
    Phone("b", 1.5, 1.6),
    Phone("ao", 1.6, 1.9),
    Phone("pau", 1.9, 3.0),
)
TRUTH = mouth_shapes(PHONES, 75)[:, OPENING]


def track(predicted: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> Track:
    return Track(predicted.astype(np.float32), TRUTH, PHONES)


def test_the_truth_is_perfect() -> None:
    figures = measure([track(TRUTH), track(TRUTH)])
    assert figures.correlation == pytest.approx(1)
    assert figures.lag_frames == 0
    assert figures.closures_reached == figures.silence_closed == 1
    assert figures.mean_error == 0
    assert figures.frames == 150


@pytest.mark.parametrize("late", [-2, -1, 0, 1, 3])
def test_a_late_mouth_is_told_by_how_much(late: int) -> None:
    assert measure([track(np.roll(TRUTH, late))]).lag_frames == late


def test_a_mouth_that_never_moves_says_nothing() -> None:
    figures = measure([track(np.full(75, 0.3))])
    assert figures.correlation == 0
    assert figures.closures_reached == 0
    assert figures.silence_closed == 0


def test_closures_are_looked_for_within_a_frame() -> None:
    missed = TRUTH.copy()
    missed[int(1.15 * 25) - 1 : int(1.15 * 25) + 2] = 0.2
    assert closures_reached(track(missed)) == [False, True]
    late = np.roll(TRUTH, 1)
    assert closures_reached(track(late)) == [True, True]


def test_silence_lies_away_from_speech() -> None:
    silent = silent_frames(track(TRUTH))
    assert np.flatnonzero(silent).tolist() == [*range(12), *range(55, 75)]


def test_correlation_is_that_of_numpy() -> None:
    noisy = TRUTH + np.random.default_rng(0).normal(0, 0.2, 75).astype(np.float32)
    assert correlation([track(noisy)], 0) == pytest.approx(np.corrcoef(noisy, TRUTH)[0, 1], abs=1e-5)
