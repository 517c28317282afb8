"""A stage for live sessions that answers at once, and a clock that is moved by hand."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from compositor.errors import LipsyncError, TenantNotFound
from compositor.events import Event
from compositor.outbox import Outbox
from compositor.rendering import Rendered
from compositor.session import Ask
from compositor.tenant import Tenant

Value = TypeVar("Value")


class InPlace(Executor):
    """Does at once, in the caller's thread, what it is given."""

    def submit(self, fn: Callable[..., Value], /, *args: Any, **kwargs: Any) -> Future[Value]:
        future: Future[Value] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


class SimulatedClock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self._now_s = 1000.02  # between two ticks
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._count = 0

    def now_s(self) -> float:
        return self._now_s

    async def sleep_until(self, at_s: float) -> None:
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._count += 1
        heapq.heappush(self._sleepers, (at_s, self._count, woken))
        await woken

    async def move(self, seconds: float) -> None:
        """Lets time pass, and everybody do what they do meanwhile."""
        end_s = self._now_s + seconds
        await settle()
        while self._sleepers and self._sleepers[0][0] <= end_s:
            at_s, _, woken = heapq.heappop(self._sleepers)
            self._now_s = max(self._now_s, at_s)
            if not woken.done():
                woken.set_result(None)
            await settle()
        self._now_s = end_s


async def settle() -> None:
    """Every task that can go on has gone on."""
    for _ in range(12):
        await asyncio.sleep(0)


class FakeStage:
    """Shows a mouth of one grey level. `before` runs ahead of each prediction and may wait or raise."""

    def __init__(self, tenants: dict[str, Tenant]) -> None:
        self.tenants = tenants
        self.pool = InPlace()
        self.asked: list[list[int]] = []
        self.windows = 0
        self.before: Callable[[], Any] = lambda: None
        self.embed_failure: LipsyncError | None = None

    async def open(self, name: str) -> Tenant:
        if name not in self.tenants:
            raise TenantNotFound(f"no tenant named {name!r} is installed", field="tenant")
        return self.tenants[name]

    async def load(self, tenant: Tenant) -> None: ...

    async def embed(self, tenant: Tenant, windows: NDArray[np.float32]) -> NDArray[np.float32]:
        if self.embed_failure:
            raise self.embed_failure
        self.windows += len(windows)
        return np.zeros((len(windows), 512), np.float32)

    async def predict(self, tenant: Tenant, asks: Sequence[Ask]) -> list[Rendered]:
        self.asked.append([ask.number for ask in asks])
        waiting = self.before()
        if waiting is not None:
            await waiting
        planes = np.full((3, 328, 328), 200, np.uint8)
        return [ask.finish(planes) for ask in asks]


def drain(outbox: Outbox) -> list[Event]:
    """What waits for the viewer now, all of it taken and acknowledged."""
    events: list[Event] = []
    while True:
        taking = outbox.get()
        try:
            taking.send(None)
        except StopIteration as done:
            if done.value is None:
                return events
            events.append(done.value)
        else:
            taking.close()
            return events
