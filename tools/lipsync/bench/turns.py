"""What the processes that measure in turns share: their callers work in tasks, while the CPU of others is read."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping

from compositor.errors import LipsyncError

from .clocks import process_clock


async def pause(tasks: list[asyncio.Task[None]], seconds: float) -> None:
    """Lets the tasks work; raises what one of them raises."""
    done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        await task


async def until(tasks: list[asyncio.Task[None]], reached: Callable[[], bool], longest_s: float, otherwise: str) -> None:
    """Lets the tasks work until something is reached. Raises what `pause` raises, and after `longest_s` LipsyncError
    with the words `otherwise`."""
    give_up_s = time.perf_counter() + longest_s
    while not reached():
        await pause(tasks, 0.01)
        if time.perf_counter() > give_up_s:
            raise LipsyncError(f"{otherwise} within {longest_s:.0f} s")


def cpu_s(watched: Mapping[str, Iterable[int]], own: str) -> dict[str, float]:
    """CPU seconds of processes that live, by name, and of this one, by the name `own`."""
    spent = {name: sum(time.clock_gettime(process_clock(pid)) for pid in pids) for name, pids in watched.items()}
    return {**spent, own: time.process_time()}
