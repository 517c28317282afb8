"""How tenants return to a server that was down."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from compositor.deadline import Deadline
from compositor.errors import InferenceFailed, Overloaded, TenantBroken, TritonUnavailable
from compositor.residency.models import Facts
from compositor.triton import homecoming as module
from compositor.triton.homecoming import Homecoming
from compositor.triton.placement import CALM_S, Placement, ranked

from .fleet_fakes import Servers

AT_A = [tenant for tenant in map(str, range(60)) if ranked(tenant, "ab")[0] == "a"][:3]


@pytest.fixture
def servers() -> Servers:
    return Servers("ab")


@pytest.fixture
def placement(servers: Servers) -> Placement:
    """Time passes from look to look."""
    return Placement(servers.endpoints, 4, map(float, itertools.count()).__next__)


@pytest.fixture
def homecoming(placement: Placement) -> Homecoming:
    return Homecoming(placement, 5, 0, lambda model: Facts(0, True, (), encoder="encoder"), lambda: 0.0)


async def step(homecoming: Homecoming) -> None:
    """One that is waited for to its end."""
    homecoming.step()
    await homecoming.settle()


async def displace(servers: Servers, placement: Placement) -> None:
    """Server a was down, and is back; its three tenants and an encoder are on b."""
    servers["a"].failed(0)
    for tenant in AT_A:
        found = placement.find(tenant, tenant, [])
        assert found is servers["b"]
        servers.residency["b"].models.add(tenant)
        servers.triton["b"].loaded[tenant] = 1
    servers.residency["b"].models.add("encoder")
    await servers.check()


async def test_one_tenant_a_step_returns_its_encoder_first(
    servers: Servers, placement: Placement, homecoming: Homecoming
) -> None:
    await displace(servers, placement)
    for number, tenant in enumerate(AT_A):
        assert placement.find(tenant, tenant, []) is servers["b"]
        await step(homecoming)
        assert servers.triton["a"].loads == ["encoder", *AT_A[: number + 1]]
        assert placement.find(tenant, tenant, []) is servers["a"]
    await step(homecoming)
    assert len(servers.triton["a"].loads) == 4


async def test_an_encoder_that_the_tenant_does_not_need_does_not_matter(servers: Servers, placement: Placement) -> None:
    homecoming = Homecoming(placement, 5, 0, lambda model: Facts(0, True, (), encoder="other"))
    await displace(servers, placement)
    servers.residency["a"].failures = {"encoder": TenantBroken("failed to poll")}
    for _ in AT_A:
        await step(homecoming)
    assert [placement.at(tenant) for tenant in AT_A] == [servers["a"]] * 3
    assert "encoder" not in servers.residency["a"].models


async def test_a_tenant_whose_encoder_does_not_load_returns_once_that_is_mended(
    servers: Servers, placement: Placement
) -> None:
    def facts(model: str) -> Facts:
        return Facts(0, True, (), encoder="encoder" if model == AT_A[0] else "")

    now_s = 0.0
    homecoming = Homecoming(placement, 5, 0, facts, lambda: now_s)
    await displace(servers, placement)
    servers.residency["a"].failures = {"encoder": TenantBroken("failed to poll")}
    for _ in AT_A:
        await step(homecoming)
    assert [placement.at(tenant) for tenant in AT_A] == [servers["b"], servers["a"], servers["a"]]
    servers.residency["a"].failures.clear()
    await step(homecoming)
    assert placement.at(AT_A[0]) is servers["b"]  # it was tried just now
    now_s = module.AGAIN_S
    await step(homecoming)
    assert placement.at(AT_A[0]) is servers["a"]


async def test_a_tenant_whose_inference_fails_at_home_stays_where_it_is_served(
    servers: Servers, placement: Placement
) -> None:
    now_s = 0.0
    homecoming = Homecoming(placement, 5, 0, lambda model: Facts(0, True, ()), lambda: now_s)
    await displace(servers, placement)
    servers.triton["a"].broken = {AT_A[0]: InferenceFailed("CUDA failure 999")}
    for _ in AT_A:
        await step(homecoming)
    assert [placement.at(tenant) for tenant in AT_A] == [servers["b"], servers["a"], servers["a"]]
    servers.triton["a"].broken = None
    await step(homecoming)
    assert placement.at(AT_A[0]) is servers["b"]  # it was tried just now
    now_s = module.AGAIN_S
    await step(homecoming)
    assert placement.at(AT_A[0]) is servers["a"]


class Stuck:
    """Loads of these models at home never end, until they are let go."""

    def __init__(self, servers: Servers, *models: str) -> None:
        self._go, self._ensure = asyncio.Event(), servers.residency["a"].ensure
        self._models = models
        self.begun = asyncio.Event()
        self.asked: list[str] = []
        servers.residency["a"].ensure = self._wait  # type: ignore[method-assign]

    async def _wait(self, model: str, deadline: Deadline) -> None:
        self.asked.append(model)
        if model in self._models:
            self.begun.set()
            await self._go.wait()
        await self._ensure(model, deadline)

    def let_go(self) -> None:
        self._go.set()


async def until_idle() -> None:
    """What is under way gets as far as it can."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_load_that_takes_long_holds_back_no_other(
    servers: Servers, placement: Placement, homecoming: Homecoming
) -> None:
    await displace(servers, placement)
    stuck = Stuck(servers, AT_A[0])
    for _ in AT_A:
        homecoming.step()
        await until_idle()
    assert [placement.at(tenant) for tenant in AT_A] == [servers["b"], servers["a"], servers["a"]]
    assert stuck.asked.count(AT_A[0]) == 1
    stuck.let_go()
    await homecoming.settle()
    assert placement.at(AT_A[0]) is servers["a"]


