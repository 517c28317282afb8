"""Whether the service can serve: one check, repeated and remembered, that every transport's health answer reads."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from .errors import LipsyncError, Stopping, TritonUnavailable

log = logging.getLogger(__name__)

PERIOD_S = 0.1
"""The check reads what others have found out."""


class Health:
    """Asks `check` again and again and tells `changed` of every change. Not serving until the first good answer."""

    def __init__(
        self,
        check: Callable[[], Awaitable[LipsyncError | None]],
        changed: Callable[[bool], Awaitable[None]],
        period_s: float = PERIOD_S,
    ) -> None:
        """check: what stands in the way of serving, if anything does."""
        self._check = check
        self._changed = changed
        self._period_s = period_s
        self._stopped = False
        self.fault: LipsyncError | None = TritonUnavailable("Triton does not answer", retry_after_s=1)
        """Why the service cannot serve; None while it can."""

    @property
    def serving(self) -> bool:
        return self.fault is None

    async def watch(self) -> None:
        """Runs until it is cancelled."""
        while True:
            await self.update()
            await asyncio.sleep(self._period_s)

    async def update(self) -> None:
        """Checks once."""
        try:
            fault = await self._check()
        except Exception:
            log.exception("the health check itself failed")
            fault = TritonUnavailable("the health check itself failed; the service's log has the details")
        if not self._stopped:
            await self._become(fault)

    async def stop(self) -> None:
        """The service stops: from now on it is not serving, whatever the check says."""
        self._stopped = True
        await self._become(Stopping("the service stops", retry_after_s=1))

    async def _become(self, fault: LipsyncError | None) -> None:
        before, self.fault = self.fault, fault
        if _words(fault) != _words(before):
            if fault is None:
                log.info("ready to serve")
            else:
                log.log(logging.INFO if self._stopped else logging.WARNING, "not ready: %s", fault.message)
        if (fault is None) != (before is None):
            await self._changed(fault is None)


def _words(fault: LipsyncError | None) -> str | None:
    return None if fault is None else fault.message
