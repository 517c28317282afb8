"""Requests that are joined: each caller gets its own answers, or its own batch's error."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compositor.batching import Batcher, departure
from compositor.errors import TritonUnavailable
from compositor.logs import identify, identity

from .sessions.stage import settle

LONG_S = 100.0


class Work:
    """Doubles what it gets, when it may; remembers the batches."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = asyncio.Event()
        self.failure: Exception | None = None

    async def __call__(self, items: list[int]) -> Sequence[int]:
        self.batches.append(items)
        await self.go.wait()
        if self.failure:
            raise self.failure
        return [2 * item for item in items]


async def test_what_comes_together_goes_together() -> None:
    work = Work()
    batcher = Batcher(work, 8, 0.0)
    work.go.set()
    answers = await asyncio.gather(*(batcher.ask(items) for items in ([1, 2], [3], [4, 5, 6])))
    assert answers == [[2, 4], [6], [8, 10, 12]]
    assert work.batches == [[1, 2, 3, 4, 5, 6]]


@given(st.floats(0, 1e6), st.floats(0.001, 0.04))
def test_departures_are_a_quarter_of_a_period_before_its_multiples(now_s: float, period_s: float) -> None:
    leaves_s = departure(now_s, period_s)
    assert now_s - 1e-9 < leaves_s < now_s + period_s + 1e-9
    periods = leaves_s / period_s + 0.25
    assert periods == pytest.approx(round(periods), abs=1e-3)


async def test_what_comes_within_a_period_leaves_together() -> None:
    work = Work()
    batcher = Batcher(work, 8, LONG_S, period_s=0.02)
    work.go.set()
    assert list(await asyncio.gather(batcher.ask([1]), batcher.ask([2]))) == [[2], [4]]
    assert work.batches == [[1, 2]]


async def test_a_full_batch_does_not_wait() -> None:
    work = Work()
    batcher = Batcher(work, 4, LONG_S)
    work.go.set()
    assert await asyncio.gather(*(batcher.ask(items) for items in ([1, 2], [3, 4]))) == [[2, 4], [6, 8]]
    assert work.batches == [[1, 2, 3, 4]]


async def test_what_does_not_fit_sends_the_others() -> None:
    work = Work()
    batcher = Batcher(work, 4, LONG_S)
    work.go.set()
    answers = await asyncio.gather(*(batcher.ask(items) for items in ([1, 2, 3], [4, 5, 6, 7])))
    assert answers == [[2, 4, 6], [8, 10, 12, 14]]
    assert work.batches == [[1, 2, 3], [4, 5, 6, 7]]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(), min_size=1, max_size=5), max_size=20))
def test_everybody_gets_the_own_answers(wishes: list[list[int]]) -> None:
    async def all_of_them() -> tuple[list[list[int]], list[list[int]]]:
        work = Work()
        work.go.set()
        batcher = Batcher(work, 5, 0.0)
        return await asyncio.gather(*(batcher.ask(wish) for wish in wishes)), work.batches

    answers, batches = asyncio.run(all_of_them())
    assert answers == [[2 * item for item in wish] for wish in wishes]
    assert all(len(batch) <= 5 for batch in batches)


@pytest.mark.parametrize("items", [[], [1, 2, 3]])
async def test_what_fits_no_batch_is_refused(items: list[int]) -> None:
    with pytest.raises(ValueError, match="where 1 to 2 fit"):
        await Batcher(Work(), 2, 0.0).ask(items)


async def test_a_caller_that_leaves_takes_its_items_along() -> None:
    work = Work()
    batcher = Batcher(work, 3, LONG_S)
    work.go.set()
    gone = asyncio.create_task(batcher.ask([1]))
    await settle()
    gone.cancel()
    await settle()
    assert gone.cancelled()
    stays = asyncio.create_task(batcher.ask([2, 3]))
    assert await stays == [4, 6]
    assert work.batches == [[2, 3]]


async def test_a_caller_that_leaves_later_does_not_harm_the_others() -> None:
    work = Work()
    batcher = Batcher(work, 2, LONG_S)
    gone, stays = (asyncio.create_task(batcher.ask([item])) for item in (1, 2))
    await settle()
    gone.cancel()
    work.go.set()
    assert await stays == [4]
    assert gone.cancelled()


async def test_an_error_reaches_its_batch_and_no_other() -> None:
    work = Work()
    batcher = Batcher(work, 2, LONG_S)
    work.failure = TritonUnavailable("gone")
    work.go.set()
    failed = await asyncio.gather(*(batcher.ask([item]) for item in (1, 2)), return_exceptions=True)
    assert failed == [work.failure] * 2
    work.failure = None
    assert await batcher.ask([3, 4]) == [6, 8]


async def test_stopping_ends_requests_under_way_and_those_that_wait() -> None:
    work = Work()
    batcher = Batcher(work, 2, LONG_S)
    before = asyncio.all_tasks()
    running = asyncio.create_task(batcher.ask([1, 2]))
    await settle()
    just_sent = asyncio.create_task(batcher.ask([3, 4]))
    waiting = asyncio.create_task(batcher.ask([5]))
    asyncio.get_running_loop().call_soon(lambda: None)
    await asyncio.sleep(0)  # the second request was sent, and has not begun
    await asyncio.gather(*batcher.stop(), return_exceptions=True)
    await settle()
    assert [task.cancelled() for task in (running, just_sent, waiting)] == [True] * 3
    assert asyncio.all_tasks() == before


async def test_each_caller_is_told_how_long_it_waited() -> None:
    work, waited = Work(), list[float]()
    batcher = Batcher(work, 3, LONG_S, waited=waited.append)
    work.go.set()
    first = asyncio.create_task(batcher.ask([1]))
    await settle()
    assert not waited
    begin_s = asyncio.get_running_loop().time()
    await asyncio.gather(first, batcher.ask([2, 3]))
    end_s = asyncio.get_running_loop().time()
    before, after = waited
    assert before > after >= 0
    assert after <= end_s - begin_s


async def test_a_request_for_many_carries_nobodys_ids() -> None:
    seen: list[dict[str, str]] = []

    async def work(items: list[int]) -> list[int]:
        seen.append(dict(identity()))
        return items

    batcher = Batcher(work, 8, 0.0)

    async def call(name: str) -> None:
        identify(request=name)
        await batcher.ask([1])

    await asyncio.gather(asyncio.create_task(call("a")), asyncio.create_task(call("b")))
    assert seen == [{}]
