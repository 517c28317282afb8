from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from compositor.errors import InvalidInput
from compositor.geometry import ping_pong
from lipsync.avatar_model import loudness_encoder, mouth_model
from lipsync.avatar_motion import Shot
from training.filming import filming, milliseconds_a_frame, prepare_repository
from training.mouth_in_pictures import MouthGauge
from training.visemes import CLOSED

pytestmark = pytest.mark.triton

SIZE = {"frames": 6, "width": 640, "height": 360}


def silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    onnx.save(loudness_encoder(), folder / "encoder.onnx")
    onnx.save(mouth_model(), folder / "avatar.onnx")
    return folder


def test_frames_come_back_from_the_real_service_with_the_mouth_that_it_predicts(
    triton_home: Path, models: Path, tmp_path: Path
) -> None:
    """With the constructed models, whose mouth follows loudness: shut in silence, open in a loud chord, which must be
    short or they take it for noise."""
    repository = prepare_repository(tmp_path, models / "avatar.onnx", models / "encoder.onnx", silent, **SIZE)
    seconds = np.arange(6_400) / 16_000
    chord = 0.15 * sum(np.sin(2 * np.pi * pitch * seconds) for pitch in (220, 440, 660, 880, 1320))
    samples = np.concatenate([np.zeros(16_000), chord, np.zeros(16_000)]).astype(np.float32)
    with filming(repository, tmp_path) as film:
        shown = list(film(samples))
    assert [frame.number for frame in shown] == [ping_pong(k, 6) for k in range(60)]
    assert all(frame.picture.shape == (360, 640, 3) for frame in shown)
    gauge = MouthGauge(Shot(**SIZE))
    openings = np.array([gauge.opening(frame.picture, frame.number) for frame in shown])
    assert (openings[:20] < CLOSED).all()
    assert (openings[28:32] > 0.2).all()
    assert (openings[45:] < CLOSED).all()

    taken = milliseconds_a_frame(repository, 1)
    assert taken["both"] == pytest.approx(taken["tenant"] + taken["encoder"])
    assert min(taken.values()) > 0


def test_what_is_no_model_is_refused(models: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"encoder\.onnx|avatar\.onnx"):
        prepare_repository(tmp_path, models / "encoder.onnx", models / "avatar.onnx", silent, **SIZE)
