"""How many requests to Triton are awaited, and which piece of shared memory each has for its answer.

A slot is used again only after Triton answered the request that names it. One whose answer never came is in doubt and
stays out of use, for good: when a region runs out of slots through doubt, or Triton was restarted, a new one takes its
place, with memory and a name of its own. So an answer that comes late is written where nobody looks. The old region is
ended once Triton says that nothing writes into it any more.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass

from ..deadline import Deadline
from ..errors import Overloaded
from .shared_memory import Region

log = logging.getLogger(__name__)

MOST_REGIONS = 3
"""Regions that Triton may have mapped for us at once; beyond, mouths come as tensors until it has ended one."""
AGAIN_S = 30.0
"""How long after memory could not be had it is asked for again."""


@dataclass(frozen=True)
class Lease:
    """Leave to send one request; `region` is None where its answer comes as tensors."""

    region: Region | None
    slot: int = 0


class Slots:
    """At most `count` leases at once."""

    def __init__(
        self,
        count: int,
        slot_bytes: int,
        register: Callable[[Region], Awaitable[bool]],
        end: Callable[[Sequence[Region]], Awaitable[Collection[Region]]],
        shared_memory: bool,
    ) -> None:
        """register: makes Triton map a region, and says whether it could. end: makes it end those that it does not
        write into any more, and gives those that are gone."""
        self._count = count
        self._slot_bytes = slot_bytes
        self._register = register
        self._end = end
        self._wanted = shared_memory
        self._tensors_only = not shared_memory
        self._permits = asyncio.Semaphore(count)
        self._mapping = asyncio.Lock()
        self._region: Region | None = None
        self._held = Counter[Region]()
        """Slots of each region whose answer is awaited or read."""
        self._not_before_s = 0.0
        self.mapped: list[Region] = []
        """The regions that Triton has mapped for us, as far as is known."""

    async def lease(self, deadline: Deadline, *, memory: bool = True) -> Lease:
        """Waits for leave. Raises Overloaded where there is none before the deadline, and what `register` raises."""
        left_s = deadline.remaining_s()
        if self._permits.locked():
            try:
                await asyncio.wait_for(self._permits.acquire(), left_s)
            except asyncio.TimeoutError as error:
                raise Overloaded("no request to Triton was free in time", retry_after_s=0.2) from error
        else:
            # At once, and without wait_for, which before Python 3.12 may swallow a cancellation that comes just then.
            await self._permits.acquire()
        try:
            return await self._with_memory() if memory else Lease(None)
        except BaseException:
            self._permits.release()
            raise

    def release(self, lease: Lease) -> None:
        """Gives leave and slot back: Triton has answered, and the answer has been read."""
        if lease.region is not None:
            lease.region.free.append(lease.slot)
        self._let_go(lease)

    def abandon(self, lease: Lease) -> None:
        """Gives the leave back but not the slot: Triton has not answered and may still write."""
        self._let_go(lease)

    def _let_go(self, lease: Lease) -> None:
        if lease.region is not None:
            self._held[lease.region] -= 1
            if not self._held[lease.region]:
                del self._held[lease.region]
        self._permits.release()

    def lost(self, region: Region | None) -> None:
        """Triton was restarted, or cannot be reached: what it had mapped is gone with it."""
        if region is self._region:
            if self.mapped:
                self._not_before_s = 0.0
            self._region = None
            self.forget()
            self._tensors_only = not self._wanted

    def forget(self) -> None:
        """Triton has none of our regions mapped any more."""
        for region in self.mapped:
            region.let_go()
        self.mapped.clear()

    async def _with_memory(self) -> Lease:
        async with self._mapping:
            # A holder of a permit finds no slot only where some are in doubt.
            wanted = self._region is None or not self._region.free
            if wanted and not self._tensors_only and time.monotonic() >= self._not_before_s:
                await self._map()
            if self._tensors_only or self._region is None or not self._region.free:
                return Lease(None)
            self._held[self._region] += 1
            return Lease(self._region, self._region.free.pop())

    async def _map(self) -> None:
        self._region = None
        await self._end_old()
        if len(self.mapped) >= MOST_REGIONS:
            self._wait("too many answers never came")
            return
        try:
            region = Region(self._count, self._slot_bytes)
        except OSError as error:
            # It may be full, or missing for good: both are seen soon enough.
            self._wait(str(error.strerror))
            return
        registered = False
        try:
            registered = await self._register(region)
        finally:
            region.forget_name()
            if not registered:
                region.let_go()
        if not registered:
            log.warning("no shared memory (Triton cannot map it): mouths come as tensors until it is restarted")
            self._tensors_only = True
            return
        self.mapped.append(region)
        self._region = region
        log.info("shared memory mapped: %d slots of %d bytes", self._count, self._slot_bytes)

    async def _end_old(self) -> None:
        """Takes back the regions of which no answer is awaited or read any more."""
        old = [region for region in self.mapped if region not in self._held]
        for region in await self._end(old) if old else ():
            region.let_go()
            if region in self.mapped:  # Triton may have been found restarted meanwhile
                self.mapped.remove(region)

    def _wait(self, reason: str) -> None:
        log.warning("no shared memory (%s): mouths come as tensors for %g s", reason, AGAIN_S)
        self._not_before_s = time.monotonic() + AGAIN_S
