"""One Triton server as the fleet sees it: its connection, what it has loaded, and whether requests may go to it.

The one place that keeps a server's health. Whether its inference works, its `breaker` says. It goes down with the
first connection that fails; only a ping that is answered brings it back. That a server hangs, which accepts and never
answers, is told from its being slow by this:

- A ping (ServerLive) waits for no model, no load and no batch. Of a real Triton on 2 cores that had 24 other busy
  processes, more requests than it could serve, and models coming and going, the slowest of 316 took 0.4 s; these were
  pings by ServerReady, which asks for more.
- A ping is not taken back when it is late: a late answer is the best sign that the server is slow. While it is out, it
  is looked every `LOOK_S` whether anything was answered. Whatever was, a frame, a load or the ping, is a sign of life.
- `SILENT_LOOKS` in a row without any, and the server hangs. Looks that this process itself was too late for say
  nothing of the server.

To be wrong costs the requests in flight: they are made again elsewhere, and the memory that their answers may still be
written into is out of use until the server, which the next ping that is answered brings back, has ended it (`slots`).
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
from .breaker import SILENT_S, SLOWER, Breaker, Circuit
from .connection import NoAnswer
from .inference import Triton

log = logging.getLogger(__name__)

PERIOD_S = 0.5
"""Between the pings of a server that is up."""
LOOK_S = 0.5
"""A ping is waited for so long before it is looked whether the server shows other signs of life."""
SILENT_LOOKS = 3
"""So many in a row without any, and it hangs."""
_LOST_S = 30.0
"""A ping that a server does not answer for so long, though it answers others, is made again."""
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
    circuit: Circuit = Circuit.CLOSED
    """Not closed: inference fails there, and requests go elsewhere where others can take them."""


class Endpoint:
    """One Triton. `up`: requests may go there; `ready`: and it has said so itself; `breaker`: whether they should."""

    def __init__(
        self,
        triton: Triton,
        residency: Residency,
        told: Callable[[bool], None] = lambda up: None,
        told_works: Callable[[bool], None] = lambda works: None,
    ) -> None:
        """told: hears whether the server is up, each time that this may have changed. told_works: whether inference
        works there, as far as is known, likewise."""
        self.name = triton.endpoint
        self.triton = triton
        self.residency = residency
        # Until the first ping, requests find out by themselves.
        self.up = True
        self.ready = False
        self.falls = 0
        """How often it went down, by which a failure from before the last time is known."""
        self.breaker = Breaker(lambda: triton.inferences, self._circuit_changed)
        self._told, self._told_works = told, told_works
        self._ping: asyncio.Task[bool] | None = None
        self._silent = 0
        """Looks in a row without a sign of life."""
        self._pause_s = _PAUSE_S[0]
        self._up_since_s = time.monotonic()
        self._down_since_s = 0.0
        self._waking: asyncio.Future[None] | None = None

    def failed(self, falls: int) -> None:
        """A request found no server; it was sent when `self.falls` was `falls`."""
        if falls == self.falls and self.up:
            self._fall("it cannot be reached")
            self._wake()

    def down_for_s(self) -> float:
        """How long ago it went down; of use only while it is."""
        return time.monotonic() - self._down_since_s

    @property
    def works(self) -> bool:
        """Whether requests should go there: it is up, and so is its inference, as far as is known."""
        return self.up and self.breaker.closed

    def patience_s(self) -> float:
        """How long the server may be silent before that is a sign of anything."""
        return max(SILENT_S, SLOWER * self.triton.slowest_s)

    def is_silent(self) -> bool:
        """Whether it answers no inference, for longer than it may."""
        return self.triton.silent_s() >= self.patience_s()

    def let_go(self) -> None:
        """Its inference hangs: the requests in flight fail at once, to be made elsewhere."""
        # That they fail is no sign that it cannot be reached.
        self.falls += 1
        self._drop_ping()
        self.triton.let_go()

    async def watch(self) -> None:
        """Pings until it is cancelled."""
        try:
            while True:
                try:
                    await self.check()
                except Exception:
                    log.exception("the check of Triton at %s itself failed", self.name)
                if self._ping is None:
                    await self._sleep()
        finally:
            self._drop_ping()

    async def check(self) -> None:
        """Pings, or goes on waiting for the ping that is out, and judges by what comes within `LOOK_S`."""
        loop, answers = asyncio.get_running_loop(), self.triton.answers
        begin_s = loop.time()
        self._told_works(self.breaker.closed)
        if self._ping is None:
            self._ping = asyncio.create_task(self.triton.ping(_LOST_S))
        ping = self._ping
        await asyncio.wait((ping,), timeout=LOOK_S)
        if self._ping is not ping:
            return
        if ping.done():
            self._ping = None
            await self._take(ping)
        elif self.triton.answers != answers:
            self._silent = 0
        elif loop.time() - begin_s < 2 * LOOK_S:
            self._miss()

    def report(self) -> EndpointReport:
        residency = self.residency
        report = residency.report()
        return EndpointReport(self.name, self.up, residency.load, residency.room(), report, self.breaker.circuit)

    def _circuit_changed(self, reason: str) -> None:
        self._told_works(not reason)
        if reason:
            log.warning("inference fails at Triton at %s, which answers pings: %s", self.name, reason)
        else:
            log.info("requests go to Triton at %s again", self.name)

    async def _take(self, ping: asyncio.Task[bool]) -> None:
        """Judges by a ping that has ended."""
        try:
            takes_requests = ping.result()
            self._silent = 0
            if takes_requests:
                await self._rise()
            else:
                self._fall("it takes no requests")
        except NoAnswer:
            log.debug("Triton at %s answers others, but no ping", self.name)
        except LipsyncError as error:
            self._silent = 0
            self._fall(error.message)

    def _miss(self) -> None:
        """There was no sign of life."""
        self._silent += 1
        if self._silent >= SILENT_LOOKS:
            self._silent = 0
            self._drop_ping()
            self.triton.give_up()
            self._fall("it does not answer")

    def _drop_ping(self) -> None:
        if self._ping is not None:
            self._ping.cancel()
            self._ping = None

    def _fall(self, reason: str) -> None:
        self.ready = False
        self._told(False)
        if not self.up:
            return
        self.up = False
        self.falls += 1
        self._down_since_s = time.monotonic()
        if self._down_since_s - self._up_since_s > _STEADY_S:
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
            self.breaker.hurry()
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
