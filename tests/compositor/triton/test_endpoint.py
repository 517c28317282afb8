"""When a server counts as down, and when it is back."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from compositor.errors import TritonUnavailable
from compositor.triton import endpoint as module
from compositor.triton.breaker import Circuit
from compositor.triton.connection import NoAnswer
from compositor.triton.endpoint import LOOK_S, SILENT_LOOKS, Endpoint

from .fleet_fakes import FakeResidency, FakeTriton
from .model_server import VirtualLoop

GONE = TritonUnavailable("Triton cannot be reached")
Play = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture
def virtual() -> Iterator[VirtualLoop]:
    loop = VirtualLoop()
    yield loop
    loop.close()


@pytest.fixture
def play(virtual: VirtualLoop) -> Play:
    """Plays a scene in virtual time."""
    return virtual.run_until_complete


@pytest.fixture
def triton() -> FakeTriton:
    return FakeTriton("a:1")


@pytest.fixture
def residency(triton: FakeTriton) -> FakeResidency:
    return FakeResidency(triton)


@pytest.fixture
def told() -> list[bool]:
    return []


@pytest.fixture
def endpoint(triton: FakeTriton, residency: FakeResidency, told: list[bool]) -> Endpoint:
    return Endpoint(triton, residency, told.append)  # type: ignore[arg-type]


async def test_requests_may_go_there_before_the_first_ping_but_it_is_not_ready(endpoint: Endpoint) -> None:
    assert endpoint.up
    assert not endpoint.ready
    await endpoint.check()
    assert endpoint.ready


async def test_one_connection_that_fails_is_enough(endpoint: Endpoint, triton: FakeTriton, told: list[bool]) -> None:
    await endpoint.check()
    triton.fault = GONE
    await endpoint.check()
    assert not endpoint.up
    assert not endpoint.ready
    triton.fault = None
    await endpoint.check()
    assert endpoint.up
    assert told == [True, False, True]


async def test_a_server_that_answers_but_takes_no_requests_is_down(endpoint: Endpoint, triton: FakeTriton) -> None:
    triton.takes_requests = False
    await endpoint.check()
    assert not endpoint.up
    assert triton.given_up == 0


async def test_a_request_without_a_server_takes_it_down_once(endpoint: Endpoint) -> None:
    falls = endpoint.falls
    endpoint.failed(falls)
    assert not endpoint.up
    await endpoint.check()
    assert endpoint.up
    endpoint.failed(falls)  # this one was sent before it was back
    assert endpoint.up


def test_silence_is_a_hang_only_after_some_looks(play: Play, endpoint: Endpoint, triton: FakeTriton) -> None:
    async def scene() -> None:
        triton.go.clear()
        for _ in range(SILENT_LOOKS - 1):
            await endpoint.check()
        assert endpoint.up
        await endpoint.check()
        assert not endpoint.up
        assert (triton.pings, triton.given_up) == (1, 1)
        # A machine that is gone for good needs a new connection when it is back.
        for _ in range(SILENT_LOOKS):
            await endpoint.check()
        assert (triton.pings, triton.given_up) == (2, 2)

    play(scene())


def test_a_server_that_answers_requests_does_not_hang(play: Play, endpoint: Endpoint, triton: FakeTriton) -> None:
    async def answer() -> None:
        for _ in range(9):
            await asyncio.sleep((SILENT_LOOKS - 0.5) * LOOK_S)
            triton.answers += 1

    async def scene() -> None:
        triton.go.clear()
        answering = asyncio.create_task(answer())
        while not answering.done():
            await endpoint.check()
            assert endpoint.up
        for _ in range(SILENT_LOOKS):
            await endpoint.check()
        assert not endpoint.up

    play(scene())


def test_a_server_that_answers_late_is_slow_and_not_down(
    play: Play, endpoint: Endpoint, triton: FakeTriton, told: list[bool]
) -> None:
    async def scene() -> None:
        triton.lag_s = (SILENT_LOOKS - 0.5) * LOOK_S
        watching = asyncio.create_task(endpoint.watch())
        await asyncio.sleep(600)
        watching.cancel()
        await asyncio.wait([watching])

    play(scene())
    assert len(told) >= 300
    assert all(told)


def test_looks_that_this_process_was_late_for_say_nothing(
    play: Play, endpoint: Endpoint, triton: FakeTriton, virtual: VirtualLoop
) -> None:
    async def scene() -> None:
        triton.go.clear()
        for _ in range(3 * SILENT_LOOKS):
            virtual.call_later(LOOK_S / 2, virtual.stall, 2 * LOOK_S)
            await endpoint.check()
        assert endpoint.up
        for _ in range(SILENT_LOOKS):
            await endpoint.check()
        assert not endpoint.up

    play(scene())


def test_a_hang_is_noticed_within_two_seconds_and_so_is_its_end(
    play: Play, endpoint: Endpoint, triton: FakeTriton, virtual: VirtualLoop
) -> None:
    async def when(up: bool) -> float:
        begin_s = virtual.time()
        while endpoint.up != up:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        return virtual.time() - begin_s

    async def scene() -> None:
        watching = asyncio.create_task(endpoint.watch())
        for moment in range(10):
            await asyncio.sleep(20 + moment / 7)
            triton.go.clear()
            assert SILENT_LOOKS * LOOK_S <= await when(False) <= 2.02
            await asyncio.sleep(moment / 3)
            triton.go.set()
            assert await when(True) <= 0.6
        watching.cancel()
        await asyncio.wait([watching])
        assert asyncio.all_tasks() == {asyncio.current_task()}

    play(scene())


def test_who_stops_watching_leaves_no_ping_behind(play: Play, endpoint: Endpoint, triton: FakeTriton) -> None:
    async def scene() -> None:
        triton.go.clear()
        watching = asyncio.create_task(endpoint.watch())
        await asyncio.sleep(LOOK_S / 2)
        watching.cancel()
        await asyncio.sleep(LOOK_S / 2)
        assert (triton.pings, asyncio.all_tasks()) == (1, {asyncio.current_task()})

    play(scene())


async def test_a_ping_that_was_lost_is_made_again(endpoint: Endpoint, triton: FakeTriton) -> None:
    triton.fault = NoAnswer("Triton did not answer in time")
    for _ in range(2 * SILENT_LOOKS):
        await endpoint.check()
    assert endpoint.up
    assert triton.pings == 2 * SILENT_LOOKS


async def test_models_that_are_not_there_any_more_are_forgotten(
    endpoint: Endpoint, triton: FakeTriton, residency: FakeResidency
) -> None:
    residency.models = {"kept", "lost"}
    triton.loaded = {"kept": 3}
    endpoint.failed(endpoint.falls)
    await endpoint.check()
    assert residency.models == {"kept"}
    endpoint.failed(endpoint.falls)
    triton.loaded = {}
    await endpoint.check()
    assert residency.models == set()


async def test_it_is_not_back_before_its_models_are_known(endpoint: Endpoint, triton: FakeTriton) -> None:
    async def fail() -> None:
        raise GONE

    endpoint.failed(endpoint.falls)
    triton.uses = fail  # type: ignore[assignment]
    await endpoint.check()
    assert not endpoint.up


async def test_the_watch_is_woken_by_a_request_that_fails_and_survives_a_check_that_breaks(
    triton: FakeTriton,
    residency: FakeResidency,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(module, "PERIOD_S", 3600)
    told = asyncio.Queue[bool]()
    endpoint = Endpoint(triton, residency, told.put_nowait)  # type: ignore[arg-type]
    count = 0

    async def ping(wait_s: float) -> bool:
        nonlocal count
        count += 1
        if count == 2:
            raise RuntimeError("a fault of our own")
        return True

    triton.ping = ping  # type: ignore[method-assign]
    watching = asyncio.create_task(endpoint.watch())
    assert await told.get()
    endpoint.failed(endpoint.falls)
    assert not await told.get()
    assert await told.get()
    assert count == 3
    assert "a fault of our own" in caplog.text
    watching.cancel()
    await asyncio.wait([watching])


def test_a_server_that_comes_and_goes_is_looked_for_ever_more_slowly(
    play: Play, endpoint: Endpoint, virtual: VirtualLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def pause_s() -> float:
        endpoint.failed(endpoint.falls)
        begin_s = virtual.time()
        await endpoint._sleep()
        await endpoint.check()
        return virtual.time() - begin_s

    async def scene() -> None:
        monkeypatch.setattr(module, "_STEADY_S", math.inf)
        pauses_s = [await pause_s() for _ in range(6)]
        assert pauses_s == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.5, 0.5])
        monkeypatch.setattr(module, "_STEADY_S", -1)
        assert await pause_s() == pytest.approx(0.05)

    play(scene())


async def test_that_inference_fails_is_told_and_that_it_works_again(
    triton: FakeTriton, residency: FakeResidency, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[bool] = []
    endpoint = Endpoint(triton, residency, told_works=told.append)  # type: ignore[arg-type]
    await endpoint.check()
    for model in ("a", "b"):
        endpoint.breaker.failed(model)
        endpoint.breaker.contradicted(model)
    await endpoint.check()
    assert (endpoint.up, endpoint.ready, endpoint.works) == (True, True, False)
    assert endpoint.report().circuit is Circuit.OPEN
    assert "inference fails at Triton at a:1, which answers pings: 2 models failed in a row" in caplog.text
    triton.inferences += 1
    endpoint.breaker.look()
    assert endpoint.works
    assert told == [True, False, False, True]


async def test_requests_that_are_made_to_go_elsewhere_do_not_take_it_down(
    endpoint: Endpoint, triton: FakeTriton
) -> None:
    falls = endpoint.falls
    triton.go.clear()
    checking = asyncio.create_task(endpoint.check())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    endpoint.let_go()  # with them, the ping that is out
    await checking
    endpoint.failed(falls)
    assert endpoint.up
    assert triton.let_go_of == 1
    triton.go.set()
    await endpoint.check()
    assert endpoint.ready


async def test_one_that_is_back_is_examined_at_once(endpoint: Endpoint) -> None:
    for model in ("a", "b"):
        endpoint.breaker.failed(model)
        endpoint.breaker.contradicted(model)
    assert not endpoint.breaker.is_due(silent=False)
    endpoint.failed(endpoint.falls)
    await endpoint.check()
    assert endpoint.breaker.is_due(silent=False)


async def test_the_report_says_how_it_is(endpoint: Endpoint, residency: FakeResidency) -> None:
    residency.models, residency.load, residency.roomy = {"m"}, 2.0, False
    report = endpoint.report()
    assert (report.endpoint, report.up, report.leases, report.room) == ("a:1", True, 2.0, False)
    assert [model.name for model in report.models] == ["m"]
