"""What each frame period of a live session shows: frames of speech are placed on ticks to come, and every tick gives
the viewer one picture and the speech that belongs to it.

A tick shows what was predicted for it, if that is ready, or the prepared frame of the same background, whose mouth is
at rest. Between the two the last mouth fades, and only the mouth. The order of backgrounds never breaks. Knows no
Triton and no transport.
"""

from __future__ import annotations

import asyncio
from collections import deque
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

from ..blending import Pixels, merge_planes
from ..clock import Clock
from ..geometry import ping_pong
from ..metrics import Metrics
from ..rendering import Rendered, compose
from ..settings import LiveSettings
from ..tenant import Tenant
from .events import Heard, PlaybackFinished, PlaybackStarted, Shown, Start
from .outbox import Outbox
from .speech import Segment

CUSHION_MS = 40
"""How unevenly frames of speech that is sent as it is said may become ready: the resampler gives blocks of 40 ms."""
COARSE_CUSHION_MS = 120
"""The same at all rates but `_FINE_RATES`: blocks of up to 115 ms."""
_FINE_RATES = frozenset((16_000, 22_050, 24_000, 44_100, 48_000))


@dataclass
class Slot:
    """A tick of speech. One that is silent has no picture of its own and never will.

    level: how far the mouth has come from rest towards speech, in steps of the fade. mouth: of the picture, as long as
    it may be the one that comes to rest.
    """

    tick: int
    segment: Segment
    silent: bool
    level: int
    picture: bytes | None = None
    mouth: Pixels | None = None


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
        self.most_late_s = 0.0
        """The most that a tick was shown after its time."""
        self._due_s = clock.now_s()  # of that last one
        self._start, self._tenant = start, tenant
        self._outbox, self._pool, self._clock, self._metrics = outbox, pool, clock, metrics
        # Looked up once: at each picture that took as long as the counting.
        self._pictures = {kind: metrics.pictures.labels(kind) for kind in self.counts}
        self._least_margin = -(-settings.margin_ms * self.fps // 1000)
        # A frame may have to wait for those that are asked for with it.
        self._margin = self._least_margin + settings.frames_per_request - 1
        cushion_ms = CUSHION_MS if start.sample_rate in _FINE_RATES else COARSE_CUSHION_MS
        self._cushion = -(-cushion_ms * self.fps // 1000)
        self._ahead = 2 * settings.frames_per_request - (-int(settings.gather_ms) * self.fps // 1000)
        self._fade = round(settings.fade_ms * self.fps / 1000)
        self._background = start.start  # of tick 0, in the endless order
        self._slots: dict[int, Slot] = {}
        self._next = 0  # the first tick that no frame of speech was placed on
        self._level = 0  # of the mouth in the tick before
        self._endings: deque[tuple[int, Segment]] = deque()
        self._mouth: Pixels | None = None  # the last one shown
        self._falling = 0  # its level in the next tick, if that has no picture of its own
        self._spare: tuple[int, asyncio.Future[Rendered]] | None = None

    def pts(self, tick: int) -> int:
        """Samples from the session's begin to a tick."""
        return tick * self._start.sample_rate // self.fps

    def due_s(self, tick: int) -> float:
        """When a tick will be shown, on the session's clock."""
        return self._due_s + (tick - self.tick) / self.fps

    def number(self, tick: int) -> int:
        """The background of a tick."""
        return ping_pong(self._background + tick, self._tenant.frames)

    @property
    def full(self) -> bool:
        """Whether as many ticks are taken as may be asked for ahead of their time."""
        return self._next - self.tick > self._margin + self._ahead

    @property
    def cushion(self) -> int:
        """Frames that should be ready behind the next one before it is placed: where speech begins, or begins again
        after a gap, those that come at an uneven pace would leave another gap."""
        return self._cushion if self._next <= self.tick + self._margin else 0

    def place(self, segment: Segment, *, silent: bool) -> Slot:
        """The next frame of speech gets its tick: the one after the last frame's, but not before it can be ready."""
        tick = max(self._next, self.tick + 1 + self._margin)
        rested = max(0, self._level - (tick - self._next))
        self._level = max(0, rested - 1) if silent else min(self._fade, rested) + 1
        self._next = tick + 1
        slot = self._slots[tick] = Slot(tick, segment, silent, self._level)
        return slot

    def finish(self, slot: Slot) -> partial[Rendered]:
        """What makes a slot's picture of its predicted mouth, in a thread."""
        return partial(_finish, self._tenant, self.number(slot.tick), self._start, self._weight(slot.level))

    def fill(self, slot: Slot, rendered: Rendered) -> None:
        """A slot's picture is ready."""
        slot.picture, slot.mouth = rendered.data, rendered.mouth
        # Only the mouth that no picture follows will come to rest; kept for all, they would be most of the memory.
        before, after = self._slots.get(slot.tick - 1), self._slots.get(slot.tick + 1)
        if before is not None:
            before.mouth = None
        if after is not None and after.picture is not None:
            slot.mouth = None

    def urgent(self, slot: Slot) -> bool:
        """Whether a slot's picture must be asked for now, for it to be ready in time."""
        return slot.tick - self.tick <= self._least_margin

    def end(self, segment: Segment) -> None:
        """All frames of a segment are placed."""
        self._endings.append((max(self._next, self.tick + 1), segment))

    def drop(self) -> None:
        """Forgets all speech; the mouth comes to rest."""
        if self._mouth is None:
            self._mouth = next((slot.mouth for slot in self._slots.values() if slot.mouth is not None), None)
        self._slots.clear()
        self._endings.clear()
        self._next, self._level = self.tick + 1, self._falling
        self._prepare(self.tick + 1)

    def change(self, tenant: Tenant) -> None:
        """Goes on with another tenant, from its first background."""
        self._falling, self._spare = 0, None
        self.drop()
        self._mouth = None
        self._tenant = tenant
        self._background = -(self.tick + 1)

    def show(self, tick: int, epoch: int, due_s: float) -> list[Segment]:
        """Hands the viewer what a tick shows; the segments that ended with the one before."""
        self.tick, self._due_s = tick, due_s
        ended = self._end_due(tick, epoch)
        slot = self._slots.pop(tick, None)
        if slot is not None:
            self._hear(slot, epoch)
        kind, picture = self._choose(tick, slot)
        patches = self._start.picture == "patches"
        number = self.number(tick)
        if picture is not None:
            patch = self._tenant.frame(number).patch if patches else None
            shown = Shown(self.pts(tick), epoch, number, True, picture, patch)
        else:
            shown = Shown(self.pts(tick), epoch, number, False, b"" if patches else self._tenant.frame(number).jpeg())
        self._outbox.put(shown)
        self.counts[kind] += 1
        self._pictures[kind].inc()
        late_s = max(0.0, self._clock.now_s() - due_s)
        self.most_late_s = max(self.most_late_s, late_s)
        self._metrics.lateness_s.observe(late_s)
        self._prepare(tick + 1)
        return ended

    def _end_due(self, tick: int, epoch: int) -> list[Segment]:
        ended = []
        while self._endings and self._endings[0][0] <= tick:
            segment = self._endings.popleft()[1]
            self._tell_speech(tick, epoch, segment.take_rest())
            self._outbox.put(PlaybackFinished(self.pts(tick), epoch, segment.shown, interrupted=False))
            ended.append(segment)
        return ended

    def _hear(self, slot: Slot, epoch: int) -> None:
        segment = slot.segment
        if not segment.started:
            segment.started = True
            if segment.begin_s is not None:
                self._metrics.first_picture_s.observe(max(0.0, self._clock.now_s() - segment.begin_s))
            self._outbox.put(PlaybackStarted(self.pts(slot.tick), epoch))
        self._tell_speech(slot.tick, epoch, segment.take_frame())

    def _tell_speech(self, tick: int, epoch: int, data: bytes) -> None:
        if data and self._start.audio:
            self._outbox.put(Heard(self.pts(tick), epoch, data))

    def _choose(self, tick: int, slot: Slot | None) -> tuple[str, bytes | None]:
        """(kind, picture, or None for the prepared frame) of a tick."""
        if slot is not None and slot.picture is not None:
            self._mouth, self._falling = slot.mouth, slot.level - 1
            return "speaking", slot.picture
        late = slot is not None and not slot.silent
        fading = self._take_spare(tick)
        return "late" if late else "fade" if fading else "idle", fading

    def _take_spare(self, tick: int) -> bytes | None:
        if self._falling:
            self._falling -= 1
        spare, self._spare = self._spare, None
        if spare is None or spare[0] != tick or not spare[1].done():
            return None
        return spare[1].result().data

    def _prepare(self, tick: int) -> None:
        """Starts on the fading mouth of a tick whose own picture is not there."""
        slot = self._slots.get(tick)
        if self._mouth is None or (slot is not None and slot.picture is not None):
            return
        if not self._falling:
            self._mouth = None
            return
        weight = self._weight(self._falling)
        work = partial(_picture, self._tenant, self.number(tick), self._start, weight, self._mouth, borrowed=True)
        self._spare = tick, asyncio.get_running_loop().run_in_executor(self._pool, work)

    def _weight(self, level: int) -> float:
        return level / (self._fade + 1)


def _finish(tenant: Tenant, number: int, start: Start, weight: float, planes: Pixels) -> Rendered:
    return _picture(tenant, number, start, weight, merge_planes(planes), borrowed=False)


def _picture(tenant: Tenant, number: int, start: Start, weight: float, mouth: Pixels, *, borrowed: bool) -> Rendered:
    alone = start.picture == "patches"
    return compose(tenant, number, mouth, start.output, weight, borrowed=borrowed, alone=alone)
