"""Whether the service can serve: one check, repeated and remembered, that every transport's health answer reads."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)

PERIOD_S = 0.1
"""The check reads what others have found out."""


class Health:
    """Asks `check` again and again and tells `changed` of every change. Not serving until the first good answer."""

    def __init__(
        self,
        check: Callable[[], Awaitable[bool]],
        changed: Callable[[bool], Awaitable[None]],
        period_s: float = PERIOD_S,
    ) -> None:
        self._check = check
        self._changed = changed
        self._period_s = period_s
        self.serving = False

    async def watch(self) -> None:
        """Runs until it is cancelled."""
        while True:
            await self.update()
            await asyncio.sleep(self._period_s)

    async def update(self) -> None:
        """Checks once."""
        try:
            serving = await self._check()
        except Exception:
            log.exception("the health check itself failed")
            serving = False
        if serving != self.serving:
            self.serving = serving
            log.info("ready to serve" if serving else "not ready: no Triton answers")
            await self._changed(serving)