async def test_few_are_under_way_to_one_server_at_once(
    servers: Servers, placement: Placement, homecoming: Homecoming
) -> None:
    await displace(servers, placement)
    stuck = Stuck(servers, *AT_A)
    for _ in range(5):
        homecoming.step()
        await until_idle()
    assert [model for model in stuck.asked if model != "encoder"] == AT_A[: module.MOST_UNDER_WAY]
    stuck.let_go()
    await homecoming.settle()
    await step(homecoming)
    assert [placement.at(tenant) for tenant in AT_A] == [servers["a"]] * 3


async def test_servers_are_looked_at_while_a_load_takes_long(
    servers: Servers, placement: Placement, homecoming: Homecoming
) -> None:
    await displace(servers, placement)
    servers.residency["b"].roomy = False
    at_b = next(tenant for tenant in map(str, range(60)) if ranked(tenant, "ab")[0] == "b")
    assert placement.find(at_b, at_b, []) is servers["a"]
    servers.residency["a"].models.add(at_b)
    servers.residency["b"].roomy = True
    stuck = Stuck(servers, *AT_A)
    for _ in range(int(2 * CALM_S)):
        homecoming.step()
        await until_idle()
    assert placement.at(at_b) is servers["b"]
    stuck.let_go()
    await homecoming.settle()


async def test_a_tenant_that_is_removed_on_its_way_has_no_place(
    servers: Servers, placement: Placement, homecoming: Homecoming
) -> None:
    await displace(servers, placement)
    stuck = Stuck(servers, AT_A[0])
    homecoming.step()
    await until_idle()
    placement.forget(AT_A[0])
    stuck.let_go()
    await homecoming.settle()
    assert placement.at(AT_A[0]) is None


