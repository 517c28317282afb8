from __future__ import annotations

import asyncio

import pytest

from compositor.errors import Overloaded
from compositor.transports.admission import Admission


async def test_so_many_calls_are_served_at_once() -> None:
    admission = Admission(2)
    async with admission.counted(), admission.counted():
        assert admission.calls == 2
        with pytest.raises(Overloaded):
            await admission.counted().__aenter__()
    assert admission.calls == 0


async def test_idleness_is_told() -> None:
    admission = Admission(2)
    await admission.idle()
    async with admission.counted():
        waiting = asyncio.create_task(admission.idle())
        with pytest.raises(ZeroDivisionError):
            async with admission.counted():
                raise ZeroDivisionError
        await asyncio.sleep(0)
        assert not waiting.done()
    await waiting
