"""Where tenants go, and why they leave."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compositor.triton.endpoint import Endpoint
from compositor.triton.placement import CALM_S, Placement, models_of, ranked, tenant_of

from .fleet_fakes import Servers

NAMES = st.lists(st.text(min_size=1, max_size=8), min_size=2, max_size=6, unique=True)
SLOTS = 4


@given(st.text(max_size=8), NAMES, st.data())
def test_only_the_tenants_of_a_missing_server_move(tenant: str, names: list[str], data: st.DataObject) -> None:
    order = ranked(tenant, names)
    missing = data.draw(st.sampled_from(names))
    assert ranked(tenant, [name for name in reversed(names) if name != missing]) == [
        name for name in order if name != missing
    ]


def test_tenants_spread_evenly() -> None:
    names = ["a:8001", "b:8001", "c:8001"]
    orders = Counter(tuple(ranked(f"tenant-{number}", names)) for number in range(6000))
    assert len(orders) == 6
    assert all(850 < count < 1150 for count in orders.values())


def test_both_models_of_a_tenant_are_its_own() -> None:
    assert [tenant_of(model) for model in models_of("t")] == ["t", "t"]


@pytest.fixture
def servers() -> Servers:
    return Servers()


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now_s = 50.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def placement(servers: Servers, clock: Clock) -> Placement:
    return Placement(servers.endpoints, SLOTS, clock)


ORDER = ranked("t", "abc")


def test_a_tenant_is_at_home_and_its_encoder_with_it(placement: Placement, servers: Servers) -> None:
    assert placement.find("t", "t", []) is servers[ORDER[0]]
    for name in "abc":
        servers.residency[name].models.add("encoder")
    assert placement.find("t", "encoder", []) is servers[ORDER[0]]


def test_a_tenant_stays_where_it_is_loaded(placement: Placement, servers: Servers) -> None:
    servers.residency[ORDER[2]].models.add("t")
    assert placement.find("t", "t", []) is servers[ORDER[2]]
    assert placement.find("t", "encoder", []) is servers[ORDER[2]]


def test_a_full_server_sends_new_tenants_on_but_keeps_its_own(placement: Placement, servers: Servers) -> None:
    home = servers.residency[ORDER[0]]
    home.roomy = False
    assert placement.find("t", "t", []) is servers[ORDER[1]]
    servers.residency[ORDER[1]].models.add("t")
    home.roomy = True
    assert placement.find("t", "t", []) is servers[ORDER[1]]
    servers.residency[ORDER[1]].models.clear()
    assert placement.find("t", "t", []) is servers[ORDER[0]]
    home.models.add("t")
    home.roomy = False
    assert placement.find("t", "t", []) is servers[ORDER[0]]


def test_where_all_are_full_the_first_one_has_to_do(placement: Placement, servers: Servers) -> None:
    for residency in servers.residency.values():
        residency.roomy = False
    assert placement.find("t", "t", []) is servers[ORDER[0]]
    assert placement.find("t", "t", [servers[ORDER[0]]]) is servers[ORDER[1]]
    assert placement.find("t", "t", servers.endpoints) is None


def test_a_much_busier_server_sends_new_tenants_on(placement: Placement, servers: Servers) -> None:
    first, second, third = (servers.residency[name] for name in ORDER)
    first.load, second.load, third.load = 2 * 3 + SLOTS, 5, 3
    assert placement.find("t", "t", []) is servers[ORDER[0]]
    first.load += 1
    assert placement.find("t", "t", []) is servers[ORDER[1]]


def test_whoever_comes_during_a_load_waits_for_the_same(placement: Placement, servers: Servers) -> None:
    servers.residency[ORDER[0]].roomy = False
    chosen = placement.find("t", "t", [])
    servers.residency[ORDER[0]].roomy = True
    with placement.waiting("t"), placement.waiting("t"):
        assert placement.find("t", "t", []) is chosen
    assert placement.find("t", "t", []) is servers[ORDER[0]]


async def test_the_tenants_of_a_dead_server_move_and_are_known(placement: Placement, servers: Servers) -> None:
    home, second = servers[ORDER[0]], servers[ORDER[1]]
    assert placement.find("t", "t", []) is home
    servers.residency[home.name].models.add("t")
    home.failed(home.falls)
    assert placement.find("t", "t", []) is second
    servers.residency[second.name].models.add("t")
    assert placement.displaced() is None  # its home is still down
    servers.residency[home.name].models.clear()
    await home.check()
    assert placement.displaced() == ("t", second, home)
    assert placement.find("t", "t", []) is second
    placement.move("t", home)
    assert placement.displaced() is None
    assert placement.at("t") is home


async def test_a_displaced_tenant_that_nobody_asks_for_needs_no_way_back(
    placement: Placement, servers: Servers
) -> None:
    home = servers[ORDER[0]]
    home.failed(home.falls)
    placement.find("t", "t", [])
    await home.check()
    assert placement.displaced() is None
    assert placement.find("t", "t", []) is home


async def test_a_displaced_tenant_that_is_being_loaded_is_not_lost_sight_of(
    placement: Placement, servers: Servers
) -> None:
    home, refuge = servers[ORDER[0]], servers[ORDER[1]]
    home.failed(home.falls)
    assert placement.find("t", "t", []) is refuge
    with placement.waiting("t"):
        await home.check()
        assert placement.displaced() is None
        servers.residency[refuge.name].models.add("t")
    assert placement.displaced() == ("t", refuge, home)


async def test_others_may_go_first(placement: Placement, servers: Servers) -> None:
    tenants = [tenant for tenant in map(str, range(40)) if ranked(tenant, "abc")[0] == "a"][:3]
    servers["a"].failed(0)
    for tenant in tenants:
        found = placement.find(tenant, tenant, [])
        assert found
        servers.residency[found.name].models.add(tenant)
    await servers["a"].check()

    def first(later: Collection[str] = ()) -> str:
        found = placement.displaced(lambda tenant, home: tenant not in later and home is servers["a"])
        assert found
        return found[0]

    assert first() == tenants[0]
    assert first(later=tenants[:1]) == tenants[1]
    placement.stay(tenants[1])
    assert first(later=tenants[:1]) == tenants[2]
    placement.forget(tenants[2])
    assert placement.at(tenants[2]) is None
    assert first() == tenants[0]
    for tenant in tenants:
        placement.stay(tenant)
    assert placement.displaced() is None


def test_where_no_server_is_up_there_is_no_place(placement: Placement, servers: Servers) -> None:
    for endpoint in servers.endpoints:
        endpoint.failed(0)
    assert placement.find("t", "t", []) is None


def spill(placement: Placement, servers: Servers, tenant: str = "t") -> tuple[Endpoint, Endpoint]:
    """A tenant is loaded elsewhere, as its home has no room: where, and its home."""
    home = servers[ranked(tenant, "abc")[0]]
    servers.residency[home.name].roomy = False
    here = placement.find(tenant, tenant, [])
    assert here not in (None, home)
    servers.residency[here.name].models.add(tenant)
    return here, home


def go_on(placement: Placement, clock: Clock, seconds: float) -> None:
    """Time passes, with a look each second."""
    for _ in range(int(seconds)):
        clock.now_s += 1
        placement.look()


async def test_a_spilled_tenant_returns_when_its_home_has_had_room_for_a_while(
    placement: Placement, servers: Servers, clock: Clock
) -> None:
    await servers.check()
    here, home = spill(placement, servers)
    go_on(placement, clock, 3 * CALM_S)
    assert placement.spilled() is None
    servers.residency[home.name].roomy = True
    go_on(placement, clock, CALM_S)
    assert placement.spilled() is None
    go_on(placement, clock, 1)
    assert placement.spilled() == ("t", here, home)
    assert placement.displaced() is None
    assert placement.find("t", "t", []) is here
    placement.move("t", home)
    assert placement.spilled() is None
    assert placement.at("t") is home


async def test_a_home_that_is_calm_only_now_and_then_takes_nobody_back(
    placement: Placement, servers: Servers, clock: Clock
) -> None:
    await servers.check()
    _, home = spill(placement, servers)
    residency = servers.residency[home.name]
    for _ in range(20):
        for roomy in (True, False):
            residency.roomy = roomy
            go_on(placement, clock, CALM_S if roomy else 1)
            assert placement.spilled() is None


async def test_who_leaves_for_load_returns_at_half_of_it_only(
    placement: Placement, servers: Servers, clock: Clock
) -> None:
    await servers.check()
    first, second, third = (servers.residency[name] for name in ORDER)
    first.load, second.load, third.load = 2 * 3 + SLOTS + 1, 5, 3
    here = placement.find("t", "t", [])
    assert here is servers[ORDER[1]]
    second.models.add("t")
    for load in (first.load, 2 * 3 + SLOTS, 3 + SLOTS // 2 + 1):
        first.load = load
        go_on(placement, clock, 2 * CALM_S)
        assert placement.spilled() is None
    first.load = 3 + SLOTS // 2
    go_on(placement, clock, CALM_S + 1)
    assert placement.spilled() == ("t", here, servers[ORDER[0]])


async def test_one_that_goes_or_comes_is_waited_upon_before_the_next_returns(
    placement: Placement, servers: Servers, clock: Clock
) -> None:
    await servers.check()
    tenants = [tenant for tenant in map(str, range(60)) if ranked(tenant, "abc")[0] == "a"][:4]
    for tenant in tenants[:3]:
        spill(placement, servers, tenant)
    servers.residency["a"].roomy = True
    go_on(placement, clock, CALM_S)
    spill(placement, servers, tenants[3])  # it went within one second
    servers.residency["a"].roomy = True
    returned = []
    for _ in range(int(4 * CALM_S)):
        go_on(placement, clock, 1)
        if found := placement.spilled():
            placement.move(found[0], servers["a"])
            returned.append((found[0], clock.now_s - 50))
    assert [tenant for tenant, _ in returned] == tenants[:3]
    assert [at_s for _, at_s in returned] == [CALM_S + (CALM_S + 1) * n for n in (1, 2, 3)]


async def test_a_spilled_tenant_whose_home_dies_returns_with_those_that_had_to_go(
    placement: Placement, servers: Servers, clock: Clock
) -> None:
    await servers.check()
    here, home = spill(placement, servers)
    servers.residency[here.name].models.clear()
    home.failed(home.falls)
    assert placement.find("t", "t", []) is here
    servers.residency[here.name].models.add("t")
    await home.check()
    assert placement.displaced() == ("t", here, home)
    # Its encoder's request in between changes nothing.
    assert placement.find("t", "encoder", []) is here
    assert placement.displaced() == ("t", here, home)
    placement.wait_for_room("t", home)
    assert placement.displaced() is None
    servers.residency[home.name].roomy = True
    go_on(placement, clock, CALM_S + 1)
    assert placement.spilled() == ("t", here, home)


async def test_a_spilled_tenant_that_nobody_asks_for_needs_no_way_back(
    placement: Placement, servers: Servers, clock: Clock
) -> None:
    await servers.check()
    here, home = spill(placement, servers)
    servers.residency[home.name].roomy = True
    servers.residency[here.name].models.clear()
    go_on(placement, clock, CALM_S + 1)
    assert placement.spilled() is None
    assert placement.find("t", "t", []) is home


async def test_no_server_that_is_down_is_calm(placement: Placement, servers: Servers, clock: Clock) -> None:
    await servers.check()
    _, home = spill(placement, servers)
    servers.residency[home.name].roomy = True
    home.failed(home.falls)
    go_on(placement, clock, 2 * CALM_S)
    assert placement.spilled() is None
    for endpoint in servers.endpoints:
        endpoint.failed(endpoint.falls)
    go_on(placement, clock, 2 * CALM_S)
    assert placement.spilled() is None


async def test_a_tenant_whose_home_fails_at_inference_returns_once_it_works(
    placement: Placement, servers: Servers
) -> None:
    await servers.check()
    home, refuge = servers[ORDER[0]], servers[ORDER[1]]
    placement.find("t", "t", [])
    servers.residency[home.name].models.add("t")
    servers.break_(home.name)
    assert placement.find("t", "t", []) is refuge
    servers.residency[refuge.name].models.add("t")
    assert placement.displaced() is None
    home.breaker.worked()
    assert placement.displaced() == ("t", refuge, home)
    assert placement.find("t", "t", []) is refuge


async def test_a_tenant_that_alone_failed_at_its_home_returns_when_that_is_calm(
    placement: Placement, servers: Servers, clock: Clock
) -> None:
    await servers.check()
    home, refuge = servers[ORDER[0]], servers[ORDER[1]]
    placement.find("t", "t", [])
    servers.residency[refuge.name].models.add("t")
    placement.settle("t", refuge)
    assert placement.displaced() is None
    go_on(placement, clock, CALM_S + 1)
    assert placement.spilled() == ("t", refuge, home)
    servers.break_(home.name)
    go_on(placement, clock, 1)
    assert placement.spilled() is None
