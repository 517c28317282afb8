"""What the processes that measure in turns share."""

from __future__ import annotations

import asyncio
import os

import pytest

from compositor.errors import InvalidInput, LipsyncError
from lipsync.bench.turns import cpu_s, pause, until


async def forever() -> None:
    await asyncio.get_running_loop().create_future()


async def fail() -> None:
    raise InvalidInput("no such tenant")


async def test_waiting_ends_when_it_is_reached_or_too_late() -> None:
    tasks, looks = [asyncio.create_task(forever())], iter([False, False, True])
    await until(tasks, lambda: next(looks), 600, "no frame came")
    assert next(looks, None) is None
    with pytest.raises(LipsyncError, match=r"^no frame came within 0 s$"):
        await until(tasks, lambda: False, 0, "no frame came")
    tasks[0].cancel()


async def test_a_task_that_fails_ends_it() -> None:
    for waiting in (pause([asyncio.create_task(fail())], 600), until([asyncio.create_task(fail())], bool, 600, "late")):
        with pytest.raises(InvalidInput, match="no such tenant"):
            await waiting


def test_cpu_is_told_by_name() -> None:
    spent = cpu_s({"both": [os.getpid(), os.getpid()], "none": []}, "own")
    assert spent.keys() == {"both", "none", "own"}
    assert (spent["none"], spent["both"] > spent["own"] > 0) == (0, True)
