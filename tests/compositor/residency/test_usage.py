from __future__ import annotations

from random import Random
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compositor.residency.models import Use
from compositor.residency.usage import Usage, common_now_s

NAMES = st.sampled_from([f"m{number}" for number in range(6)])
COUNTS = st.dictionaries(NAMES, st.integers(0, 10**9), max_size=6)
STEPS = st.lists(st.tuples(COUNTS, st.floats(0, 10_000)), max_size=12)


def uses(counts: dict[str, int], last_s: float = 0.0) -> dict[str, Use]:
    return {name: Use(count, last_s) for name, count in counts.items()}


@given(st.lists(st.integers(0, 1000), max_size=30))
def test_without_time_passing_frames_are_counted(steps: list[int]) -> None:
    usage, count = Usage(600), 0
    for step in steps:
        count += step
        usage.observe(uses({"m": count}), 1000.0)
    assert usage.frames("m", 1000.0) == count


@given(st.integers(0, 10**6), st.floats(0, 1e6), st.floats(1, 1e5))
def test_a_frame_counts_half_after_each_half_life(count: int, age_s: float, half_life_s: float) -> None:
    usage = Usage(half_life_s)
    usage.observe(uses({"m": count}), 50.0)
    assert usage.frames("m", 50.0 + age_s) == pytest.approx(count * 0.5 ** (age_s / half_life_s), abs=1e-9)


@given(STEPS, st.floats(1, 1e5))
def test_how_often_one_looks_changes_nothing_but_the_time_of_each_frame(
    steps: list[tuple[dict[str, int], float]], half_life_s: float
) -> None:
    """Looks between which nothing was inferred may be left out."""
    seldom, often, now_s = Usage(half_life_s), Usage(half_life_s), 0.0
    for counts, pause_s in steps:
        often.observe({}, now_s + pause_s / 2)
        now_s += pause_s
        for usage in (seldom, often):
            usage.observe(uses(counts), now_s)
        often.observe(uses(counts), now_s)
    for name in {name for counts, _ in steps for name in counts}:
        assert often.frames(name, now_s) == pytest.approx(seldom.frames(name, now_s))


@given(STEPS)
def test_frames_are_never_negative_and_never_more_than_were_counted(steps: list[tuple[dict[str, int], float]]) -> None:
    usage, now_s, most = Usage(600), 0.0, dict.fromkeys([f"m{number}" for number in range(6)], 0)
    for counts, pause_s in steps:
        now_s += pause_s
        usage.observe(uses(counts), now_s)
        for name, count in counts.items():
            most[name] += count
    for name, total in most.items():
        assert 0 <= usage.frames(name, now_s) <= total * (1 + 1e-9)


def test_a_model_that_comes_back_is_known_and_counts_from_zero() -> None:
    usage = Usage(600)
    usage.observe(uses({"m": 100}), 0)
    usage.observe({}, 0)
    usage.observe(uses({"m": 3}), 0)
    assert usage.frames("m", 0) == 103
    usage.observe(uses({"m": 5}), 0)
    assert usage.frames("m", 0) == 105


def test_a_clock_that_is_set_back_makes_nothing_more() -> None:
    usage = Usage(600)
    usage.observe(uses({"m": 100}), 5000)
    usage.observe(uses({"m": 100}), 1000)
    assert usage.frames("m", 1000) == 100
    assert usage.frames("m", 5600) == pytest.approx(50)


@given(st.sampled_from(["lfu", "lru"]), COUNTS, st.dictionaries(NAMES, st.floats(0, 1e9), max_size=6))
def test_the_order_holds_everybody_once_and_follows_the_policy(
    policy: str, counts: dict[str, int], last_s: dict[str, float]
) -> None:
    usage = Usage(600)
    usage.observe(uses(counts), 100.0)
    order = usage.first_to_leave("lru" if policy == "lru" else "lfu", last_s, 200.0)
    assert sorted(order) == sorted(last_s)
    worth = [last_s[name] if policy == "lru" else usage.frames(name, 200.0) for name in order]
    assert worth == sorted(worth)
    if policy == "lfu":
        idle = [last_s[name] for name in order if not counts.get(name)]
        assert idle == sorted(idle), "of those that are worth the same, the longest unused leaves first"


def test_an_old_favourite_leaves_before_a_new_one() -> None:
    usage = Usage(600)
    usage.observe(uses({"old": 10_000}), 0)
    usage.observe(uses({"old": 10_000, "new": 10}), 60)
    last_s = {"old": 0.0, "new": 60.0}
    assert usage.first_to_leave("lfu", last_s, 60) == ["new", "old"]
    usage.observe(uses({"old": 10_000, "new": 20}), 7200)
    assert usage.first_to_leave("lfu", last_s, 7200) == ["old", "new"]


def hit_rate(policy: Literal["lfu", "lru"], tenants: int = 3000, places: int = 36, calls: int = 8000) -> float:
    """Of the second half of calls for tenants by Zipf, three a second, where a model stays for ten seconds."""
    random, usage = Random(1), Usage(600)
    weights = [1 / (rank + 1) for rank in range(tenants)]
    frames, last_s, now_s, hits = dict[str, int](), dict[str, float](), 0.0, 0
    for call, rank in enumerate(random.choices(range(tenants), weights, k=calls)):
        now_s, name = now_s + random.expovariate(3), str(rank)
        if name not in frames:
            usage.observe({each: Use(count, last_s[each]) for each, count in frames.items()}, now_s)
            free = {each: last_s[each] for each in frames if now_s - last_s[each] >= 10}
            if len(frames) >= places and free:
                del frames[usage.first_to_leave(policy, free, now_s)[0]]
        elif call >= calls // 2:
            hits += 1
        frames[name], last_s[name] = frames.get(name, 0) + 4, now_s
    return hits / (calls - calls // 2)


def test_lfu_comes_near_to_keeping_the_most_wanted() -> None:
    best = sum(1 / rank for rank in range(1, 37)) / sum(1 / rank for rank in range(1, 3001))
    assert hit_rate("lru") < 0.8 * best
    assert 0.87 * best < hit_rate("lfu") < best


def test_what_is_remembered_is_bounded_and_the_least_is_forgotten() -> None:
    usage = Usage(600, most=10)
    for number in range(50):
        usage.observe(uses({f"m{number}": number + 1}), float(number))
    assert len(usage) == 10
    assert usage.frames("m49", 49) == 50
    assert usage.frames("m0", 49) == 0
    loaded = {f"m{number}": 1 for number in range(20)}
    usage.observe(uses(loaded), 50)
    assert len(usage) == 20, "what is loaded is never forgotten"


@given(st.floats(0, 1e10), COUNTS, st.floats(0, 1e10))
def test_the_present_is_not_before_any_use(clock_s: float, counts: dict[str, int], last_s: float) -> None:
    now_s = common_now_s(clock_s, uses(counts, last_s))
    assert now_s == (max(clock_s, last_s) if counts else clock_s)
