"""The clock that paces live sessions: the machine's own, or in tests one that is moved by hand."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """Seconds that only grow, and the wait for one of them."""

    def now_s(self) -> float: ...

    async def sleep_until(self, at_s: float) -> None: ...


class MonotonicClock:
    """The machine's monotonic clock."""

    def now_s(self) -> float:
        return time.monotonic()

    async def sleep_until(self, at_s: float) -> None:
        """Returns at `at_s` or, where that has passed, after the other tasks had their turn."""
        await asyncio.sleep(max(0.0, at_s - time.monotonic()))
