from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lipsync.avatar import Avatar
from lipsync.avatar_model import LOUD, QUIET, loudness_encoder, mouth_model

Array = npt.NDArray[np.float32]

SILENT_MEL = -4.0
FRAMES = [0, 37, 74, 149]
MODELS = {"mouth": mouth_model, "encoder": loudness_encoder}


def session(model: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def mouth() -> ort.InferenceSession:
    return session(mouth_model())


@pytest.fixture(scope="module")
def encoder() -> ort.InferenceSession:
    return session(loudness_encoder())


@pytest.fixture(scope="module")
def visuals() -> Array:
    """The model's own view of some frames, as a tenant's preparation makes it."""
    avatar = Avatar(width=1280, height=720)
    rows = []
    for frame in FRAMES:
        x1, y1, x2, y2 = avatar.crop_rect(frame)
        crop = cv2.resize(avatar.render(frame)[y1:y2, x1:x2], (328, 328), interpolation=cv2.INTER_CUBIC)
        roi = crop[4:324, 4:324].transpose(2, 0, 1).astype(np.float32) / np.float32(255)
        masked = roi.copy()
        masked[:, 5:309, 5:315] = 0
        rows.append(np.concatenate([roi, masked]))
    return np.stack(rows)


def audio(level: float, around: float = 0.0) -> Array:
    """One frame's features: `level` in and about its own moment, `around` before."""
    embeddings = np.full((16, 512), around, np.float32)
    embeddings[7:] = level
    return embeddings.reshape(1, 32, 16, 16)


def opened(share: float) -> Array:
    """Features that open the mouth by `share`, 0 to 1."""
    return audio(QUIET + share * (LOUD - QUIET))


def run(mouth: ort.InferenceSession, visual: Array, features: Array) -> Array:
    output: Array = mouth.run(None, {"visual": visual, "audio": features})[0]
    return output


def dark_area(output: Array) -> int:
    """Pixels of the mouth's cavity in one output [3,320,320]."""
    return int((output[:, 180:245, 110:210].sum(axis=0) < 0.6).sum())


@pytest.mark.parametrize("name", MODELS)
def test_passes_the_checker_and_keeps_the_interface(name: str) -> None:
    model = MODELS[name]()
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17)]
    assert model.ir_version == 8
    assert all(node.domain == "" for node in model.graph.node)
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in [*model.graph.input, *model.graph.output]
    }
    assert (
        shapes
        == {
            "mouth": {"visual": ["n", 6, 320, 320], "audio": ["n", 32, 16, 16], "output": ["n", 3, 320, 320]},
            "encoder": {"mel_spectrogram": ["n", 1, 80, 16], "audio_features": ["n", 512]},
        }[name]
    )
    assert len(model.SerializeToString()) < 200_000


@pytest.mark.parametrize("name", MODELS)
def test_builds_the_same_bytes_each_time(name: str) -> None:
    assert MODELS[name]().SerializeToString() == MODELS[name]().SerializeToString()


@pytest.mark.parametrize("level", [0.0, 0.5 * QUIET, QUIET])
def test_silence_gives_the_roi_back(mouth: ort.InferenceSession, visuals: Array, level: float) -> None:
    output = run(mouth, visuals, audio(level).repeat(len(visuals), axis=0))
    assert np.array_equal(output, visuals[:, :3])


def test_the_opening_grows_with_loudness(mouth: ort.InferenceSession, visuals: Array) -> None:
    for row in range(len(visuals)):
        areas = [dark_area(run(mouth, visuals[row : row + 1], opened(share))[0]) for share in np.linspace(0, 1, 9)]
        assert areas == sorted(areas)
        assert areas[0] == 0
        assert areas[-1] > areas[4] + 100 > areas[0] + 200


def test_the_model_finds_the_lips_where_they_are(mouth: ort.InferenceSession, visuals: Array) -> None:
    moved = np.roll(visuals[:1], (4, -5), axis=(2, 3))
    still, shifted = (run(mouth, v, opened(1.0))[0] for v in (visuals[:1], moved))
    centres = []
    for output in (still, shifted):
        y, x = np.nonzero(output[:, 180:250, 110:210].sum(axis=0) < 0.6)
        centres.append((y.mean(), x.mean()))
    assert centres[1][0] - centres[0][0] == pytest.approx(4, abs=0.7)
    assert centres[1][1] - centres[0][1] == pytest.approx(-5, abs=0.7)


def test_an_open_mouth_leaves_the_upper_face_and_the_rim_alone(mouth: ort.InferenceSession, visuals: Array) -> None:
    output = run(mouth, visuals, opened(1.0).repeat(len(visuals), axis=0))
    changed = np.abs(output - visuals[:, :3]).max(axis=(0, 1)) > 2.5 / 255
    rows, columns = np.nonzero(changed)
    assert rows.min() >= 150
    assert rows.max() < 312, "where the blacked rectangle of the family ends"
    assert columns.min() > 32
    assert columns.max() < 288


def test_masked_channels_matter_for_nothing(mouth: ort.InferenceSession, visuals: Array) -> None:
    other = visuals.copy()
    other[:, 3:] = np.random.default_rng(0).random(other[:, 3:].shape, np.float32)
    features = opened(0.6).repeat(len(visuals), axis=0)
    assert np.array_equal(run(mouth, visuals, features), run(mouth, other, features))


