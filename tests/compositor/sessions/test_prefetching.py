"""Items fetched ahead: all of them, in order, errors in their turn, and nothing left running."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

import pytest

from compositor.errors import InferenceFailed
from compositor.sessions.prefetching import prefetched


class Source:
    """Counts, and says how far it got and whether it was closed."""

    def __init__(self, count: int, error: Exception | None = None) -> None:
        self.given = 0
        self.closed = False
        self._count, self._error = count, error

    async def items(self) -> AsyncGenerator[int, None]:
        try:
            for item in range(self._count):
                await asyncio.sleep(0)
                self.given += 1
                yield item
            if self._error:
                raise self._error
        finally:
            self.closed = True


async def settled(source: Source) -> None:
    before = -1
    while before != source.given:
        before = source.given
        for _ in range(20):
            await asyncio.sleep(0)


@pytest.mark.parametrize("count", [0, 1, 7, 100])
async def test_all_items_come_in_order(count: int) -> None:
    source = Source(count)
    assert [item async for item in prefetched(source.items(), 3)] == list(range(count))
    assert source.closed


async def test_so_many_are_fetched_ahead_and_no_more() -> None:
    source = Source(100)
    async with contextlib.aclosing(prefetched(source.items(), 3)) as items:
        assert await anext(items) == 0
        await settled(source)
        assert source.given == 1 + 3 + 1, "one taken, three waiting, one in hand"


async def test_an_error_comes_after_what_came_before_it() -> None:
    items = prefetched(Source(2, InferenceFailed("no")).items(), 5)
    assert [await anext(items), await anext(items)] == [0, 1]
    with pytest.raises(InferenceFailed):
        await anext(items)


async def test_whoever_leaves_ends_the_fetching() -> None:
    source = Source(100)
    async with contextlib.aclosing(prefetched(source.items(), 3)) as items:
        await anext(items)
    await settled(source)
    assert source.closed
    assert asyncio.all_tasks() == {asyncio.current_task()}
