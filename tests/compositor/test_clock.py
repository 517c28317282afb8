"""The machine's clock."""

import asyncio

from compositor.clock import MonotonicClock


async def test_what_has_passed_is_not_waited_for_but_others_have_their_turn() -> None:
    clock, turns = MonotonicClock(), list[int]()
    asyncio.get_running_loop().call_soon(turns.append, 1)
    await clock.sleep_until(clock.now_s() - 100)
    assert turns == [1]


async def test_time_that_is_to_come_is_waited_for() -> None:
    clock = MonotonicClock()
    due_s = clock.now_s() + 0.01
    await clock.sleep_until(due_s)
    assert clock.now_s() >= due_s - 1e-3
