"""Calls that can be cut off when the service stops: each is told UNAVAILABLE, and that trying again helps."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from ..errors import Stopping


class Stoppable:
    """Tasks that end by an error of their own instead of a bare cancellation."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[object]] = set()
        self._stopped = False

    def stop(self) -> None:
        """Cancels what is under way; what still begins is refused."""
        self._stopped = True
        for task in self._tasks:
            task.cancel()

    @contextlib.asynccontextmanager
    async def told(self) -> AsyncIterator[None]:
        """The block raises Stopping where it is cut off or refused."""
        stopping = Stopping("the service stops", retry_after_s=1)
        if self._stopped:
            raise stopping
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if not self._stopped:
                raise
            raise stopping from None
        finally:
            # Whoever is told why is not cancelled meanwhile.
            self._tasks.discard(task)
