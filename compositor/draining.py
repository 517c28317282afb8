"""How a started service stops: its health says so first, then nothing new begins, what is under way ends, and what has
not ended in time is cut off."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine
from typing import Any

import grpc

from .health import Health
from .sessions.live import Live
from .settings import ServerSettings
from .transports.admission import Admission
from .transports.speak import Calls
from .transports.stopping import Stoppable
from .transports.web import FAREWELL_S, Server
from .transports.websocket import Conversations

log = logging.getLogger(__name__)

_UNLIMITED_S = 86_400.0


class Draining:
    """The end of one service. `hurry`, once set, ends all waiting."""

    def __init__(
        self,
        settings: ServerSettings,
        hurry: asyncio.Event,
        health: Health,
        rpc: grpc.aio.Server,
        web: Server,
        admission: Admission,
        live: Live,
        calls: Stoppable,
        live_calls: Calls,
        conversations: Conversations,
    ) -> None:
        self._settings, self._hurry, self._health = settings, hurry, health
        self._rpc, self._web = rpc, web
        self._admission, self._live = admission, live
        self._calls, self._live_calls, self._conversations = calls, live_calls, conversations
        self._over = asyncio.Event()

    async def run(self) -> None:
        """Returns when nothing is under way any more. Triton must be watched until then: calls still ask it."""
        await self._health.stop()
        if self._settings.drain_delay_s:
            log.info("stopping; new calls are still taken for %g s", self._settings.drain_delay_s)
            await self._wait(self._settings.drain_delay_s)
        log.info("draining, at most %g s: %s", self._settings.drain_s, self._left() or "nothing is under way")
        # Nothing new is taken from here on; what was taken goes on until it is stopped below.
        refusing = asyncio.create_task(self._rpc.stop(_UNLIMITED_S))
        sessions = asyncio.create_task(self._end_sessions())
        ending = asyncio.create_task(_all(sessions, self._admission.idle(), self._web.drain()))
        timing = asyncio.create_task(self._wait(self._settings.drain_s))
        try:
            await asyncio.wait({ending, timing}, return_when=asyncio.FIRST_COMPLETED)
            if not ending.done() and (left := self._left()):
                log.warning("the time to drain is over; cut off: %s", left)
            self._over.set()
            # Those who listen are told.
            self._calls.stop()
            await asyncio.wait({sessions}, timeout=2 * FAREWELL_S)
        finally:
            self._over.set()
            for task in (ending, timing, sessions):
                task.cancel()
            for fault in await asyncio.gather(ending, timing, return_exceptions=True):
                if isinstance(fault, Exception):
                    log.error("what was under way did not end in order", exc_info=fault)
            await asyncio.gather(sessions, return_exceptions=True)
            # Answers that are written already are taken, and streams that have no end, of health say, come to theirs.
            await asyncio.gather(self._web.cut(), self._rpc.stop(FAREWELL_S), refusing)

    async def _end_sessions(self) -> None:
        await self._live.drain(self._over)
        self._live_calls.stop()
        await self._conversations.stop()

    async def _wait(self, seconds: float) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._hurry.wait(), seconds)

    def _left(self) -> str:
        """What is under way, in words."""
        counts = {"call": self._admission.calls, "live session": len(self._live.sessions)}
        return ", ".join(f"{count} {word}{'s' * (count > 1)}" for word, count in counts.items() if count)


async def _all(*works: Coroutine[Any, Any, None] | asyncio.Task[None]) -> None:
    await asyncio.gather(*works)
