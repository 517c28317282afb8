"""Requests of models that nobody else asks of: as rarely as may be, never two at once, and none that keeps another."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable
from functools import partial

import pytest

from compositor.errors import TenantNotFound, TritonUnavailable
from compositor.sessions.keep_alive import KeepAlive, Request, period_of
from compositor.settings import ResidencySettings

from .stage import SimulatedClock, settle


class Models:
    """Counts what is asked of models; those in `stuck` never answer."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.asked: Counter[str] = Counter()
        self.stuck: set[str] = set()

    def wanted(self) -> dict[str, Request]:
        return {name: partial(self._ask, name) for name in self.names}

    async def _ask(self, name: str) -> None:
        self.asked[name] += 1
        if name in self.stuck:
            await asyncio.get_running_loop().create_future()


@pytest.fixture
def models() -> Models:
    return Models()


@pytest.fixture
def clock() -> SimulatedClock:
    return SimulatedClock()


@pytest.fixture
async def keeping(models: Models, clock: SimulatedClock) -> AsyncIterator[KeepAlive]:
    keeping = KeepAlive(clock, 2.0, models.wanted)
    keeping.start()
    await settle()
    yield keeping
    await asyncio.gather(*keeping.stop(), return_exceptions=True)


@pytest.mark.parametrize(
    ("settings", "period_s"),
    [
        ({}, 10 / 3),
        ({"min_resident_s": 0}, 1),
        ({"min_resident_s": 6}, 2),
        ({"min_resident_s": 600}, 5),
        ({"min_resident_s": 600, "idle_s": 9}, 3),
        ({"min_resident_s": 6, "idle_s": 900}, 2),
    ],
)
def test_the_period_follows_what_unloads_a_model(settings: dict[str, float], period_s: float) -> None:
    assert period_of(ResidencySettings.model_validate(settings)) == pytest.approx(period_s)


def use(models: Models, keeping: KeepAlive, *names: str) -> None:
    """These models, and no others, are wanted, and used now."""
    models.names = list(names)
    for name in names:
        keeping.used(name)


async def test_each_model_is_asked_once_a_period(models: Models, clock: SimulatedClock, keeping: KeepAlive) -> None:
    use(models, keeping, "a", "b")
    await clock.move(20)
    assert models.asked.keys() == {"a", "b"}
    assert all(9 <= count <= 10 for count in models.asked.values())


async def test_a_use_puts_the_next_request_off(models: Models, clock: SimulatedClock, keeping: KeepAlive) -> None:
    use(models, keeping, "busy", "silent")
    for _ in range(20):
        keeping.used("busy")
        await clock.move(1)
    assert models.asked["busy"] == 0
    assert 9 <= models.asked["silent"] <= 11
    await clock.move(2.1)
    assert models.asked["busy"] == 1


async def test_models_come_and_go(models: Models, clock: SimulatedClock, keeping: KeepAlive) -> None:
    use(models, keeping, "a")
    await clock.move(4.1)
    use(models, keeping, "b")
    asked = models.asked["a"]
    await clock.move(10)
    assert models.asked["a"] == asked
    assert models.asked["b"] >= 4


async def test_one_that_is_stuck_is_asked_once_and_keeps_no_other(
    models: Models, clock: SimulatedClock, keeping: KeepAlive
) -> None:
    models.stuck = {"stuck"}
    use(models, keeping, "stuck", "sound")
    await clock.move(20)
    assert models.asked["stuck"] == 1
    assert models.asked["sound"] >= 9
    ending = keeping.stop()
    await asyncio.gather(*ending, return_exceptions=True)
    assert len(ending) == 2
    assert all(task.cancelled() for task in ending)


async def test_a_failure_is_not_the_end(clock: SimulatedClock, caplog: pytest.LogCaptureFixture) -> None:
    asked = 0

    async def fail() -> None:
        nonlocal asked
        asked += 1
        raise TritonUnavailable("it is away")

    def request() -> Awaitable[None]:
        return fail()

    keeping = KeepAlive(clock, 2.0, lambda: {"a": request})
    keeping.used("a")
    keeping.start()
    await clock.move(9)
    await asyncio.gather(*keeping.stop(), return_exceptions=True)
    assert asked >= 4
    assert "a is used by silent sessions and does not answer: it is away" in caplog.text


async def test_a_failure_is_told_once_and_so_is_its_end(
    clock: SimulatedClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    away = {"a"}

    async def ask(model: str) -> None:
        if model in away:
            raise TenantNotFound(f"no tenant named {model!r} is installed")

    wanted: dict[str, Request] = {name: partial(ask, name) for name in "ab"}
    keeping = KeepAlive(clock, 2.0, lambda: wanted)
    for name in wanted:
        keeping.used(name)
    keeping.start()
    told = "a is used by silent sessions and does not answer: no tenant named 'a' is installed"
    await clock.move(60)
    assert caplog.messages == [told]
    away.clear()
    await clock.move(60)
    assert caplog.messages == [told, "a answers silent sessions again"]
    away.add("a")
    await clock.move(60)
    assert caplog.messages[2:] == [told]
    # Other sessions of it begin when those have ended.
    del wanted["a"]
    await clock.move(4)
    wanted["a"] = partial(ask, "a")
    keeping.used("a")
    await clock.move(60)
    assert caplog.messages[3:] == [told]
    await asyncio.gather(*keeping.stop(), return_exceptions=True)


async def test_it_begins_again(models: Models, clock: SimulatedClock, keeping: KeepAlive) -> None:
    use(models, keeping, "a")
    await clock.move(5)
    await asyncio.gather(*keeping.stop(), return_exceptions=True)
    asked = models.asked["a"]
    await clock.move(5)
    assert models.asked["a"] == asked
    keeping.used("a")
    keeping.start()
    keeping.start()
    await clock.move(2.1)
    assert models.asked["a"] == asked + 1


async def test_a_model_that_was_not_used_yet_is_not_asked(
    models: Models, clock: SimulatedClock, keeping: KeepAlive
) -> None:
    """It may be loading, and the request would be one more that waits."""
    models.names = ["a"]
    await clock.move(10)
    assert models.asked["a"] == 0
    keeping.used("a")
    await clock.move(2.1)
    assert models.asked["a"] == 1
