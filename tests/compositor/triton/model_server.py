"""A server of models that behaves as Triton does (TRITON.md), and an event loop whose time passes when all wait."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from compositor.errors import LipsyncError, TenantBroken, TritonUnavailable
from compositor.residency.models import Device, Facts, State, Use
from compositor.triton.connection import ModelNotLoaded, NoAnswer

EPOCH_S = 1_800_000_000.0


class _Selector(selectors.DefaultSelector):
    """Instead of waiting for time to pass, moves it."""

    passed_s = 0.0

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            raise AssertionError("everybody waits, and nothing will ever happen")
        self.passed_s += max(0.0, timeout)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop on which sleeping takes no time."""

    def __init__(self) -> None:
        self._own = _Selector()
        super().__init__(self._own)

    def time(self) -> float:
        return 100.0 + self._own.passed_s

    def stall(self, seconds: float) -> None:
        """Time passes, and nobody gets to do anything."""
        self._own.passed_s += seconds


@dataclass(eq=False)
class Copy:
    """A model in memory."""

    name: str
    gpu: int | None
    stamp: int
    state: State
    count: int = 0
    last_s: float = 0.0
    requests: int = 0
    replaces: bool = False
    """A reload: the older copy serves until this one does, and both are one model."""


@dataclass
class Files:
    """The models that are installed."""

    sizes: dict[str, int]
    encoders: frozenset[str] = frozenset()
    stamps: dict[str, int] = field(default_factory=dict)
    removed: set[str] = field(default_factory=set)
    encoder_of: dict[str, str] = field(default_factory=dict)

    def facts(self, name: str) -> Facts:
        if name not in self.sizes:
            return Facts(0, False, None)
        removed = name in self.removed
        stamp = None if removed else (self.stamp(name),)
        return Facts(self.sizes[name], name not in self.encoders, stamp, removed, self.encoder_of.get(name, ""))

    def stamp(self, name: str) -> int:
        return self.stamps.get(name, 0)

    def replace(self, name: str) -> None:
        self.stamps[name] = self.stamp(name) + 1


class ModelServer:
    """What many clients see of one Triton. Loads take `load_s`; memory is free `unload_s` after an unload, and after
    its last request."""

    endpoint = "server:8001"

    def __init__(self, files: Files, *, load_s: float = 0.2, unload_s: float = 1.0, lag_s: float = 0.001) -> None:
        self.files = files
        self.load_s, self.unload_s, self.lag_s = load_s, unload_s, lag_s
        self.copies: list[Copy] = []
        self.loads: list[str] = []
        self.unloads: list[str] = []
        self.polls = 0
        self.loading = 0
        self.most_loading = 0
        self.failures: list[LipsyncError] = []
        """What the next loads end with."""
        self.watch: Callable[[], None] = lambda: None
        """Called at each change of what is in memory."""
        self.down = False
        self._life = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def clock_s(self) -> float:
        return EPOCH_S + asyncio.get_running_loop().time()

    def serving(self, name: str) -> Copy | None:
        return next((each for each in self.copies if each.name == name and each.state is State.READY), None)

    def ready(self) -> set[str]:
        return {each.name for each in self.copies if each.state is State.READY}

    def restart(self) -> None:
        """Dies and is up again at once, with nothing loaded."""
        self._life += 1
        self.copies.clear()

    async def load(self, model: str, gpu: int | None = None) -> None:
        self._check()
        self.loads.append(model)
        life, stamp = self._life, self.files.stamp(model)
        failure = self.failures.pop(0) if self.failures else None
        if model not in self.files.sizes:
            failure = TenantBroken("failed to poll")
        old = self.serving(model)
        if failure is None and old is not None and old.gpu is None and gpu is None and old.stamp == stamp:
            await asyncio.sleep(self.lag_s)
            return
        copy = Copy(model, gpu, stamp, State.LOADING, replaces=old is not None)
        self._add(copy)
        self.loading += 1
        self.most_loading = max(self.most_loading, self.loading)
        task = asyncio.create_task(self._finish(copy, life, failure))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            if isinstance(failure, (NoAnswer, TritonUnavailable)):
                await asyncio.sleep(self.load_s / 2)
                raise failure
            await asyncio.shield(task)
        finally:
            self.loading -= 1
        if failure is not None:
            raise failure
        if self._life != life:
            raise TritonUnavailable("the connection ended")

    async def _finish(self, copy: Copy, life: int, failure: LipsyncError | None) -> None:
        """What the server does whether or not the client still waits for it."""
        await asyncio.sleep(self.load_s)
        if self._life != life:
            return
        if failure is not None and not isinstance(failure, (NoAnswer, TritonUnavailable)):
            self.copies.remove(copy)
            return
        for old in [each for each in self.copies if each.name == copy.name and each.state is State.READY]:
            self.copies.remove(old)
        copy.state, copy.replaces = State.READY, False

    async def unload(self, model: str) -> None:
        self._check()
        self.unloads.append(model)
        copy = self.serving(model)
        if copy is not None:
            self.watch()
            copy.state = State.UNLOADING
            task = asyncio.create_task(self._free(copy))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        await asyncio.sleep(self.lag_s)

    async def _free(self, copy: Copy) -> None:
        await asyncio.sleep(self.unload_s)
        while copy.requests:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        if copy in self.copies:
            self.copies.remove(copy)

    async def warm(self, model: str) -> None:
        await self.infer(model, 0.002)

    async def infer(self, model: str, seconds: float) -> int:
        """One frame; the stamp of the files that it was made from."""
        self._check()
        copy, life = self.serving(model), self._life
        if copy is None:
            raise ModelNotLoaded("has no available versions")
        copy.requests += 1
        try:
            await asyncio.sleep(seconds)
        finally:
            copy.requests -= 1
        if self._life != life:
            raise TritonUnavailable("the connection ended")
        copy.count, copy.last_s = copy.count + 1, self.clock_s()
        return copy.stamp

    async def states(self) -> dict[str, str]:
        self._check()
        self.polls += 1
        # Of two copies the newer one is listed.
        states = {each.name: each.state.name for each in self.copies}
        await asyncio.sleep(self.lag_s)
        return states

    async def uses(self) -> dict[str, Use]:
        self._check()
        uses = {each.name: Use(each.count, each.last_s) for each in self.copies if each.state is State.READY}
        await asyncio.sleep(self.lag_s)
        return uses

    async def placed(self, model: str) -> int | None:
        await asyncio.sleep(self.lag_s)
        copy = self.serving(model)
        return copy.gpu if copy else None

    def models_on(self, device: Device) -> int:
        """How many models, that are no encoders, have memory there."""
        return sum(1 for each in self._on(device) if each.name not in self.files.encoders)

    def bytes_on(self, device: Device) -> int:
        return sum(self.files.sizes.get(each.name, 0) for each in self._on(device))

    def _on(self, device: Device) -> Iterator[Copy]:
        return (each for each in self.copies if not each.replaces and (each.gpu is None or each.gpu == device.gpu))

    def _add(self, copy: Copy) -> None:
        self.copies.append(copy)
        self.watch()

    def _check(self) -> None:
        if self.down:
            raise TritonUnavailable("cannot be reached")
