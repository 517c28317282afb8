from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from compositor.residency.budget import MB, Budget, Holding
from compositor.residency.plan import DeviceOrder, Plan, Wish, leave_early, make_plan
from compositor.settings import ResidencySettings

DEVICES = ["gpu0", "gpu1"]
PLACES = st.sampled_from([*DEVICES, None])
SIZES = st.sampled_from([0, 10 * MB, 40 * MB, 90 * MB])
HOLDINGS = st.builds(
    lambda number, device, size, counted, leaving: Holding(f"h{number}", device, size, counted, leaving),
    st.integers(0, 30),
    PLACES,
    SIZES,
    st.booleans(),
    st.booleans(),
)
WISHES = st.builds(
    lambda number, size, counted, held, blocked: Wish(
        Holding(f"w{number}", None, size, counted), held, blocked and not held
    ),
    st.integers(0, 10),
    SIZES,
    st.booleans(),
    st.booleans(),
    st.booleans(),
)


def unique(holdings: list[Holding]) -> list[Holding]:
    return list({each.model: each for each in holdings}.values())


def settings(max_models: int, max_mb: int = 0) -> ResidencySettings:
    return ResidencySettings.model_validate({"max_models": max_models, "max_mb": max_mb})


def totals(budget: Budget) -> list[tuple[int, int]]:
    return [(total.models, total.bytes) for total in budget.now.values()]


@given(
    st.lists(HOLDINGS, max_size=12).map(unique),
    st.lists(WISHES, max_size=6, unique_by=lambda wish: wish.holding.model),
    st.integers(2, 6),
    st.sampled_from([0, 100]),
    st.integers(0, 4),
    st.sampled_from(["least_loaded", "round_robin"]),
)
def test_a_plan_keeps_to_the_budget_and_to_the_order(
    holdings: list[Holding], wishes: list[Wish], max_models: int, max_mb: int, loads: int, policy: str
) -> None:
    limits = settings(max_models, max_mb)
    candidates = [each for each in holdings if not each.leaving and each.counted]
    placement = DeviceOrder("round_robin" if policy == "round_robin" else "least_loaded", DEVICES)
    plan = make_plan(wishes, Budget(limits, DEVICES, holdings), candidates, placement, loads)

    assert len(plan.grants) <= loads
    assert len(set(plan.evictions)) == len(plan.evictions)
    assert set(plan.evictions) <= {each.model for each in candidates}
    assert not set(plan.grants) & set(plan.refusals)
    by_name = {wish.holding.model: wish for wish in wishes}
    # What is granted has room beside all that is there now, who leaves included, as long as there was any before.
    for device in DEVICES:
        after = Budget(limits, DEVICES, holdings)
        for name, chosen in plan.grants.items():
            wish = by_name[name]
            assert not wish.blocked
            if not wish.held and chosen == device:
                assert after.fits_now(wish.holding, device), "it was granted though there was no room"
                after.add(Holding(name, device, wish.holding.bytes, wish.holding.counted))
    # Nobody is refused while something leaves, and nobody who takes no room.
    if any(each.leaving for each in holdings) or plan.evictions:
        assert not plan.refusals
    assert not any(by_name[name].held for name in plan.refusals)


@given(st.lists(HOLDINGS, max_size=12).map(unique), st.integers(2, 6), st.integers(0, 4))
def test_leaving_early_frees_so_many_places_where_enough_may_leave(
    holdings: list[Holding], max_models: int, places: int
) -> None:
    limits = settings(max_models)
    candidates = [each for each in holdings if not each.leaving and each.counted]
    budget = Budget(limits, DEVICES, holdings)
    before = {device: budget.soon[device].models for device in DEVICES}
    leaving = leave_early(min(places, max_models - 1), budget, candidates)
    assert len(set(leaving)) == len(leaving)
    for device in DEVICES:
        mine = [each for each in candidates if each.device in (device, None)]
        left = budget.soon[device].models
        assert before[device] - len(mine) <= left <= before[device]
        if left + min(places, max_models - 1) > max_models:
            # So many cannot leave: it keeps to its budget, if it can.
            assert left <= max_models or all(each.model in leaving for each in mine)
    if all(before[device] + places <= max_models for device in DEVICES):
        assert not leaving


