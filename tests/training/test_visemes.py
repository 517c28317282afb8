from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compositor.errors import InvalidInput
from training.phonemes import BILABIALS, LABIODENTALS, PAUSE, PHONEMES, Phone
from training.visemes import (
    CLOSED,
    FPS,
    OPENING,
    PARAMETERS,
    TEETH,
    closures,
    mouth_shapes,
    mouths,
    shapes_at,
)

SYMBOLS = sorted(PHONEMES)
VOWELS = ["aa", "ae", "ah", "ao", "eh", "iy", "uw"]


def in_time(parts: list[tuple[str, float]], start_s: float = 0.0) -> list[Phone]:
    phones, at = list[Phone](), start_s
    for symbol, length in parts:
        phones.append(Phone(symbol, at, at + length))
        at += length
    return phones


speeches = st.builds(
    in_time,
    st.lists(st.tuples(st.sampled_from(SYMBOLS), st.floats(0.03, 0.35)), min_size=1, max_size=25),
    st.floats(0, 0.5),
)


@given(speeches)
def test_shapes_stay_in_range(phones: list[Phone]) -> None:
    shapes = mouth_shapes(phones, 60)
    assert shapes.shape == (60, len(PARAMETERS))
    assert shapes.dtype == np.float32
    assert np.isfinite(shapes).all()
    assert shapes.min() >= 0
    assert shapes.max() <= 1


@given(speeches)
def test_every_bilabial_closes_the_lips_in_a_frame_of_its_own(phones: list[Phone]) -> None:
    frames = int(phones[-1].end_s * FPS) + 3
    openings = mouth_shapes(phones, frames)[:, OPENING]
    for phone in closures(phones):
        frame = int(phone.middle_s * FPS)
        assert openings[max(0, frame - 1) : frame + 2].min() == 0


@given(speeches)
def test_silence_is_a_closed_mouth(phones: list[Phone]) -> None:
    seconds = np.arange(0, phones[-1].end_s + 1, 0.01)
    openings = shapes_at(phones, seconds)[:, OPENING]
    silent = np.ones(len(seconds), bool)
    for phone in phones:
        if phone.symbol != PAUSE:
            silent &= (seconds < phone.start_s - 0.1) | (seconds > phone.end_s + 0.1)
    assert (openings[silent] < CLOSED).all()


@given(speeches)
def test_mouths_move_smoothly(phones: list[Phone]) -> None:
    step_s = 0.001
    shapes = shapes_at(phones, np.arange(0, phones[-1].end_s + 0.3, step_s))
    assert np.abs(np.diff(shapes, axis=0)).max() < 50 * step_s


@pytest.mark.parametrize("symbol", sorted(LABIODENTALS))
@pytest.mark.parametrize("vowel", VOWELS)
def test_f_and_v_bring_the_teeth_to_the_lip(symbol: str, vowel: str) -> None:
    shape = shapes_at(in_time([(vowel, 0.2), (symbol, 0.09), (vowel, 0.2)]), np.array([0.245]))[0]
    (mouth,) = mouths(shape[None])
    assert shape[TEETH] == pytest.approx(1.0)
    assert CLOSED < mouth.opening < 0.2
    # As deep as the drawing makes them: they cover nine tenths of what is between the lips.
    assert min(7.5, 0.55 * mouth.gap) * mouth.teeth / 0.6 > 0.9 * mouth.gap


@pytest.mark.parametrize("vowel", VOWELS)
def test_neighbours_colour_a_sound(vowel: str) -> None:
    """An s between rounded vowels is rounder than one between spread ones."""
    alone = shapes_at(in_time([("s", 0.09)], 0.2), np.array([0.245]))[0]
    beside = shapes_at(in_time([(vowel, 0.2), ("s", 0.09), (vowel, 0.2)]), np.array([0.245]))[0]
    assert not np.allclose(alone, beside, atol=1e-3)


def test_vowels_open_as_they_are_said() -> None:
    def opening(vowel: str) -> float:
        return float(shapes_at(in_time([("t", 0.08), (vowel, 0.2), ("t", 0.08)]), np.array([0.18]))[0, OPENING])

    assert opening("aa") > 0.8
    assert opening("aa") > opening("eh") > opening("ih") > opening("uw") > 0.15


def test_w_rounds_and_iy_spreads() -> None:
    shapes = shapes_at(in_time([("w", 0.15), ("iy", 0.2)]), np.array([0.06, 0.28]))
    width, rounding = PARAMETERS.index("width"), PARAMETERS.index("rounding")
    assert shapes[0, rounding] > 0.7
    assert shapes[1, rounding] < 0.1
    assert shapes[1, width] > 0.85 > 0.4 > shapes[0, width]


def test_no_phones_are_silence() -> None:
    assert not mouth_shapes([], 10)[:, OPENING].any()


def test_an_unknown_phone_is_named() -> None:
    with pytest.raises(InvalidInput, match="qq"):
        mouth_shapes([Phone("qq", 0, 1)], 3)


def test_closures_are_the_bilabials() -> None:
    phones = in_time([(symbol, 0.1) for symbol in SYMBOLS])
    assert {phone.symbol for phone in closures(phones)} == BILABIALS
