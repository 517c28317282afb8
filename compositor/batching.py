"""Joins what many callers want at about the same time into one request: the work's items go in, their answers come out.

Frames of one tenant's sessions are due together; one request for all of them costs little more than one for each.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from .logs import of_nobody

Item = TypeVar("Item")
Answer = TypeVar("Answer")


def departure(now_s: float, period_s: float) -> float:
    """The first moment after `now_s` that is a quarter of a period before a multiple of the period.

    Frames are shown on multiples of theirs: what leaves then has time to come back before the next is placed.
    """
    return ((now_s + period_s / 4) // period_s + 1) * period_s - period_s / 4


@dataclass
class _Wish(Generic[Item, Answer]):
    """One caller's items, and where their answers go."""

    items: Sequence[Item]
    done: asyncio.Future[list[Answer]]
    since_s: float


class Batcher(Generic[Item, Answer]):
    """Calls `run` with at most `most` items, gathered for at most `wait_s` after the first or, where there is a
    `period_s`, until the next `departure`."""

    def __init__(
        self,
        run: Callable[[list[Item]], Awaitable[Sequence[Answer]]],
        most: int,
        wait_s: float,
        period_s: float = 0,
        waited: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        """waited: is told how long each caller's items waited for their batch to leave."""
        self._run = run
        self._most = most
        self._wait_s = wait_s
        self._period_s = period_s
        self._waited = waited
        self._wishes: list[_Wish[Item, Answer]] = []
        self._count = 0
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def ask(self, items: Sequence[Item]) -> list[Answer]:
        """The answers to at most `most` items, in their order. Raises what `run` raises for the batch they were in.

        A caller that goes away before its batch left takes its items along.
        """
        if not 1 <= len(items) <= self._most:
            raise ValueError(f"{len(items)} items where 1 to {self._most} fit a batch")
        if self._count + len(items) > self._most:
            self._send()
        loop = asyncio.get_running_loop()
        wish = _Wish[Item, Answer](items, loop.create_future(), loop.time())
        self._wishes.append(wish)
        self._count += len(items)
        if self._count == self._most:
            self._send()
        elif self._timer is None:
            leaves_s = departure(wish.since_s, self._period_s) if self._period_s else wish.since_s + self._wait_s
            self._timer = loop.call_at(leaves_s, self._send)
        return await wish.done

    def stop(self) -> list[asyncio.Task[None]]:
        """Cancels all requests, and gives those that are still ending; their callers see the cancellation."""
        self._stop_timer()
        for wish in self._wishes:
            wish.done.cancel()
        for task in self._tasks:
            task.cancel()
        return list(self._tasks)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _send(self) -> None:
        self._stop_timer()
        wishes = [wish for wish in self._wishes if not wish.done.done()]
        self._wishes, self._count = [], 0
        if wishes:
            now_s = asyncio.get_running_loop().time()
            for wish in wishes:
                self._waited(now_s - wish.since_s)
            task = of_nobody(self._serve(wishes))
            self._tasks.add(task)
            task.add_done_callback(partial(self._served, wishes))

    async def _serve(self, wishes: list[_Wish[Item, Answer]]) -> None:
        try:
            answers = list(await self._run([item for wish in wishes for item in wish.items]))
        except Exception as error:
            for wish in wishes:
                if not wish.done.done():
                    wish.done.set_exception(error)
            return
        for wish in wishes:
            own, answers = answers[: len(wish.items)], answers[len(wish.items) :]
            if not wish.done.done():
                wish.done.set_result(own)

    def _served(self, wishes: list[_Wish[Item, Answer]], task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        for wish in wishes:  # those whose request was cancelled, perhaps before it began
            wish.done.cancel()
