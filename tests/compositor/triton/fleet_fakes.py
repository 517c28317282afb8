"""Servers that can be told to misbehave, and residencies without a budget, for what chooses among them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from compositor.deadline import Deadline
from compositor.errors import LipsyncError
from compositor.residency.models import ModelReport, State, Use
from compositor.triton.endpoint import Endpoint


class FakeTriton:
    """Holds models, and counts their uses. `fault`: what pings and loads raise. `go`: pings wait for it, and then for
    `lag_s`. `broken`: what inferences of a model raise, or of any; those of a model in `hung` are never answered."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.loaded: dict[str, int] = {}
        self.loads: list[str] = []
        self.fault: LipsyncError | None = None
        self.takes_requests = True
        self.go = asyncio.Event()
        self.go.set()
        self.lag_s = 0.0
        self.pings = 0
        self.answers = 0
        self.given_up = 0
        self.let_go_of = 0
        self.broken: LipsyncError | dict[str, LipsyncError] | None = None
        self.hung: set[str] = set()
        self.inferences = 0
        self.inferred = 0
        self.slowest_s = 0.0
        self.silence_s = 0.0
        self.warmed: list[str] = []

    async def warm(self, model: str) -> None:
        self.warmed.append(model)
        await self.infer(model)

    async def infer(self, model: str) -> None:
        if model in self.hung:
            await asyncio.Event().wait()
        self.inferred += 1
        fault = self.broken.get(model) if isinstance(self.broken, dict) else self.broken
        if fault:
            raise fault

    async def serve(self, model: str) -> str:
        """A caller's inference."""
        await self.infer(model)
        self.inferences += 1
        return self.endpoint

    def silent_s(self) -> float:
        return self.silence_s

    def let_go(self) -> None:
        self.let_go_of += 1

    async def ping(self, wait_s: float) -> bool:
        self.pings += 1
        await self.go.wait()
        if self.lag_s:
            await asyncio.sleep(self.lag_s)
        if self.fault:
            raise self.fault
        self.answers += 1
        return self.takes_requests

    def give_up(self) -> None:
        self.given_up += 1

    async def uses(self) -> dict[str, Use]:
        return {model: Use(count, 0.0) for model, count in self.loaded.items()}

    async def load(self, model: str) -> None:
        if self.fault:
            raise self.fault
        self.loads.append(model)
        self.loaded[model] = 0


class FakeResidency:
    """Loads without end. `failures`: what the next loads of a model raise."""

    def __init__(self, triton: FakeTriton) -> None:
        self._triton = triton
        self.models = set[str]()
        self.failures: dict[str, LipsyncError] = {}
        self.forgotten: list[tuple[str, bool]] = []
        self.asked_of_files: list[str] = []
        self.dropped: list[str] = []
        self.roomy = True
        self.load = 0.0

    def __contains__(self, model: str) -> bool:
        return model in self.models

    async def ensure(self, model: str, deadline: Deadline) -> None:
        if model not in self.models:
            if model in self.failures:
                raise self.failures[model]
            await self._triton.load(model)
            self.models.add(model)

    @contextlib.asynccontextmanager
    async def lease(self, model: str, deadline: Deadline) -> AsyncIterator[None]:
        await self.ensure(model, deadline)
        self.load += 1
        try:
            yield
        finally:
            self.load -= 1

    def forget(self, model: str, *, lost: bool = False) -> None:
        self.forgotten.append((model, lost))
        self.models.discard(model)

    def replaced(self, model: str) -> None:
        self.asked_of_files.append(model)

    def forget_all(self) -> None:
        self.models.clear()

    async def drop(self, model: str) -> None:
        if self._triton.fault:
            raise self._triton.fault
        self.dropped.append(model)
        self.models.discard(model)

    def room(self) -> bool:
        return self.roomy

    def report(self) -> list[ModelReport]:
        return [ModelReport(model, State.READY, "default", 0, 0, 0, 0.0, False) for model in sorted(self.models)]


class Servers:
    """Some endpoints by the names a, b, ..., and the fakes behind them."""

    def __init__(self, names: Sequence[str] = "abc") -> None:
        self.triton = {name: FakeTriton(name) for name in names}
        self.residency = {name: FakeResidency(triton) for name, triton in self.triton.items()}
        self.endpoints = [
            Endpoint(triton, self.residency[name])  # type: ignore[arg-type]
            for name, triton in self.triton.items()
        ]

    def __getitem__(self, name: str) -> Endpoint:
        return next(endpoint for endpoint in self.endpoints if endpoint.name == name)

    def break_(self, name: str) -> None:
        """Inference fails at a server, as is known by now."""
        for model in ("x", "y"):
            self[name].breaker.failed(model)
            self[name].breaker.contradicted(model)

    async def check(self) -> None:
        """Every server is pinged."""
        for endpoint in self.endpoints:
            await endpoint.check()
