from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import pytest

from compositor.blending import Pixels
from lipsync.avatar import Avatar
from lipsync.avatar_features import MAX_GAP, Mouth
from training.mouth_in_pictures import UNREADABLE, MouthGauge, mouth_area
from training.visemes import CLOSED, PARAMETERS

FRAMES = 20
Show = Callable[[Pixels], Pixels]


def as_drawn(picture: Pixels) -> Pixels:
    return picture


def as_jpeg(picture: Pixels) -> Pixels:
    """As the service sends it: quality 75, colours at half the resolution."""
    _, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 75])
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), np.uint8)


def as_blurred(picture: Pixels) -> Pixels:
    """As a model that is not sure of itself draws it."""
    return np.asarray(cv2.GaussianBlur(picture, (0, 0), 1.5), np.uint8)


@pytest.fixture(scope="module")
def avatar() -> Avatar:
    return Avatar(frames=FRAMES)


@pytest.fixture(scope="module")
def gauge(avatar: Avatar) -> MouthGauge:
    return MouthGauge(avatar.shot)


def random_mouth(random: np.random.Generator, opening: float) -> Mouth:
    others = {name: float(random.uniform()) for name in PARAMETERS if name != "opening"}
    return Mouth(opening=opening, **others)


@pytest.mark.parametrize(("show", "most"), [(as_drawn, 0.035), (as_jpeg, 0.035), (as_blurred, 0.06)])
def test_it_reads_the_opening_of_every_shape(avatar: Avatar, gauge: MouthGauge, show: Show, most: float) -> None:
    """Whatever the width, the rounding, the teeth and the tongue; 0.035 is one pixel."""
    random = np.random.default_rng(1)
    openings = np.linspace(0, 1, 40)
    read = []
    for number, opening in enumerate(openings):
        picture = avatar.render(number % FRAMES, random_mouth(random, float(opening)))
        read.append(gauge.opening(show(picture), number % FRAMES))
    assert np.abs(np.array(read) - openings).max() < most
    assert np.corrcoef(read, openings)[0, 1] > 0.998


@pytest.mark.parametrize("show", [as_drawn, as_jpeg])
def test_closed_reads_closed_and_hardly_open_does_not(avatar: Avatar, gauge: MouthGauge, show: Show) -> None:
    random = np.random.default_rng(2)
    for number in range(12):
        closed, parted = (random_mouth(random, opening) for opening in (0.0, CLOSED + 0.035))
        assert gauge.opening(show(avatar.render(number, closed)), number) < CLOSED
        assert gauge.opening(show(avatar.render(number, parted)), number) > CLOSED


def test_other_sizes_of_frames_are_read_too() -> None:
    avatar = Avatar(frames=4, width=640, height=360)
    gauge = MouthGauge(avatar.shot)
    for opening in (0.0, 0.4, 0.9):
        assert gauge.opening(avatar.render(2, Mouth(opening=opening)), 2) == pytest.approx(opening, abs=2 / MAX_GAP)


def test_what_is_no_mouth_is_not_closed(avatar: Avatar, gauge: MouthGauge) -> None:
    picture = avatar.render(3)
    mouth = mouth_area(avatar.crop_rect(3))
    picture[mouth.y : mouth.bottom, mouth.x : mouth.right] = picture[mouth.y, mouth.x]
    assert gauge.opening(picture, 3) == UNREADABLE
    assert gauge.opening(np.zeros_like(picture), 3) == UNREADABLE


def test_all_that_moves_is_in_the_mouths_area(avatar: Avatar) -> None:
    rest, wide = avatar.render(5), avatar.render(5, Mouth(opening=1, width=1))
    moved = np.abs(rest.astype(int) - wide).max(axis=2) > 12
    area = mouth_area(avatar.crop_rect(5))
    inside = moved[area.y : area.bottom, area.x : area.right].sum()
    assert inside > 2000
    assert inside > 0.97 * moved.sum()
