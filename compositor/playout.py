"""What each frame period of a live session shows: frames of speech are placed on ticks to come, and every tick gives
the viewer one picture and the speech that belongs to it.

A tick shows what was predicted for it, if that is ready, or the prepared frame of the same background, whose mouth is
at rest. Between the two the last mouth fades, and only the mouth. The order of backgrounds never breaks. Knows no
Triton and no transport.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

from .blending import Pixels, merge_planes
from .clock import Clock
from .events import Heard, PlaybackFinished, PlaybackStarted, Shown, Start
from .geometry import ping_pong
from .metrics import Metrics
from .outbox import Outbox
from .rendering import Rendered, compose
from .settings import LiveSettings
from .speech import Segment
from .tenant import Tenant

log = logging.getLogger(__name__)


@dataclass
class Slot:
    """A tick of speech. One that is silent has no picture of its own and never will."""

    tick: int
    segment: Segment
    silent: bool
    picture: Rendered | None = None


class Playout:
    """The ticks of one session. `show` is called once for each, in order, when its time has come."""

    def __init__(
        self,
        start: Start,
        tenant: Tenant,
        outbox: Outbox,
        pool: Executor,
        settings: LiveSettings,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self.fps = start.fps or tenant.manifest.fps
        self.tick = -1
        """The last one that was shown."""
        self.counts = dict.fromkeys(("speaking", "fade", "idle", "late"), 0)
        self._start, self._tenant = start, tenant
        self._outbox, self._pool, self._clock, self._metrics = outbox, pool, clock, metrics
        # A frame may have to wait for those that are asked for with it.
        self._margin = -(-settings.margin_ms * self.fps // 1000) + settings.frames_per_request - 1
        self._ahead = 2 * settings.frames_per_request
        self._fade = round(settings.fade_ms * self.fps / 1000)
        self._background = start.start  # of tick 0, in the endless order
        self._slots: dict[int, Slot] = {}
        self._next = 0  # the first tick that no frame of speech was placed on
        self._rising = 0  # frames placed since the mouth was at rest
        self._endings: deque[tuple[int, Segment]] = deque()
        self._mouth: Pixels | None = None  # the last one shown
        self._falling = 0  # pictures that it has left for coming to rest
        self._spare: tuple[int, asyncio.Future[Rendered]] | None = None

    def pts(self, tick: int) -> int:
        """Samples from the session's begin to a tick."""
        return tick * self._start.sample_rate // self.fps

    def number(self, tick: int) -> int:
        """The background of a tick."""
        return ping_pong(self._background + tick, self._tenant.frames)

    @property
    def full(self) -> bool:
        """Whether as many ticks are taken as may be asked for ahead of their time."""
        return self._next - self.tick > self._margin + self._ahead

    def place(self, segment: Segment, *, silent: bool) -> Slot:
        """The next frame of speech gets its tick: the one after the last frame's, but not before it can be ready."""
        tick = max(self._next, self.tick + 1 + self._margin)
        if tick > self._next:
            self._rising = 0
        self._rising = 0 if silent else self._rising + 1
        self._next = tick + 1
        slot = self._slots[tick] = Slot(tick, segment, silent)
        return slot

    def finish(self, slot: Slot) -> partial[Rendered]:
        """What makes a slot's picture of its predicted mouth, in a thread. To be asked for as slots are placed."""
        weight = min(1.0, self._rising / (self._fade + 1))
        return partial(_finish, self._tenant, self.number(slot.tick), self._start, weight)

    def end(self, segment: Segment) -> None:
        """All frames of a segment are placed."""
        self._endings.append((max(self._next, self.tick + 1), segment))

    def drop(self) -> None:
        """Forgets all speech; the mouth comes to rest."""
        self._slots.clear()
        self._endings.clear()
        self._next = 0

    def change(self, tenant: Tenant) -> None:
        """Goes on with another tenant, from its first background."""
        self.drop()
        self._tenant = tenant
        self._background = -(self.tick + 1)
        self._mouth, self._falling, self._spare = None, 0, None

    def show(self, tick: int, epoch: int, due_s: float) -> list[Segment]:
        """Hands the viewer what a tick shows; the segments that ended with the one before."""
        self.tick = tick
        ended = self._end_due(tick, epoch)
        slot = self._slots.pop(tick, None)
        if slot is not None:
            self._hear(slot, epoch)
        kind, picture = self._choose(tick, slot)
        patches = self._start.picture == "patches"
        number = self.number(tick)
        frame = self._tenant.frame(number)
        if picture is not None:
            shown = Shown(self.pts(tick), epoch, number, True, picture.data, frame.patch if patches else None)
        else:
            shown = Shown(self.pts(tick), epoch, number, False, b"" if patches else frame.jpeg())
        self._outbox.put(shown)
        self.counts[kind] += 1
        self._metrics.pictures.labels(kind).inc()
        self._metrics.lateness_s.observe(max(0.0, self._clock.now_s() - due_s))
        self._prepare(tick + 1)
        return ended

    def _end_due(self, tick: int, epoch: int) -> list[Segment]:
        ended = []
        while self._endings and self._endings[0][0] <= tick:
            segment = self._endings.popleft()[1]
            if rest := segment.take_rest():
                self._outbox.put(Heard(self.pts(tick), epoch, rest))
            self._outbox.put(PlaybackFinished(self.pts(tick), epoch, segment.shown, interrupted=False))
            ended.append(segment)
        return ended

    def _hear(self, slot: Slot, epoch: int) -> None:
        segment, pts = slot.segment, self.pts(slot.tick)
        if not segment.started:
            segment.started = True
            self._metrics.first_picture_s.observe(max(0.0, self._clock.now_s() - segment.begin_s))
            self._outbox.put(PlaybackStarted(pts, epoch))
        data = segment.take(self.pts(slot.tick + 1) - pts)
        if data and self._start.audio:
            self._outbox.put(Heard(pts, epoch, data))

    def _choose(self, tick: int, slot: Slot | None) -> tuple[str, Rendered | None]:
        """(kind, picture, or None for the prepared frame) of a tick."""
        if slot is not None and slot.picture is not None:
            self._mouth, self._falling = slot.picture.mouth, self._fade
            return "speaking", slot.picture
        late = slot is not None and not slot.silent
        fading = self._take_spare(tick)
        return "late" if late else "fade" if fading else "idle", fading

    def _take_spare(self, tick: int) -> Rendered | None:
        if self._falling:
            self._falling -= 1
        spare, self._spare = self._spare, None
        if spare is None or spare[0] != tick or not spare[1].done():
            return None
        return spare[1].result()

    def _prepare(self, tick: int) -> None:
        """Starts on the fading mouth of a tick whose own picture is not there."""
        slot = self._slots.get(tick)
        if self._mouth is None or (slot is not None and slot.picture is not None):
            return
        if not self._falling:
            self._mouth = None
            return
        weight = self._falling / (self._fade + 1)
        work = partial(_picture, self._tenant, self.number(tick), self._start, weight, self._mouth)
        self._spare = tick, asyncio.get_running_loop().run_in_executor(self._pool, work)


def _finish(tenant: Tenant, number: int, start: Start, weight: float, planes: Pixels) -> Rendered:
    return _picture(tenant, number, start, weight, merge_planes(planes))


def _picture(tenant: Tenant, number: int, start: Start, weight: float, mouth: Pixels) -> Rendered:
    return compose(tenant, number, mouth, start.output, weight, alone=start.picture == "patches")
