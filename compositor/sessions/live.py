"""What all live sessions share: the stage on which they perform, their number, and what is told of them."""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
from collections.abc import Coroutine, Sequence
from concurrent.futures import Executor
from contextvars import Context
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..batching import Batcher
from ..call import Call, Stages
from ..clock import Clock, MonotonicClock
from ..deadline import Deadline
from ..errors import Overloaded, Stopping
from ..features import ENCODER_BATCH, Windows
from ..logs import fields, identify
from ..metrics import REFUSALS, Metrics
from ..pipeline import FEATURE_SHAPE, Compositor
from ..rendering import Output, Rendered
from ..settings import Settings
from ..tenant import Tenant
from .events import Start
from .keep_alive import KeepAlive, Request, period_of
from .pressure import Pressure, Refusal
from .session import Session
from .stage import Ask
from .timeliness import Timeliness

log = logging.getLogger(__name__)

CANCELLED = "CANCELLED"
"""Why a session ended whose client left."""
_TOGETHER_S = 0.004
"""How long a frame waits for those whose features came with the same answer, to be one request with them."""
_FAREWELL_S, _SHORT_FAREWELL_S = 5.0, 1.0
"""How long the last events of a session may take when the service stops, and once its time to drain is over."""
_WORTHLESS_S = 2.0
"""How long a picture's answer is waited for; its time has long gone by then, but that of a load may come."""


