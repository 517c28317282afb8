"""When a server counts as down, and when it is back."""

from __future__ import annotations

import asyncio

import pytest

from compositor.errors import TritonUnavailable
from compositor.triton import endpoint as module
from compositor.triton.connection import NoAnswer
from compositor.triton.endpoint import SILENT_PINGS, Endpoint

from .fleet_fakes import FakeResidency, FakeTriton

GONE = TritonUnavailable("Triton cannot be reached")
SILENT = NoAnswer("Triton did not answer in time")


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


async def test_silence_is_a_hang_only_after_some_pings(endpoint: Endpoint, triton: FakeTriton) -> None:
    triton.fault = SILENT
    for _ in range(SILENT_PINGS - 1):
        await endpoint.check()
    assert endpoint.up
    await endpoint.check()
    assert not endpoint.up
    assert triton.given_up == 1
    # A machine that is gone for good needs a new connection when it is back.
    for _ in range(SILENT_PINGS):
        await endpoint.check()
    assert triton.given_up == 2


async def test_a_server_that_answers_requests_does_not_hang(endpoint: Endpoint, triton: FakeTriton) -> None:
    triton.fault = SILENT

    async def ping(wait_s: float) -> bool:
        triton.answers += 1
        raise SILENT

    triton.ping = ping  # type: ignore[method-assign]
    for _ in range(3 * SILENT_PINGS):
        await endpoint.check()
    assert endpoint.up


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


async def test_a_server_that_comes_and_goes_is_looked_for_ever_more_slowly(
    endpoint: Endpoint, triton: FakeTriton, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses = []

    def call_later(delay: float, callback: object) -> asyncio.TimerHandle:
        pauses.append(delay)
        return loop.call_soon(callback)  # type: ignore[return-value, arg-type]

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "call_later", call_later)
    for _ in range(6):
        endpoint.failed(endpoint.falls)
        await endpoint._sleep()
        await endpoint.check()
    assert pauses == [0.05, 0.1, 0.2, 0.4, 0.5, 0.5]
    monkeypatch.setattr(module, "_STEADY_S", -1)
    endpoint.failed(endpoint.falls)
    await endpoint._sleep()
    assert pauses[-1] == 0.05


async def test_the_report_says_how_it_is(endpoint: Endpoint, residency: FakeResidency) -> None:
    residency.models, residency.load, residency.roomy = {"m"}, 2.0, False
    report = endpoint.report()
    assert (report.endpoint, report.up, report.leases, report.room) == ("a:1", True, 2.0, False)
    assert [model.name for model in report.models] == ["m"]