async def test_the_watch_ends_with_all_that_it_began(
    servers: Servers, placement: Placement, homecoming: Homecoming, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PERIOD_S", 0)
    await displace(servers, placement)
    stuck = Stuck(servers, AT_A[0])
    before = asyncio.all_tasks()
    watching = asyncio.create_task(homecoming.watch())
    await stuck.begun.wait()
    watching.cancel()
    await asyncio.wait([watching])
    assert asyncio.all_tasks() == before


async def test_a_fault_of_our_own_on_the_way_is_told_and_the_next_one_sets_out(
    servers: Servers, placement: Placement, homecoming: Homecoming, caplog: pytest.LogCaptureFixture
) -> None:
    await displace(servers, placement)
    servers.residency["a"].failures = {AT_A[0]: RuntimeError("a fault of our own")}  # type: ignore[dict-item]
    await step(homecoming)
    assert "a fault of our own" in caplog.text
    for _ in AT_A:
        await step(homecoming)
    assert placement.at(AT_A[1]) is servers["a"]


async def test_copies_left_behind_are_unloaded_when_nobody_uses_them(
    servers: Servers, placement: Placement, homecoming: Homecoming
) -> None:
    await displace(servers, placement)
    await step(homecoming)
    assert servers.residency["b"].dropped == []
    for _ in range(3):
        # Another compositor has not moved yet.
        servers.triton["b"].loaded[AT_A[0]] += 1
        await step(homecoming)
    assert AT_A[0] not in servers.residency["b"].dropped
    await step(homecoming)
    assert AT_A[0] in servers.residency["b"].dropped
    assert "encoder" not in servers.residency["b"].dropped


async def test_a_copy_that_is_used_again_or_gone_already_is_left_alone(
    servers: Servers, placement: Placement, homecoming: Homecoming
) -> None:
    await displace(servers, placement)
    for _ in AT_A:
        await step(homecoming)
    servers.residency["b"].dropped.clear()
    servers.residency["b"].models.update(AT_A)
    servers["a"].failed(servers["a"].falls)
    for tenant in AT_A[:2]:
        assert placement.find(tenant, tenant, []) is servers["b"]
    del servers.triton["b"].loaded[AT_A[2]]
    for _ in range(3):
        await step(homecoming)
    assert servers.residency["b"].dropped == []


async def test_who_finds_no_room_at_home_waits_and_who_is_broken_stays(
    servers: Servers, placement: Placement, homecoming: Homecoming
) -> None:
    await displace(servers, placement)
    servers.residency["a"].failures = {AT_A[0]: Overloaded("full"), AT_A[1]: TenantBroken("failed to poll")}
    for _ in range(3):
        await step(homecoming)
    assert [placement.at(tenant) for tenant in AT_A] == [servers["b"], servers["b"], servers["a"]]
    servers.residency["a"].failures.clear()
    for _ in range(3):
        await step(homecoming)
    # What was full may be so again: it has to be calm for a while.
    assert placement.at(AT_A[0]) is servers["b"]
    for _ in range(int(CALM_S)):
        await step(homecoming)
    assert [placement.at(tenant) for tenant in AT_A] == [servers["a"], servers["b"], servers["a"]]


async def test_a_server_that_cannot_be_reached_lets_others_go_first(
    servers: Servers, placement: Placement, homecoming: Homecoming
) -> None:
    await displace(servers, placement)
    servers.residency["a"].failures = {AT_A[0]: TritonUnavailable("gone")}
    for _ in range(2):
        await step(homecoming)
    assert [placement.at(tenant) for tenant in AT_A] == [servers["b"], servers["a"], servers["b"]]


async def test_spilled_tenants_return_one_at_a_time_when_their_home_is_calm(
    servers: Servers, placement: Placement, homecoming: Homecoming
) -> None:
    await servers.check()
    servers.residency["a"].roomy = False
    for tenant in AT_A:
        assert placement.find(tenant, tenant, []) is servers["b"]
        servers.residency["b"].models.add(tenant)
    for _ in range(3 * int(CALM_S)):
        await step(homecoming)
    assert servers.triton["a"].loads == []
    servers.residency["a"].roomy = True
    steps: list[int] = []
    for number in range(6 * int(CALM_S)):
        await step(homecoming)
        steps += [number] * (len(servers.triton["a"].loads) - len(steps))
    assert servers.triton["a"].loads == AT_A
    assert all(later - sooner >= CALM_S / 2 for sooner, later in itertools.pairwise(steps))
    assert all(placement.find(tenant, tenant, []) is servers["a"] for tenant in AT_A)


async def test_nobody_returns_to_a_server_that_is_down_again(
    servers: Servers, placement: Placement, homecoming: Homecoming
) -> None:
    await displace(servers, placement)
    servers["a"].failed(servers["a"].falls)
    await step(homecoming)
    assert servers.triton["a"].loads == []
    assert all(placement.at(tenant) is servers["b"] for tenant in AT_A)


async def test_a_server_that_cannot_be_asked_is_asked_again(
    servers: Servers, placement: Placement, homecoming: Homecoming
) -> None:
    await displace(servers, placement)
    uses = servers.triton["b"].uses

    async def fail() -> None:
        raise TritonUnavailable("gone")

    servers.triton["b"].uses = fail  # type: ignore[assignment]
    for _ in range(3):
        await step(homecoming)
    servers.triton["b"].uses = uses  # type: ignore[method-assign]
    for _ in range(2):
        await step(homecoming)
    assert sorted(servers.residency["b"].dropped) == sorted(AT_A)


async def test_the_watch_survives_a_step_that_breaks(
    homecoming: Homecoming, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "PERIOD_S", 0)
    steps = asyncio.Queue[None]()

    def fail() -> None:
        steps.put_nowait(None)
        raise RuntimeError("a fault of our own")

    homecoming.step = fail  # type: ignore[method-assign]
    watching = asyncio.create_task(homecoming.watch())
    for _ in range(2):
        await steps.get()
    watching.cancel()
    await asyncio.wait([watching])
    assert "a fault of our own" in caplog.text
