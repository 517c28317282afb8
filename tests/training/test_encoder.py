from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from compositor.audio import SAMPLE_RATE
from compositor.errors import InvalidInput
from compositor.features import Embeddings, Windows, clip_features
from lipsync.model_check import inspect_encoder
from training.phonemes import Phone, without_gaps
from training.speech import Line, Utterance, Voice
from training.visemes import CLOSED

torch = pytest.importorskip("torch", reason="the training extra is not installed")

from training.checkpoints import load_checkpoint  # noqa: E402
from training.encoder import EncoderOptions, MouthReader, loss, make_tracks, rate_share, train_encoder  # noqa: E402
from training.encoder_data import clip_windows, frame_rows, make_batch, make_clip, training_batches, unchanged  # noqa: E402
from training.export import export_encoder  # noqa: E402

TINY = EncoderOptions(width=0.125, steps=4, clips=2)


def hummed(seconds: float, seed: int) -> Utterance:
    """Hums for vowels and nothing for closures: as much of speech as a test needs."""
    random = np.random.default_rng(seed)
    samples = random.normal(0, 0.003, round(seconds * SAMPLE_RATE)).astype(np.float32)
    phones, at = list[Phone](), 0.2
    while at + 0.4 < seconds:
        first, middle = at + 0.2, at + 0.2 + random.uniform(0.08, 0.12)
        phones += [Phone("aa", at, first), Phone("p", first, middle)]
        span = np.arange(round(at * SAMPLE_RATE), round(first * SAMPLE_RATE))
        samples[span] += 0.3 * np.sin(2 * np.pi * 200 * span / SAMPLE_RATE)
        at = middle
    line = Line("ah", Voice("flite", "slt", 100), 1.0, 100.0)
    return Utterance(line, samples, tuple(without_gaps(phones, seconds)))


HUMS = [hummed(1.5 + 0.3 * seed, seed) for seed in range(4)]


def no_report(step: int, steps: int, loss: float) -> None:
    """Nobody watches."""


def fingerprint(windows: Windows) -> Embeddings:
    """An embedding that differs for different windows."""
    return windows.reshape(len(windows), -1)[:, :512].astype(np.float32)


def test_frames_hear_what_the_service_lets_them_hear() -> None:
    clip = make_clip(HUMS[0], np.random.default_rng(0), unchanged)
    expected = clip_features(clip.samples, SAMPLE_RATE, fingerprint)
    batch = make_batch([clip])
    heard = fingerprint(batch.windows.numpy())[batch.rows.numpy()].reshape(-1, 32, 16, 16)
    assert np.array_equal(heard, expected)


def test_clips_of_a_batch_do_not_hear_each_other() -> None:
    clips = [make_clip(hum, np.random.default_rng(0), unchanged) for hum in HUMS[:2]]
    batch = make_batch(clips)
    at = clips[0].frames
    assert int(batch.rows[:at].max()) == at
    assert set(batch.rows[at:].flatten().tolist()) == {0, *range(at + 1, at + 1 + clips[1].frames)}
    assert torch.nonzero(~batch.follows).flatten().tolist() == [0, at]
    own = clip_windows(clips[1].samples, clips[1].frames)
    assert np.array_equal(batch.windows[at + 1 :].numpy(), own)


def test_closures_weigh_more() -> None:
    clip = make_clip(HUMS[0], np.random.default_rng(0), unchanged)
    batch = make_batch([clip])
    closed = batch.shapes[:, 0] < CLOSED
    assert set(batch.weights.tolist()) == {1.0, 3.0}
    assert bool(closed[batch.weights == 3.0].all())


def test_rows_outside_the_clip_are_silence() -> None:
    rows = frame_rows(3)
    assert rows[0].tolist() == [0] * 9 + [1, 2, 3] + [0] * 4
    assert rows[2].tolist() == [0] * 7 + [1, 2, 3] + [0] * 6


def test_batches_are_the_same_from_wherever_training_goes_on() -> None:
    whole = list(training_batches(HUMS, 3, 0, 0, 4))
    later = list(training_batches(HUMS, 3, 0, 2, 4))
    assert len(whole) == 4
    assert len(later) == 2
    for one, other in zip(whole[2:], later, strict=True):
        assert torch.equal(one.windows, other.windows)
        assert torch.equal(one.shapes, other.shapes)


def test_the_rate_rises_then_falls_to_nothing() -> None:
    shares = [rate_share(step, 100) for step in range(1, 101)]
    assert shares[:5] == sorted(shares[:5])
    assert max(shares) == shares[4] == 1
    assert shares[4:] == sorted(shares[4:], reverse=True)
    assert shares[-1] == 0


def test_a_perfect_mouth_loses_nothing() -> None:
    batch = make_batch([make_clip(hum, np.random.default_rng(0), unchanged) for hum in HUMS[:2]])
    own = torch.zeros(len(batch.windows), 5)
    own[1:] = batch.shapes.roll(-2, 0)
    assert float(loss(batch.shapes, own, batch)) == 0
    assert float(loss(batch.shapes + 0.1, own, batch)) > 0.01
    assert float(loss(batch.shapes, own + 0.1, batch)) > 0.01


def test_training_learns_hums(tmp_path: Path) -> None:
    losses = list[float]()
    options = EncoderOptions(width=0.125, steps=50, clips=1)
    model = train_encoder(HUMS, options, tmp_path / "encoder.pt", lambda step, steps, value: losses.append(value))
    assert np.mean(losses[-10:]) < 0.4 * np.mean(losses[:5])
    (track,) = make_tracks(model, HUMS[:1])
    assert np.corrcoef(track.predicted, track.truth)[0, 1] > 0.7


def test_training_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.encoder._SAVE_EVERY", 3)
    options = EncoderOptions(width=0.125, steps=8, clips=1)
    whole = train_encoder(HUMS, options, tmp_path / "whole.pt", no_report)

    class Stop(Exception):
        pass

    def stop(step: int, steps: int, value: float) -> None:
        if step == 5:
            raise Stop

    with pytest.raises(Stop):
        train_encoder(HUMS, options, tmp_path / "parts.pt", stop)
    steps = list[int]()
    parts = train_encoder(HUMS, options, tmp_path / "parts.pt", lambda step, total, value: steps.append(step))
    assert steps == [4, 5, 6, 7, 8]
    for name, value in whole.state_dict().items():
        assert torch.allclose(value.float(), parts.state_dict()[name].float(), atol=1e-5), name


def test_a_checkpoint_of_other_options_is_refused(tmp_path: Path) -> None:
    train_encoder(HUMS, TINY, tmp_path / "encoder.pt", no_report)
    assert load_checkpoint(tmp_path / "encoder.pt", MouthReader(0.125), None, TINY) == 4
    with pytest.raises(InvalidInput, match="other options"):
        train_encoder(HUMS, EncoderOptions(width=0.125, steps=5, clips=2), tmp_path / "encoder.pt", no_report)


def test_the_exported_encoder_is_one_that_lipsync_takes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    difference = export_encoder(MouthReader(0.125).encoder, tmp_path / "encoder.onnx")
    model = inspect_encoder(tmp_path / "encoder.onnx")
    assert difference < 1e-3
    assert (model.mel, model.features, model.opset, model.batch) == ("mel_spectrogram", "audio_features", 17, "dynamic")