class Live:
    """All live sessions. Also their stage: frames of a tenant's sessions that are due together are one request."""

    def __init__(
        self, compositor: Compositor, settings: Settings, metrics: Metrics, clock: Clock | None = None
    ) -> None:
        self.settings = settings
        self.sessions: dict[str, Session] = {}
        self._compositor = compositor
        self._metrics = metrics
        self._gathered = metrics.observer_of("gather")
        self._clock = clock or MonotonicClock()
        self._frames: dict[Tenant, Batcher[Ask, Rendered]] = {}
        self._windows: dict[str, Batcher[NDArray[np.float32], NDArray[np.float32]]] = {}
        self._pressure = Pressure(settings.live.max_late, settings.live.burst)
        self._refuses = False
        self._refused = dict.fromkeys(REFUSALS, 0)
        self._keep_alive = KeepAlive(self._clock, period_of(settings.residency), self._wanted)
        self.draining = asyncio.Event()
        """Set once no other session may begin."""
        self._ended = asyncio.Event()

    async def begin(self, start: Start) -> Session:
        """A new session. Raises Overloaded where there are too many, Stopping, and what `Session.open` raises."""
        if refusal := self._refusal(start.tenant):
            self._refused[refusal.reason] += 1
            self._metrics.refused[refusal.reason].inc()
            # Those who were refused together do not come back together.
            raise Overloaded(refusal.message, retry_after_s=round(refusal.retry_after_s * random.uniform(1, 1.5), 1))
        name = secrets.token_hex(8)
        identify(session=name)
        session = await Session.open(name, start, self, self.settings, self._clock, self._metrics)
        if self.draining.is_set():
            await asyncio.gather(*session.stop(), return_exceptions=True)
            raise stopped()
        self._pressure.begun(self._clock.now_s(), len(self.sessions))
        self.sessions[name] = session
        self._keep_alive.start()
        self._metrics.sessions.set(len(self.sessions))
        self._metrics.sessions_opened.inc()
        said = fields(tenant=session.tenant.name, fps=session.playout.fps, picture=start.picture)
        words = "session %s begins: %s, %d fps, %s"
        log.info(words, name, session.tenant.name, session.playout.fps, start.picture, extra=said)
        return session

    def _refusal(self, tenant: str) -> Refusal | None:
        """Why no other session of the tenant may begin."""
        count, most, now_s = len(self.sessions), self.settings.live.max_sessions, self._clock.now_s()
        if count >= most:
            return Refusal("max_sessions", f"{most} sessions are live already", 5)
        if self._pressure.look(now_s):
            self._tell_pressure()
        speaking = any(session.speaking for session in self.sessions.values())
        return self._pressure.refusal(now_s, tenant, count, speaking=speaking)

    def _tell_pressure(self) -> None:
        """Passes on what was measured of late."""
        self._metrics.late_share.set(self._pressure.share)
        refuses = self._pressure.closed
        if refuses != self._refuses:
            self._refuses = refuses
            # It is about all sessions, and not about the one that was just shown.
            Context().run(_tell_refusing, refuses, self._pressure.share)

    async def end(self, session: Session, reason: str = CANCELLED) -> None:
        """Closes a session; it leaves nothing behind. reason: OK, CANCELLED, or of the error that ended it."""
        self.sessions.pop(session.name, None)
        self._metrics.sessions.set(len(self.sessions))
        # All is cancelled before the first await: who is cancelled here, too, leaves nothing running.
        ending = session.stop()
        tenants = {each.tenant for each in self.sessions.values()}
        encoders = {tenant.manifest.encoder for tenant in tenants}
        for tenant in self._frames.keys() - tenants:
            ending += self._frames.pop(tenant).stop()
            self._pressure.forget_tenant(tenant.name)
        for encoder in self._windows.keys() - encoders:
            ending += self._windows.pop(encoder).stop()
        if not self.sessions:
            ending += self._keep_alive.stop()
            self._pressure.forget()
            self._tell_pressure()
            self._ended.set()
        _tell_end(session, reason)
        await asyncio.gather(*ending, return_exceptions=True)

    async def drain(self, over: asyncio.Event) -> None:
        """Ends each session as soon as it is silent, and those that still speak once `over` is set; no other begins.

        Its viewer is told what was shown of its speech, and then Stopping. Returns when all have heard, but does not
        wait for those who take nothing.
        """
        self.draining.set()
        await asyncio.gather(*[_retire(session, over) for session in self.sessions.values()])
        self._ended.clear()
        if self.sessions:
            await _first_of(self._ended.wait(), over.wait(), timeout_s=_FAREWELL_S)
        if self.sessions and over.is_set():
            await _first_of(self._ended.wait(), timeout_s=_SHORT_FAREWELL_S)

    def stats(self) -> dict[str, Any]:
        """The sessions, for people: JSON."""
        return {
            "sessions": [
                {
                    "session": session.name,
                    "tenant": session.tenant.name,
                    "epoch": session.epoch,
                    "fps": session.playout.fps,
                    "position_s": round((session.playout.tick + 1) / session.playout.fps, 3),
                    "pictures": session.playout.counts,
                    "dropped": session.outbox.dropped,
                }
                for session in self.sessions.values()
            ],
            "late_share": round(self._pressure.share, 4),
            "refused": dict(self._refused),
        }

    # The stage.

    @property
    def pool(self) -> Executor:
        return self._compositor.pool

    async def open(self, name: str) -> Tenant:
        return await self._compositor.open(name, Stages())

    async def load(self, tenant: Tenant) -> None:
        await self._compositor.load(self._long_call(tenant))
        for model in (tenant.name, tenant.manifest.encoder):
            self._keep_alive.used(model)

    async def embed(self, tenant: Tenant, windows: Windows) -> NDArray[np.float32]:
        if len(self.sessions) < 2:  # nobody to wait for
            self._keep_alive.used(tenant.manifest.encoder)
            return await self._compositor.embeddings(self._long_call(tenant), windows)
        encoder = tenant.manifest.encoder
        batcher = self._windows.get(encoder)
        if batcher is None:
            work = partial(self._embed, tenant)
            batcher = self._windows[encoder] = Batcher(work, ENCODER_BATCH, 0, self._gather_s, self._gathered)
        parts = [
            await batcher.ask(list(windows[begin : begin + ENCODER_BATCH]))
            for begin in range(0, len(windows), ENCODER_BATCH)
        ]
        return np.stack([embedding for part in parts for embedding in part])

    async def predict(self, tenant: Tenant, asks: Sequence[Ask]) -> list[Rendered]:
        most = self._compositor.batch_size(tenant)
        batcher = self._frames.get(tenant)
        if batcher is None:
            work = partial(self._predict, tenant, Timeliness(tenant.name, self._pressure, self._clock))
            batcher = self._frames[tenant] = Batcher(
                work, most, min(_TOGETHER_S, self._gather_s), waited=self._gathered
            )
        if len(asks) <= most:
            return await batcher.ask(asks)
        parts = await asyncio.gather(*[batcher.ask(asks[begin : begin + most]) for begin in range(0, len(asks), most)])
        return [rendered for part in parts for rendered in part]

    def shown(self, *, late: bool) -> None:
        if self._pressure.tick(self._clock.now_s(), late=late):
            self._tell_pressure()

    @property
    def _gather_s(self) -> float:
        return self.settings.live.gather_ms / 1000

    async def _embed(self, tenant: Tenant, windows: list[NDArray[np.float32]]) -> Sequence[NDArray[np.float32]]:
        self._keep_alive.used(tenant.manifest.encoder)
        return list(await self._compositor.embeddings(self._long_call(tenant), np.stack(windows)))

    async def _predict(self, tenant: Tenant, timeliness: Timeliness, asks: list[Ask]) -> list[Rendered]:
        timeliness.check(asks)
        self._metrics.batch.observe(len(asks))
        self._keep_alive.used(tenant.name)
        call = _call(tenant, _WORTHLESS_S)
        features = np.stack([ask.features for ask in asks])
        with timeliness.request(asks, call.stages):
            return await self._compositor.predict(
                call, [ask.number for ask in asks], features, [ask.finish for ask in asks]
            )

    def _wanted(self) -> dict[str, Request]:
        """The models of all sessions, and what asks each of them for next to nothing."""
        tenants = {session.tenant for session in self.sessions.values()}
        frames: dict[str, Request] = {tenant.name: partial(self._ask_frame, tenant) for tenant in tenants}
        windows = {tenant.manifest.encoder: partial(self._ask_window, tenant) for tenant in tenants}
        return {**frames, **windows}

    async def _ask_frame(self, tenant: Tenant) -> None:
        features = np.zeros((1, *FEATURE_SHAPE), np.float32)
        await self._compositor.predict(self._long_call(tenant), [0], features, [_nothing])

    async def _ask_window(self, tenant: Tenant) -> None:
        await self._compositor.embeddings(self._long_call(tenant), np.zeros((1, 1, 80, 16), np.float32))

    def _long_call(self, tenant: Tenant) -> Call:
        return _call(tenant, self.settings.server.timeout_s)


