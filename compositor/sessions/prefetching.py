"""An asynchronous stream's items, fetched ahead of whoever takes them."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator
from typing import TypeVar

Item = TypeVar("Item")


async def prefetched(source: AsyncGenerator[Item, None], most: int) -> AsyncGenerator[Item, None]:
    """The items of `source`, at most `most` of which wait. Raises what the source raises, in its turn."""
    waiting: deque[Item] = deque()
    news, room = asyncio.Event(), asyncio.Event()

    async def fetch() -> None:
        async with contextlib.aclosing(source):
            async for item in source:
                while len(waiting) >= most:
                    room.clear()
                    await room.wait()
                waiting.append(item)
                news.set()

    fetching = asyncio.create_task(fetch())
    fetching.add_done_callback(lambda _: news.set())
    try:
        while waiting or not fetching.done():
            if waiting:
                room.set()
                yield waiting.popleft()
            else:
                news.clear()
                await news.wait()
        await fetching
    finally:
        fetching.cancel()
