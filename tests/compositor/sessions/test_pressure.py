"""Whether sessions are late: what is an overload and what a mere stall, who is let in all the same, and until when."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compositor.sessions.pressure import CAREFUL_S, LONGEST_RETRY_S, SETTLED_S, SLOT_S, SLOTS, Pressure, Window

MOST_LATE = 0.05
SPOKEN = 25
TENANT, OTHER, THIRD = "anna", "berta", "clara"


class Machine:
    """Sessions whose ticks and pictures are late or not, second by second."""

    def __init__(self, most_late: float = MOST_LATE, burst: int = 4) -> None:
        self.now_s = 1000.1
        self.pressure = Pressure(most_late, burst)

    def run(
        self,
        seconds: float,
        *,
        late_ticks: float = 0,
        late_pictures: float = 0,
        pictures: bool = True,
        others: dict[str, float] | None = None,
    ) -> None:
        """Shares of late ones, spread evenly; of others, by tenant."""
        shares = {TENANT: late_pictures} if pictures else {}
        for number in range(round(seconds * SPOKEN)):
            self.now_s += 1 / SPOKEN
            self.pressure.tick(self.now_s, late=is_late(number, late_ticks))
            for tenant, share in {**shares, **(others or {})}.items():
                self.pressure.picture(self.now_s, tenant, late=is_late(number, share))

    def refused(self, sessions: int = 10, *, speaking: bool = True, tenant: str = TENANT) -> str:
        """The reason why another session is; nothing where it is not."""
        refusal = self.pressure.refusal(self.now_s, tenant, sessions, speaking=speaking)
        return refusal.reason if refusal else ""

    def begin(self, sessions: int = 10, count: int = 1) -> None:
        for _ in range(count):
            self.pressure.begun(self.now_s, sessions)


def is_late(number: int, share: float) -> bool:
    return int((number + 1) * share) > int(number * share)


@pytest.mark.parametrize(("late_ticks", "late_pictures"), [(0.3, 0), (0, 0.3), (0.3, 0.3)])
def test_an_overload_ends_the_admission_within_two_seconds(late_ticks: float, late_pictures: float) -> None:
    machine = Machine()
    machine.run(10)
    assert machine.refused() == ""
    machine.run(2, late_ticks=late_ticks, late_pictures=late_pictures)
    assert machine.refused() == "late"
    assert 0.2 < machine.pressure.share < 0.4


@pytest.mark.parametrize("stall_s", [0.04, 0.2, 0.5])
@pytest.mark.parametrize("begin_s", [0, 0.1, 0.3, 0.45])
def test_one_stall_refuses_nobody(stall_s: float, begin_s: float) -> None:
    machine = Machine()
    machine.run(5 + begin_s)
    machine.run(stall_s, late_ticks=1, late_pictures=1)
    for _ in range(50):
        assert machine.refused() == ""
        machine.run(0.1)


def test_a_longer_stall_refuses_for_moments() -> None:
    machine = Machine()
    machine.run(5)
    machine.run(1.6, late_pictures=1)
    assert machine.refused() == "late"
    machine.run(SLOT_S * (SLOTS + 1))
    assert machine.refused() == ""


def test_the_process_that_got_no_time_at_all_is_a_stall() -> None:
    machine = Machine()
    machine.run(5)
    machine.now_s += 3
    machine.run(0.4, late_ticks=1, late_pictures=1)
    machine.run(1)
    assert machine.refused() == ""


def test_it_opens_at_the_share_that_closed_it() -> None:
    machine = Machine(most_late=0.2)
    machine.run(5, late_pictures=0.3)
    assert machine.refused() == "late"
    machine.run(5, late_pictures=0.16)
    assert machine.refused() == ""


def test_stalls_do_not_keep_it_closed() -> None:
    machine, refused = Machine(), 0
    machine.run(3, late_ticks=1)
    assert machine.refused() == "late"
    machine.run(2)
    for _ in range(20):
        machine.run(2 - 2 / SPOKEN)
        machine.run(2 / SPOKEN, late_ticks=1)
        refused += machine.refused() == "late"
    assert refused == 0


def test_a_tenant_whose_model_is_slow_keeps_out_its_own() -> None:
    machine = Machine()
    machine.run(5, late_pictures=0.5, others={OTHER: 0, THIRD: 0})
    assert machine.refused() == "late"
    assert machine.refused(tenant=OTHER) == machine.refused(tenant="new") == ""
    assert not machine.pressure.closed
    assert machine.pressure.share > 0.4


@pytest.mark.parametrize(("others", "reason"), [({OTHER: 0.5}, "late"), ({OTHER: 0.5, THIRD: 0}, "late"), ({}, "")])
def test_where_most_tenants_are_late_none_begins(others: dict[str, float], reason: str) -> None:
    machine = Machine()
    machine.run(5, late_pictures=0.5, others=others)
    assert machine.refused(tenant="new") == reason
    assert machine.pressure.closed == bool(reason)
    machine.run(5, others=dict.fromkeys(others, 0))
    assert machine.refused(tenant="new") == ""


def test_a_tenant_that_has_gone_is_forgotten() -> None:
    machine = Machine()
    machine.run(5, late_pictures=0.5, others={OTHER: 0})
    machine.pressure.forget_tenant(TENANT)
    assert machine.refused() == ""


def test_silence_opens_it() -> None:
    machine = Machine()
    machine.run(5, late_pictures=1)
    machine.run(3, pictures=False)
    assert machine.refused() == ""


def test_nothing_shown_at_all_opens_it() -> None:
    machine = Machine()
    machine.run(5, late_pictures=1)
    machine.now_s += 60
    assert machine.refused() == ""
    assert machine.pressure.share == 0


def test_many_idle_ticks_hide_no_late_pictures() -> None:
    machine = Machine()
    for _ in range(100):
        machine.run(0.04, late_pictures=1)
        for _ in range(500):
            machine.pressure.tick(machine.now_s, late=False)
    assert machine.refused() == "late"


@pytest.mark.parametrize(("sessions", "speaking", "reason"), [(0, False, ""), (1, False, ""), (1, True, "late")])
def test_the_first_that_speaks_is_always_let_in(sessions: int, speaking: bool, reason: str) -> None:
    machine = Machine(burst=1)
    machine.run(60, late_ticks=1, late_pictures=1)
    assert machine.refused(sessions, speaking=speaking) == reason


def test_the_hint_grows_with_the_overload() -> None:
    machine, hints = Machine(), []
    machine.run(2, late_pictures=1)
    for _ in range(8):
        refusal = machine.pressure.refusal(machine.now_s, TENANT, 10, speaking=True)
        assert refusal is not None
        hints.append(refusal.retry_after_s)
        machine.run(6, late_pictures=1)
    assert hints == sorted(hints)
    assert (hints[0], hints[-1]) == (3, LONGEST_RETRY_S)


@pytest.mark.parametrize(("sessions", "a_second"), [(4, 1), (16, 1), (32, 2), (320, 20)])
def test_beyond_a_burst_they_come_at_a_steady_pace(sessions: int, a_second: int) -> None:
    machine = Machine()
    for _ in range(4):
        assert machine.refused(sessions) == ""
        machine.begin(sessions)
    assert machine.refused(sessions) == "burst"
    begun = 0
    for _ in range(100):
        machine.now_s += 0.1
        while not machine.refused(sessions):
            machine.begin(sessions)
            begun += 1
    assert begun == pytest.approx(10 * a_second, abs=1)


def test_those_who_come_now_and_then_are_never_refused() -> None:
    machine = Machine()
    for _ in range(100):
        machine.now_s += 1.01
        assert machine.refused() == ""
        machine.begin()


def test_a_crowd_is_told_to_come_back_one_after_another() -> None:
    machine = Machine()
    machine.begin(count=4)
    hints = []
    for _ in range(100):
        refusal = machine.pressure.refusal(machine.now_s, TENANT, 10, speaking=True)
        assert refusal is not None
        hints.append(refusal.retry_after_s)
    assert hints[:3] == [SETTLED_S + 1, SETTLED_S + 2, SETTLED_S + 3]
    assert hints[-1] == LONGEST_RETRY_S
    machine.now_s += 1
    assert machine.refused() == ""
    machine.begin()
    again = machine.pressure.refusal(machine.now_s, TENANT, 10, speaking=True)
    assert again is not None
    assert again.retry_after_s == hints[0]


def test_while_one_is_new_a_late_slot_is_enough_to_wait() -> None:
    machine = Machine()
    machine.run(5)
    machine.begin()
    machine.run(SLOT_S + 0.1, late_pictures=0.5)
    assert machine.refused() == "late"
    assert machine.refused(tenant=OTHER) == "", "it is not that tenant's"
    machine.run(2 * SLOT_S)
    assert machine.refused() == ""
    machine.run(SETTLED_S)
    machine.run(SLOT_S + 0.1, late_pictures=0.5)
    assert machine.refused() == "", "then it is not that one"


def test_after_an_overload_they_come_one_by_one() -> None:
    machine = Machine()
    machine.run(5, late_pictures=1)
    machine.run(3)
    assert machine.refused() == ""
    machine.begin()
    machine.run(SETTLED_S - 0.1)
    assert machine.refused() == "burst"
    machine.run(0.2)
    assert machine.refused() == ""
    machine.run(CAREFUL_S)
    machine.begin()
    assert machine.refused() == ""


def test_what_is_forgotten_refuses_nobody() -> None:
    machine = Machine()
    machine.run(5, late_ticks=1, late_pictures=1)
    machine.begin(count=4)
    machine.pressure.forget()
    assert machine.pressure.share == 0
    assert machine.refused(sessions=3) == ""
    machine.run(2, late_pictures=1)
    assert machine.refused() == "late", "what comes then counts"


def test_at_one_nobody_is_refused() -> None:
    machine = Machine(most_late=1, burst=1)
    machine.run(60, late_ticks=1, late_pictures=1)
    machine.begin(count=2)
    assert machine.pressure.share == 1
    assert machine.refused() == ""


@pytest.mark.parametrize(("late", "count", "share"), [(4, 4, 0), (5, 5, 1), (1, 12, 0), (2, 10, 0.2)])
def test_a_slot_with_next_to_nothing_in_it_says_nothing(late: int, count: int, share: float) -> None:
    window = Window(MOST_LATE)
    for _ in range(SLOTS):
        for number in range(count):
            window.add(number < late)
        window.close(1, 0)
    assert window.share == share


SLOT = st.tuples(st.integers(5, 60), st.floats(0, 1))


@given(st.lists(SLOT, max_size=20), st.lists(st.integers(1, 8), min_size=20, max_size=20))
def test_the_share_is_the_median_of_the_last_slots(slots: list[tuple[int, float]], gaps: list[int]) -> None:
    window, told = Window(MOST_LATE), [0.0] * SLOTS
    for (count, share), gap in zip(slots, gaps, strict=False):
        late = round(count * share)
        if late == 1:
            late = 0  # which says nothing
        for number in range(count):
            window.add(number < late)
        window.close(gap, 0)
        told += [late / count, *[0.0] * (gap - 1)]
    assert window.share == sorted(told[-SLOTS:])[SLOTS // 2]


@given(st.lists(st.tuples(st.floats(0, 3), st.booleans(), st.booleans()), max_size=300), st.floats(0.01, 0.99))
def test_whatever_happens_three_calm_seconds_open_it(events: list[tuple[float, bool, bool]], most_late: float) -> None:
    machine = Machine(most_late)
    for passed_s, late_tick, late_picture in events:
        machine.now_s += passed_s
        machine.pressure.tick(machine.now_s, late=late_tick)
        machine.pressure.picture(machine.now_s, TENANT, late=late_picture)
        assert 0 <= machine.pressure.share <= 1
    machine.run(SLOT_S * (SLOTS + 1))
    assert machine.refused() == ""
