"""Live sessions on a clock that is moved by hand; predictions are the fake stage's."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from compositor.events import Event, Heard, PlaybackFinished, PlaybackStarted, Shown, Start, Started
from compositor.geometry import ping_pong
from compositor.metrics import Metrics
from compositor.session import Session
from compositor.settings import Settings
from compositor.tenant import Tenant

from .stage import FakeStage, SimulatedClock, drain

Kind = TypeVar("Kind")
RATE = 24_000
FRAME = RATE // 25


class Viewer:
    """A session, its clock, its stage, and all that came of it."""

    def __init__(self, session: Session, stage: FakeStage, clock: SimulatedClock) -> None:
        self.session, self.stage, self.clock = session, stage, clock
        self.events: list[Event] = []

    async def watch(self, frames: int) -> list[Event]:
        """The events of the next frames."""
        begin = len(self.events)
        for _ in range(frames):
            await self.clock.move(1 / self.session.playout.fps)
            self.events += drain(self.session.outbox)
        return self.events[begin:]

    def of(self, kind: type[Kind]) -> list[Kind]:
        return [event for event in self.events if isinstance(event, kind)]


Open = Callable[..., AbstractAsyncContextManager[Viewer]]


@pytest.fixture
def opened(repository: Path) -> Open:
    @contextlib.asynccontextmanager
    async def open_(settings: dict[str, Any] | None = None, **start: Any) -> AsyncIterator[Viewer]:
        stage = FakeStage({name: Tenant(repository, name) for name in ("plain", "avatar")})
        clock = SimulatedClock()
        chosen = Settings.model_validate({"live": settings or {}})
        start = {"tenant": "plain", "flow": "plain", **start}
        session = await Session.open("s", Start(**start), stage, chosen, clock, Metrics())
        try:
            yield Viewer(session, stage, clock)
        finally:
            await session.close()

    return open_


def speech(seconds: float, level: float = 0.3, rate: int = RATE) -> bytes:
    random = np.random.default_rng(0)
    return (random.uniform(-level, level, int(seconds * rate)) * 32767).astype("<i2").tobytes()


async def test_idle_frames_are_the_prepared_ones_in_endless_order(opened: Open) -> None:
    async with opened(start=3) as viewer:
        await viewer.watch(20)
        shown = viewer.of(Shown)
        assert [frame.pts for frame in shown] == [number * FRAME for number in range(20)]
        assert [frame.number for frame in shown] == [ping_pong(3 + tick, 8) for tick in range(20)]
        assert all(frame.data == viewer.session.tenant.frame(frame.number).jpeg() for frame in shown)
        assert not viewer.stage.asked
        assert isinstance(viewer.events[0], Started)


async def test_speech_is_shown_whole_and_beside_its_frames(opened: Open) -> None:
    async with opened() as viewer:
        await viewer.watch(3)
        data = speech(2.0)
        for begin in range(0, len(data), 999):
            viewer.session.push(data[begin : begin + 999])
        viewer.session.end_segment()
        await viewer.watch(70)
        started, finished = viewer.of(PlaybackStarted)[0], viewer.of(PlaybackFinished)[0]
        heard = viewer.of(Heard)
        assert b"".join(each.data for each in heard) == data
        speaking = [frame for frame in viewer.of(Shown) if started.pts <= frame.pts < finished.pts]
        assert len(speaking) == 50
        assert all(frame.speaking for frame in speaking)
        assert [each.pts for each in heard] == [frame.pts for frame in speaking]
        assert (finished.position, finished.interrupted) == (2 * RATE, False)
        shown = viewer.of(Shown)
        assert [frame.number for frame in shown] == [ping_pong(tick, 8) for tick in range(len(shown))]
        after = [frame.speaking for frame in shown if frame.pts >= finished.pts]
        assert after[:3] == [True] * 3, "the mouth comes to rest"
        assert not any(after[3:])


async def test_an_interruption_ends_all(opened: Open) -> None:
    async with opened() as viewer:
        viewer.session.push(speech(5.0))
        await viewer.watch(30)
        viewer.session.interrupt()
        events = await viewer.watch(20)
        finished = next(event for event in events if isinstance(event, PlaybackFinished))
        played = sum(len(each.data) for each in viewer.of(Heard)) // 2
        assert (finished.interrupted, finished.epoch, finished.position) == (True, 1, played)
        assert all(event.epoch == 1 for event in events)
        assert not any(isinstance(event, Heard) for event in events)
        viewer.session.push(speech(1.0))
        viewer.session.end_segment()
        await viewer.watch(50)
        assert viewer.of(PlaybackFinished)[-1].position == RATE
