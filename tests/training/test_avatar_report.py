from __future__ import annotations

import numpy as np
import pytest

from lipsync.avatar import Avatar

torch = pytest.importorskip("torch", reason="the training extra is not installed")

from torch import Tensor  # noqa: E402

from training.avatar_model import MOUTH_AREA  # noqa: E402
from training.avatar_report import contact_sheet, predict_crop, report_avatar  # noqa: E402
from training.packed import PackedUNet  # noqa: E402
from training.pictures import Moments, Pictures, draw_pictures  # noqa: E402


class Copier(PackedUNet):
    """Gives back what it sees in channels 0-2, half a level up, as truncation takes it off again."""

    def forward(self, visual: Tensor, audio: Tensor) -> Tensor:
        return visual[:, :3] + 0.5 / 255


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    avatar = Avatar(frames=2, width=640, height=360)
    shapes = np.array([[0.0, 0.5, 0.0, 0.6, 0.5], [0.8, 0.5, 0.0, 0.6, 0.5]], np.float32)
    moments = Moments(np.array([0, 1]), shapes, np.zeros((2, 32, 16, 16), np.float16))
    return draw_pictures(avatar, moments, tmp_path_factory.mktemp("pictures"))


def test_a_prediction_is_set_into_the_frame_at_rest(pictures: Pictures) -> None:
    assert np.array_equal(predict_crop(Copier(0.125), pictures, 1), pictures.resting[1])


def test_a_mouth_that_rests_is_as_far_off_as_a_resting_mouth(pictures: Pictures) -> None:
    told = pictures.moments
    only_open = Pictures(
        Moments(told.frames[1:], told.shapes[1:], told.features[1:]), pictures.crops[1:], pictures.resting
    )
    figures = report_avatar(Copier(0.125), only_open)
    assert figures["pictures"] == 1
    assert figures["psnr_mean_db"] == pytest.approx(figures["psnr_of_a_resting_mouth_db"])
    assert figures["psnr_mean_db"] < 25


def test_the_sheet_shows_the_prediction_above_the_truth(pictures: Pictures) -> None:
    sheet = contact_sheet(Copier(0.125), pictures, columns=3)
    assert sheet.shape == (328, 3 * 164, 3)
    assert (sheet[:, 328:] == 255).all()
    rows, columns = (slice(part.start // 2, part.stop // 2) for part in MOUTH_AREA)
    still, opened = sheet[:164, 164:328][rows, columns], sheet[164:, 164:328][rows, columns]
    assert np.abs(still.astype(int) - opened).mean() > 10
