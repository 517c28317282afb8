"""Conversations: what may be said when, what ends them, and that nothing of them stays."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from compositor.errors import (
    InvalidInput,
    LipsyncError,
    Overloaded,
    RequestTimeout,
    TenantBroken,
    TenantNotFound,
)
from compositor.sessions.conversation import converse
from compositor.sessions.events import (
    Ack,
    Audio,
    Command,
    Event,
    Failed,
    Heard,
    Interrupt,
    PlaybackFinished,
    PlaybackStarted,
    SegmentEnd,
    Shown,
    Start,
    Started,
    Switch,
)
from compositor.sessions.live import Live

from .stage import RATE, SimulatedClock, settle, speech
from .test_live import FakeCompositor, live_of

START = Start("plain", flow="plain")


class Client:
    """Says what it is told to, until it is told to hang up."""

    def __init__(self, *said: Command) -> None:
        self._said: asyncio.Queue[Command | None] = asyncio.Queue()
        for command in said:
            self.say(command)

    def say(self, command: Command | None) -> None:
        self._said.put_nowait(command)

    def hang_up(self) -> None:
        self.say(None)

    async def commands(self) -> AsyncGenerator[Command, None]:
        while (command := await self._said.get()) is not None:
            yield command


class Talk:
    """A conversation and a consumer that takes all it gets."""

    def __init__(self, compositor: FakeCompositor, client: Client, **settings: float) -> None:
        self.clock = SimulatedClock()
        self.live: Live = live_of(compositor, self.clock, **settings)
        self.client = client
        self.events: list[Event] = []
        self.consuming = asyncio.create_task(self._consume())

    async def _consume(self) -> None:
        async with (
            contextlib.aclosing(self.client.commands()) as commands,
            contextlib.aclosing(converse(self.live, commands)) as events,
        ):
            async for event in events:
                self.events.append(event)

    async def move(self, frames: int) -> None:
        for _ in range(frames):
            await self.clock.move(0.04)

    async def failure(self) -> BaseException | None:
        """What ended the conversation, soon."""
        await self.move(3)
        assert self.consuming.done()
        return self.consuming.exception()


@pytest.fixture
def compositor(repository: Path) -> FakeCompositor:
    return FakeCompositor(repository)


async def test_a_client_that_hangs_up_hears_what_it_said(compositor: FakeCompositor) -> None:
    before = asyncio.all_tasks()
    talk = Talk(compositor, Client(START, Audio(speech(1.0)), SegmentEnd(), Audio(speech(0.5))))
    talk.client.hang_up()
    await talk.move(60)
    await talk.consuming
    assert isinstance(talk.events[0], Started)
    assert [event.position for event in talk.events if isinstance(event, PlaybackFinished)] == [RATE, RATE // 2]
    assert b"".join(event.data for event in talk.events if isinstance(event, Heard)) == speech(1.0) + speech(0.5)
    assert not talk.live.sessions
    assert asyncio.all_tasks() == before


async def test_who_has_hung_up_needs_no_credit(compositor: FakeCompositor) -> None:
    talk = Talk(compositor, Client(Start("plain"), Audio(speech(1.0))))
    talk.client.hang_up()
    await talk.move(40)
    assert sum(event.speaking for event in talk.events if isinstance(event, Shown)) >= 25
    await talk.consuming


async def test_who_takes_frames_more_slowly_than_they_come_sees_the_end(compositor: FakeCompositor) -> None:
    clock = SimulatedClock()
    live = live_of(compositor, clock)
    client = Client(START, Audio(speech(0.2)))
    client.hang_up()
    seen: list[Event] = []

    async def watch() -> None:
        async for event in converse(live, client.commands()):
            seen.append(event)
            await clock.sleep_until(clock.now_s() + 0.13)

    watching = asyncio.create_task(watch())
    for _ in range(100):
        await clock.move(0.04)
    assert watching.done()
    assert sum(isinstance(event, PlaybackFinished) for event in seen) == 1


async def test_a_conversation_with_all_that_can_be_said(compositor: FakeCompositor) -> None:
    talk = Talk(compositor, Client(Start("plain")))
    await talk.move(5)
    assert sum(isinstance(event, Shown) for event in talk.events) == 2, "no more without acknowledgement"
    talk.client.say(Ack(10**9))
    talk.client.say(Audio(speech(2.0)))
    await talk.move(20)
    assert any(isinstance(event, PlaybackStarted) for event in talk.events)
    talk.client.say(Interrupt())
    talk.client.say(Switch("avatar"))
    await talk.move(1)
    assert [event.tenant for event in talk.events if isinstance(event, Started)] == ["plain", "avatar"]
    talk.client.hang_up()
    await talk.move(2)
    await talk.consuming


NOT_FIRST = [
    (Audio(b""), "audio"),
    (SegmentEnd(), "segment_end"),
    (Interrupt(), "interrupt"),
    (Ack(0), "ack"),
    (Switch("plain"), "switch"),
]


@pytest.mark.parametrize(("command", "field"), NOT_FIRST)
async def test_start_comes_first(compositor: FakeCompositor, command: Command, field: str) -> None:
    talk = Talk(compositor, Client(command))
    failure = await talk.failure()
    assert isinstance(failure, InvalidInput)
    assert (failure.field, talk.events) == (field, [])


MISUSE: list[tuple[list[Command], type[LipsyncError], str]] = [
    ([START, START], InvalidInput, "start"),
    ([Start("nobody")], TenantNotFound, "tenant"),
    ([Start("plain", sample_rate=1)], InvalidInput, "sample_rate"),
    ([START, Switch("nobody")], TenantNotFound, "tenant"),
    ([START, Audio(b"\0"), SegmentEnd()], InvalidInput, "audio"),
    ([START, Audio(bytes(2 * 2 * RATE))], Overloaded, ""),
]


@pytest.mark.parametrize(("said", "kind", "field"), MISUSE)
async def test_misuse_ends_it(
    compositor: FakeCompositor, said: list[Command], kind: type[LipsyncError], field: str
) -> None:
    before = asyncio.all_tasks()
    talk = Talk(compositor, Client(*said), buffer_s=1)
    failure = await talk.failure()
    assert isinstance(failure, kind)
    assert failure.field == field
    assert not talk.live.sessions
    assert asyncio.all_tasks() == before


async def test_a_cut_sample_at_the_end_is_told(compositor: FakeCompositor) -> None:
    talk = Talk(compositor, Client(START, Audio(b"\0\0\0")))
    talk.client.hang_up()
    assert isinstance(await talk.failure(), InvalidInput)


async def test_hanging_up_before_the_start(compositor: FakeCompositor) -> None:
    talk = Talk(compositor, Client())
    talk.client.hang_up()
    failure = await talk.failure()
    assert isinstance(failure, InvalidInput)
    assert failure.field == "start"


async def test_a_start_that_does_not_come(compositor: FakeCompositor) -> None:
    before = asyncio.all_tasks()
    talk = Talk(compositor, Client(), start_timeout_s=0.01)
    with pytest.raises(RequestTimeout, match=r"no start within 0\.01 s"):
        await talk.consuming
    await settle()
    assert asyncio.all_tasks() == before


async def test_what_fails_in_a_segment_does_not_end_it(compositor: FakeCompositor) -> None:
    talk = Talk(compositor, Client(START, Audio(speech(1.0)), SegmentEnd()))
    failure = TenantBroken("broken")

    def fail() -> None:
        raise failure

    compositor.before = fail
    await talk.move(5)
    assert [event.error for event in talk.events if isinstance(event, Failed)] == [failure]
    compositor.before = lambda: None
    talk.client.say(Audio(speech(1.0)))
    talk.client.hang_up()
    await talk.move(50)
    await talk.consuming
    *_, finished = (event for event in talk.events if isinstance(event, PlaybackFinished))
    assert (finished.position, finished.interrupted) == (RATE, False)


async def test_what_ends_the_session_is_raised(compositor: FakeCompositor, monkeypatch: pytest.MonkeyPatch) -> None:
    async def load(call: object) -> None:
        raise TenantBroken("does not load")

    monkeypatch.setattr(compositor, "load", load)
    talk = Talk(compositor, Client(START, Audio(speech(1.0))))
    talk.client.hang_up()
    assert isinstance(await talk.failure(), TenantBroken)
    assert not talk.live.sessions


async def test_a_client_that_breaks_down(compositor: FakeCompositor) -> None:
    before = asyncio.all_tasks()

    class Broken(Client):
        async def commands(self) -> AsyncGenerator[Command, None]:
            yield START
            await asyncio.sleep(0)
            raise ConnectionResetError("gone")

    talk = Talk(compositor, Broken())
    assert isinstance(await talk.failure(), ConnectionResetError)
    assert asyncio.all_tasks() == before


@pytest.mark.parametrize("cancellations", [1, 2])
@pytest.mark.parametrize("turns", [*range(12), 20, 40, 80])
async def test_a_cancellation_at_any_point_leaves_nothing(
    compositor: FakeCompositor, turns: int, cancellations: int
) -> None:
    """After so many turns of the event loop; and again while it cleans up."""
    before = asyncio.all_tasks()
    compositor.before = asyncio.Event().wait
    talk = Talk(compositor, Client(START, Audio(speech(3.0)), Switch("avatar"), Audio(speech(3.0))))
    moving = asyncio.create_task(talk.move(20))
    for _ in range(turns):
        await asyncio.sleep(0)
    for _ in range(cancellations):
        talk.consuming.cancel()
        await asyncio.sleep(0)
    with contextlib.suppress(asyncio.CancelledError):
        await talk.consuming
    assert talk.consuming.cancelled()
    moving.cancel()
    await settle()
    assert not talk.live.sessions
    assert asyncio.all_tasks() == before


async def test_a_consumer_that_closes_leaves_nothing(compositor: FakeCompositor) -> None:
    before = asyncio.all_tasks()
    live = live_of(compositor)
    client = Client(START, Audio(speech(3.0)))
    events = converse(live, client.commands())
    assert isinstance(await anext(events), Started)
    await events.aclose()
    await settle()
    assert not live.sessions
    assert asyncio.all_tasks() == before


def endings(caplog: pytest.LogCaptureFixture) -> list[dict[str, object]]:
    """What the log says of sessions that have ended."""
    lines = (getattr(record, "fields", {}) for record in caplog.records)
    return [fields for fields in lines if "reason" in fields]


async def test_the_log_sums_up_what_a_session_was(compositor: FakeCompositor, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    talk = Talk(compositor, Client(START, Audio(speech(1.0))))
    talk.client.hang_up()
    await talk.move(60)
    (ending,) = endings(caplog)
    most_late_s = ending.pop("most_late_s")
    pictures = ending.pop("pictures")
    assert isinstance(pictures, dict)
    assert pictures["speaking"] == 25
    ticks = sum(pictures.values())
    assert most_late_s == 0
    assert ending == {"tenant": "plain", "seconds": ticks / 25, "dropped": 0, "dropped_audio": 0, "reason": "OK"}


async def test_the_log_says_why_a_session_ended(compositor: FakeCompositor, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    talk = Talk(compositor, Client(START, START))
    assert isinstance(await talk.failure(), InvalidInput)
    talk = Talk(compositor, Client(START))
    await talk.move(3)
    talk.consuming.cancel()
    await asyncio.gather(talk.consuming, return_exceptions=True)
    assert [ending["reason"] for ending in endings(caplog)] == ["INVALID_INPUT", "CANCELLED"]
