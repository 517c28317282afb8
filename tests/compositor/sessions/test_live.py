"""What live sessions share: requests for frames that are due together, room for so many, and nothing left behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from compositor.call import Call, Stages
from compositor.errors import Overloaded, Stopping, TenantNotFound
from compositor.metrics import Metrics
from compositor.pipeline import Compositor
from compositor.rendering import Rendered
from compositor.sessions import live as module
from compositor.sessions.conversation import converse
from compositor.sessions.events import Command, Heard, PlaybackFinished, SegmentEnd, Shown, Start
from compositor.sessions.live import Live
from compositor.settings import Settings
from compositor.tenant import Tenant

from .stage import RATE, InPlace, SimulatedClock, drain, settle, speech

PLANES = np.full((3, 328, 328), 200, np.uint8)


class FakeCompositor:
    """What `Live` needs of the pipeline. Remembers how many frames each request had, and of whom."""

    def __init__(self, repository: Path) -> None:
        self.tenants = {name: Tenant(repository, name) for name in ("plain", "avatar")}
        self.pool: Executor = InPlace()
        self.requests: list[tuple[str, int]] = []
        self.embedded: list[int] = []
        self.before: Callable[[], Any] = lambda: None

    async def open(self, name: str, stages: Stages) -> Tenant:
        if name not in self.tenants:
            raise TenantNotFound(f"no tenant named {name!r} is installed", field="tenant")
        return self.tenants[name]

    async def load(self, call: Call) -> None: ...

    def batch_size(self, tenant: Tenant) -> int:
        return 8

    async def embeddings(self, call: Call, windows: NDArray[np.float32]) -> NDArray[np.float32]:
        self.embedded.append(len(windows))
        return np.zeros((len(windows), 512), np.float32)

    async def predict(
        self,
        call: Call,
        numbers: Sequence[int],
        features: NDArray[np.float32],
        works: Sequence[Callable[[NDArray[np.uint8]], Rendered]],
    ) -> list[Rendered]:
        self.requests.append((call.tenant.name, len(numbers)))
        waiting = self.before()
        if waiting is not None:
            await waiting
        assert len(numbers) == len(features) == len(works)
        return [work(PLANES) for work in works]


@pytest.fixture
def compositor(repository: Path) -> FakeCompositor:
    return FakeCompositor(repository)


def live_of(compositor: FakeCompositor, clock: SimulatedClock | None = None, **live: Any) -> Live:
    # 0 ms: on a clock that stands still, nothing else would end the gathering.
    settings = Settings.model_validate({"live": {"gather_ms": 0, "burst": 100, **live}})
    return Live(cast(Compositor, compositor), settings, Metrics(), clock or SimulatedClock())


async def test_frames_that_are_due_together_are_one_request(compositor: FakeCompositor) -> None:
    clock = SimulatedClock()
    live = live_of(compositor, clock)
    names = ["plain"] * 3 + ["avatar"] * 2
    sessions = [await live.begin(Start(name, flow="plain")) for name in names]
    await clock.move(0.1)
    for session in sessions:
        session.push(speech(1.0))
        session.end_segment()
    heard = {session: [] for session in sessions}  # type: dict[Any, list[Any]]
    for _ in range(40):
        await clock.move(0.04)
        for session in sessions:
            heard[session] += drain(session.outbox)
    for session in sessions:
        (finished,) = (event for event in heard[session] if isinstance(event, PlaybackFinished))
        assert finished.position == RATE
        assert session.playout.counts["speaking"] == 25
    frames = {name: [count for who, count in compositor.requests if who == name] for name in ("plain", "avatar")}
    assert (sum(frames["plain"]), sum(frames["avatar"])) == (75, 50)
    assert np.median(frames["plain"]) == 3
    assert np.median(frames["avatar"]) == 2
    assert max(frames["plain"]) <= 8
    for session in sessions:
        await live.end(session)


async def test_many_frames_at_once_are_requests_side_by_side(compositor: FakeCompositor) -> None:
    live = live_of(compositor, frames_per_request=20, margin_ms=1000)
    compositor.before = asyncio.Event().wait
    session = await live.begin(Start("plain"))
    session.push(speech(3.0))
    for _ in range(10_000):
        await asyncio.sleep(0)
        if len(compositor.requests) >= 3:
            break
    assert compositor.requests[:3] == [("plain", 8), ("plain", 8), ("plain", 4)]
    await live.end(session)


async def test_there_is_room_for_so_many(compositor: FakeCompositor) -> None:
    live = live_of(compositor, max_sessions=2)
    sessions = [await live.begin(Start("plain")) for _ in range(2)]
    with pytest.raises(Overloaded) as refused:
        await live.begin(Start("plain"))
    assert refused.value.retry_after_s
    await live.end(sessions[0])
    await live.end(await live.begin(Start("avatar")))
    await live.end(sessions[1])
    assert not live.sessions


async def test_a_session_that_cannot_begin_takes_no_room(compositor: FakeCompositor) -> None:
    live = live_of(compositor)
    with pytest.raises(TenantNotFound):
        await live.begin(Start("nobody"))
    assert not live.sessions


@pytest.mark.parametrize("turns", [0, 1, 2, 5, 20])
async def test_the_end_of_a_session_leaves_nothing(compositor: FakeCompositor, turns: int) -> None:
    before = asyncio.all_tasks()
    clock = SimulatedClock()
    live = live_of(compositor, clock)
    compositor.before = asyncio.Event().wait
    session = await live.begin(Start("plain"))
    session.push(speech(3.0))
    for _ in range(turns):
        await clock.move(0.01)
    await live.end(session)
    assert asyncio.all_tasks() == before
    assert (live._frames, live._windows, live.sessions) == ({}, {}, {})


async def test_the_end_of_one_session_does_not_harm_the_others(compositor: FakeCompositor) -> None:
    clock = SimulatedClock()
    live = live_of(compositor, clock)
    gone, stays = [await live.begin(Start("plain", flow="plain")) for _ in range(2)]
    for session in (gone, stays):
        session.push(speech(2.0))
        session.end_segment()
    await clock.move(0.3)
    await live.end(gone)
    await clock.move(3.0)
    assert stays.playout.counts["late"] == 0
    assert stays.playout.counts["speaking"] == 50
    await live.end(stays)


async def test_stats_are_for_people(compositor: FakeCompositor) -> None:
    clock = SimulatedClock()
    live = live_of(compositor, clock)
    session = await live.begin(Start("avatar"))
    await clock.move(0.2)
    (told,) = live.stats()["sessions"]
    assert told == {
        "session": session.name,
        "tenant": "avatar",
        "epoch": 0,
        "fps": 25,
        "position_s": 0.2,
        "pictures": {"speaking": 0, "fade": 0, "idle": 5, "late": 0},
        "dropped": 4,
    }
    assert [event.dropped for event in drain(session.outbox) if isinstance(event, Shown)] == [4]
    await live.end(session)


def live_for(compositor: FakeCompositor, clock: SimulatedClock) -> Live:
    """With a request of each model a second at least: 3 s is the least time that a model stays."""
    settings = Settings.model_validate({"live": {"gather_ms": 0}, "residency": {"min_resident_s": 3}})
    return Live(cast(Compositor, compositor), settings, Metrics(), clock)


async def test_the_models_of_silent_sessions_are_asked_now_and_then(compositor: FakeCompositor) -> None:
    clock = SimulatedClock()
    live = live_for(compositor, clock)
    sessions = [await live.begin(Start(name, flow="plain")) for name in ("plain", "plain", "avatar")]
    await clock.move(0.9)
    assert (compositor.requests, compositor.embedded) == ([], []), "loading them was a use"
    await clock.move(0.2)
    assert sorted(compositor.requests) == [("avatar", 1), ("plain", 1)], "once for all sessions of a tenant"
    assert compositor.embedded == [1]
    await clock.move(3)
    assert len(compositor.requests) == 8
    assert len(compositor.embedded) == 4
    assert live.stats()["sessions"][0]["pictures"]["speaking"] == 0, "nobody sees them"
    await live.end(sessions[2])
    compositor.requests.clear()
    await clock.move(3)
    assert set(compositor.requests) == {("plain", 1)}
    for session in sessions[:2]:
        await live.end(session)
    compositor.requests.clear()
    await clock.move(10)
    assert compositor.requests == []


async def test_the_models_of_speaking_sessions_are_not_asked_beyond(compositor: FakeCompositor) -> None:
    clock = SimulatedClock()
    live = live_for(compositor, clock)
    session = await live.begin(Start("plain", flow="plain"))
    session.push(speech(3.0))
    session.end_segment()
    for _ in range(74):
        await clock.move(0.04)
        drain(session.outbox)
    assert sum(count for _, count in compositor.requests) == 75, "no frame but those of the speech"
    await live.end(session)


async def test_a_model_that_does_not_answer_harms_no_session(compositor: FakeCompositor) -> None:
    clock = SimulatedClock()
    live = live_for(compositor, clock)

    def fail() -> None:
        raise Overloaded("no room")

    compositor.before = fail
    session = await live.begin(Start("plain", flow="plain"))
    await clock.move(5)
    compositor.before = lambda: None
    asked = len(compositor.requests)
    await clock.move(2)
    assert asked >= 4
    assert len(compositor.requests) == asked + 2
    await live.end(session)


async def test_sessions_are_counted(repository: Path) -> None:
    metrics = Metrics()
    live = Live(cast(Compositor, FakeCompositor(repository)), Settings(), metrics, SimulatedClock())
    sessions = [await live.begin(Start("plain")) for _ in range(2)]
    await live.end(sessions[0])
    text = metrics.exposition().decode()
    assert "lipsync_sessions 1.0" in text
    assert "lipsync_sessions_opened_total 2.0" in text
    await live.end(sessions[1])


async def test_the_stop_ends_each_session_once_it_is_silent(
    compositor: FakeCompositor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is idle, one speaks to its end, and one goes on until it is told that time is over."""
    for name in ("_FAREWELL_S", "_SHORT_FAREWELL_S"):
        monkeypatch.setattr(module, name, 60)
    clock, over = SimulatedClock(), asyncio.Event()
    live = live_of(compositor, clock)
    idle, speaking, endless = [await live.begin(Start("plain", flow="plain")) for _ in range(3)]
    speaking.push(speech(1.0))
    speaking.end_segment()
    endless.push(speech(10.0))
    await clock.move(0.2)
    heard = {session: drain(session.outbox) for session in (speaking, endless)}
    draining = asyncio.create_task(live.drain(over))
    await settle()
    assert [session.error is None for session in (idle, speaking, endless)] == [False, True, True]
    with pytest.raises(Stopping):
        await live.begin(Start("plain"))
    for _ in range(40):
        await clock.move(0.04)
        for session in heard:
            heard[session] += drain(session.outbox)
    assert [session.error is None for session in (idle, speaking, endless)] == [False, False, True]
    over.set()
    await settle()
    heard[endless] += drain(endless.outbox)
    for session in (idle, speaking, endless):
        assert isinstance(session.error, Stopping)
        assert await session.outbox.get() is None or session is idle
    for session, (samples, interrupted) in {speaking: (RATE, False), endless: (None, True)}.items():
        (finished,) = (event for event in heard[session] if isinstance(event, PlaybackFinished))
        sound = sum(len(event.data) for event in heard[session] if isinstance(event, Heard)) // 2
        assert finished.position == sound == (samples or sound)
        assert finished.interrupted == interrupted
    assert not draining.done(), "who listens has not left yet"
    for session in (idle, speaking, endless):
        await live.end(session)
    await draining


