"""Requests that come too late anyway are not made, and all others are."""

from __future__ import annotations

import itertools
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


@pytest.mark.parametrize("takes_s", [0.01, 0.05, 0.1])
def test_after_a_stall_nothing_is_lost(takes_s: float) -> None:
    shedding = Shedding()
    for number in range(8):
        shedding.end(shedding.begin(number * PERIOD_S), 1.0, late=True)
    for number in range(100):
        now_s = 1.0 + number * PERIOD_S
        request = shedding.begin(now_s - 0.01)
        assert not shedding.worthless(now_s, now_s + LEFT_S)
        shedding.end(request, now_s - 0.01 + takes_s, late=False)


def behind() -> Shedding:
    """One whose answers were late."""
    shedding = Shedding()
    for _ in range(20):
        shedding.end(shedding.begin(-LEFT_S), 0, late=True)
    return shedding


def test_after_late_answers_the_oldest_under_way_tells() -> None:
    shedding = behind()
    late, oldest = shedding.begin(0), shedding.begin(0.1)
    shedding.end(late, 0.11, late=True)
    assert not shedding.worthless(0.12, 0.12 + LEFT_S)
    assert shedding.worthless(0.23, 0.23 + LEFT_S), "it has waited longer than there is time"
    assert not shedding.worthless(0.23, 0.23 + 10 * LEFT_S), "there is time enough"
    shedding.end(oldest, 0.23, late=False)
    assert not shedding.worthless(0.23, 0.23 + LEFT_S), "nothing is under way"
    shedding.begin(0.3)
    assert not shedding.worthless(0.11 + BEHIND_S, 0.11 + BEHIND_S + LEFT_S), "that is long ago"


def test_requests_of_one_moment_count_though_none_of_them_has_waited() -> None:
    shedding = Shedding()
    for number in range(100):
        shedding.end(shedding.begin(number * PERIOD_S), (number + 1) * PERIOD_S, late=True)
    now_s = 100 * PERIOD_S
    assert not shedding.worthless(now_s, now_s + LEFT_S), "nothing is under way"
    for _ in range(3):
        shedding.begin(now_s)
    assert shedding.worthless(now_s, now_s + LEFT_S), "three that take 40 ms each come before it"
    assert not shedding.worthless(now_s, now_s + 10 * 4 * PERIOD_S)


def served(shed: bool, load: float, takes_s: float, batches: int = 0, gap_s: float = 0.0) -> list[float]:
    """The shares of pictures in time where each is made in `takes_s`, one after another.

    `load` times as many are asked for as can be made: evenly, or in each tick so many batches, always in the same
    order, `gap_s` apart. A share for each place in that order.
    """
    places = max(1, batches)
    ticks = 5000 // places
    asked_s = takes_s / load
    shedding, under_way, in_time = Shedding(), deque[tuple[float, int, float, int]](), [0] * places
    free_s = 0.0
    for tick, place in itertools.product(range(ticks), range(places)):
        now_s = tick * places * asked_s + place * gap_s
        while under_way and under_way[0][0] <= now_s:
            end_s, request, due_s, its_place = under_way.popleft()
            shedding.end(request, end_s, late=end_s > due_s)
            in_time[its_place] += end_s <= due_s
        if not (shed and shedding.worthless(now_s, now_s + LEFT_S)):
            free_s = max(free_s, now_s) + takes_s
            under_way.append((free_s, shedding.begin(now_s), now_s + LEFT_S, place))
    return [count / ticks for count in in_time]


@pytest.mark.parametrize("load", [1.05, 1.5, 3, 5])
def test_an_overload_loses_what_is_too_much_and_not_everything(load: float) -> None:
    takes_s = 0.01
    assert served(False, load, takes_s)[0] < 0.1
    assert served(True, load, takes_s)[0] > 0.7 / load


@pytest.mark.parametrize("gap_s", [0.0, 0.0001, 0.001])
@pytest.mark.parametrize("batches", [2, 3, 4, 6, 8, 12, 16, 24])
@pytest.mark.parametrize("load", [1.5, 3])
def test_whoever_comes_last_in_every_tick_is_served_too(load: float, batches: int, gap_s: float) -> None:
    shares = served(True, load, PERIOD_S * load / batches, batches, gap_s)
    mean = sum(shares) / batches
    assert mean > 0.65 / load
    assert min(shares) > 0.35 * mean


def test_where_all_can_be_made_all_are() -> None:
    assert served(True, 0.99, 0.01)[0] > 0.99
