"""Boxes, and the endless order of frames."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from compositor.geometry import Box, ping_pong


def test_box() -> None:
    box = Box(10, 20, 30, 40)
    assert (box.right, box.bottom, box.area) == (40, 60, 1200)
    assert box.inside(Box(8, 16, 64, 64)) == Box(2, 4, 30, 40)
    assert box.inside(box) == Box(0, 0, 30, 40)


def test_ping_pong_is_the_families_order() -> None:
    assert [ping_pong(position, 4) for position in range(14)] == [0, 1, 2, 3, 2, 1, 0, 1, 2, 3, 2, 1, 0, 1]
    assert [ping_pong(position, 2) for position in range(5)] == [0, 1, 0, 1, 0]
    assert [ping_pong(position, 1) for position in range(3)] == [0, 0, 0]


@given(st.integers(-(10**12), 10**12), st.integers(2, 20_000))
@settings(deadline=None)
def test_ping_pong_never_jumps_and_never_doubles(position: int, frames: int) -> None:
    here, there = ping_pong(position, frames), ping_pong(position + 1, frames)
    assert 0 <= here < frames
    assert abs(there - here) == 1
    assert ping_pong(position + 2 * frames - 2, frames) == here