async def test_the_stop_does_not_wait_for_sessions_that_leave(compositor: FakeCompositor) -> None:
    clock, over = SimulatedClock(), asyncio.Event()
    live = live_of(compositor, clock)
    session = await live.begin(Start("plain"))
    session.push(speech(10.0))
    draining = asyncio.create_task(live.drain(over))
    await settle()
    assert not draining.done()
    await live.end(session)
    await draining


async def test_who_never_started_is_told_of_the_stop(compositor: FakeCompositor) -> None:
    live = live_of(compositor)

    async def silence() -> AsyncIterator[Command]:
        await asyncio.Event().wait()
        yield SegmentEnd()

    events = converse(live, silence())
    waiting = asyncio.ensure_future(anext(events))
    await settle()
    await live.drain(asyncio.Event())
    with pytest.raises(Stopping):
        await waiting


async def overloaded(live: Live, clock: SimulatedClock) -> None:
    """Seconds in which each tick is shown late."""
    for _ in range(60):
        clock.stall(0.05)
        await clock.move(0.01)


def refusals(metrics: Metrics) -> dict[str, float]:
    return {
        sample.labels["reason"]: sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "lipsync_sessions_refused_total"
    }


async def test_while_sessions_are_late_no_other_begins(
    compositor: FakeCompositor, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    clock, metrics = SimulatedClock(), Metrics()
    live = Live(cast(Compositor, compositor), Settings(), metrics, clock)
    sessions = [await live.begin(Start("plain", flow="plain")) for _ in range(2)]
    await overloaded(live, clock)
    share = live.stats()["late_share"]
    assert share > 0.3
    assert metrics.registry.get_sample_value("lipsync_late_share") == pytest.approx(share, abs=1e-4)
    for _ in range(2):
        with pytest.raises(Overloaded, match="busy") as refused:
            await live.begin(Start("plain"))
        assert 3 <= (refused.value.retry_after_s or 0) <= 4.5, "not all at the same time"
    assert refusals(metrics) == live.stats()["refused"] == {"max_sessions": 0, "late": 2, "burst": 0}
    assert len(live.sessions) == 2, "those under way go on"
    await clock.move(3)
    sessions.append(await live.begin(Start("plain", flow="plain")))
    assert live.stats()["late_share"] == 0
    assert next(record.levelname for record in caplog.records if "late" in record.message) == "WARNING"
    assert "pictures are in time again: sessions may begin" in caplog.messages
    for session in sessions:
        await live.end(session)


async def test_pictures_that_are_not_ready_are_an_overload_too(compositor: FakeCompositor) -> None:
    clock = SimulatedClock()
    live = live_of(compositor, clock)
    session = await live.begin(Start("plain", flow="plain"))
    compositor.before = lambda: clock.sleep_until(clock.now_s() + 0.3)
    session.push(speech(10.0))
    for _ in range(150):
        await clock.move(0.04)
        drain(session.outbox)
    assert session.playout.counts["speaking"] == 0
    assert live.stats()["late_share"] > 0.9
    with pytest.raises(Overloaded):
        await live.begin(Start("plain"))
    session.interrupt()
    await clock.move(3)
    await live.end(await live.begin(Start("plain")))
    await live.end(session)


async def test_once_all_have_left_the_next_is_let_in(compositor: FakeCompositor) -> None:
    clock = SimulatedClock()
    live = live_of(compositor, clock)
    sessions = [await live.begin(Start("plain", flow="plain")) for _ in range(2)]
    await overloaded(live, clock)
    for session in sessions:
        await live.end(session)
    assert live.stats()["late_share"] == 0
    for session in [await live.begin(Start("plain")) for _ in range(3)]:
        await live.end(session)


async def test_few_begin_at_once_where_nothing_is_known_yet(compositor: FakeCompositor) -> None:
    clock = SimulatedClock()
    live = live_of(compositor, clock, burst=2)
    sessions = [await live.begin(Start("plain", flow="plain")) for _ in range(2)]
    with pytest.raises(Overloaded) as refused:
        await live.begin(Start("plain"))
    await clock.move(refused.value.retry_after_s or 0)
    sessions.append(await live.begin(Start("plain", flow="plain")))
    assert live.stats()["refused"] == {"max_sessions": 0, "late": 0, "burst": 1}
    for session in sessions:
        await live.end(session)


async def test_without_a_measure_all_begin(compositor: FakeCompositor) -> None:
    clock = SimulatedClock()
    live = live_of(compositor, clock, max_late=1, burst=1)
    sessions = [await live.begin(Start("plain", flow="plain")) for _ in range(5)]
    await overloaded(live, clock)
    sessions.append(await live.begin(Start("plain", flow="plain")))
    for session in sessions:
        await live.end(session)
