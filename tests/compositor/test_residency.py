from __future__ import annotations

import asyncio

import pytest

from compositor.errors import TenantBroken
from compositor.residency import Residency


class Loads:
    """Counts loads; each waits until it is let go, and fails where it should."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.go = asyncio.Event()
        self.failure: Exception | None = None
        self.unloaded: list[str] = []
        self.under_way = 0
        self.most_under_way = 0

    async def load(self, model: str) -> None:
        self.loaded.append(model)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            await self.go.wait()
        finally:
            self.under_way -= 1
        if self.failure:
            raise self.failure

    async def unload(self, model: str) -> None:
        self.unloaded.append(model)


async def test_a_hundred_misses_make_one_load() -> None:
    loads = Loads()
    residency = Residency(loads)
    waiting = [asyncio.create_task(residency.ensure("a")) for _ in range(100)]
    await asyncio.sleep(0)
    assert "a" not in residency
    loads.go.set()
    await asyncio.gather(*waiting)
    assert loads.loaded == ["a"]
    assert "a" in residency
    await residency.ensure("a")
    assert loads.loaded == ["a"]


async def test_a_failed_load_fails_all_who_wait_and_the_next_one_tries_again() -> None:
    loads = Loads()
    residency = Residency(loads)
    loads.failure = TenantBroken("does not load")
    loads.go.set()
    results = await asyncio.gather(*(residency.ensure("a") for _ in range(3)), return_exceptions=True)
    assert all(isinstance(result, TenantBroken) for result in results)
    loads.failure = None
    await residency.ensure("a")
    assert loads.loaded == ["a", "a"]


async def test_a_caller_that_goes_away_does_not_stop_the_load() -> None:
    loads = Loads()
    residency = Residency(loads)
    first, second = (asyncio.create_task(residency.ensure("a")) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    loads.go.set()
    await second
    assert loads.loaded == ["a"]


async def test_what_is_forgotten_is_loaded_again() -> None:
    loads = Loads()
    loads.go.set()
    residency = Residency(loads)
    await residency.ensure("a")
    residency.forget("a")
    residency.forget("never loaded")
    assert "a" not in residency
    await residency.ensure("a")
    assert loads.loaded == ["a", "a"]


async def test_closing_ends_loads_under_way() -> None:
    residency = Residency(Loads())
    waiting = asyncio.create_task(residency.ensure("a"))
    await asyncio.sleep(0)
    await residency.close()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_a_model_replaced_while_it_loads_is_loaded_anew_after_that() -> None:
    loads = Loads()
    residency = Residency(loads)
    old = asyncio.create_task(residency.ensure("a"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    residency.forget("a")
    new = asyncio.create_task(residency.ensure("a"))
    await asyncio.sleep(0)
    residency.forget("a")
    newest = asyncio.create_task(residency.ensure("a"))
    for _ in range(3):
        await asyncio.sleep(0)
    assert loads.loaded == ["a"]
    loads.go.set()
    await asyncio.gather(old, new, newest)
    assert loads.loaded == ["a", "a", "a"]
    assert loads.most_under_way == 1
    assert "a" in residency


async def test_dropping_unloads_what_was_loaded_from_here() -> None:
    loads = Loads()
    loads.go.set()
    residency = Residency(loads)
    await residency.ensure("a")
    await residency.drop("a")
    await residency.drop("b")
    assert loads.unloaded == ["a"]
    assert "a" not in residency
