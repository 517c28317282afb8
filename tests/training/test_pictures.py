from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from compositor.errors import InvalidInput
from lipsync.avatar import Avatar
from lipsync.avatar_features import Mouth
from training.phonemes import Phone
from training.speech import VOICES, Line, Utterance
from training.visemes import Shapes

torch = pytest.importorskip("torch", reason="the training extra is not installed")

from training.avatar_model import MOUTH_AREA, MOUTH_PART, AvatarOptions, listen, picture_loss, plan, train_avatar  # noqa: E402
from training.encoder_data import make_clip  # noqa: E402
from training.networks import AudioBranch, AudioEncoder  # noqa: E402
from training.packed import WHOLE  # noqa: E402
from training.pictures import (  # noqa: E402
    Moments,
    audio_features,
    choose_moments,
    draw_crop,
    draw_pictures,
    keep_moments,
    picture_batches,
    roi,
    visual,
)

FRAMES = 4


@pytest.fixture(scope="module")
def avatar() -> Avatar:
    return Avatar(frames=FRAMES, width=640, height=360)


def moments(openings: list[float], frames: list[int]) -> Moments:
    shapes: Shapes = np.zeros((len(frames), 5), np.float32)
    shapes[:, 0] = openings
    shapes[:, 1] = 0.5
    features = np.random.default_rng(0).uniform(0, 1, (len(frames), 32, 16, 16)).astype(np.float16)
    return Moments(np.array(frames), shapes, features)


def test_pictures_are_the_avatar_with_its_mouth_as_told(avatar: Avatar, tmp_path: Path) -> None:
    calls = list[tuple[int, int]]()
    drawn = draw_pictures(avatar, moments([0.0, 0.9], [2, 2]), tmp_path, lambda *at: calls.append(at))
    assert calls == [(1, 2), (2, 2)]
    assert drawn.crops.shape == (2, 328, 328, 3)
    assert drawn.resting.shape == (FRAMES, 328, 328, 3)
    assert np.array_equal(drawn.resting[2], draw_crop(avatar, 2))
    closed, opened = (roi(crop) for crop in drawn.crops)
    changed = np.abs(closed - opened).max(axis=0) > 0.1
    assert changed[MOUTH_AREA].sum() > 2000
    assert changed[MOUTH_AREA].sum() > 0.95 * changed.sum()
    x1, y1, x2, y2 = avatar.crop_rect(2)
    face = avatar.render(2, Mouth(opening=0.9, teeth=0.0, tongue=0.0))[y1:y2, x1:x2]
    assert abs(float(face.mean()) - float(drawn.crops[1].mean())) < 1


def test_drawing_goes_on_where_it_stopped(avatar: Avatar, tmp_path: Path) -> None:
    wanted = moments([0.2] * 60, [0, 1, 2, 3] * 15)

    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 55:
            raise Stop

    with pytest.raises(Stop):
        draw_pictures(avatar, wanted, tmp_path, stop)
    calls = list[int]()
    drawn = draw_pictures(avatar, wanted, tmp_path, lambda done, total: calls.append(done))
    assert calls == list(range(51, 61))
    assert all(drawn.crops[i].any() for i in range(60))
    assert np.array_equal(drawn.crops[0], drawn.crops[56])
    with pytest.raises(InvalidInput, match="other moments"):
        draw_pictures(avatar, moments([0.3] * 60, [0, 1, 2, 3] * 15), tmp_path)


def test_the_mouth_of_the_target_is_not_shown() -> None:
    target, reference = np.full((3, 320, 320), 0.7, np.float32), np.full((3, 320, 320), 0.2, np.float32)
    seen = visual(reference, target)
    assert np.array_equal(seen[:3], reference)
    assert not seen[3:, 5:310, 5:315].any()
    assert (seen[3:, :5] == np.float32(0.7)).all()
    assert (seen[3:, 310:] == np.float32(0.7)).all()
    assert (target == np.float32(0.7)).all()


