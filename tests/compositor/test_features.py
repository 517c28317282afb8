"""Mel windows and audio features: laid out as in training, and the same from chunks as from the whole clip."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from compositor.audio import mel_spectrogram, resample
from compositor.errors import InferenceFailed, InvalidInput
from compositor.features import (
    FULL_LOOKAHEAD_MS,
    FeatureStream,
    clip_features,
    frame_count,
    window_lookahead_ms,
    window_starts,
)

Array = NDArray[np.float32]
Edge = Literal["zeros", "silence"]

GENERATOR = np.random.default_rng(7)
INWARD, OUTWARD = GENERATOR.standard_normal((80 * 16, 24)) / 60, GENERATOR.standard_normal((24, 512)) / 5


def encode(windows: Array) -> Array:
    """A stand-in for the audio encoder: smooth, nonlinear, and different for different windows."""
    flat = windows.reshape(len(windows), 80 * 16).astype(np.float64)
    embeddings: Array = np.tanh(np.sin(flat @ INWARD) @ OUTWARD).astype(np.float32)
    return embeddings


def noise(count: int, seed: int = 0) -> Array:
    generator = np.random.default_rng(seed)
    samples: Array = (generator.uniform(-1, 1, count) * generator.uniform(0, 0.5)).astype(np.float32)
    return samples


def streamed(
    samples: Array, rate: int, fps: int, edge: Edge, cuts: list[int], lookahead_ms: float = FULL_LOOKAHEAD_MS
) -> tuple[Array, list[Array]]:
    """The features, and the windows that were to encode, of the clip in chunks of the given sizes, again and again."""
    stream = FeatureStream(rate, fps, edge, lookahead_ms)
    features, windows = [], []
    sizes, start, turn = [*cuts, 480], 0, 0

    def encode_and_take() -> None:
        windows.append(stream.take_windows())
        stream.put_embeddings(encode(windows[-1]))
        features.append(stream.take_features())
        assert stream.frames_taken == sum(map(len, features))

    while start < len(samples):
        size = sizes[turn % len(sizes)]
        stream.push(samples[start : start + size])
        start, turn = start + size, turn + 1
        if turn % 3:
            encode_and_take()
    assert stream.frames_total is None
    assert not stream.done
    stream.finish()
    stream.finish()
    encode_and_take()
    assert stream.done
    assert stream.frames_total == stream.frames_taken
    return np.concatenate(features), windows


CUTS = st.lists(st.integers(0, 5_000), max_size=5)


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from([8_000, 16_000, 22_050, 24_000, 44_100, 48_000]),
    st.sampled_from([25, 30]) | st.integers(1, 60),
    st.sampled_from(["zeros", "silence"]),
    st.integers(0, 40_000) | st.integers(1, 40).map(lambda frames: frames * 640),
    CUTS,
    st.integers(0, 2**32 - 1),
)
def test_chunks_give_the_features_of_the_whole_clip(
    rate: int, fps: int, edge: Edge, count: int, cuts: list[int], seed: int
) -> None:
    samples = noise(count, seed)
    whole = clip_features(samples, rate, encode, fps, edge)
    assert whole.shape == (frame_count(len(resample(samples, rate)), fps), 32, 16, 16)
    assert whole.dtype == np.float32
    parts, _ = streamed(samples, rate, fps, edge, cuts)
    assert parts.dtype == np.float32
    np.testing.assert_allclose(parts, whole, atol=1e-6, rtol=0)


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from([8_000, 16_000, 24_000, 48_000]),
    st.sampled_from([25, 30]) | st.integers(1, 60),
    st.sampled_from(["zeros", "silence"]),
    st.integers(0, 30_000) | st.integers(1, 40).map(lambda frames: frames * 640),
    CUTS,
    st.floats(0, 500) | st.integers(-5, 6).map(window_lookahead_ms),
    st.integers(0, 2**32 - 1),
)
def test_chunks_give_the_features_of_the_whole_clip_with_any_lookahead(
    rate: int, fps: int, edge: Edge, count: int, cuts: list[int], lookahead_ms: float, seed: int
) -> None:
    samples = noise(count, seed)
    whole = clip_features(samples, rate, encode, fps, edge, lookahead_ms=lookahead_ms)
    assert whole.shape == (frame_count(len(resample(samples, rate)), fps), 32, 16, 16)
    parts, _ = streamed(samples, rate, fps, edge, cuts, lookahead_ms)
    np.testing.assert_allclose(parts, whole, atol=1e-6, rtol=0)


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from([25, 30]) | st.integers(1, 60),
    st.integers(1, 30_000),
    st.floats(0, 500) | st.integers(-5, 6).map(window_lookahead_ms),
    st.integers(0, 2**32 - 1),
)
def test_a_cut_lookahead_silences_the_windows_that_start_later(
    fps: int, count: int, lookahead_ms: float, seed: int
) -> None:
    samples = noise(count, seed)
    full, cut = (
        clip_features(samples, 16_000, encode, fps, lookahead_ms=ms).reshape(-1, 16, 512)
        for ms in (FULL_LOOKAHEAD_MS, lookahead_ms)
    )
    hush = encode(np.full((1, 1, 80, 16), -4, np.float32))
    for m in range(-9, 7):
        kept = 40 * m + 187.5 + 25 <= lookahead_ms
        expected = full[:, m + 9] if kept else np.broadcast_to(hush, (len(full), 512))
        np.testing.assert_allclose(cut[:, m + 9], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("lookahead_ms", [0.0, 100.0, 252.5, 300.0])
def test_zeros_with_a_cut_lookahead_repeats_the_last_window_that_it_allows(lookahead_ms: float) -> None:
    rows = clip_features(noise(25_600), 16_000, encode, edge="zeros", lookahead_ms=lookahead_ms).reshape(-1, 16, 512)
    last = max(j for j in range(16) if window_lookahead_ms(j - 9) <= lookahead_ms)
    for frame in rows[9:30]:
        assert frame[last].any()
        np.testing.assert_array_equal(frame[last + 1], frame[last])
        assert not frame[last + 2 :].any()


@pytest.mark.parametrize("fps", [25, 30, 7])
@pytest.mark.parametrize("edge", ["zeros", "silence"])
@pytest.mark.parametrize("lookahead_ms", [0, 40, 252.5, 333.3, FULL_LOOKAHEAD_MS, 1_000])
def test_a_frame_is_complete_with_the_audio_up_to_its_lookahead(fps: int, edge: Edge, lookahead_ms: float) -> None:
    stream = FeatureStream(16_000, fps, edge, lookahead_ms)
    samples = noise(32_000)
    heard = 0
    for frame in range(frame_count(10_000, fps)):
        start_ms = 1_000 * frame / fps
        end = max(math.ceil((start_ms + min(lookahead_ms, FULL_LOOKAHEAD_MS)) * 16), int(start_ms * 16) + 1)
        stream.push(samples[heard:end])
        heard = end
        stream.put_embeddings(encode(stream.take_windows()))
        stream.take_features()
        assert stream.frames_taken > frame


def test_the_full_lookahead_is_what_the_last_window_needs() -> None:
    assert FULL_LOOKAHEAD_MS == 6 * 40 + 187.5 + 25
    samples = noise(20_000)
    full = clip_features(samples, 16_000, encode)
    for more in (FULL_LOOKAHEAD_MS, 453, 10_000, float("inf")):
        np.testing.assert_array_equal(clip_features(samples, 16_000, encode, lookahead_ms=more), full)
    assert not np.array_equal(clip_features(samples, 16_000, encode, lookahead_ms=452.4), full)


@pytest.mark.parametrize("fps", [25, 30])
def test_a_cut_lookahead_encodes_no_more_windows(fps: int) -> None:
    samples = noise(32_000)
    sizes = [
        sum(map(len, streamed(samples, 16_000, fps, "silence", [320], lookahead_ms)[1]))
        for lookahead_ms in (0.0, FULL_LOOKAHEAD_MS)
    ]
    assert sizes[0] <= sizes[1]


@pytest.mark.parametrize("lookahead_ms", [-1, -0.5, float("nan")])
def test_a_lookahead_below_none_is_refused(lookahead_ms: float) -> None:
    with pytest.raises(InvalidInput, match="is less than none") as caught:
        FeatureStream(16_000, lookahead_ms=lookahead_ms)
    assert caught.value.field == "lookahead_ms"
    with pytest.raises(InvalidInput):
        clip_features(noise(10), 16_000, encode, lookahead_ms=lookahead_ms)


@pytest.mark.parametrize("fps", [25, 30])
@pytest.mark.parametrize("edge", ["zeros", "silence"])
@pytest.mark.parametrize("size", [1, 7, 3_001])
def test_a_chunk_may_be_one_sample(fps: int, edge: Edge, size: int) -> None:
    samples = noise(3_000)
    stream = FeatureStream(16_000, fps, edge)
    for start in range(0, len(samples), size):
        stream.push(samples[start : start + size])
    stream.finish()
    stream.put_embeddings(encode(stream.take_windows()))
    whole = clip_features(samples, 16_000, encode, fps, edge)
    np.testing.assert_allclose(stream.take_features(), whole, atol=1e-6, rtol=0)


def test_window_starts_at_25_fps() -> None:
    assert window_starts(0, 25) == (-29, -26, -23, -20, -16, -13, -10, -7, -4, 0, 3, 6, 9, 12, 16, 19)
    for frame in range(9, 2_000):
        assert window_starts(frame, 25) == tuple(int(3.2 * k) for k in range(frame - 9, frame + 7))


def test_window_starts_at_other_rates_are_40_ms_apart_and_centred_on_the_frame() -> None:
    assert window_starts(1, 30)[9] == 2  # 1/30 s is column 2.67
    assert window_starts(3, 30) == tuple(8 + start for start in window_starts(0, 25))
    for fps in range(1, 61):
        assert window_starts(7 * fps, fps) == window_starts(7 * 25, 25)


@pytest.mark.parametrize(
    ("samples", "fps", "frames"),
    [(0, 25, 0), (1, 25, 1), (640, 25, 1), (641, 25, 2), (16_000, 25, 25), (16_000, 30, 30), (16_001, 30, 31)],
)
def test_a_clip_has_a_frame_for_every_part_of_one(samples: int, fps: int, frames: int) -> None:
    assert frame_count(samples, fps) == frames
    assert len(clip_features(noise(samples), 16_000, encode, fps)) == frames


def sequence(samples: Array) -> Array:
    """The embeddings of the windows of all 25 fps frames of a clip, as training takes them."""
    mel = mel_spectrogram(np.pad(samples, (0, max(0, 3_000 - len(samples)))))
    windows = []
    for k in range(frame_count(len(samples), 25)):
        start = min(int(3.2 * k), len(mel) - 16)
        windows.append(mel[start : start + 16].T[None])
    return encode(np.stack(windows))


@pytest.mark.parametrize("count", [500, 25_000, 25_600])
def test_zeros_is_the_sequence_of_training(count: int) -> None:
    samples = noise(count)
    e = sequence(samples)
    doubled = np.concatenate([e[:1], e, e[-1:]])
    padded = np.concatenate([np.zeros((8, 512)), doubled, np.zeros((8, 512))])
    expected = np.stack([padded[frame : frame + 16].reshape(32, 16, 16) for frame in range(len(e))])
    np.testing.assert_allclose(clip_features(samples, 16_000, encode, edge="zeros"), expected, atol=1e-6)
    np.testing.assert_allclose(streamed(samples, 16_000, 25, "zeros", [320])[0], expected, atol=1e-6)


@pytest.mark.parametrize("count", [500, 25_000, 25_600])
def test_silence_surrounds_the_speech_with_its_embedding(count: int) -> None:
    samples = noise(count)
    e, hush = sequence(samples), encode(np.full((1, 1, 80, 16), -4, np.float32))
    padded = np.concatenate([hush.repeat(9, axis=0), e, hush.repeat(6, axis=0)])
    expected = np.stack([padded[frame : frame + 16].reshape(32, 16, 16) for frame in range(len(e))])
    np.testing.assert_allclose(clip_features(samples, 16_000, encode, edge="silence"), expected, atol=1e-6)
    np.testing.assert_allclose(streamed(samples, 16_000, 25, "silence", [320])[0], expected, atol=1e-6)


def test_zeros_at_30_fps_repeats_the_neighbour_inside_within_each_frame() -> None:
    samples = noise(25_000)
    features = clip_features(samples, 16_000, encode, fps=30, edge="zeros").reshape(-1, 16, 512)
    for frame, rows in enumerate(features):
        starts_s = [frame / 30 + m / 25 for m in range(-9, 7)]
        inside = [j for j, start in enumerate(starts_s) if -1e-9 < start < 25_000 / 16_000]
        for j in range(16):
            if j in inside:
                assert rows[j].any()
            elif j + 1 in inside or j - 1 in inside:
                np.testing.assert_array_equal(rows[j], rows[j + 1 if j + 1 in inside else j - 1])
            else:
                assert not rows[j].any()


def test_embedding_j_fills_channels_2j_and_2j_plus_1() -> None:
    count = 0

    def numbered(windows: Array) -> Array:
        nonlocal count
        numbers = np.arange(count, count + len(windows))
        count += len(windows)
        return (numbers[:, None] + np.arange(512) / 1_024).astype(np.float32)

    features = clip_features(noise(32_000), 16_000, numbered, batch=7)
    frame = features[20]  # inside, where windows are numbered by k + 1: number 0 is the silence
    for j in range(16):
        channels = frame[2 * j : 2 * j + 2].reshape(512)
        np.testing.assert_array_equal(channels, 20 - 9 + j + 1 + np.arange(512) / 1_024)


def test_a_clip_shorter_than_a_window_is_lengthened_with_silence() -> None:
    samples = noise(100)
    lengthened = mel_spectrogram(np.concatenate([samples, np.zeros(2_900, np.float32)]))
    own = clip_features(samples, 16_000, encode).reshape(1, 16, 512)[:, 9]
    np.testing.assert_allclose(own, encode(lengthened[:16].T[None, None]), atol=1e-6)


def test_an_empty_speech_has_no_frames() -> None:
    assert clip_features(noise(0), 24_000, encode).shape == (0, 32, 16, 16)
    assert clip_features(noise(0), 24_000, encode, edge="zeros").shape == (0, 32, 16, 16)
    features, _ = streamed(noise(0), 24_000, 25, "silence", [])
    assert features.shape == (0, 32, 16, 16)


@pytest.mark.parametrize(("fps", "windows_per_s"), [(25, 25), (30, 80), (50, 50)])
def test_each_window_is_encoded_once(fps: int, windows_per_s: int) -> None:
    seconds = 8
    samples = noise(16_000 * seconds)
    _, windows = streamed(samples, 16_000, fps, "silence", [320])
    encoded = np.concatenate(windows)
    assert (encoded[0] == -4).all()
    assert len(encoded) <= windows_per_s * seconds + 2
    assert len({window.tobytes() for window in encoded}) == len(encoded)
    sizes: list[int] = []

    def counting(part: Array) -> Array:
        sizes.append(len(part))
        return encode(part)

    clip_features(samples, 16_000, counting, fps, batch=11)
    assert sum(sizes) == len(encoded)
    assert max(sizes) == 11


@pytest.mark.parametrize("fps", [25, 30])
def test_frames_come_as_early_as_their_audio_allows(fps: int) -> None:
    stream = FeatureStream(16_000, fps, "silence")
    chunk = noise(40)  # fine enough: columns complete at multiples of 200
    for end in range(40, 30_000, 40):
        stream.push(chunk)
        stream.put_embeddings(encode(stream.take_windows()))
        stream.take_features()
        columns = max(0, (end - 400) // 200 + 1)
        ready = 0
        while window_starts(ready, fps)[-1] + 16 <= columns:
            ready += 1
        assert stream.frames_taken == ready


def test_batches_may_be_outstanding_and_come_back_in_order() -> None:
    samples = noise(40_000)
    stream = FeatureStream(16_000, 25, "silence")
    batches = []
    for start in range(0, len(samples), 8_000):
        stream.push(samples[start : start + 8_000])
        batches.append(stream.take_windows())
    stream.finish()
    batches.append(stream.take_windows())
    assert len(stream.take_features()) == 0
    for batch in batches:
        stream.put_embeddings(encode(batch))
    np.testing.assert_allclose(stream.take_features(), clip_features(samples, 16_000, encode), atol=1e-6)


def held_bytes(held: Any) -> int:
    """Bytes of all arrays that an object keeps alive, bases of views included."""
    if isinstance(held, np.ndarray):
        return held.nbytes if held.base is None else max(held.nbytes, held_bytes(held.base))
    if isinstance(held, Mapping):
        return held_bytes(list(held.values()))
    if hasattr(held, "__dict__"):
        return held_bytes(vars(held))
    if isinstance(held, (str, bytes)) or not hasattr(held, "__iter__"):
        return 64
    return 64 + sum(map(held_bytes, held))


@pytest.mark.parametrize(("fps", "edge"), [(25, "silence"), (30, "zeros"), (1, "silence")])
def test_memory_is_bounded_over_a_long_stream(fps: int, edge: Edge) -> None:
    stream = FeatureStream(16_000, fps, edge)
    peaks = []
    for _ in range(3):
        peak = 0
        for minute in range(20):
            second = noise(16_000, minute)
            for start in range(0, 16_000, 1_600):
                stream.push(second[start : start + 1_600])
                stream.put_embeddings(encode(stream.take_windows()))
                stream.take_features()
                peak = max(peak, held_bytes(stream))
        peaks.append(peak)
    assert peaks[0] == pytest.approx(peaks[2], rel=0.1)
    assert peaks[2] < 400_000  # 2 KiB an embedding, 5 KiB a window


def test_a_long_push_leaves_nothing_behind() -> None:
    stream = FeatureStream(16_000)
    stream.push(noise(16_000 * 30))
    stream.put_embeddings(encode(stream.take_windows()))
    assert len(stream.take_features()) > 25 * 29
    assert held_bytes(stream) < 100_000


def test_the_callers_samples_are_never_changed() -> None:
    samples = noise(5_000)
    before = samples.copy()
    samples.setflags(write=False)
    clip_features(samples, 16_000, encode)
    streamed(samples, 24_000, 25, "silence", [100])
    np.testing.assert_array_equal(samples, before)


def test_embeddings_are_copied() -> None:
    samples = noise(8_000)
    stream = FeatureStream(16_000)
    stream.push(samples)
    stream.finish()
    embeddings = encode(stream.take_windows())
    stream.put_embeddings(embeddings)
    embeddings[:] = 9
    np.testing.assert_allclose(stream.take_features(), clip_features(samples, 16_000, encode), atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_samples_are_refused_and_the_stream_goes_on(bad: float) -> None:
    samples = noise(8_000)
    poisoned = samples.copy()
    poisoned[5] = bad
    with pytest.raises(InvalidInput, match=r"sample 5 \(counted from 0\)"):
        clip_features(poisoned, 16_000, encode)
    stream = FeatureStream(16_000)
    with pytest.raises(InvalidInput, match=r"sample 5 \(counted from 0\)"):
        stream.push(poisoned)
    stream.push(samples)
    stream.finish()
    stream.put_embeddings(encode(stream.take_windows()))
    np.testing.assert_allclose(stream.take_features(), clip_features(samples, 16_000, encode), atol=1e-6)


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (lambda e: e[:-1], r"answered \[\d+, 512\], not \[\d+, 512\]"),
        (lambda e: e[:, :256], r"answered \[\d+, 256\]"),
        (lambda e: e[None], r"answered \[1, \d+, 512\]"),
        (lambda e: np.where(np.arange(512) == 3, np.nan, e), "NaN or Inf"),
        (lambda e: np.where(np.arange(512) == 3, np.inf, e), "NaN or Inf"),
    ],
)
def test_what_is_no_embedding_is_refused(spoil: Any, fault: str) -> None:
    samples = noise(8_000)
    with pytest.raises(InferenceFailed, match=fault):
        clip_features(samples, 16_000, lambda windows: spoil(encode(windows)))
    stream = FeatureStream(16_000)
    stream.push(samples)
    windows = stream.take_windows()
    with pytest.raises(InferenceFailed, match=fault):
        stream.put_embeddings(spoil(encode(windows)))
    assert len(stream.take_features()) == 0
    stream.put_embeddings(encode(windows))  # tried again, it goes on
    assert len(stream.take_features())


def test_calls_out_of_order_are_refused() -> None:
    stream = FeatureStream(16_000, edge="zeros")
    stream.put_embeddings(np.empty((0, 512), np.float32))
    with pytest.raises(RuntimeError, match="never taken"):
        stream.put_embeddings(np.zeros((1, 512), np.float32))
    stream.finish()
    with pytest.raises(RuntimeError, match="finished"):
        stream.push(noise(10))


@pytest.mark.parametrize("fps", [-1, 0, 61])
def test_frame_rates_out_of_range_are_refused(fps: int) -> None:
    with pytest.raises(InvalidInput, match=rf"{fps} frames a second is outside 1\.\.60") as caught:
        FeatureStream(16_000, fps)
    assert caught.value.field == "fps"
    with pytest.raises(InvalidInput):
        clip_features(noise(10), 16_000, encode, fps)


def test_unknown_edges_and_rates_are_refused() -> None:
    edge: Any = "mirror"
    with pytest.raises(InvalidInput, match="'mirror' is neither 'zeros' nor 'silence'"):
        FeatureStream(16_000, edge=edge)
    with pytest.raises(InvalidInput, match="sample rate 4000 Hz"):
        FeatureStream(4_000)