@given(
    st.lists(HOLDINGS, max_size=12).map(unique),
    st.lists(WISHES, max_size=6, unique_by=lambda wish: wish.holding.model),
    st.integers(2, 6),
    st.integers(0, 3),
)
def test_headroom_changes_nothing_for_those_who_wait_now(
    holdings: list[Holding], wishes: list[Wish], max_models: int, headroom: int
) -> None:
    candidates = [each for each in holdings if not each.leaving and each.counted]

    def planned(headroom: int) -> tuple[Plan, Budget]:
        budget = Budget(settings(max_models), DEVICES, holdings)
        return make_plan(wishes, budget, candidates, DeviceOrder("least_loaded", DEVICES), 9, headroom), budget

    (without, _), (plan, budget) = planned(0), planned(headroom)
    assert plan.grants == without.grants
    assert set(plan.refusals) <= set(without.refusals)
    assert (plan.evictions, plan.waits) == (without.evictions, without.waits)
    assert not set(plan.evictions) & set(plan.ahead)
    for device in DEVICES:
        free = max_models - budget.soon[device].models
        mine = {each.model for each in candidates if each.device in (device, None)} - {*plan.evictions, *plan.ahead}
        assert free >= headroom or free + len(mine) < headroom, "it is kept where it can be"


def plan_of(wishes: list[Wish], holdings: list[Holding], limits: ResidencySettings, loads: int = 9) -> Plan:
    candidates = [each for each in holdings if each.counted and not each.leaving]
    return make_plan(wishes, Budget(limits, ["cpu"], holdings), candidates, DeviceOrder("least_loaded", ["cpu"]), loads)


def wish(name: str, size: int = 0, *, counted: bool = True, held: bool = False, blocked: bool = False) -> Wish:
    return Wish(Holding(name, None, size, counted), held, blocked)


def held(*names: str, size: int = 0, leaving: bool = False) -> list[Holding]:
    return [Holding(name, "cpu", size, counted=True, leaving=leaving) for name in names]


def test_who_came_first_gets_the_place() -> None:
    plan = plan_of([wish("first"), wish("second")], held("a"), settings(2))
    assert plan == Plan({"first": "cpu"}, ["a"], waits=["second"])


def test_who_takes_the_free_place_has_another_one_freed() -> None:
    budget = Budget(settings(3), ["cpu"], held("a", "b"))
    plan = make_plan([wish("first")], budget, held("a", "b"), DeviceOrder("least_loaded", ["cpu"]), 9, headroom=1)
    assert plan == Plan({"first": "cpu"}, ahead=["a"])


def test_nobody_leaves_for_places_that_cannot_be_free() -> None:
    """Of a budget in bytes, say."""
    budget = Budget(settings(40, 1000), ["cpu"], held("a", "b", "c", size=300 * MB))
    assert leave_early(4, budget, held("a", "b", "c", size=300 * MB)) == []
    assert leave_early(2, budget, held("a", "b", "c", size=300 * MB)) == ["a", "b"]
    over = Budget(settings(2), ["cpu"], held("a", "b", "c", "d"))
    assert leave_early(1, over, held("a")) == ["a"], "of those that are too many all leave that may"


def test_a_place_that_is_leaving_is_promised_once() -> None:
    holdings = [*held("a"), *held("b", leaving=True)]
    plan = plan_of([wish("first"), wish("second")], holdings, settings(2))
    assert plan == Plan({}, ["a"], waits=["first", "second"])


def test_who_waits_for_room_keeps_it_from_those_who_came_later() -> None:
    holdings = [*held("a", size=40 * MB), *held("b", size=40 * MB, leaving=True)]
    plan = plan_of([wish("large", 55 * MB), wish("small", 4 * MB)], holdings, settings(9, 100))
    assert plan == Plan(waits=["large", "small"])


def test_nobody_leaves_in_vain() -> None:
    plan = plan_of([wish("larger than all", 200 * MB)], held("a", "b", size=30 * MB), settings(9, 100))
    assert plan == Plan({}, [], ["larger than all"])


def test_as_many_leave_as_it_takes() -> None:
    plan = plan_of([wish("large", 80 * MB)], held("a", "b", "c", size=30 * MB), settings(9, 100))
    assert plan == Plan({}, ["a", "b", "c"], waits=["large"])


def test_what_is_there_already_needs_no_room() -> None:
    plan = plan_of([wish("a", held=True)], held("a", "b"), settings(2))
    assert plan == Plan({"a": "cpu"}, [], [])


def test_an_encoder_needs_no_place() -> None:
    plan = plan_of([wish("encoder", counted=False)], held("a", "b"), settings(2))
    assert plan == Plan({"encoder": "cpu"}, [], [])


def test_who_is_blocked_waits_and_keeps_the_place() -> None:
    plan = plan_of([wish("again", blocked=True), wish("later")], held("a"), settings(2))
    assert plan == Plan({}, ["a"], waits=["later"])


def test_a_model_on_every_device_counts_on_each() -> None:
    budget = Budget(settings(2), DEVICES, [Holding("everywhere", None, 5, counted=True)])
    assert totals(budget) == [(1, 5), (1, 5)]


def test_unknown_bytes_are_the_mean_of_the_known_ones() -> None:
    budget = Budget(settings(9), ["cpu"], [*held("a", size=10), *held("b", size=30), *held("c")])
    assert totals(budget) == [(3, 60)]
