from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from compositor.triton.shared_memory import Region


def test_slots_are_apart() -> None:
    region = Region(3, 1000)
    try:
        assert sorted(region.free) == [0, 1, 2]
        for slot in range(3):
            region.view(slot, 1000)[:] = slot + 1
        assert [int(region.view(slot, 1000).sum()) for slot in range(3)] == [1000, 2000, 3000]
    finally:
        region.forget_name()


def test_the_name_goes_and_the_memory_stays() -> None:
    region = Region(2, 4096)
    path = Path("/dev/shm") / region.name
    assert path.stat().st_size == region.size
    view = region.view(1, 4096)
    region.forget_name()
    region.forget_name()
    assert not path.exists()
    view[:] = 7
    assert np.all(region.view(1, 4096) == 7)


def test_what_does_not_fit_leaves_nothing() -> None:
    before = set(Path("/dev/shm").iterdir())
    with pytest.raises(OSError):
        Region(1, 1 << 50)
    assert not {path for path in Path("/dev/shm").iterdir() if path.name.startswith("lipsync-")} - before
