"""Which models are loaded in Triton, as far as this compositor knows: loads on first use, once for all who wait.

What Triton says has the last word: a request that finds its model gone makes its caller `forget` and load again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Protocol

log = logging.getLogger(__name__)


class Loader(Protocol):
    """What loads and unloads models: Triton."""

    async def load(self, model: str) -> None: ...

    async def unload(self, model: str) -> None: ...


class Residency:
    """Loads each model once, however many ask for it at the same time."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self._ready: set[str] = set()
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._outdated: set[asyncio.Task[None]] = set()

    def __contains__(self, model: str) -> bool:
        """Whether this compositor loaded the model and has not seen it missing since."""
        return model in self._ready

    async def ensure(self, model: str) -> None:
        """Returns when the model is loaded. A caller that goes away does not stop the load for the others."""
        if model in self._ready:
            return
        task = self._loads.get(model)
        if task is None:
            task = self._loads[model] = asyncio.create_task(self._load(model, frozenset(self._outdated)))
            task.add_done_callback(lambda done: self._loaded(model, done))
        await asyncio.shield(task)

    async def _load(self, model: str, outdated: frozenset[asyncio.Task[None]]) -> None:
        # A load that was forgotten meanwhile may have read older files: this one must come after it.
        if outdated:
            await asyncio.wait(outdated)
        begin = time.monotonic()
        await self._loader.load(model)
        log.info("%s loaded in %.3f s", model, time.monotonic() - begin)

    def _loaded(self, model: str, task: asyncio.Task[None]) -> None:
        self._outdated.discard(task)
        if self._loads.get(model) is task:
            del self._loads[model]
            if not task.cancelled() and task.exception() is None:
                self._ready.add(model)

    def forget(self, model: str) -> None:
        """Triton does not have it any more, or has it from older files: the next `ensure` loads it."""
        self._ready.discard(model)
        task = self._loads.pop(model, None)
        if task is not None:
            self._outdated.add(task)

    async def drop(self, model: str) -> None:
        """Unloads a model whose files are gone, if it was loaded from here."""
        if model in self._ready:
            self.forget(model)
            await self._loader.unload(model)

    async def close(self) -> None:
        """Ends the loads that are under way."""
        tasks = [*self._loads.values(), *self._outdated]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