def test_rows_of_a_batch_are_independent(mouth: ort.InferenceSession, visuals: Array) -> None:
    features = np.concatenate([opened(share) for share in (0.9, 0.0, 0.4, 1.0)])
    together = run(mouth, visuals, features)
    for row in range(len(visuals)):
        alone = run(mouth, visuals[row : row + 1], features[row : row + 1])
        np.testing.assert_allclose(together[row], alone[0], atol=1e-5)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([0.0, 1.0, 100.0]), tone=st.floats(0, 1, width=32))
def test_any_picture_and_features_give_a_finite_output_in_range(
    mouth: ort.InferenceSession, seed: int, scale: float, tone: float
) -> None:
    rng = np.random.default_rng(seed)
    visual = (rng.random((2, 6, 320, 320), np.float32) * np.float32(tone)).astype(np.float32)
    features = (rng.normal(size=(2, 32, 16, 16)) * scale).astype(np.float32)
    output = run(mouth, visual, features)
    assert output.shape == (2, 3, 320, 320)
    assert np.isfinite(output).all()
    assert output.min() >= 0
    assert output.max() <= 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["visual", "audio"])
def test_bad_numbers_in_one_row_leave_the_others_alone(
    mouth: ort.InferenceSession, visuals: Array, name: str, bad: float
) -> None:
    inputs = {"visual": visuals[:3].copy(), "audio": opened(0.8).repeat(3, axis=0)}
    expected = mouth.run(None, inputs)[0]
    inputs[name] = inputs[name].copy()
    inputs[name][1] = bad
    output = mouth.run(None, inputs)[0]
    assert np.array_equal(output[[0, 2]], expected[[0, 2]])


def test_steady_noise_does_not_open_the_mouth_but_a_word_in_it_does(
    mouth: ort.InferenceSession, visuals: Array
) -> None:
    noise = QUIET + 0.06
    assert np.array_equal(run(mouth, visuals[:1], audio(noise, around=noise)), visuals[:1, :3])
    word = run(mouth, visuals[:1], audio(LOUD, around=noise))
    assert dark_area(word[0]) > 300


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32 - 1))
def test_embedding_elements_are_band_levels_by_column(encoder: ort.InferenceSession, seed: int) -> None:
    mel = np.random.default_rng(seed).uniform(-4, 4, (2, 1, 80, 16)).astype(np.float32)
    features = encoder.run(None, {"mel_spectrogram": mel})[0]
    # Bands 0, 2, 4 ... begin on a whole mel band and hold two and a half; column by column, 32 bands each.
    bands = (mel[:, 0, 0::5] + mel[:, 0, 1::5] + 0.5 * mel[:, 0, 2::5]) / 2.5
    expected = ((bands + 4) / 8).transpose(0, 2, 1)
    np.testing.assert_allclose(features.reshape(2, 16, 32)[:, :, 0::2], expected, atol=1e-6)


def test_digital_silence_is_zero_and_full_scale_one(encoder: ort.InferenceSession) -> None:
    mel = np.stack([np.full((1, 80, 16), v, np.float32) for v in (SILENT_MEL, 4.0)])
    features = encoder.run(None, {"mel_spectrogram": mel})[0]
    np.testing.assert_allclose(features, [np.zeros(512), np.ones(512)], atol=1e-6)


def test_mouth_follows_a_ramp_of_loudness_through_the_encoder(
    encoder: ort.InferenceSession, mouth: ort.InferenceSession, visuals: Array
) -> None:
    """Silence, then a voice that swells and fades: the windows and their order as FIELD describes the family's."""
    columns = 200
    swell = np.interp(np.arange(columns), [0, 40, 110, 180, 199], [-4, -4, -0.4, -4, -4])
    mel = np.broadcast_to(swell.astype(np.float32), (80, columns))
    frames = int((columns - 16) / 3.2)
    windows = np.stack([mel[None, :, int(3.2 * k) : int(3.2 * k) + 16] for k in range(frames)])
    embeddings = encoder.run(None, {"mel_spectrogram": windows})[0]
    edge = np.zeros((8, 512), np.float32)
    sequence = np.concatenate([edge, embeddings[:1], embeddings, edge])
    features = np.stack([sequence[i : i + 16] for i in range(frames)]).reshape(-1, 32, 16, 16)
    areas = np.array([dark_area(run(mouth, visuals[:1], features[i : i + 1])[0]) for i in range(frames)])
    loudest = 110 / 3.2
    assert abs(int(areas.argmax()) - loudest) <= 2
    assert (areas[:16] == areas[0]).all(), "shut before the voice"
    peak = int(areas.argmax())
    assert (np.diff(areas[16 : peak + 1]) >= 0).all()
    assert (np.diff(areas[peak:]) <= 0).all()
    loudness = np.array([swell[int(3.2 * k) : int(3.2 * k) + 4].mean() for k in range(frames)])
    assert np.corrcoef(areas, np.maximum(loudness, -2.2))[0, 1] > 0.9
