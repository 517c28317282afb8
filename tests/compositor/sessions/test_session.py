"""Live sessions on a clock that is moved by hand; predictions are the fake stage's."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compositor.errors import (
    InferenceFailed,
    InvalidInput,
    LipsyncError,
    Overloaded,
    TenantBroken,
    TenantNotFound,
    TritonUnavailable,
)
from compositor.geometry import ping_pong
from compositor.metrics import Metrics
from compositor.rendering import Output, Rendered
from compositor.sessions.events import Event, Failed, Heard, PlaybackFinished, PlaybackStarted, Shown, Start, Started
from compositor.sessions.session import Session
from compositor.sessions.stage import Ask
from compositor.settings import Settings
from compositor.tenant import Tenant

from .stage import FRAME, RATE, FakeStage, Open, SimulatedClock, Viewer, drain, opened, speech

SILENCE = bytes(2 * RATE)
BLIND = Rendered(b"a picture", np.zeros((328, 328, 3), np.uint8), 0, 0)


@pytest.fixture
def open_(repository: Path) -> Open:
    return partial(opened, repository)


def check_order(viewer: Viewer) -> None:
    """One picture for each tick, on the backgrounds of the endless order; speech only beside its own picture."""
    shown, fps, rate = viewer.of(Shown), viewer.session.playout.fps, viewer.session.start.sample_rate
    assert [frame.pts for frame in shown] == [tick * rate // fps for tick in range(len(shown))]
    assert [frame.number for frame in shown] == [ping_pong(tick, 8) for tick in range(len(shown))]
    assert {heard.pts for heard in viewer.of(Heard)} <= {frame.pts for frame in shown}


async def test_idle_frames_are_the_prepared_ones_in_endless_order(open_: Open) -> None:
    async with open_(start=3) as viewer:
        await viewer.watch(20)
        shown = viewer.of(Shown)
        assert [frame.pts for frame in shown] == [number * FRAME for number in range(20)]
        assert [frame.number for frame in shown] == [ping_pong(3 + tick, 8) for tick in range(20)]
        assert all(frame.data == viewer.session.tenant.frame(frame.number).jpeg() for frame in shown)
        assert (viewer.stage.asked, viewer.stage.windows) == ([], 0)
        assert isinstance(viewer.events[0], Started)


async def test_speech_is_shown_whole_and_beside_its_frames(open_: Open) -> None:
    async with open_() as viewer:
        await viewer.watch(3)
        data = speech(2.0)
        for begin in range(0, len(data), 999):
            viewer.session.push(data[begin : begin + 999])
        viewer.session.end_segment()
        await viewer.watch(70)
        started, finished = viewer.of(PlaybackStarted)[0], viewer.of(PlaybackFinished)[0]
        heard = viewer.of(Heard)
        assert viewer.heard == data
        speaking = [frame for frame in viewer.of(Shown) if started.pts <= frame.pts < finished.pts]
        assert len(speaking) == 50
        assert all(frame.speaking for frame in speaking)
        assert [each.pts for each in heard] == [frame.pts for frame in speaking]
        assert (finished.position, finished.interrupted) == (2 * RATE, False)
        check_order(viewer)
        after = [frame.speaking for frame in viewer.of(Shown) if frame.pts >= finished.pts]
        assert after[:3] == [True] * 3, "the mouth comes to rest"
        assert not any(after[3:])


@pytest.mark.parametrize("fps", [25, 29, 30])
@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 24_000, 44_100, 48_000])
async def test_any_rate_at_any_fps(open_: Open, rate: int, fps: int) -> None:
    async with open_(rendered=BLIND, sample_rate=rate, fps=fps) as viewer:
        data = speech(1.7, rate=rate)
        await viewer.watch(5)
        viewer.session.push(data)
        viewer.session.end_segment()
        await viewer.watch(2 * fps + 20)
        heard, finished = viewer.of(Heard), viewer.of(PlaybackFinished)[0]
        assert viewer.heard == data
        assert finished.position == len(data) // 2
        played = np.cumsum([0] + [len(each.data) // 2 for each in heard])
        offsets = [each.pts - heard[0].pts - begin for each, begin in zip(heard, played, strict=False)]
        assert set(offsets) <= {-1, 0, 1}, "what was heard and what was shown stay together"
        check_order(viewer)


@pytest.mark.parametrize("size", [1, 7, 960, 4801])
async def test_the_chunking_changes_nothing(open_: Open, size: int) -> None:
    data = speech(0.4) + bytes(4800) + speech(0.4)
    seen: list[list[Event]] = []
    for cut in (len(data), size):
        async with open_() as viewer:
            for begin in range(0, len(data), cut):
                viewer.session.push(data[begin : begin + cut])
            viewer.session.end_segment()
            seen.append(await viewer.watch(40))
    assert seen[0] == seen[1]


async def test_float32_says_the_same_as_pcm16(open_: Open) -> None:
    data = speech(0.5)
    floats = (np.frombuffer(data, "<i2") / 32768).astype("<f4").tobytes()
    pictures: list[list[Event]] = []
    for encoding, spoken in (("pcm16", data), ("float32", floats)):
        async with open_(encoding=encoding) as viewer:
            viewer.session.push(spoken)
            viewer.session.end_segment()
            await viewer.watch(30)
            assert viewer.heard == spoken
            pictures.append([event for event in viewer.events if not isinstance(event, Heard)])
    assert pictures[0] == pictures[1]


async def test_speech_may_stay_away(open_: Open) -> None:
    async with open_(audio=False, sample_rate=24_000, fps=29) as viewer:
        viewer.session.push(speech(1.0))
        viewer.session.end_segment()
        await viewer.watch(50)
        assert not viewer.of(Heard)
        assert viewer.of(PlaybackFinished)[0].position == RATE


async def test_an_hour_of_speech_does_not_drift(open_: Open) -> None:
    """Continuous, at a rate and an fps that do not divide; the sender's clock is the session's."""
    rate, fps, seconds = 8_000, 7, 3600
    second = speech(1.0, rate=rate)
    async with open_({"frames_per_request": 8}, rendered=BLIND, sample_rate=rate, fps=fps) as viewer:
        samples, pictures, started = 0, 0, 0
        viewer.session.push(second)  # the sender stays ahead by this
        for sent in range(seconds + 2):
            if sent < seconds - 1:
                viewer.session.push(second)
            else:
                viewer.session.end_segment()
            for event in await viewer.watch(fps):
                if isinstance(event, PlaybackStarted):
                    started = event.pts
                if isinstance(event, Heard):
                    assert abs(event.pts - started - samples) <= 1
                    samples += len(event.data) // 2
                if isinstance(event, Shown):
                    assert event.pts == pictures * rate // fps
                    pictures += 1
            viewer.events.clear()
        assert samples == seconds * rate
        assert viewer.session.playout.counts["speaking"] == seconds * fps
        assert viewer.session.playout.counts["late"] == 0


async def test_an_hour_of_segments_does_not_drift(open_: Open) -> None:
    rate, fps, segments = 22_050, 7, 120
    spoken = speech(1.013, rate=rate)
    async with open_(rendered=BLIND, sample_rate=rate, fps=fps) as viewer:
        for _ in range(segments):
            viewer.session.push(spoken)
            viewer.session.end_segment()
            events = await viewer.watch(30 * fps)
            started = next(event for event in events if isinstance(event, PlaybackStarted))
            finished = next(event for event in events if isinstance(event, PlaybackFinished))
            heard = [event for event in events if isinstance(event, Heard)]
            assert (finished.position, b"".join(each.data for each in heard)) == (len(spoken) // 2, spoken)
            assert heard[0].pts == started.pts
            assert 0 <= finished.pts - started.pts - finished.position <= rate // fps + 1
        assert viewer.clock.now_s() == pytest.approx(1000.02 + 3600)
        check_order(viewer)


async def test_silence_inside_a_stream_is_idle(open_: Open) -> None:
    async with open_() as viewer:
        viewer.session.push(speech(1.0) + SILENCE * 3 + speech(1.0))
        viewer.session.end_segment()
        await viewer.watch(150)
        frames = viewer.of(Shown)
        quiet = [frame for frame in frames if 60 <= frame.pts // FRAME < 100]
        assert all(frame.data == viewer.session.tenant.frame(frame.number).jpeg() for frame in quiet)
        assert not any(frame.speaking for frame in quiet)
        assert len(viewer.heard) // 2 == 5 * RATE, "what is silent is heard all the same"
        asked = sum(map(len, viewer.stage.asked))
        assert asked == viewer.session.playout.counts["speaking"] == 25 + 4 + 2 + 25
        check_order(viewer)


async def test_silence_is_embedded_once(open_: Open) -> None:
    async with open_() as viewer:
        viewer.session.push(SILENCE * 3)
        await viewer.watch(100)
        assert viewer.stage.windows == 1
        viewer.session.interrupt()
        viewer.session.push(SILENCE * 3)
        await viewer.watch(50)
        assert (viewer.stage.windows, viewer.stage.asked) == (1, [])
        assert viewer.session.playout.counts["idle"] == 150


async def test_segments_follow_each_other_without_a_gap(open_: Open) -> None:
    async with open_() as viewer:
        for _ in range(3):
            viewer.session.push(speech(0.4))
            viewer.session.end_segment()
        await viewer.watch(50)
        started, finished = viewer.of(PlaybackStarted), viewer.of(PlaybackFinished)
        assert [each.pts for each in started[1:]] == [each.pts for each in finished[:-1]]
        assert [each.position for each in finished] == [round(0.4 * RATE)] * 3
        assert viewer.heard == speech(0.4) * 3
        assert np.diff([each.pts for each in viewer.of(Heard)]).tolist() == [FRAME] * 29


async def test_an_end_without_speech_is_none(open_: Open) -> None:
    async with open_() as viewer:
        viewer.session.end_segment()
        viewer.session.push(b"")
        viewer.session.end_segment()
        await viewer.watch(5)
        assert {type(event) for event in viewer.events} == {Started, Shown}


async def test_the_end_of_a_segment_flushes_the_lookahead(open_: Open) -> None:
    async with open_() as viewer:
        viewer.session.push(speech(0.4))
        await viewer.watch(20)
        assert not viewer.speaking(), "the first frame waits for more than came"
        viewer.session.end_segment()
        await viewer.watch(20)
        assert viewer.heard == speech(0.4)


async def test_an_interruption_ends_all(open_: Open) -> None:
    async with open_() as viewer:
        viewer.session.push(speech(5.0))
        await viewer.watch(30)
        viewer.session.interrupt()
        events = await viewer.watch(20)
        finished = next(event for event in events if isinstance(event, PlaybackFinished))
        assert (finished.interrupted, finished.epoch, finished.position) == (True, 1, len(viewer.heard) // 2)
        assert all(vars(event)["epoch"] == 1 for event in events)
        assert not any(isinstance(event, Heard) for event in events)
        viewer.session.push(speech(1.0))
        viewer.session.end_segment()
        await viewer.watch(50)
        assert viewer.of(PlaybackFinished)[-1].position == RATE
        check_order(viewer)


async def test_the_position_is_what_the_viewer_got(open_: Open) -> None:
    """Speech that still waits for a slow viewer was not heard."""
    async with open_() as viewer:
        viewer.session.push(speech(5.0))
        await viewer.watch(30)
        got = len(viewer.heard) // 2
        await viewer.clock.move(0.2)
        viewer.session.interrupt()
        (finished,) = (event for event in drain(viewer.session.outbox) if isinstance(event, PlaybackFinished))
        assert finished.position == got


async def test_interruptions_in_a_row_and_before_any_speech(open_: Open) -> None:
    async with open_() as viewer:
        viewer.session.interrupt()
        await viewer.watch(1)
        viewer.session.push(speech(2.0))
        await viewer.watch(20)
        viewer.session.interrupt()
        viewer.session.interrupt()
        events = await viewer.watch(30)
        answers = viewer.of(PlaybackFinished)
        assert [each.epoch for each in answers] == [1, 2, 3]
        assert [each.position for each in answers] == [0, len(viewer.heard) // 2, 0]
        assert not any(isinstance(event, Heard | PlaybackStarted) for event in events)
        assert len(viewer.session._works) == 1
        check_order(viewer)


async def test_an_interruption_at_the_last_frame(open_: Open) -> None:
    async with open_() as viewer:
        viewer.session.push(speech(0.4))
        viewer.session.end_segment()
        while len(viewer.heard) < len(speech(0.4)):
            await viewer.watch(1)
        viewer.session.interrupt()
        await viewer.watch(10)
        (finished,) = viewer.of(PlaybackFinished)
        assert (finished.interrupted, finished.position) == (True, round(0.4 * RATE))
        check_order(viewer)


async def test_an_interruption_right_after_the_end_finds_nothing(open_: Open) -> None:
    async with open_() as viewer:
        viewer.session.push(speech(0.4))
        viewer.session.end_segment()
        while not viewer.of(PlaybackFinished):
            await viewer.watch(1)
        viewer.session.interrupt()
        await viewer.watch(10)
        assert [(each.interrupted, each.position) for each in viewer.of(PlaybackFinished)] == [
            (False, round(0.4 * RATE)),
            (True, 0),
        ]


async def test_the_late_answer_to_what_was_interrupted_does_not_show(open_: Open) -> None:
    async with open_({"fade_ms": 0}) as viewer:
        gates: list[asyncio.Event] = []

        def hold() -> object:
            gates.append(asyncio.Event())
            return gates[-1].wait()

        viewer.stage.before = hold
        viewer.session.push(speech(2.0))
        await viewer.watch(5)
        assert gates
        viewer.session.interrupt()
        for gate in gates:
            gate.set()
        await viewer.watch(20)
        assert not viewer.speaking()
        assert viewer.session.playout.counts["idle"] + viewer.session.playout.counts["late"] == 25


async def test_new_speech_right_after_an_interruption_is_new(open_: Open) -> None:
    async with open_() as viewer:
        viewer.session.push(speech(2.0))
        await viewer.watch(12)
        old = len(viewer.of(Heard))
        viewer.session.interrupt()
        new = speech(1.0, 0.1)
        viewer.session.push(new)
        viewer.session.end_segment()
        await viewer.watch(40)
        assert b"".join(each.data for each in viewer.of(Heard)[old:]) == new
        assert {each.epoch for each in viewer.of(Heard)[old:]} == {1}
        check_order(viewer)


async def test_an_interruption_while_models_load(open_: Open) -> None:
    loaded = asyncio.Event()
    async with open_() as viewer:
        viewer.stage.before_load = loaded.wait
        viewer.session.push(speech(2.0))
        await viewer.watch(20)
        viewer.session.interrupt()
        viewer.session.push(speech(1.0))
        viewer.session.end_segment()
        await viewer.watch(20)
        assert not viewer.of(Heard)
        loaded.set()
        await viewer.watch(40)
        assert viewer.heard == speech(1.0)
        viewer.session.interrupt()
        await viewer.watch(5)
        assert viewer.stage.loads == 2, "not once more when they are loaded"


async def test_models_that_do_not_load_end_the_session(open_: Open) -> None:
    async with open_() as viewer:
        viewer.stage.before_load = raiser(TenantBroken("does not load"))
        viewer.session.push(speech(1.0))
        finishing = asyncio.create_task(viewer.session.finish())
        await viewer.watch(3)
        assert isinstance(viewer.session.error, TenantBroken)
        await finishing
        assert await viewer.session.outbox.get() is None


def raiser(error: Exception) -> Callable[[], object]:
    def fail() -> object:
        raise error

    return fail


@pytest.mark.parametrize("frames_per_request", [1, 4])
async def test_speech_that_comes_too_slowly_waits_with_its_pictures(open_: Open, frames_per_request: int) -> None:
    """Half as fast as it is said, in pieces of 200 ms."""
    async with open_({"frames_per_request": frames_per_request}) as viewer:
        data = speech(4.0)
        for begin in range(0, len(data), 9600):
            viewer.session.push(data[begin : begin + 9600])
            await viewer.watch(10)
        viewer.session.end_segment()
        await viewer.watch(30)
        assert viewer.heard == data
        counts = viewer.session.playout.counts
        assert (counts["speaking"], counts["late"]) == (100, 0)
        beside = {heard.pts for heard in viewer.of(Heard)}
        assert beside <= set(viewer.speaking()), "no speech without its mouth"
        check_order(viewer)


@pytest.mark.parametrize("kind", [TritonUnavailable, Overloaded])
async def test_pictures_that_do_not_come_do_not_stop_the_speech(open_: Open, kind: type[LipsyncError]) -> None:
    # No error as a parameter: pytest keeps it to its end and, by its traceback, all that was there where it was raised.
    async with open_({"fade_ms": 0}) as viewer:
        viewer.stage.before = raiser(kind("gone"))
        viewer.session.push(speech(1.0))
        viewer.session.end_segment()
        await viewer.watch(40)
        assert viewer.heard == speech(1.0)
        assert viewer.of(PlaybackFinished)[0].position == RATE
        assert viewer.session.playout.counts["late"] == 25
        assert not viewer.of(Failed)
        assert 'lipsync_pictures_total{kind="late"} 25.0' in viewer.metrics.exposition().decode()
        check_order(viewer)


async def test_a_late_picture_is_not_shown_later(open_: Open) -> None:
    async with open_({"fade_ms": 0}) as viewer:
        gate = asyncio.Event()
        viewer.stage.before = gate.wait
        viewer.session.push(speech(2.0))
        viewer.session.end_segment()
        await viewer.watch(10)
        late = viewer.session.playout.counts["late"]
        assert late
        viewer.stage.before = lambda: None
        gate.set()
        await viewer.watch(60)
        counts = viewer.session.playout.counts
        assert (counts["late"], counts["speaking"]) == (late, 50 - late)
        assert viewer.heard == speech(2.0)
        check_order(viewer)


@pytest.mark.parametrize("kind", [TenantBroken, InferenceFailed])
async def test_a_segment_that_fails_is_told_once_and_the_session_goes_on(open_: Open, kind: type[LipsyncError]) -> None:
    error = kind("broken")
    async with open_() as viewer:
        await viewer.watch(1)
        viewer.stage.before = raiser(error)
        chunk = speech(0.02)[:-1]  # samples cut in two
        for _ in range(100):
            viewer.session.push(chunk)
            await viewer.watch(1)
        (failed,), (finished,) = viewer.of(Failed), viewer.of(PlaybackFinished)
        assert (failed.error, failed.epoch) == (error, 0)
        assert (finished.interrupted, finished.epoch) == (True, 1)
        viewer.stage.before = lambda: None
        viewer.session.end_segment()
        viewer.session.push(speech(1.0))
        viewer.session.end_segment()
        await viewer.watch_to_end()
        assert viewer.of(PlaybackFinished)[-1].position == RATE
        assert viewer.session.error is None
        reason = error.reason
        assert f'lipsync_segments_failed_total{{reason="{reason}"}} 1.0' in viewer.metrics.exposition().decode()
        check_order(viewer)


async def test_an_encoder_that_fails_ends_the_segment(open_: Open) -> None:
    async with open_() as viewer:
        viewer.stage.embed_failure = TritonUnavailable("gone")
        viewer.session.push(speech(1.0))
        await viewer.watch(2)
        assert [each.error for each in viewer.of(Failed)] == [viewer.stage.embed_failure]
        viewer.stage.embed_failure = None
        viewer.session.interrupt()
        viewer.session.push(speech(1.0))
        viewer.session.end_segment()
        await viewer.watch_to_end()
        assert viewer.heard == speech(1.0)


async def test_a_fault_that_nobody_foresaw_ends_the_session(open_: Open, caplog: pytest.LogCaptureFixture) -> None:
    async with open_() as viewer:
        viewer.stage.before = raiser(ZeroDivisionError("oops"))
        viewer.session.push(speech(1.0))
        await viewer.watch(5)
        assert viewer.session.error is not None
        assert "internal" in viewer.session.error.message
        await viewer.session.finish()
        assert "ZeroDivisionError" in caplog.text


async def test_samples_that_are_no_numbers_fail_their_segment(open_: Open) -> None:
    async with open_(encoding="float32") as viewer:
        viewer.session.push(np.full(RATE, np.inf, "<f4").tobytes())
        await viewer.watch(3)
        assert isinstance(viewer.of(Failed)[0].error, InvalidInput)
        assert viewer.session.error is None


async def test_too_much_speech_is_refused(open_: Open) -> None:
    async with open_({"buffer_s": 2}) as viewer:
        for _ in range(4):
            viewer.session.push(speech(0.5))
            viewer.session.end_segment()
        with pytest.raises(Overloaded, match="buffer_s"):
            viewer.session.push(b"\0\0")
        await viewer.watch(10)
        viewer.session.push(b"\0\0")


async def test_too_many_segments_are_refused(open_: Open) -> None:
    async with open_() as viewer:
        for _ in range(256):
            viewer.session.push(b"\0\0")
            viewer.session.end_segment()
        with pytest.raises(Overloaded):
            viewer.session.push(b"\0\0")


async def test_switching_goes_on_with_the_other_tenant(open_: Open) -> None:
    async with open_() as viewer:
        viewer.session.push(speech(3.0))
        await viewer.watch(20)
        viewer.events.clear()
        await viewer.session.switch("avatar")
        events = await viewer.watch(5)
        assert isinstance(events[0], PlaybackFinished)
        assert events[0].interrupted
        started, tenant = events[1], viewer.session.tenant
        assert isinstance(started, Started)
        assert (started.tenant, started.epoch, started.fps, started.frames) == ("avatar", 1, 25, 6)
        assert (started.width, started.height) == (640, 360)
        shown = viewer.of(Shown)
        assert [frame.number for frame in shown] == [0, 1, 2, 3, 4]
        assert [frame.pts for frame in shown] == [tick * FRAME for tick in range(20, 25)]
        assert all(frame.data == tenant.frame(frame.number).jpeg() for frame in shown)
        viewer.session.push(speech(1.0))
        viewer.session.end_segment()
        await viewer.watch_to_end()
        assert viewer.of(PlaybackFinished)[-1].position == RATE
        assert viewer.stage.loads == 2


async def test_switching_to_nobody_changes_nothing(open_: Open) -> None:
    async with open_() as viewer:
        viewer.session.push(speech(1.0))
        viewer.session.end_segment()
        await viewer.watch(10)
        with pytest.raises(TenantNotFound):
            await viewer.session.switch("nobody")
        await viewer.watch(40)
        assert viewer.heard == speech(1.0)
        assert viewer.session.epoch == 0
        assert viewer.session.tenant.name == "plain"
        check_order(viewer)


async def test_a_short_stall_is_made_up_for(open_: Open) -> None:
    """Speech is heard whole; of the pictures that are due at once, the viewer gets the last."""
    async with open_({"gather_ms": 0}) as viewer:
        viewer.session.push(speech(3.0))
        viewer.session.end_segment()
        await viewer.watch(20)
        viewer.events.clear()
        viewer.clock.stall(0.16)
        await viewer.watch(1)
        (shown,), heard = viewer.of(Shown), viewer.of(Heard)
        assert (shown.pts, shown.dropped) == (24 * FRAME, 4)
        assert [each.pts for each in heard] == [tick * FRAME for tick in range(20, 24)], "what was placed by then"
        viewer.events.clear()
        await viewer.watch(80)
        assert viewer.of(PlaybackFinished)[0].position == 3 * RATE
        assert [each.pts for each in viewer.of(Shown)] == [tick * FRAME for tick in range(25, 105)]
        assert {each.pts for each in viewer.of(Heard)} <= set(viewer.speaking())


async def test_a_long_stall_stops_time(open_: Open) -> None:
    async with open_() as viewer:
        viewer.session.push(speech(3.0))
        viewer.session.end_segment()
        await viewer.watch(20)
        viewer.clock.stall(60.0)
        await viewer.watch(100)
        assert viewer.heard == speech(3.0)
        assert viewer.session.outbox.dropped == 2
        assert viewer.of(Shown)[-1].pts == (119 + 2) * FRAME


async def test_a_stall_is_counted(open_: Open) -> None:
    async with open_() as viewer:
        await viewer.watch(10)
        viewer.clock.stall(0.2)
        await viewer.watch(1)
        text = viewer.metrics.exposition().decode()
        assert 'lipsync_lateness_seconds_bucket{le="0.08"} 13.0' in text
        assert "lipsync_lateness_seconds_count 16.0" in text


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"fps": 61}, "fps"),
        ({"fps": -1}, "fps"),
        ({"start": -1}, "start"),
        ({"sample_rate": 7999}, "sample_rate"),
        ({"output": Output(raw=True)}, "output.format"),
    ],
)
async def test_what_no_session_can_do_is_refused(repository: Path, wrong: dict[str, Any], field: str) -> None:
    tasks = asyncio.all_tasks()
    with pytest.raises(InvalidInput) as refused:
        async with opened(repository, **wrong):
            pass
    assert refused.value.field == field
    assert asyncio.all_tasks() == tasks


async def test_closing_leaves_no_task(open_: Open) -> None:
    before = asyncio.all_tasks()
    async with open_() as viewer:
        viewer.stage.before = asyncio.Event().wait
        viewer.session.push(speech(2.0))
        await viewer.watch(10)
        viewer.session.interrupt()
        viewer.session.push(speech(2.0))
        await viewer.watch(10)
        assert asyncio.all_tasks() > before
    assert asyncio.all_tasks() == before


async def test_fifty_stalled_viewers_take_little_memory(repository: Path) -> None:
    """And the fifty-first, who is not stalled, misses nothing."""
    clock, metrics = SimulatedClock(), Metrics()
    stage = FakeStage({"plain": Tenant(repository, "plain")})
    settings = Settings()
    sessions = [
        await Session.open(str(number), Start("plain"), stage, settings, clock, metrics) for number in range(50)
    ]
    healthy = Viewer(
        await Session.open("healthy", Start("plain"), stage, settings, clock, metrics), stage, clock, metrics
    )
    everybody = [*sessions, healthy.session]
    data = speech(0.2)

    async def watch_a_little() -> None:
        for _ in range(2):
            for session in everybody:
                session.push(data)
            for _ in range(5):
                await healthy.watch(1)
                healthy.session.outbox.acknowledge(healthy.of(Shown)[-1].pts)

    try:
        tracemalloc.start()
        taken = []
        for _ in range(5):
            await watch_a_little()
            taken.append(tracemalloc.get_traced_memory()[0])
        assert taken[-1] < 50_000_000
        assert taken[4] - taken[2] < 2_000_000, "no more with time"
        assert (healthy.session.outbox.dropped, healthy.session.outbox.dropped_audio) == (0, 0)
        check_order(healthy)
        for session in sessions:
            (picture,) = (event for event in drain(session.outbox) if isinstance(event, Shown))
            assert picture.pts == healthy.of(Shown)[-1].pts, "of now"
            assert picture.dropped == 49
    finally:
        tracemalloc.stop()
        for session in everybody:
            await asyncio.gather(*session.stop(), return_exceptions=True)


@pytest.mark.parametrize(
    ("fps", "stall_s", "late"), [(25, 0.03, 0), (25, 0.1, 1), (25, 0.13, 2), (10, 0.1, 0), (10, 0.35, 2), (25, 2, 2)]
)
async def test_ticks_that_are_shown_late_are_told(open_: Open, fps: int, stall_s: float, late: int) -> None:
    """By more than a frame's period. Of a long stall: the one that it hit, and the next, from which time goes on."""
    async with open_(rendered=BLIND, fps=fps) as viewer:
        await viewer.watch(5)
        viewer.clock.stall(stall_s)
        await viewer.watch(5)
        assert viewer.stage.ticks.count(True) == late
        assert len(viewer.stage.ticks) == sum(viewer.session.playout.counts.values())


async def test_each_picture_is_asked_for_with_the_time_at_which_it_is_due(open_: Open) -> None:
    async with open_(rendered=BLIND) as viewer:
        due_s: list[float] = []
        predict = viewer.stage.predict

        async def note(tenant: Tenant, asks: Sequence[Ask]) -> list[Rendered]:
            due_s.extend(ask.due_s for ask in asks)
            return await predict(tenant, asks)

        viewer.stage.predict = note  # type: ignore[method-assign]
        await viewer.watch(3)
        viewer.session.push(speech(1.0))
        viewer.session.end_segment()
        await viewer.watch(40)
        shown_s = [1000.04 + pts / RATE for pts in viewer.speaking()[:25]]
        assert due_s == pytest.approx(shown_s)


async def test_who_has_speech_left_speaks(open_: Open) -> None:
    async with open_(rendered=BLIND) as viewer:
        assert not viewer.session.speaking
        viewer.session.push(speech(0.5))
        viewer.session.end_segment()
        assert viewer.session.speaking
        await viewer.watch_to_end()
        assert not viewer.session.speaking
