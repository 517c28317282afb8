"""Calls that are cut off raise Stopping; those that are cancelled by others do not."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from compositor.errors import Stopping
from compositor.transports.stopping import Stoppable


class Call:
    """One call: it goes on for good, and says goodbye for a while."""

    def __init__(self, stoppable: Stoppable) -> None:
        self.parting, self.parted = asyncio.Event(), asyncio.Event()
        self._stoppable = stoppable
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        try:
            async with self._stoppable.told():
                await asyncio.Event().wait()
        except Stopping:
            self.parting.set()
            await self.parted.wait()
            raise


async def test_a_call_is_told_once_and_may_say_goodbye() -> None:
    stoppable = Stoppable()
    call = Call(stoppable)
    await asyncio.sleep(0)
    for _ in range(2):
        stoppable.stop()
        await call.parting.wait()
    call.parted.set()
    with pytest.raises(Stopping):
        await call.task


async def test_a_call_that_begins_too_late_is_refused() -> None:
    stoppable = Stoppable()
    stoppable.stop()
    with pytest.raises(Stopping):
        await stoppable.told().__aenter__()


async def test_a_client_that_leaves_is_no_stop() -> None:
    call = Call(Stoppable())
    await asyncio.sleep(0)
    call.task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await call.task
    assert call.task.cancelled()
