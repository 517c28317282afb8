"""Keeps the models of silent sessions in use: a model that no request reaches looks unused to every compositor, and is
unloaded for another's sake.

Which models must stay comes in, with a small request of each; a request goes out where no other did for a while.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeAlias

from ..clock import Clock
from ..errors import LipsyncError
from ..logs import of_nobody
from ..settings import ResidencySettings

log = logging.getLogger(__name__)

Request: TypeAlias = Callable[[], Awaitable[object]]

LEAST_S, MOST_S = 1.0, 5.0


def period_of(settings: ResidencySettings) -> float:
    """How long a model may go without a request, seconds: a third of the time after which it may be unloaded."""
    limits = [settings.min_resident_s, *filter(None, [settings.idle_s])]
    return min(max(min(limits) / 3, LEAST_S), MOST_S)


class KeepAlive:
    """Asks of each model that must stay and was used before, unless it was asked of anyway."""

    def __init__(self, clock: Clock, period_s: float, wanted: Callable[[], Mapping[str, Request]]) -> None:
        """wanted: the models that must stay now, by name, and what asks of them."""
        self._clock = clock
        self._period_s = period_s
        self._wanted = wanted
        self._used_s: dict[str, float] = {}
        self._asking: dict[str, asyncio.Task[None]] = {}
        self._failing = set[str]()
        self._watching: asyncio.Task[None] | None = None

    def used(self, model: str) -> None:
        """The model was loaded, or a request of it goes out."""
        self._used_s[model] = self._clock.now_s()

    def start(self) -> None:
        """Begins to watch, if it does not yet."""
        if self._watching is None:
            self._watching = of_nobody(self._watch())

    def stop(self) -> list[asyncio.Task[None]]:
        """Cancels everything, and gives the tasks that are still ending."""
        tasks = [*self._asking.values(), *filter(None, [self._watching])]
        for task in tasks:
            task.cancel()
        self._watching = None
        self._used_s.clear()
        self._failing.clear()
        return tasks

    async def _watch(self) -> None:
        while True:
            now_s, wanted = self._clock.now_s(), self._wanted()
            self._used_s = {model: at_s for model, at_s in self._used_s.items() if model in wanted}
            self._failing &= wanted.keys()
            for model, at_s in self._used_s.items():
                if at_s + self._period_s <= now_s:
                    self._used_s[model] = now_s
                    self._ask(model, wanted[model])
            await self._clock.sleep_until(min(self._used_s.values(), default=now_s) + self._period_s)

    def _ask(self, model: str, request: Request) -> None:
        """A request in a task of its own, where the last one has ended: one that takes long keeps no other waiting."""
        if model not in self._asking:
            task = self._asking[model] = asyncio.create_task(self._try(model, request))
            task.add_done_callback(lambda _: self._asking.pop(model))

    async def _try(self, model: str, request: Request) -> None:
        try:
            await request()
        except LipsyncError as error:
            if model not in self._failing:
                log.warning("%s is used by silent sessions and does not answer: %s", model, error.message)
            self._failing.add(model)
        else:
            if model in self._failing:
                log.info("%s answers silent sessions again", model)
            self._failing.discard(model)
