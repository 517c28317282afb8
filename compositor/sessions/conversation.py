"""One conversation: a client's commands come in, its session's events go out, each when its time has come.

The rules that every transport shares: what comes first, what may not come twice, and what ends it all.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

from ..errors import InvalidInput, LipsyncError, RequestTimeout
from ..tracing import Span
from .events import (
    Ack,
    Audio,
    Command,
    Event,
    Failed,
    Interrupt,
    PlaybackFinished,
    PlaybackStarted,
    SegmentEnd,
    Start,
    Started,
    Switch,
)
from .live import CANCELLED, Live, stopped
from .session import Session


async def converse(
    live: Live, commands: AsyncIterator[Command], span: Span | None = None
) -> AsyncGenerator[Event, None]:
    """The events of a conversation. Ends when the commands have ended and all speech was shown.

    Raises InvalidInput for commands out of place, RequestTimeout where no Start comes, what `Live.begin` raises, and
    what ended the session. Whoever is done with it closes the generator, which ends the session. span: where the call
    is traced, whose parts are its segments of speech: frames would be too many.
    """
    speech = _Speech(span) if span is not None else None
    session = await live.begin(await _first(live, commands))
    listening = asyncio.create_task(_listen(session, commands))
    reason = CANCELLED
    try:
        while (event := await _next(session, listening)) is not None:
            if speech is not None:
                speech.hear(event)
            yield event
        if session.error is not None:
            raise session.error
        await listening
        reason = "OK"
    except LipsyncError as error:
        reason = error.reason
        raise
    finally:
        if speech is not None:
            speech.end()
        # The session first: who is cancelled here, too, leaves nothing running.
        listening.cancel()
        await live.end(session, reason)
        await asyncio.gather(listening, return_exceptions=True)


class _Speech:
    """The segments of a conversation, as the parts of its trace."""

    def __init__(self, call: Span) -> None:
        self._call = call
        self._segment: Span | None = None

    def hear(self, event: Event) -> None:
        if isinstance(event, Started):
            self._call.note(session=event.session, tenant=event.tenant)
        elif isinstance(event, PlaybackStarted):
            self._segment = self._call.begin("speech")
        elif isinstance(event, PlaybackFinished):
            if self._segment is not None:
                self._segment.note(samples=event.position, interrupted=event.interrupted)
            self.end()
        elif isinstance(event, Failed):
            self.end(event.error.reason)

    def end(self, failure: str = "") -> None:
        if self._segment is not None:
            self._segment.end(failure)
        self._segment = None


async def _first(live: Live, commands: AsyncIterator[Command]) -> Start:
    timeout_s = live.settings.live.start_timeout_s
    reading = asyncio.ensure_future(anext(commands))
    stopping = asyncio.create_task(live.draining.wait())
    try:
        # Not wait_for, which up to Python 3.11 may swallow a cancellation.
        await asyncio.wait({reading, stopping}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if stopping.done():
            raise stopped()
        if not reading.done():
            raise RequestTimeout(f"no start within {timeout_s:g} s")
        first = await reading
    except StopAsyncIteration:
        raise InvalidInput("the stream ended before it started: send start first", field="start") from None
    finally:
        reading.cancel()
        stopping.cancel()
        await asyncio.gather(reading, stopping, return_exceptions=True)
    if not isinstance(first, Start):
        raise InvalidInput(f"{_name(first)} before start: send start first", field=_name(first))
    return first


async def _next(session: Session, listening: asyncio.Task[None]) -> Event | None:
    """The session's next event; None when it has ended. Raises what the client's commands were refused for."""
    if listening.done() and listening.exception() is not None:
        await listening
    return await session.outbox.get()


async def _listen(session: Session, commands: AsyncIterator[Command]) -> None:
    """Carries out commands until they end, then plays out what was said."""
    try:
        async for command in commands:
            await _obey(session, command)
        session.outbox.lift_credit()
        await session.finish()
    finally:
        session.outbox.close()


async def _obey(session: Session, command: Command) -> None:
    match command:
        case Audio(data):
            session.push(data)
        case SegmentEnd():
            session.end_segment()
        case Interrupt():
            session.interrupt()
        case Ack(pts):
            session.outbox.acknowledge(pts)
        case Switch(tenant):
            await session.switch(tenant)
        case Start():
            raise InvalidInput("start twice: a session has one; use switch for another tenant", field="start")


def _name(command: Command) -> str:
    return {Audio: "audio", SegmentEnd: "segment_end", Interrupt: "interrupt", Ack: "ack", Switch: "switch"}.get(
        type(command), "start"
    )
