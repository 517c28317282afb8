"""What tests of live sessions play on: a stage that answers at once, a clock that is moved by hand, and a viewer."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor, Future
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from compositor.errors import LipsyncError, TenantNotFound
from compositor.metrics import Metrics
from compositor.rendering import Rendered
from compositor.sessions.events import Event, Heard, Shown, Start
from compositor.sessions.outbox import Outbox
from compositor.sessions.session import Session
from compositor.sessions.stage import Ask
from compositor.settings import Settings
from compositor.tenant import Tenant
from compositor.threads import keep_libraries_single_threaded

Value = TypeVar("Value")
Kind = TypeVar("Kind")
RATE = 24_000
FRAME = RATE // 25


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

    def stall(self, seconds: float) -> None:
        """Lets time pass without anybody noticing: the process got no CPU."""
        self._now_s += seconds

    async def move(self, seconds: float) -> None:
        """Lets time pass, and everybody do what they do meanwhile."""
        end_s = self._now_s + seconds
        await settle()
        while self._sleepers and self._sleepers[0][0] <= end_s:
            self._now_s = max(self._now_s, self._sleepers[0][0])
            while self._sleepers and self._sleepers[0][0] <= self._now_s:
                *_, woken = heapq.heappop(self._sleepers)
                if not woken.done():
                    woken.set_result(None)
            await settle()
        self._now_s = end_s


async def settle() -> None:
    """Every task that can go on has gone on."""
    ready = vars(asyncio.get_running_loop())["_ready"]
    await asyncio.sleep(0)
    for _ in range(10_000):
        if not ready:
            return
        await asyncio.sleep(0)
    raise AssertionError("tasks that never wait")


class FakeStage:
    """Hears in each window its mean, and shows mouths of one grey level: `grey`, or brighter for what is louder.

    `before` runs ahead of each prediction, and `before_load` of each load; they may raise, or give what is waited for.
    """

    def __init__(self, tenants: dict[str, Tenant], rendered: Rendered | None = None) -> None:
        """rendered: what all predictions are, for tests that have no eyes for pictures."""
        self.tenants = tenants
        self._rendered = rendered
        self.pool = InPlace()
        self.asked: list[list[int]] = []
        self.windows = 0
        self.grey: int | None = None
        self.loads = 0
        self.ticks: list[bool] = []
        """Whether each tick that was shown was late."""
        self.before: Callable[[], Any] = lambda: None
        self.before_load: Callable[[], Any] = lambda: None
        self.embed_failure: LipsyncError | None = None

    async def open(self, name: str) -> Tenant:
        if name not in self.tenants:
            raise TenantNotFound(f"no tenant named {name!r} is installed", field="tenant")
        return self.tenants[name]

    async def load(self, tenant: Tenant) -> None:
        self.loads += 1
        waiting = self.before_load()
        if waiting is not None:
            await waiting

    async def embed(self, tenant: Tenant, windows: NDArray[np.float32]) -> NDArray[np.float32]:
        if self.embed_failure:
            raise self.embed_failure
        self.windows += len(windows)
        return np.repeat(windows.mean(axis=(1, 2, 3))[:, None], 512, axis=1)

    async def predict(self, tenant: Tenant, asks: Sequence[Ask]) -> list[Rendered]:
        self.asked.append([ask.number for ask in asks])
        waiting = self.before()
        if waiting is not None:
            await waiting
        return [self._rendered or ask.finish(self._mouth(ask.features)) for ask in asks]

    def shown(self, *, late: bool) -> None:
        self.ticks.append(late)

    def _mouth(self, features: NDArray[np.float32]) -> NDArray[np.uint8]:
        return np.full((3, 328, 328), self.grey or 150 + 20 * float(features.mean()), np.uint8)


def drain(outbox: Outbox) -> list[Event]:
    """What waits for the viewer now, taken."""
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


class Viewer:
    """A session, its clock, its stage, and all that came of it."""

    def __init__(self, session: Session, stage: FakeStage, clock: SimulatedClock, metrics: Metrics) -> None:
        self.session, self.stage, self.clock, self.metrics = session, stage, clock, metrics
        self.events: list[Event] = []

    async def watch(self, frames: int) -> list[Event]:
        """The events of the next frames."""
        begin = len(self.events)
        for _ in range(frames):
            await self.clock.move(1 / self.session.playout.fps)
            self.events += drain(self.session.outbox)
        return self.events[begin:]

    async def watch_to_end(self) -> None:
        """All events until everything that was said is over."""
        finishing = asyncio.create_task(self.session.finish())
        while not finishing.done():
            await self.watch(1)
        await finishing

    def of(self, kind: type[Kind]) -> list[Kind]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def heard(self) -> bytes:
        return b"".join(each.data for each in self.of(Heard))

    def speaking(self) -> list[int]:
        """The pts of the pictures with a mouth of their own."""
        return [frame.pts for frame in self.of(Shown) if frame.speaking]


Open = Callable[..., AbstractAsyncContextManager[Viewer]]


@contextlib.asynccontextmanager
async def opened(
    repository: Path, live: dict[str, Any] | None = None, *, rendered: Rendered | None = None, **start: Any
) -> AsyncIterator[Viewer]:
    """A session of the tenant `plain` for a viewer that takes all it gets. live: settings. start: fields of Start."""
    keep_libraries_single_threaded()
    stage = FakeStage({name: Tenant(repository, name) for name in ("plain", "avatar")}, rendered)
    clock, metrics = SimulatedClock(), Metrics()
    settings = Settings.model_validate({"live": live or {}})
    start = {"tenant": "plain", "flow": "plain", **start}
    session = await Session.open("s", Start(**start), stage, settings, clock, metrics)
    try:
        yield Viewer(session, stage, clock, metrics)
    finally:
        await asyncio.gather(*session.stop(), return_exceptions=True)


def speech(seconds: float, level: float = 0.3, rate: int = RATE) -> bytes:
    """Noise as PCM16."""
    random = np.random.default_rng(0)
    return (random.uniform(-level, level, round(seconds * rate)) * 32767).astype("<i2").tobytes()
