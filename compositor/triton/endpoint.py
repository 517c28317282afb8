"""One Triton server as the fleet sees it: its connection, what it has loaded, and whether requests may go to it.

The one place that judges a server's health. It goes down with the first connection that fails, or when it accepts pings
and answers nothing for a while; only a ping that is answered brings it back.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import LipsyncError
from ..residency.models import ModelReport, State
from ..residency.residency import Residency
from .connection import NoAnswer
from .inference import Triton

log = logging.getLogger(__name__)

PERIOD_S = 1.0
"""Between the pings of a server that is up."""
PATIENCE_S = 2.0
"""A ping that takes longer is not answered."""
SILENT_PINGS = 2
"""So many in a row without any answer of the server meanwhile, and it hangs."""
_PAUSE_S = (0.05, 0.5)
"""Between the pings of a server that is down: at first, and at most."""
_STEADY_S = 10.0
"""A server that was up for so long is looked for quickly again; one that comes and goes is held off."""


@dataclass(frozen=True)
class EndpointReport:
    """One server, for people and tests."""

    endpoint: str
    """host:port."""
    up: bool
    leases: float
    """Requests under way."""
    room: bool
    """Whether one more model fits without unloading one in use."""
    models: list[ModelReport]


class Endpoint:
    """One Triton. `up`: requests may go there; `ready`: and it has said so itself."""

    def __init__(self, triton: Triton, residency: Residency, told: Callable[[bool], None] = lambda up: None) -> None:
        """told: hears whether the server is up, each time that this may have changed."""
        self.name = triton.endpoint
        self.triton = triton
        self.residency = residency
        # Until the first ping, requests find out by themselves.
        self.up = True
        self.ready = False
        self.falls = 0
        """How often it went down, by which a failure from before the last time is known."""
        self._told = told
        self._silent = 0
        self._pause_s = _PAUSE_S[0]
        self._up_since_s = time.monotonic()
        self._waking: asyncio.Future[None] | None = None

    def failed(self, falls: int) -> None:
        """A request found no server; it was sent when `self.falls` was `falls`."""
        if falls == self.falls and self.up:
            self._fall("it cannot be reached")
            self._wake()

    async def watch(self) -> None:
        """Pings until it is cancelled."""
        while True:
            try:
                await self.check()
            except Exception:
                log.exception("the check of Triton at %s itself failed", self.name)
            await self._sleep()

    async def check(self) -> None:
        """Pings once."""
        answers = self.triton.answers
        try:
            if await self.triton.ping(PATIENCE_S):
                await self._rise()
            else:
                self._fall("it takes no requests")
            self._silent = 0
        except NoAnswer:
            self._silent = self._silent + 1 if self.triton.answers == answers else 0
            if self._silent >= SILENT_PINGS:
                self._silent = 0
                self.triton.give_up()
                self._fall("it does not answer")
        except LipsyncError as error:
            self._fall(error.message)

    def report(self) -> EndpointReport:
        residency = self.residency
        return EndpointReport(self.name, self.up, residency.load, residency.room(), residency.report())

    def _fall(self, reason: str) -> None:
        self.ready = False
        self._told(False)
        if not self.up:
            return
        self.up = False
        self.falls += 1
        if time.monotonic() - self._up_since_s > _STEADY_S:
            self._pause_s = _PAUSE_S[0]
        log.warning("Triton at %s is down: %s", self.name, reason)

    async def _rise(self) -> None:
        if not self.up:
            # It may have been restarted, and have loaded some of its models again or none.
            loaded = await self.triton.uses()
            if not loaded:
                self.residency.forget_all()
            for model in self.residency.report():
                if model.state is State.READY and model.name not in loaded:
                    self.residency.forget(model.name)
            self._up_since_s = time.monotonic()
            log.info("Triton at %s is back", self.name)
        self.up = self.ready = True
        self._told(True)

    async def _sleep(self) -> None:
        """Until the next ping is due, or a request finds no server."""
        pause_s = PERIOD_S if self.up else self._pause_s
        if not self.up:
            self._pause_s = min(self._pause_s * 2, _PAUSE_S[1])
        loop = asyncio.get_running_loop()
        self._waking = loop.create_future()
        timer = loop.call_later(pause_s, self._wake)
        try:
            await self._waking
        finally:
            timer.cancel()

    def _wake(self) -> None:
        if self._waking is not None and not self._waking.done():
            self._waking.set_result(None)