def _tell_refusing(refuses: bool, share: float) -> None:
    if refuses:
        log.warning("%.0f %% of the pictures are late: no more sessions begin", 100 * share)
    else:
        log.info("pictures are in time again: sessions may begin")


def _tell_end(session: Session, reason: str) -> None:
    playout, outbox = session.playout, session.outbox
    said = fields(
        tenant=session.tenant.name,
        seconds=round((playout.tick + 1) / playout.fps, 3),
        pictures=playout.counts,
        dropped=outbox.dropped,
        dropped_audio=outbox.dropped_audio,
        most_late_s=round(playout.most_late_s, 4),
        reason=reason,
    )
    shown = ", ".join(f"{count} {kind}" for kind, count in playout.counts.items())
    words = "session %s ends (%s): pictures %s; %d dropped; %.1f ms late at most"
    log.info(words, session.name, reason, shown, outbox.dropped, 1000 * playout.most_late_s, extra=said)


async def _retire(session: Session, over: asyncio.Event) -> None:
    await _first_of(session.silent(), over.wait())
    session.close(stopped())


async def _first_of(*waits: Coroutine[Any, Any, object], timeout_s: float | None = None) -> None:
    """Returns when one of them has ended, or the time."""
    tasks = [asyncio.create_task(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def stopped() -> Stopping:
    """Why a session ends, or does not begin, when the service stops."""
    return Stopping("the service stops", retry_after_s=1)


def _nothing(mouth: NDArray[np.uint8]) -> None:
    """What is made of a frame that nobody wants."""


def _call(tenant: Tenant, seconds: float) -> Call:
    return Call(tenant, Output(), Stages(), Deadline.after(seconds))