def test_batches_never_show_the_answer_and_repeat_themselves(avatar: Avatar, tmp_path: Path) -> None:
    wanted = moments([0.1, 0.3, 0.5, 0.7, 0.9], [0, 1, 2, 3, 0])
    drawn = draw_pictures(avatar, wanted, tmp_path)
    whole = list(picture_batches(drawn, 2, 0, 0, 5))
    later = list(picture_batches(drawn, 2, 0, 3, 5))
    assert len(whole) == 5
    for one, other in zip(whole[3:], later, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    targets = set()
    for seen, heard, target in whole:
        assert seen.shape == (2, 6, 320, 320)
        assert heard.shape == (2, 32, 16, 16)
        assert (seen[:, :3] - target).abs().amax(dim=(1, 2, 3)).min() > 0.1
        assert torch.equal(seen[:, 3:, 310:], target[:, :, 310:])
        targets |= {picture.numpy().tobytes() for picture in target}
    assert len(targets) == 5, "each moment comes once before one comes again"


def test_moments_are_kept_for_the_encoder_that_made_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    one, other = AudioEncoder(0.125), AudioEncoder(0.125)
    made, again = moments([0.1, 0.5], [0, 1]), moments([0.3], [2])
    assert keep_moments(tmp_path / "moments.npz", one, lambda: made) is made
    kept = keep_moments(tmp_path / "moments.npz", one, lambda: again)
    assert np.array_equal(kept.frames, made.frames)
    assert np.array_equal(kept.shapes, made.shapes)
    assert np.array_equal(kept.features, made.features)
    assert keep_moments(tmp_path / "moments.npz", other, lambda: again) is again


def test_features_of_moments_are_those_of_the_service() -> None:
    samples = np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32)
    line = Line("ah", VOICES[0], 1.0, 100.0)
    utterance = Utterance(line, samples, (Phone("aa", 0.0, 1.0),))
    torch.manual_seed(0)
    encoder = AudioEncoder(0.125).eval()
    chosen = choose_moments([utterance, utterance], encoder, 7, 5, seed=1)
    again = choose_moments([utterance, utterance], encoder, 7, 5, seed=1)
    assert len(chosen) == 10
    assert chosen.features.shape == (10, 32, 16, 16)
    assert set(chosen.frames.tolist()) <= set(range(7))
    assert np.array_equal(chosen.features, again.features)
    clip = make_clip(utterance, np.random.default_rng([1, 6, 0]))
    heard = audio_features(encoder, clip).astype(np.float16)
    assert all((heard == feature).all(axis=(1, 2, 3)).any() for feature in chosen.features[:5])


def test_errors_about_the_mouth_weigh_more() -> None:
    target = torch.full((1, 3, 320, 320), 0.5)
    here, there = target.clone(), target.clone()
    here[:, :, 200:220, 150:170] += 0.2
    there[:, :, 20:40, 150:170] += 0.2
    assert float(picture_loss(target, target)) == 0
    assert float(picture_loss(here, target)) > 4 * float(picture_loss(there, target)) > 0
    rows, columns = MOUTH_PART
    in_part = picture_loss(here[:, :, rows, columns], target[:, :, rows, columns], MOUTH_PART)
    assert float(in_part) > float(picture_loss(here, target)), "of a part, the mouth's area is the same"


def test_listening_tells_shapes_apart() -> None:
    """Features that hold the shape plainly: the branch soon reads it from them, better than by its mean."""
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    shapes = random.random((64, 5), np.float32)
    features = np.zeros((64, 32, 16, 16), np.float16)
    features[:, :5] = shapes[:, :, None, None]
    losses = list[float]()
    options = AvatarOptions(width=0.125, listening=120, blur=0.0)
    heard = Moments(np.zeros(64, np.int64), shapes, features)
    listen(AudioBranch(0.125), heard, options, lambda stage, step, total, loss: losses.append(loss))
    assert len(losses) == 120
    assert losses[-1] < 0.5 * float(shapes.var())


def test_both_rounds_end_with_whole_pictures() -> None:
    options = AvatarOptions(steps=100, again=40, whole=10, learning_rate=1.0)
    parts, rates = zip(*(plan(step, options) for step in range(1, 141)), strict=True)
    assert [part == WHOLE for part in parts] == [False] * 90 + [True] * 10 + [False] * 30 + [True] * 10
    assert (max(rates[:100]), max(rates[100:])) == (1.0, 0.5)
    assert rates[99] == rates[139] == 0


def test_training_moves_the_picture_and_goes_on(
    avatar: Avatar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.avatar_model._SAVE_EVERY", 1)
    drawn = draw_pictures(avatar, moments([0.8, 0.8], [0, 1]), tmp_path / "pictures")
    options = AvatarOptions(width=0.125, listening=1, steps=2, again=1, whole=1, pictures=1)
    whole = train_avatar(drawn, options, tmp_path / "whole.pt", lambda *_: None)
    steps, losses = list[tuple[str, int]](), list[float]()

    class Stop(Exception):
        pass

    def report(stage: str, step: int, total: int, loss: float) -> None:
        steps.append((stage, step))
        losses.append(loss)
        if steps[-1] == ("pictures", 2):
            raise Stop

    with pytest.raises(Stop):
        train_avatar(drawn, options, tmp_path / "avatar.pt", report)
    model = train_avatar(drawn, options, tmp_path / "avatar.pt", report)
    assert steps == [("listen", 1), ("pictures", 1), ("pictures", 2), ("pictures", 3)]
    assert all(np.isfinite(losses))
    assert losses[1] > 0.1, "an untrained model shows the mouth at rest"
    assert float(model.head.weight.detach().abs().max()) > 0
    for name, value in whole.state_dict().items():
        assert torch.allclose(value.float(), model.state_dict()[name].float(), atol=1e-5), name
