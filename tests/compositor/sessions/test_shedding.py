"""Requests that come too late anyway are not made, and all others are."""

from __future__ import annotations

from collections import deque

import pytest

from compositor.sessions.shedding import BEHIND_S, Shedding

PERIOD_S, LEFT_S = 0.04, 0.12


def test_what_is_due_already_is_worth_nothing() -> None:
    shedding = Shedding()
    assert shedding.worthless(10, 10)
    assert shedding.worthless(10, 9)
    assert not shedding.worthless(10, 10.001)


@pytest.mark.parametrize("takes_s", [0.01, 0.07, 0.119])
def test_a_model_that_is_slow_but_in_time_loses_nothing(takes_s: float) -> None:
    shedding, under_way = Shedding(), deque[tuple[float, int]]()
    for number in range(200):
        now_s = number * PERIOD_S
        while under_way and under_way[0][0] <= now_s:
            end_s, oldest = under_way.popleft()
            shedding.end(oldest, end_s, late=False)
        assert not shedding.worthless(now_s, now_s + LEFT_S)
        under_way.append((now_s + takes_s, shedding.begin(now_s)))


def test_after_a_late_answer_the_oldest_under_way_tells() -> None:
    shedding = Shedding()
    late, oldest = shedding.begin(0), shedding.begin(0.1)
    shedding.end(late, 0.2, late=True)
    assert not shedding.worthless(0.2 - 0.05, 0.2 - 0.05 + LEFT_S)
    assert shedding.worthless(0.2, 0.2 + LEFT_S)
    assert not shedding.worthless(0.2, 0.2 + 10 * LEFT_S), "there is time enough"
    shedding.end(oldest, 0.2, late=False)
    assert not shedding.worthless(0.2, 0.2 + LEFT_S), "nothing is under way"
    shedding.begin(0.3)
    assert not shedding.worthless(0.2 + BEHIND_S, 0.2 + BEHIND_S + LEFT_S), "that is long ago"


def served(shed: bool, asked_s: float, takes_s: float) -> float:
    """The share of pictures in time where one is asked for each `asked_s`, and made in `takes_s` one after another."""
    shedding, under_way, in_time, total = Shedding(), deque[tuple[float, int, float]](), 0, 5000
    free_s = 0.0
    for number in range(total):
        now_s = number * asked_s
        while under_way and under_way[0][0] <= now_s:
            end_s, request, due_s = under_way.popleft()
            shedding.end(request, end_s, late=end_s > due_s)
            in_time += end_s <= due_s
        if not (shed and shedding.worthless(now_s, now_s + LEFT_S)):
            free_s = max(free_s, now_s) + takes_s
            under_way.append((free_s, shedding.begin(now_s), now_s + LEFT_S))
    return in_time / total


@pytest.mark.parametrize("load", [1.05, 1.5, 3])
def test_an_overload_loses_what_is_too_much_and_not_everything(load: float) -> None:
    takes_s = 0.01
    assert served(False, takes_s / load, takes_s) < 0.1
    assert served(True, takes_s / load, takes_s) > 0.6 / load


def test_where_all_can_be_made_all_are() -> None:
    assert served(True, 0.0101, 0.01) > 0.99
