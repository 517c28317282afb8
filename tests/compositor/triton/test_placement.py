"""Where tenants go, and why they leave."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compositor.triton.placement import Placement, models_of, ranked, tenant_of

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


@pytest.fixture
def placement(servers: Servers) -> Placement:
    return Placement(servers.endpoints, SLOTS)


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

    def first() -> str:
        found = placement.displaced()
        assert found
        return found[0]

    assert first() == tenants[0]
    placement.postpone(tenants[0])
    assert first() == tenants[1]
    placement.stay(tenants[1])
    assert first() == tenants[2]
    placement.forget(tenants[2])
    assert placement.at(tenants[2]) is None
    assert first() == tenants[0]
    for tenant in tenants:
        placement.postpone(tenant)
        placement.stay(tenant)
    assert placement.displaced() is None


def test_where_no_server_is_up_there_is_no_place(placement: Placement, servers: Servers) -> None:
    for endpoint in servers.endpoints:
        endpoint.failed(0)
    assert placement.find("t", "t", []) is None
