"""Requests to several servers: what is repeated, where, and what is not."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from compositor.deadline import Deadline
from compositor.errors import (
    DeadlinePassed,
    InferenceFailed,
    LipsyncError,
    Overloaded,
    TenantBroken,
    TritonUnavailable,
)
from compositor.residency.models import Device, Facts
from compositor.settings import Settings
from compositor.triton.breaker import Circuit
from compositor.triton.connection import ModelNotLoaded, NoAnswer, RegionLost, Unresponsive
from compositor.triton.examination import Examiner
from compositor.triton.fleet import Fleet, open_fleet
from compositor.triton.inference import Triton
from compositor.triton.placement import ranked

from .fleet_fakes import Servers

FIRST, SECOND, THIRD = ranked("t", "abc")
Ask = Callable[[Triton], Awaitable[str]]


@pytest.fixture
def servers() -> Servers:
    return Servers()


def fleet_of(servers: Servers, restart_wait_s: float) -> Fleet:
    settings = Settings.model_validate({"triton": {"restart_wait_s": restart_wait_s}})
    return Fleet(servers.endpoints, settings, lambda model: Facts(0, True, None))


@pytest.fixture
def fleet(servers: Servers) -> Fleet:
    return fleet_of(servers, restart_wait_s=0.2)


def answers(*faults: LipsyncError | None) -> tuple[list[str], Ask]:
    """A request that raises these faults, one each time that it is made; and where it went."""
    went: list[str] = []
    left = list(faults)

    async def request(triton: Triton) -> str:
        went.append(triton.endpoint)
        if left and (fault := left.pop(0)):
            raise fault
        triton.inferences += 1
        return triton.endpoint

    return went, request


def soon() -> Deadline:
    return Deadline.after(60)


async def test_a_request_goes_to_its_model_which_is_leased_meanwhile(fleet: Fleet, servers: Servers) -> None:
    async def request(triton: Triton) -> float:
        return servers.residency[triton.endpoint].load

    assert await fleet.serve("t", soon(), request) == 1
    assert servers.triton[FIRST].loads == ["t"]
    assert all(residency.load == 0 for residency in servers.residency.values())


async def test_the_wait_for_a_load_is_accounted_for_and_nothing_else(fleet: Fleet) -> None:
    loads = 0

    @contextlib.contextmanager
    def loading() -> Iterator[None]:
        nonlocal loads
        loads += 1
        yield

    _, request = answers()
    for _ in range(3):
        await fleet.serve("t", soon(), request, loading)
    assert loads == 1


async def test_a_model_that_is_gone_is_loaded_again_where_it_was(fleet: Fleet, servers: Servers) -> None:
    went, request = answers(ModelNotLoaded("gone"))
    assert await fleet.serve("t", soon(), request) == FIRST
    assert went == [FIRST, FIRST]
    assert servers.triton[FIRST].loads == ["t", "t"]
    assert servers.residency[FIRST].forgotten == [("t", True)]
    assert servers[FIRST].up


async def test_a_server_that_lost_the_shared_memory_is_asked_again(fleet: Fleet, servers: Servers) -> None:
    went, request = answers(RegionLost("Unable to find shared memory region"))
    assert await fleet.serve("t", soon(), request) == FIRST
    assert went == [FIRST, FIRST]
    assert servers.triton[FIRST].loads == ["t"]
    assert servers[FIRST].up


async def test_a_server_that_cannot_be_reached_is_left_at_once(fleet: Fleet, servers: Servers) -> None:
    went, request = answers(TritonUnavailable("gone"))
    assert await fleet.serve("t", soon(), request) == SECOND
    assert not servers[FIRST].up
    assert await fleet.serve("t", soon(), request) == SECOND
    assert went == [FIRST, SECOND, SECOND]


async def test_a_server_that_cannot_even_load_is_left_too(fleet: Fleet, servers: Servers) -> None:
    servers.triton[FIRST].fault = TritonUnavailable("gone")
    _, request = answers()
    assert await fleet.serve("t", soon(), request) == SECOND


async def test_where_nobody_waits_for_a_restart_others_are_asked_all_the_same(servers: Servers) -> None:
    fleet = fleet_of(servers, restart_wait_s=0)
    went, request = answers(TritonUnavailable("gone"), TritonUnavailable("gone"))
    assert await fleet.serve("t", soon(), request) == THIRD
    assert went == [FIRST, SECOND, THIRD]
    with pytest.raises(TritonUnavailable):
        await fleet.serve("t", soon(), answers(TritonUnavailable("gone"))[1])


async def test_a_region_that_is_lost_again_and_again_is_the_end(servers: Servers) -> None:
    fleet = fleet_of(servers, restart_wait_s=0)
    with pytest.raises(RegionLost):
        await fleet.serve("t", soon(), answers(RegionLost("restarted"))[1])


@pytest.mark.parametrize(
    "fault", [InferenceFailed("boom"), TenantBroken("NaN"), Overloaded("queue"), NoAnswer("late"), RuntimeError("ours")]
)
async def test_what_another_try_would_not_help_is_not_tried_again(fleet: Fleet, fault: LipsyncError) -> None:
    went, request = answers(fault)
    with pytest.raises(type(fault)):
        await fleet.serve("t", soon(), request)
    assert went == [FIRST]


async def test_a_request_that_fails_as_at_a_broken_server_is_made_again_elsewhere(
    fleet: Fleet, servers: Servers
) -> None:
    await servers.check()
    went, request = answers(InferenceFailed("CUDA failure 999"))
    assert await fleet.serve("t", soon(), request) == SECOND
    assert await fleet.serve("t", soon(), request) == SECOND
    assert went == [FIRST, SECOND, SECOND]
    assert servers[FIRST].breaker.known_to_work("t")
    assert servers[FIRST].works


@pytest.mark.parametrize("model", ["", "encoder"])
@pytest.mark.parametrize("worked", [False, True])
async def test_where_two_servers_are_broken_all_end_at_the_third(
    servers: Servers, fleet: Fleet, model: str, worked: bool
) -> None:
    """worked: whether inferences worked there until just now."""
    tenants = [name for name in map(str, range(99)) if ranked(name, "abc") == [FIRST, SECOND, THIRD]][:3]
    examiner = Examiner(servers.endpoints, 60, lambda model: Facts(0, model != "encoder", (1,)))
    await servers.check()
    for name in (FIRST, SECOND):
        servers.triton[name].inferences += worked
        servers.triton[name].broken = InferenceFailed("CUDA failure 999")

    async def look(triton: Any) -> str:
        return str(triton.endpoint)

    async def say(tenant: str) -> str:
        async def request(triton: Any) -> str:
            return str(await triton.serve(model or tenant))

        await fleet.serve(tenant, soon(), look)
        try:
            return await fleet.serve(model or tenant, soon(), request, tenant=tenant)
        except InferenceFailed:
            return ""

    for _ in range(3):
        went = [await say(tenant) for tenant in tenants]
        for endpoint in servers.endpoints:
            if endpoint.breaker.is_due(silent=False):
                await examiner.examine(endpoint)
    assert went == [THIRD] * 3
    assert not servers[FIRST].works
    assert servers[THIRD].works


@pytest.mark.parametrize("lost", [ModelNotLoaded("gone"), RegionLost("restarted")])
async def test_a_witness_that_was_restarted_or_lost_the_model_is_asked_again(
    fleet: Fleet, servers: Servers, lost: LipsyncError
) -> None:
    await servers.check()
    servers.residency[SECOND].models.add("t")
    servers.residency[FIRST].models.add("t")
    went, request = answers(InferenceFailed("CUDA failure 999"), lost)
    assert await fleet.serve("t", soon(), request) == SECOND
    assert went == [FIRST, SECOND, SECOND]
    assert servers.residency[SECOND].forgotten == ([("t", True)] if isinstance(lost, ModelNotLoaded) else [])
    went, request = answers(InferenceFailed("CUDA failure 999"), lost, lost)
    with pytest.raises(InferenceFailed):
        await fleet.serve("t", soon(), request)
    assert len(went) == 3


async def test_a_tenant_without_room_elsewhere_is_told_the_fault_and_stays(fleet: Fleet, servers: Servers) -> None:
    await servers.check()
    for name in (SECOND, THIRD):
        servers.residency[name].failures["t"] = Overloaded("full", retry_after_s=1)
    went, request = answers(InferenceFailed("boom"), InferenceFailed("boom"), None)
    for _ in range(2):
        with pytest.raises(InferenceFailed, match="boom"):
            await fleet.serve("t", soon(), request)
    assert await fleet.serve("t", soon(), request) == FIRST
    assert went == [FIRST] * 3


async def test_servers_whose_inference_fails_are_avoided_where_others_can_take_the_tenant(
    fleet: Fleet, servers: Servers
) -> None:
    await servers.check()
    went, request = answers()
    await fleet.serve("t", soon(), request)
    servers.break_(FIRST)
    assert await fleet.serve("t", soon(), request) == SECOND
    for name in (SECOND, THIRD):
        servers.residency[name].models.clear()
        servers.residency[name].failures["t"] = Overloaded("full", retry_after_s=1)
    assert await fleet.serve("t", soon(), request) == FIRST
    for name in (SECOND, THIRD):
        servers.break_(name)
    assert await fleet.serve("t", soon(), request) == FIRST
    assert went == [FIRST, SECOND, FIRST, FIRST]
    assert await fleet.ready()


@pytest.mark.parametrize("fault", [InferenceFailed("boom"), TenantBroken("NaN"), NoAnswer("late")])
async def test_the_only_server_is_asked_whatever_is_known_of_it(fault: LipsyncError) -> None:
    servers = Servers("a")
    fleet = fleet_of(servers, restart_wait_s=0.2)
    await servers.check()
    servers.triton["a"].silence_s = 1000.0
    went, request = answers(*[fault] * 9)
    for number in range(9):
        with pytest.raises(type(fault)):
            await fleet.serve(f"tenant-{number}", soon(), request)
    assert fleet.report()[0].circuit is Circuit.OPEN
    assert await fleet.ready()
    assert await fleet.serve("t", soon(), request) == "a"
    assert went == ["a"] * 10


@pytest.mark.parametrize("fault", [NoAnswer("late"), Overloaded("no request to Triton was free in time"), None])
async def test_a_tenant_whose_request_was_never_answered_asks_elsewhere_next(
    fleet: Fleet, servers: Servers, fault: LipsyncError | None
) -> None:
    """fault: what the request raises; None: its caller leaves."""
    await servers.check()
    begun = asyncio.Event()

    async def hang(triton: Triton) -> str:
        begun.set()
        if fault:
            raise fault
        return await asyncio.Event().wait() and ""

    servers.triton[FIRST].silence_s = 5.0
    asking = asyncio.create_task(fleet.serve("t", soon(), hang))
    await begun.wait()
    if not fault:
        asking.cancel()
    with contextlib.suppress(NoAnswer, Overloaded, asyncio.CancelledError):
        await asking
    went, request = answers()
    assert await fleet.serve("t", soon(), request) == SECOND
    assert await fleet.serve("t", soon(), request) == SECOND
    assert went == [SECOND, SECOND]


async def test_a_server_without_room_sends_the_request_on_until_there_is_none(fleet: Fleet, servers: Servers) -> None:
    for name in (FIRST, SECOND):
        servers.residency[name].failures["t"] = Overloaded(f"{name} is full", retry_after_s=1)
    went, request = answers()
    assert await fleet.serve("t", soon(), request) == THIRD
    servers.residency[THIRD].models.clear()
    servers.residency[THIRD].failures["t"] = Overloaded("third is full", retry_after_s=1)
    with pytest.raises(Overloaded, match="is full"):
        await fleet.serve("t", soon(), request)
    assert went == [THIRD]


async def test_who_waited_for_room_until_the_deadline_is_told_so(fleet: Fleet, servers: Servers) -> None:
    late = Deadline.after(0)
    servers.residency[FIRST].failures["t"] = Overloaded("first is full", retry_after_s=1)
    with pytest.raises(Overloaded, match="first is full"):
        await fleet.serve("t", late, answers()[1])


async def test_a_server_that_was_killed_is_waited_for_where_the_others_are_full(servers: Servers) -> None:
    fleet = fleet_of(servers, restart_wait_s=60)
    full = asyncio.Event()

    async def refuse(model: str, deadline: Deadline) -> None:
        full.set()
        raise Overloaded("full", retry_after_s=10)

    for name in (SECOND, THIRD):
        servers.residency[name].ensure = refuse  # type: ignore[method-assign]
    servers[FIRST].failed(0)
    _, request = answers()
    waiting = asyncio.create_task(fleet.serve("t", Deadline.after(60), request))
    await full.wait()
    await asyncio.wait((waiting,), timeout=0.1)
    assert not waiting.done()
    await servers[FIRST].check()
    assert await waiting == FIRST


@pytest.mark.parametrize(("restart_wait_s", "deadline_s"), [(0.0, 60.0), (0.2, 60.0), (60.0, 0.2)])
async def test_where_it_does_not_come_back_the_lack_of_room_is_told(
    servers: Servers, restart_wait_s: float, deadline_s: float
) -> None:
    fleet = fleet_of(servers, restart_wait_s=restart_wait_s)
    for name in (SECOND, THIRD):
        servers.residency[name].failures["t"] = Overloaded("full", retry_after_s=10)
    servers[FIRST].failed(0)
    with pytest.raises(Overloaded, match="full"):
        await fleet.serve("t", Deadline.after(deadline_s), answers()[1])


async def test_a_server_that_is_away_for_long_holds_back_no_refusal(servers: Servers) -> None:
    fleet = fleet_of(servers, restart_wait_s=60)
    for name in (SECOND, THIRD):
        servers.residency[name].failures["t"] = Overloaded("full", retry_after_s=10)
    servers[FIRST].failed(0)
    servers[FIRST].down_for_s = lambda: 60.0  # type: ignore[method-assign]
    with pytest.raises(Overloaded, match="full"):
        await asyncio.wait_for(fleet.serve("t", Deadline.after(60), answers()[1]), 30)


async def test_a_server_that_does_not_say_what_it_has_is_left_for_another(fleet: Fleet, servers: Servers) -> None:
    servers.residency[FIRST].failures["t"] = Unresponsive("Triton did not answer in time", retry_after_s=1)
    went, request = answers()
    assert await fleet.serve("t", soon(), request) == SECOND
    assert went == [SECOND]
    assert servers[FIRST].up


async def test_where_all_are_silent_each_is_asked_in_turn(servers: Servers) -> None:
    fleet = fleet_of(servers, restart_wait_s=60)
    went, request = answers(*[Unresponsive("Triton did not answer in time")] * 5)
    await fleet.serve("t", Deadline.after(60), request)
    assert Counter(went) == {FIRST: 2, SECOND: 2, THIRD: 2}


async def test_where_no_other_has_an_answer_it_is_asked_again(fleet: Fleet, servers: Servers) -> None:
    for name in (SECOND, THIRD):
        servers[name].failed(0)
    went, request = answers(Unresponsive("Triton did not answer in time"))
    assert await fleet.serve("t", soon(), request) == FIRST
    assert went == [FIRST, FIRST]
    assert servers[FIRST].up


async def test_where_none_ever_says_what_it_has_the_service_is_unavailable(servers: Servers) -> None:
    fleet = fleet_of(servers, restart_wait_s=0)
    for residency in servers.residency.values():
        residency.failures["t"] = Unresponsive("Triton did not answer in time", retry_after_s=1)
    with pytest.raises(Unresponsive):
        await fleet.serve("t", soon(), answers()[1])
    assert all(endpoint.up for endpoint in servers.endpoints)


async def test_a_tenant_that_does_not_load_is_not_tried_elsewhere(fleet: Fleet, servers: Servers) -> None:
    servers.residency[FIRST].failures["t"] = TenantBroken("failed to poll")
    with pytest.raises(TenantBroken):
        await fleet.serve("t", soon(), answers()[1])
    assert servers.triton[SECOND].loads == []


async def test_without_any_server_a_request_waits_for_one(servers: Servers) -> None:
    fleet = fleet_of(servers, restart_wait_s=60)
    for endpoint in servers.endpoints:
        endpoint.failed(0)
    _, request = answers()
    waiting = asyncio.create_task(fleet.serve("t", soon(), request))
    await asyncio.sleep(0)
    assert not waiting.done()
    await servers[THIRD].check()
    assert await waiting == THIRD


async def test_but_not_for_ever(fleet: Fleet, servers: Servers) -> None:
    for endpoint in servers.endpoints:
        endpoint.failed(0)
    with pytest.raises(TritonUnavailable) as caught:
        await fleet.serve("t", soon(), answers()[1])
    assert caught.value.retry_after_s == 1
    with pytest.raises((TritonUnavailable, DeadlinePassed)):
        await fleet.serve("t", Deadline.after(0.01), answers()[1])


async def test_a_server_that_always_loses_the_model_ends_with_the_deadline(fleet: Fleet) -> None:
    async def request(triton: Triton) -> None:
        raise ModelNotLoaded("gone")

    with pytest.raises(DeadlinePassed):
        await fleet.serve("t", Deadline.after(0.1), request)


async def test_who_goes_away_leaves_no_lease(fleet: Fleet, servers: Servers) -> None:
    begun = asyncio.Event()

    async def request(triton: Triton) -> None:
        begun.set()
        await asyncio.Event().wait()

    asking = asyncio.create_task(fleet.serve("t", soon(), request))
    await begun.wait()
    asking.cancel()
    await asyncio.wait([asking])
    assert servers.residency[FIRST].load == 0


async def test_an_encoder_is_loaded_where_its_tenants_are(fleet: Fleet, servers: Servers) -> None:
    _, request = answers()
    tenants = [next(name for name in map(str, range(99)) if ranked(name, "abc")[0] == home) for home in "abc"]
    for tenant in tenants:
        await fleet.serve("encoder", soon(), request, tenant=tenant)
        await fleet.serve(tenant, soon(), request)
        await fleet.serve(f"{tenant}.raw", soon(), request, tenant=tenant)
    for tenant, triton in zip(tenants, servers.triton.values(), strict=True):
        assert triton.loads == ["encoder", tenant, f"{tenant}.raw"]


async def test_replaced_and_removed_tenants_are_told_to_every_server(fleet: Fleet, servers: Servers) -> None:
    fleet.replaced("t")
    servers[FIRST].breaker.failed("t")
    servers.triton[SECOND].fault = TritonUnavailable("gone")
    await fleet.drop("t")
    for name, residency in servers.residency.items():
        assert residency.asked_of_files == ["t", "t.raw"]
        assert residency.dropped == ([] if name == SECOND else ["t", "t.raw"])
    assert servers[FIRST].breaker.suspects == []


async def test_one_server_is_enough_to_be_ready(fleet: Fleet, servers: Servers) -> None:
    assert not await fleet.ready()
    for name in (FIRST, SECOND):
        servers.triton[name].fault = TritonUnavailable("gone")
    await servers.check()
    assert await fleet.ready()
    assert {report.endpoint: report.up for report in fleet.report()} == {FIRST: False, SECOND: False, THIRD: True}


async def test_where_no_gpu_is_named_the_device_claims_none(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def residency(server: Triton, settings: object, facts: object, devices: object, *rest: object) -> Any:
        made.append(devices)

    monkeypatch.setattr("compositor.triton.fleet.Residency", residency)
    open_fleet(Settings(), lambda model: Facts(0, True, None))
    assert made == [[Device("default", None)]]


async def test_each_tenant_is_pinned_at_home_only(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, tuple[Any, Any]] = {}

    def residency(server: Triton, settings: object, *rest: object) -> Any:
        made[server.endpoint] = (settings, rest)
        return Servers().residency["a"]

    monkeypatch.setattr("compositor.triton.fleet.Residency", residency)
    endpoints = ["127.0.0.1:1", "127.0.0.1:2"]
    pinned, preload = [f"p{number}" for number in range(20)], [f"q{number}" for number in range(20)]
    settings = Settings.model_validate(
        {
            "triton": {"endpoints": [*endpoints, endpoints[0]], "gpus": [0, 2], "placement": "round_robin"},
            "residency": {"pinned": pinned, "preload": preload},
        }
    )
    fleet = open_fleet(settings, lambda model: Facts(0, True, None))
    assert [report.endpoint for report in fleet.report()] == endpoints
    for wanted, key in ((pinned, "pinned"), (preload, "preload")):
        of = {endpoint: getattr(own, key) for endpoint, (own, _) in made.items()}
        assert sorted(of[endpoints[0]] + of[endpoints[1]]) == sorted(wanted)
        assert all(ranked(tenant, endpoints)[0] == endpoint for endpoint in endpoints for tenant in of[endpoint])
        assert all(of.values())
    _, (_, devices, _, placement) = made[endpoints[0]]
    assert [(device.name, device.gpu) for device in devices] == [("gpu0", 0), ("gpu2", 2)]
    assert placement == "round_robin"
