"""What viewers see: the mouth comes and goes within its patch, on time, and patches say the same as frames."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from compositor import jpeg
from compositor.features import window_lookahead_ms
from compositor.rendering import Rendered
from compositor.sessions.events import Heard, PlaybackFinished, PlaybackStarted, Shown
from compositor.sessions.playout import CUSHION_MS

from .stage import FRAME, RATE, Open, Viewer, drain, opened, speech

BLIND = Rendered(b"a picture", np.zeros((328, 328, 3), np.uint8), 0, 0)
MARGIN_MS, FRAME_MS, CHUNK_MS = 80, 40, 20


@pytest.fixture
def open_(repository: Path) -> Open:
    return partial(opened, repository)


def change(viewer: Viewer, shown: Shown) -> tuple[float, float]:
    """The mean difference of a picture from its prepared frame, at the mouth, and the largest outside of the patch."""
    frame = viewer.session.tenant.frame(shown.number)
    difference = np.abs(jpeg.decode(shown.data).astype(int) - jpeg.decode(frame.jpeg()))
    patch = frame.patch
    rect = viewer.session.tenant.rect(shown.number)
    x, y = rect.x + rect.width // 2, rect.y + 2 * rect.height // 3
    inside: NDArray[np.int64] = difference[y - 8 : y + 8, x - 12 : x + 12].copy()
    # A decoder's smooth upsampling carries the patch's colours two pixels over its edge.
    difference[max(0, patch.y - 2) : patch.bottom + 2, max(0, patch.x - 2) : patch.right + 2] = 0
    return float(inside.mean()), float(difference.max())


async def spoken(viewer: Viewer, seconds: float = 0.6) -> list[float]:
    """How far the mouth is from rest, picture by picture, from one before speech to the first at rest after it."""
    viewer.stage.grey = 250
    await viewer.watch(2)
    viewer.session.push(speech(seconds))
    viewer.session.end_segment()
    await viewer.watch(round(25 * seconds) + 12)
    changes = [change(viewer, shown) for shown in viewer.of(Shown)]
    assert max(outside for _, outside in changes) == 0, "only the mouth"
    first, last = (viewer.speaking()[at] // FRAME for at in (0, -1))
    return [inside for inside, _ in changes[first - 1 : last + 2]]


async def test_the_mouth_fades_in_and_out_and_nothing_else_changes(open_: Open) -> None:
    async with open_() as viewer:
        levels = await spoken(viewer)
        assert levels[0] == levels[-1] == 0
        rise, fall = levels[:5], levels[-5:]
        assert np.diff(rise).min() > 0.5
        assert np.diff(fall).max() < -0.5
        counts = viewer.session.playout.counts
        assert (counts["speaking"], counts["fade"], counts["late"]) == (15, 3, 0)


async def test_no_fade_is_a_fade_too(open_: Open) -> None:
    async with open_({"fade_ms": 0}) as viewer:
        levels = await spoken(viewer)
        assert min(levels[1:-1]) > 0.5 * max(levels)
        assert (levels[0], levels[-1], len(levels)) == (0, 0, 17)


async def test_a_mouth_that_has_hardly_opened_falls_from_there(open_: Open) -> None:
    async with open_() as viewer:
        levels = await spoken(viewer, 0.08)
        assert [round(level / levels[1]) for level in levels] == [0, 1, 2, 1, 0]


async def test_after_an_interruption_the_mouth_comes_to_rest(open_: Open) -> None:
    """At once, smoothly, and under the new epoch."""
    async with open_() as viewer:
        viewer.session.push(speech(5.0))
        await viewer.watch(20)
        viewer.session.interrupt()
        await viewer.watch(6)
        levels = [change(viewer, shown)[0] for shown in viewer.of(Shown)[19:]]
        assert np.diff(levels[:5]).max() < -0.5
        assert levels[4:] == [0, 0, 0]
        assert [shown.epoch for shown in viewer.of(Shown)[19:]] == [0] + [1] * 6


async def test_new_speech_takes_up_the_mouth_where_it_is(open_: Open) -> None:
    async with open_() as viewer:
        viewer.stage.grey = 250
        viewer.session.push(speech(5.0))
        await viewer.watch(20)
        viewer.session.interrupt()
        viewer.session.push(speech(0.6))
        viewer.session.end_segment()
        await viewer.watch(8)
        levels = [change(viewer, shown)[0] for shown in viewer.of(Shown)[19:]]
        full = levels[0]
        assert min(levels) > 0.2 * full, "never quite at rest"
        assert np.abs(np.diff(levels)).max() < 0.4 * full, "no jump"


async def test_late_pictures_let_the_mouth_come_to_rest(open_: Open) -> None:
    async with open_() as viewer:
        viewer.session.push(speech(5.0))
        await viewer.watch(20)
        viewer.stage.before = asyncio.Event().wait
        await viewer.watch(10)
        assert viewer.session.playout.counts["late"] >= 5
        *_, last = viewer.of(Shown)
        assert change(viewer, last) == (0, 0)


async def test_an_avatar_is_spliced_on_its_prepared_frames(open_: Open) -> None:
    """The same with a tenant whose idle pictures are rendered."""
    async with open_(tenant="avatar") as viewer:
        levels = await spoken(viewer)
        assert levels[0] == levels[-1] == 0
        assert np.diff(levels[:5]).min() > 0


async def test_patches_are_what_frames_show(open_: Open) -> None:
    seen: list[list[Shown]] = []
    for picture in ("frames", "patches"):
        async with open_(picture=picture) as viewer:
            viewer.session.push(speech(0.6))
            viewer.session.end_segment()
            await viewer.watch(30)
            seen.append(viewer.of(Shown))
            tenant = viewer.session.tenant
    assert any(frame.speaking for frame in seen[0])
    for whole, part in zip(*seen, strict=True):
        assert (whole.pts, whole.number, whole.speaking) == (part.pts, part.number, part.speaking)
        if part.speaking:
            patch = tenant.frame(part.number).patch
            assert part.patch == patch
            cut = jpeg.decode(whole.data)[patch.y : patch.bottom, patch.x : patch.right]
            assert np.abs(jpeg.decode(part.data).astype(int) - cut)[2:-2, 2:-2].max() <= 1
        else:
            assert (part.data, part.patch) == (b"", None)


async def said(viewer: Viewer, seconds: float, after_ms: int) -> float:
    """Speech sent as it is said, begun some time after a tick; the delay of its first frame in milliseconds."""
    await viewer.clock.move(0.2 - 0.02 + after_ms / 1000)
    begin_s = viewer.clock.now_s()
    rate = viewer.session.start.sample_rate
    data, size = speech(seconds, rate=rate), 2 * (rate * CHUNK_MS // 1000)
    delay_ms = 0.0
    for begin in range(0, len(data), size):
        await viewer.clock.move(CHUNK_MS / 1000)
        viewer.session.push(data[begin : begin + size])
        await viewer.clock.move(0)
        events = drain(viewer.session.outbox)
        viewer.events += events
        if not delay_ms and any(isinstance(event, PlaybackStarted) for event in events):
            (started,) = viewer.of(PlaybackStarted)
            delay_ms = 1000 * (1000.04 + started.pts / rate - begin_s)
    await viewer.watch_to_end()
    return delay_ms


@pytest.mark.parametrize("lookahead_ms", [0, 60, 100, 180, 300, 453])
@pytest.mark.parametrize("after_ms", [1, 15, 30])
async def test_the_delay_is_the_lookahead_and_the_margins(open_: Open, lookahead_ms: int, after_ms: int) -> None:
    """And once it runs, live speech runs without a gap."""
    async with open_({"lookahead_ms": lookahead_ms}, rendered=BLIND, sample_rate=16_000) as viewer:
        delay_ms = await said(viewer, 3.0, after_ms)
        windows = [window_lookahead_ms(offset) for offset in range(-9, 7)]
        used_ms = max(0.0, *(window for window in windows if window <= lookahead_ms))
        least_ms = used_ms + CUSHION_MS + MARGIN_MS
        assert least_ms <= delay_ms <= least_ms + FRAME_MS + CHUNK_MS
        heard = [each.pts // 640 for each in viewer.of(Heard)]
        assert heard == list(range(heard[0], heard[0] + 75))
        assert viewer.session.playout.counts["late"] == 0


@pytest.mark.parametrize("rate", [8_000, 11_025, 24_000, 44_100, 96_000, 192_000])
@pytest.mark.parametrize("after_ms", [1, 15, 30])
async def test_live_speech_at_any_rate_runs_without_a_gap(open_: Open, rate: int, after_ms: int) -> None:
    """However coarse the blocks are that the resampler gives."""
    async with open_(rendered=BLIND, sample_rate=rate) as viewer:
        await said(viewer, 2.0, after_ms)
        heard = [round(each.pts * 25 / rate) for each in viewer.of(Heard)]
        assert heard[:50] == list(range(heard[0], heard[0] + 50))
        assert viewer.session.playout.counts["late"] == 0


@pytest.mark.parametrize("margin_ms", [20, 80, 200])
@pytest.mark.parametrize("frames_per_request", [1, 4])
async def test_speech_that_is_all_there_waits_for_the_margin_alone(
    open_: Open, margin_ms: int, frames_per_request: int
) -> None:
    live = {"margin_ms": margin_ms, "frames_per_request": frames_per_request}
    async with open_(live, rendered=BLIND) as viewer:
        await viewer.watch(5)
        viewer.session.push(speech(2.0))
        viewer.session.end_segment()
        await viewer.watch(100)
        delay = viewer.of(PlaybackStarted)[0].pts // FRAME - 5
        assert delay == -(-margin_ms // FRAME_MS) + frames_per_request - 1
        text = viewer.metrics.exposition().decode()
        assert "lipsync_first_picture_seconds_count 1.0" in text
        sizes = {len(numbers) for numbers in viewer.stage.asked}
        assert max(sizes) == frames_per_request
        assert viewer.of(PlaybackFinished)[0].position == 2 * RATE


async def test_frames_that_wait_for_others_are_asked_for_in_time(open_: Open) -> None:
    """Speech stops within the 4 frames that a request may carry. Without lookahead its first frame is not heard."""
    async with open_({"frames_per_request": 4, "lookahead_ms": 0}, rendered=BLIND, sample_rate=16_000) as viewer:
        viewer.session.push(speech(0.24, rate=16_000))
        await viewer.watch(25)
        assert [len(numbers) for numbers in viewer.stage.asked] == [4, 1]
        assert viewer.session.playout.counts["late"] == 0
        assert viewer.session.playout.counts["speaking"] == 5


async def test_only_the_mouth_that_will_rest_is_kept(open_: Open) -> None:
    async with open_() as viewer:
        viewer.session.push(speech(5.0))
        await viewer.watch(30)
        slots = viewer.session.playout._slots
        assert len(slots) >= 3
        assert sum(slot.mouth is not None for slot in slots.values()) == 1
