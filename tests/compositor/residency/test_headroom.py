from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from compositor.residency.headroom import SOON_S, Headroom

NAMES = st.lists(st.sampled_from("abcdef"), max_size=4, unique=True)
STEPS = st.lists(st.tuples(st.sampled_from(["waits", "left", "loads"]), NAMES, st.floats(0, 60)), max_size=40)


@given(st.integers(0, 5), STEPS)
def test_it_stays_within_its_bounds(most: int, steps: list[tuple[str, list[str], float]]) -> None:
    headroom = Headroom(most)
    now_s = 0.0
    for step, names, passed_s in steps:
        now_s += passed_s
        if step == "waits":
            headroom.waits(names)
        elif step == "left":
            headroom.left(names, now_s)
        else:
            for name in names:
                headroom.loads(name, now_s)
        assert 0 <= headroom.places <= most


def test_each_newcomer_who_waits_makes_it_one_more() -> None:
    headroom = Headroom(4)
    assert headroom.places == 1
    headroom.waits(["a", "b"])
    assert headroom.places == 3
    headroom.waits(["a", "b"])
    assert headroom.places == 3, "they wait still"
    headroom.waits(["b"])
    headroom.waits(["a", "b"])
    assert headroom.places == 4, "again"


def test_who_comes_back_before_the_place_is_taken_makes_it_one_less() -> None:
    headroom = Headroom(2)
    headroom.left(["a"], 0)
    headroom.loads("a", 1000)
    assert headroom.places == 0


def test_who_comes_back_soon_makes_it_one_less() -> None:
    headroom = Headroom(2)
    headroom.left(["a"], 0)
    headroom.loads("b", 1)
    headroom.loads("a", SOON_S - 1)
    assert headroom.places == 0


def test_who_comes_back_later_had_to_leave_anyway() -> None:
    headroom = Headroom(2)
    headroom.left(["a"], 0)
    headroom.loads("b", 1)
    headroom.loads("a", SOON_S + 1)
    assert headroom.places == 1


def test_who_left_for_somebody_else_says_nothing() -> None:
    headroom = Headroom(2)
    headroom.loads("a", 0)
    headroom.loads("a", 1)
    assert headroom.places == 1
