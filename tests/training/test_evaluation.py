"""The measures, on films that are made of the truth with a known fault."""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np
import pytest

from compositor.audio import Samples
from compositor.blending import Pixels
from compositor.errors import InvalidInput
from lipsync.avatar import Avatar
from lipsync.avatar_features import Mouth
from training.evaluation import Observed, Truth, figures, jitter, observe, openings_of
from training.filming import Film, Shown
from training.phonemes import Phone
from training.takes import Take
from training.visemes import OPENING, mouth_shapes, mouths

FRAMES = 45
PHONES = (
    Phone("pau", 0.0, 0.5),
    Phone("aa", 0.5, 0.8),
    Phone("m", 0.8, 0.9),
    Phone("iy", 0.9, 1.2),
    Phone("pau", 1.2, 1.8),
)
TAKE = Take("ami", "nobody", np.zeros(FRAMES * 640, np.float32), PHONES, mouth_shapes(PHONES, FRAMES))
NUMBERS = [k % 3 for k in range(FRAMES)]


@pytest.fixture(scope="module")
def avatar() -> Avatar:
    return Avatar(frames=3)


@pytest.fixture(scope="module")
def truth(avatar: Avatar) -> Truth:
    return Truth(avatar)


def compressed(picture: Pixels) -> Pixels:
    _, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 75])
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), np.uint8)


def film_of(avatar: Avatar, told: list[Mouth]) -> Film:
    """A service that shows these mouths, whatever it hears."""

    def film(samples: Samples) -> Iterator[Shown]:
        for number, mouth in zip(NUMBERS, told, strict=False):
            yield Shown(number, compressed(avatar.render(number, mouth)))

    return film


@pytest.fixture(scope="module")
def perfect(avatar: Avatar, truth: Truth) -> Observed:
    return observe(TAKE, film_of(avatar, mouths(TAKE.shapes)), truth, keep=[20])


def test_the_truth_itself_has_perfect_figures(perfect: Observed) -> None:
    found = figures([perfect], [perfect.predicted])
    assert found["correlation"] > 0.999
    assert found["lag_frames"] == 0
    assert found["closures"] == 1
    assert found["closures_reached"] == found["closures_reached_by_the_truth"] == found["silence_closed"] == 1
    assert found["mean_error"] < 0.01
    assert found["correlation_with_drawn_opening"] > 0.999
    assert found["mouth_psnr_db"] > 34
    assert found["mouth_ssim"] > 0.95
    assert found["mouth_psnr_db_of_a_resting_mouth"] < found["mouth_psnr_db"] - 5
    assert max(found["colour_step_at_crop"], found["colour_step_at_roi"]) < 1
    assert found["in_noise"]["correlation"] == found["correlation"]


def test_what_is_kept_is_the_frame_and_its_truth(perfect: Observed) -> None:
    assert list(perfect.kept) == [20]
    picture, expected = perfect.kept[20]
    assert picture.shape == expected.shape
    assert 0 < np.abs(picture.astype(int) - expected).mean() < 4


def test_a_late_mouth_is_late(avatar: Avatar, truth: Truth) -> None:
    told = mouths(np.roll(TAKE.shapes, 2, axis=0))
    late = figures([observe(TAKE, film_of(avatar, told), truth)])
    assert late["lag_frames"] == 2
    assert late["correlation"] < 0.9
    assert "in_noise" not in late


def test_lips_that_only_come_near_each_other_are_not_closed(avatar: Avatar, truth: Truth) -> None:
    shapes = TAKE.shapes.copy()
    shapes[:, OPENING] = np.maximum(shapes[:, OPENING], 0.12)
    near = figures([observe(TAKE, film_of(avatar, mouths(shapes)), truth)])
    assert near["correlation"] > 0.98
    assert near["closures_reached"] == near["silence_closed"] == 0


def test_a_mouth_that_rests_says_nothing(avatar: Avatar, truth: Truth) -> None:
    still = figures([observe(TAKE, film_of(avatar, [Mouth()] * FRAMES), truth)])
    assert abs(still["correlation"]) < 0.5
    assert still["mean_error"] > 0.1
    assert still["mouth_psnr_db"] == pytest.approx(still["mouth_psnr_db_of_a_resting_mouth"], abs=0.5)


def test_an_edge_around_the_patch_is_seen(avatar: Avatar, truth: Truth) -> None:
    def film(samples: Samples) -> Iterator[Shown]:
        for shown in film_of(avatar, mouths(TAKE.shapes))(samples):
            box = truth.rect(shown.number)
            shown.picture[box.y : box.bottom, box.x : box.right] -= np.minimum(
                shown.picture[box.y : box.bottom, box.x : box.right], 6
            )
            yield shown

    edged = figures([observe(TAKE, film, truth)])
    assert edged["colour_step_at_crop"] == pytest.approx(6, abs=0.7)
    assert edged["colour_step_at_roi"] < 1


def test_missing_frames_are_refused(avatar: Avatar, truth: Truth) -> None:
    with pytest.raises(InvalidInput, match="40 frames came back of 45"):
        observe(TAKE, film_of(avatar, mouths(TAKE.shapes)[:40]), truth)


def test_openings_of_any_speech(avatar: Avatar, truth: Truth) -> None:
    wide = [Mouth(opening=0.5)] * 4
    assert openings_of(np.zeros(2560, np.float32), film_of(avatar, wide), truth.gauge) == pytest.approx(
        np.full(4, 0.5), abs=0.03
    )


def test_jitter_is_what_trembles_in_a_held_vowel() -> None:
    phones = (Phone("pau", 0, 0.4), Phone("aa", 0.4, 1.4), Phone("pau", 1.4, 1.8))
    take = Take("ah", "nobody", TAKE.samples, phones, mouth_shapes(phones, FRAMES))
    true = take.shapes[:, OPENING]
    nothing = np.zeros(FRAMES)
    trembling = (true + 0.05 * np.resize([1, -1], FRAMES)).astype(np.float32)
    found = jitter([Observed(take, trembling, true, nothing, nothing, nothing, np.zeros((FRAMES, 2)))])
    assert found["frames"] > 8
    assert found["truth"] < 0.005
    assert found["predicted"] == pytest.approx(0.2, abs=0.005)
    with pytest.raises(InvalidInput, match="no vowel is long enough"):
        jitter([])
