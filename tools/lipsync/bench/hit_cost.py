"""What residency adds to a request whose model is loaded: the way through the fleet to one of a real Triton's models,
beside the request alone, in this process and without a wire."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from compositor.catalogue import Catalogue
from compositor.deadline import Deadline
from compositor.metrics import Metrics
from compositor.settings import Settings
from compositor.triton.fleet import open_fleet
from compositor.triton.inference import Triton

from .figures import Spread

_ROUNDS, _CALLS = 31, 2000
_LONGEST_S = 600.0

Ask = Callable[[str], Awaitable[None]]


def hit_cost_s(repository: Path, triton: str, names: Sequence[str]) -> Spread:
    """Seconds that choosing a server, the lease and counting the hit add to a request that does nothing.

    triton: its gRPC address. names: tenants that are loaded, or will be. Raises LipsyncError.
    """
    return Spread.of(asyncio.run(_added_s(Settings(model_repository=repository).with_triton(triton), names)))


async def _added_s(settings: Settings, names: Sequence[str]) -> list[float]:
    """The difference for each of some rounds, in which both take turns to begin."""
    metrics, deadline = Metrics(), Deadline.after(_LONGEST_S)
    fleet = open_fleet(settings, Catalogue(settings.model_repository).facts, lambda name: metrics.observer(name, 0, 0))

    async def leased(name: str) -> None:
        await fleet.serve(name, deadline, _nothing)

    async def alone(name: str) -> None:
        await _nothing(None)

    try:
        for name in names:
            await leased(name)
        added = []
        for number in range(_ROUNDS):
            ways = [leased, alone] if number % 2 else [alone, leased]
            taken = {way: await _time(way, names) for way in ways}
            added.append(taken[leased] - taken[alone])
        return added
    finally:
        await fleet.close()


async def _nothing(triton: Triton | None) -> None:
    """A request."""


async def _time(ask: Ask, names: Sequence[str]) -> float:
    """Mean seconds of a request."""
    begin = time.perf_counter()
    for name in itertools.islice(itertools.cycle(names), _CALLS):
        await ask(name)
    return (time.perf_counter() - begin) / _CALLS
