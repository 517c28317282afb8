"""A live session: speech goes in as it is said, pictures come out when their time has come, and idle ones in between.

Turns speech into frames asked for ahead of their time, and paces what `Playout` shows by one clock. Knows no transport
and no Triton: its `Stage` predicts, and its `Outbox` waits for the viewer.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ..audio import SILENCE_MEL
from ..clock import Clock
from ..errors import DeadlinePassed, InvalidInput, LipsyncError, Overloaded, TritonUnavailable
from ..features import EMBEDDING, MAX_FPS, Features, Windows
from ..metrics import Metrics
from ..pcm import check_rate
from ..settings import Settings
from ..tenant import Tenant
from .events import Failed, PlaybackFinished, Start, Started
from .outbox import Outbox
from .playout import Playout, Slot
from .prefetching import prefetched
from .pressure import LATE_S
from .speech import SAMPLE_BYTES, Segment
from .stage import Ask, Stage

log = logging.getLogger(__name__)

_PASSING = (TritonUnavailable, DeadlinePassed, Overloaded)
"""What makes pictures late, but does not end the speech."""
_AUDIO_HELD_S = 0.5
"""Speech that may wait for a viewer who does not take it."""
_CAUGHT_UP_S = 0.4
"""Longest stall that a session catches up with: less than the speech that may wait for its viewer."""
_FETCHED_AHEAD = 8
"""Frames whose features wait to be placed."""
_MOST_SEGMENTS = 256
"""Segments that may wait, however short."""


class Session:
    """One viewer's session. Made by `Session.open`, ended by `stop`; what it tells waits in `outbox`."""

    def __init__(
        self, name: str, start: Start, tenant: Tenant, stage: Stage, settings: Settings, clock: Clock, metrics: Metrics
    ) -> None:
        self.name = name
        self.tenant = tenant
        self.start = start
        self.epoch = 0
        self.error: LipsyncError | None = None
        """What ended the session by itself, if anything did."""
        self.outbox = Outbox(start.flow, self._bytes(_AUDIO_HELD_S), metrics)
        self.playout = Playout(start, tenant, self.outbox, stage.pool, settings.live, clock, metrics)
        self._stage, self._settings, self._clock, self._metrics = stage, settings, clock, metrics
        self._segments: deque[Segment] = deque()  # those whose end was not shown
        self._open: Segment | None = None  # the one that takes speech
        self._asks: list[tuple[Slot, Ask]] = []  # frames to ask for together
        self._loaded: Tenant | None = None
        self._silence: NDArray[np.float32] | None = None
        self._moved = asyncio.Event()
        self._pacing: asyncio.Task[None] | None = None
        self._speaking: asyncio.Task[None] | None = None
        self._works: set[asyncio.Task[None]] = set()

    @classmethod
    async def open(
        cls, name: str, start: Start, stage: Stage, settings: Settings, clock: Clock, metrics: Metrics
    ) -> Session:
        """A session that shows its first picture at once. Raises InvalidInput, TenantNotFound, TenantBroken."""
        check_rate(start.sample_rate)
        if not 0 <= start.fps <= MAX_FPS:
            raise InvalidInput(
                f"fps {start.fps} is out of range: use 1 to {MAX_FPS}, or 0 for the tenant's own", field="fps"
            )
        if start.start < 0:
            raise InvalidInput("start is negative: give a position in the order of backgrounds", field="start")
        if start.output.raw:
            raise InvalidInput("live frames are JPEG: BGR24 is for Composite and Generate", field="output.format")
        session = cls(name, start, await stage.open(start.tenant), stage, settings, clock, metrics)
        session._announce()
        session._pacing = asyncio.create_task(session._guard(session._pace))
        session._speaking = session._work(session._speak)
        return session

    def push(self, data: bytes) -> None:
        """More speech, in chunks of any size. Raises Overloaded where too much waits to be shown."""
        if not data:
            return
        waiting = sum(segment.held for segment in self._segments)
        full = self._open is None and len(self._segments) >= _MOST_SEGMENTS
        if full or waiting + len(data) > self._bytes(self._settings.live.buffer_s):
            raise Overloaded(
                "too much speech waits to be shown; send it as it is shown, or raise live.buffer_s", retry_after_s=1
            )
        if self._open is None:
            self._open = self._segment()
            self._segments.append(self._open)
        self._open.push(data)
        self._moved.set()

    def _bytes(self, seconds: float) -> int:
        """What so much speech is in the session's encoding."""
        return int(seconds * self.start.sample_rate) * SAMPLE_BYTES[self.start.encoding]

    def _segment(self) -> Segment:
        live = self._settings.live
        return Segment(
            self.start.sample_rate,
            self.start.encoding,
            self.playout.fps,
            edge=self._settings.audio.edge,
            lookahead_ms=live.lookahead_ms,
            floor_dbfs=live.silence_dbfs,
            begin_s=None if self._segments else self._clock.now_s(),
        )

    def end_segment(self) -> None:
        """The speech so far is whole. Raises InvalidInput where its last sample is not."""
        if self._open is not None:
            self._open.end()
            self._open = None

    def interrupt(self) -> None:
        """Drops all speech; the answer says how much of it was shown."""
        self._metrics.interrupts.inc()
        self._restart()

    async def switch(self, tenant: str) -> None:
        """Goes on with another tenant. Raises as `open` does, and then nothing changes."""
        other = await self._stage.open(tenant)
        self._restart()
        self.tenant = other
        self._silence = None
        self.playout.change(other)
        self._announce()

    @property
    def speaking(self) -> bool:
        """Whether speech is left to be shown."""
        return bool(self._segments)

    async def finish(self) -> None:
        """Returns when all speech so far was shown, or the session has ended."""
        self.end_segment()
        await self.silent()

    async def silent(self) -> None:
        """Returns when no speech is left to be shown, or the session has ended."""
        while self._segments and self.error is None:
            self._moved.clear()
            await self._moved.wait()

    def close(self, error: LipsyncError) -> None:
        """Ends the session with an error, of which its viewer hears after what was shown of its speech."""
        if self._segments and self.error is None:
            self._restart()
        self._end(error)

    def stop(self) -> list[asyncio.Task[None]]:
        """Ends the session's events and cancels its work; gives the tasks that are still ending."""
        tasks = [task for task in (self._pacing, *self._works) if task is not None]
        for task in tasks:
            task.cancel()
        self.outbox.close()
        self._segments.clear()
        self._moved.set()
        return tasks

    def _announce(self) -> None:
        manifest, playout = self.tenant.manifest, self.playout
        rate, lookahead_ms = self.start.sample_rate, self._settings.live.lookahead_ms
        size = (manifest.width, manifest.height, manifest.frames)
        self.outbox.put(Started(self.name, self.tenant.name, self.epoch, rate, playout.fps, *size, lookahead_ms))

    def _work(self, work: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
        task = asyncio.create_task(self._guard(work))
        self._works.add(task)
        task.add_done_callback(self._works.discard)
        return task

    async def _guard(self, work: Callable[[], Awaitable[None]]) -> None:
        """What a task dies of ends the session, and is told."""
        try:
            await work()
        except LipsyncError as error:
            self._end(error)
        except Exception:
            log.exception("session %s failed in a way that nobody foresaw", self.name)
            self._end(LipsyncError("internal error; the service's log has the details"))

    def _end(self, error: LipsyncError) -> None:
        self.error = self.error or error
        self.outbox.close()
        self._moved.set()

    async def _pace(self) -> None:
        """Shows one tick after another. All sessions' ticks fall on one grid, so that their frames make one request.

        After a stall of the process, the ticks that were missed follow at once: their speech is heard, and of their
        pictures the last is shown. A long stall stops the session's time instead, so that no speech is lost.
        """
        fps = self.playout.fps
        late_s = max(LATE_S, 1 / fps)
        origin = int(self._clock.now_s() * fps) + 1
        for tick in itertools.count():
            missed = int(self._clock.now_s() * fps) - origin - tick
            stalled = missed > _CAUGHT_UP_S * fps
            if stalled:
                origin, missed = origin + missed, 0
            due_s = (origin + tick) / fps
            if missed <= 0:
                await self._clock.sleep_until(due_s)
            for segment in self.playout.show(tick, self.epoch, due_s):
                self._segments.remove(segment)
            self._stage.shown(late=stalled or self._clock.now_s() - due_s > late_s)
            if self._asks and self.playout.urgent(self._asks[0][0]):
                self._ask()
            self._moved.set()

    async def _speak(self) -> None:
        """Asks for the frames of one segment after another."""
        if self._loaded is not self.tenant:
            await self._stage.load(self.tenant)
            self._loaded = self.tenant
        done: Segment | None = None
        # Up to Python 3.11 asyncio.wait_for, and so the load, may swallow the cancellation.
        while self._speaking is asyncio.current_task():
            segments = list(self._segments)
            waiting = segments[segments.index(done) + 1 :] if done in segments else segments
            if not waiting:
                self._moved.clear()
                await self._moved.wait()
                continue
            done = waiting[0]
            try:
                await self._perform(done)
            except LipsyncError as error:
                self._fail(done, error)

    async def _perform(self, segment: Segment) -> None:
        """Places a segment's frames on ticks and asks for them, as far ahead as the playout wants."""
        ready: deque[Features | None] = deque()
        # The next speech becomes features while the last of it is shown: an encoder that is slow once makes no gap.
        fetching = prefetched(segment.frames(self._embed), _FETCHED_AHEAD)
        async with contextlib.aclosing(fetching) as frames:
            async for features in frames:
                ready.append(features)
                if len(ready) > self.playout.cushion:
                    await self._place(segment, ready)
        await self._place(segment, ready)
        self._ask()
        self.playout.end(segment)

    async def _place(self, segment: Segment, ready: deque[Features | None]) -> None:
        while ready:
            features = ready.popleft()
            slot = self.playout.place(segment, silent=features is None)
            if features is not None:
                playout = self.playout
                ask = Ask(playout.number(slot.tick), features, playout.finish(slot), playout.due_s(slot.tick))
                self._asks.append((slot, ask))
            if features is None or len(self._asks) >= self._settings.live.frames_per_request:
                self._ask()
            while self.playout.full:
                self._moved.clear()
                await self._moved.wait()

    def _ask(self) -> None:
        """Asks for the frames that were gathered, if any were."""
        if self._asks:
            self._work(partial(self._fill, self._asks))
            self._asks = []

    async def _fill(self, asks: list[tuple[Slot, Ask]]) -> None:
        try:
            pictures = await self._stage.predict(self.tenant, [ask for _, ask in asks])
        except _PASSING as error:
            log.debug("session %s: pictures are late: %s", self.name, error.message)
        except LipsyncError as error:
            self._fail(asks[0][0].segment, error)
        else:
            for (slot, _), picture in zip(asks, pictures, strict=True):
                self.playout.fill(slot, picture)

    async def _embed(self, windows: Windows) -> NDArray[np.float32]:
        """As the stage, but digital silence only once."""
        silent = (windows == SILENCE_MEL).all(axis=(1, 2, 3))
        if not silent.any():
            return await self._stage.embed(self.tenant, windows)
        if self._silence is None:
            self._silence = (await self._stage.embed(self.tenant, windows[silent][:1]))[0]
        embeddings = np.empty((len(windows), EMBEDDING), np.float32)
        embeddings[silent] = self._silence
        if not silent.all():
            embeddings[~silent] = await self._stage.embed(self.tenant, windows[~silent])
        return embeddings

    def _fail(self, segment: Segment, error: LipsyncError) -> None:
        """A segment cannot be shown; the session goes on. What is still to come of the open one is not shown either:
        it would fail again, chunk by chunk."""
        if segment in self._segments:
            log.warning("session %s: a segment failed: %s", self.name, error.message)
            self._metrics.failures.labels(error.reason).inc()
            self.outbox.put(Failed(self.playout.pts(self.playout.tick + 1), self.epoch, error))
            rest = self._open
            self._restart()
            if rest is not None:
                rest.mute()
                self._open = rest

    def _restart(self) -> None:
        """Drops all speech and what was made of it."""
        self.epoch += 1
        missed = self.outbox.withdraw() // SAMPLE_BYTES[self.start.encoding]
        position = self._segments[0].shown - missed if self._segments else 0
        self._segments.clear()
        self._open = None
        self._asks = []
        self.playout.drop()
        pts = self.playout.pts(self.playout.tick + 1)
        self.outbox.put(PlaybackFinished(pts, self.epoch, position, interrupted=True))
        current = asyncio.current_task()
        for task in self._works - {current}:
            task.cancel()
        if self._speaking is not current:
            self._speaking = self._work(self._speak)
        self._moved.set()
