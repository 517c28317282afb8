"""Segments of live speech: the same frames and the same bytes, however the speech was cut."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from compositor.errors import InvalidInput
from compositor.features import FULL_LOOKAHEAD_MS, Windows
from compositor.sessions.speech import Loudness, Segment

from .stage import settle

Encoding = Literal["pcm16", "float32"]
RATES = (8_000, 16_000, 22_050, 24_000, 44_100, 48_000)


def segment(rate: int = 16_000, encoding: Encoding = "pcm16", fps: int = 25, lookahead_ms: float = 453) -> Segment:
    return Segment(rate, encoding, fps, edge="silence", lookahead_ms=lookahead_ms, floor_dbfs=-50, begin_s=None)


async def embed(windows: Windows) -> NDArray[np.float32]:
    return np.repeat(windows.mean(axis=(1, 2, 3))[:, None], 512, axis=1)


def words(rate: int, encoding: Encoding, seconds: float = 1.3) -> bytes:
    """Noise with silence between its words."""
    random = np.random.default_rng(1)
    time = np.arange(int(seconds * rate)) / rate
    samples = random.uniform(-0.3, 0.3, len(time)) * (np.sin(2 * np.pi * 0.9 * time) > 0)
    return (samples * 32767).astype("<i2").tobytes() if encoding == "pcm16" else samples.astype("<f4").tobytes()


async def _spoken(speech: Segment, data: bytes, cuts: list[int]) -> tuple[list[float | None], list[bytes]]:
    """Each frame as one number, None for silence, and its bytes."""

    async def listen() -> list[float | None]:
        return [None if one is None else float(one.mean()) async for one in speech.frames(embed)]

    listening = asyncio.create_task(listen())
    for begin, end in pairwise([0, *cuts, len(data)]):
        speech.push(data[begin:end])
        await settle()
    speech.end()
    shown = await listening
    return shown, [*(speech.take_frame() for _ in shown), speech.take_rest()]


def spoken(speech: Segment, data: bytes, cuts: list[int]) -> tuple[list[float | None], list[bytes]]:
    return asyncio.run(_spoken(speech, data, cuts))


@settings(max_examples=40, deadline=None)
@given(
    rate=st.sampled_from(RATES),
    fps=st.sampled_from((25, 29, 30)),
    encoding=st.sampled_from(("pcm16", "float32")),
    lookahead_ms=st.sampled_from((0, 40, 100, 180, 453)),
    cuts=st.lists(st.floats(0, 1), max_size=40),
)
def test_the_chunking_changes_nothing(
    rate: int, fps: int, encoding: Encoding, lookahead_ms: float, cuts: list[float]
) -> None:
    data = words(rate, encoding)
    at = sorted(int(cut * len(data)) for cut in cuts)
    whole, _ = spoken(segment(rate, encoding, fps, lookahead_ms), data, [])
    shown, heard = spoken(segment(rate, encoding, fps, lookahead_ms), data, at)
    assert [each is None for each in shown] == [each is None for each in whole]
    assert shown == pytest.approx(whole, abs=1e-4)
    assert b"".join(heard) == data
    assert None in shown
    assert any(each is not None for each in shown)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("fps", [25, 29, 30])
def test_each_frame_has_its_own_samples(rate: int, fps: int) -> None:
    data = words(rate, "pcm16", 3.0)
    shown, heard = spoken(segment(rate, fps=fps), data, [])
    begins = [sum(map(len, heard[:frame])) // 2 for frame in range(len(shown))]
    assert begins == [frame * rate // fps for frame in range(len(shown))]


def test_one_sample_at_a_time() -> None:
    data = words(8_000, "pcm16", 0.2)
    shown, heard = spoken(segment(8_000), data, list(range(len(data))))
    assert (len(shown), b"".join(heard)) == (5, data)


@pytest.mark.parametrize("rate", RATES)
def test_the_shortest_speech_is_shown(rate: int) -> None:
    shown, heard = spoken(segment(rate), b"\0\1", [])
    assert len(shown) <= 1
    assert b"".join(heard) == b"\0\1"


def test_speech_ends_at_a_whole_sample() -> None:
    speech = segment()
    speech.push(b"\0\0\0")
    with pytest.raises(InvalidInput, match="within a sample"):
        speech.end()


async def test_what_is_no_number_is_refused() -> None:
    speech = segment(encoding="float32")
    speech.push(np.full(16_000, np.nan, "<f4").tobytes())
    with pytest.raises(InvalidInput, match="sample 0"):
        await anext(speech.frames(embed))


async def test_speech_that_comes_late_is_made_up_for() -> None:
    """Without lookahead a frame may be shown before all of its speech has come."""
    speech = segment(lookahead_ms=0)
    frames = speech.frames(embed)
    data = words(16_000, "pcm16", 0.2)
    speech.push(data[:1600])  # 1.25 frames
    await anext(frames)
    await anext(frames)
    first, second = speech.take_frame(), speech.take_frame()
    speech.push(data[1600:])
    speech.end()
    assert len([None async for _ in frames]) == 3
    assert [len(first), len(second)] == [1280, 320]
    assert len(speech.take_frame()) == 1280 + 960
    assert speech.shown == 3 * 640


async def test_a_muted_segment_takes_nothing() -> None:
    speech = segment()
    speech.push(b"\0" * 1001)
    speech.mute()
    speech.push(b"\0" * 100_001)
    assert speech.held == 0
    speech.end()


def loudness(lookahead_ms: float, loud: list[bool], rate: int = 16_000, fps: int = 25) -> list[bool]:
    judge = Loudness(rate, fps, -50, lookahead_ms)
    judge.push(np.repeat(np.array(loud, np.float32), rate // fps))
    judge.finish()
    return [judge.silent(frame) for frame in range(len(loud))]


@pytest.mark.parametrize(
    ("lookahead_ms", "before"), [(FULL_LOOKAHEAD_MS, 2), (172.5, 2), (100.0, 1), (60.0, 0), (0.0, -1)]
)
def test_a_word_moves_the_mouth_around_it(lookahead_ms: float, before: int) -> None:
    silent = loudness(lookahead_ms, [False] * 8 + [True] + [False] * 8)
    assert silent == [not 8 - before <= frame <= 12 for frame in range(17)]


def test_the_floor_is_a_level() -> None:
    for level, silent in ((10 ** (-51 / 20), True), (10 ** (-49 / 20), False)):
        judge = Loudness(16_000, 25, -50, 453)
        judge.push(np.full(640, level, np.float32))
        assert judge.silent(0) is silent
