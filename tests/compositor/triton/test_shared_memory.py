from __future__ import annotations

import gc
import secrets
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from compositor.triton.shared_memory import Region, is_left_behind, sweep_locks


def test_slots_are_apart() -> None:
    region = Region(3, 1000)
    try:
        assert sorted(region.free) == [0, 1, 2]
        for slot in range(3):
            region.view(slot, 1000)[:] = slot + 1
        assert [int(region.view(slot, 1000).sum()) for slot in range(3)] == [1000, 2000, 3000]
    finally:
        region.forget_name()
        region.let_go()


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


def test_what_does_not_fit_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    number = secrets.token_hex(8)
    monkeypatch.setattr(secrets, "token_hex", lambda size: number)
    with pytest.raises(OSError):
        Region(1, 1 << 50)
    assert not list(Path("/dev/shm").glob(f"*{number}*"))


def test_a_region_is_left_behind_once_its_process_is_gone() -> None:
    """Its process is killed, so that nothing of it can tidy up."""
    code = (
        "import sys, time; from compositor.triton.shared_memory import Region; region = Region(1, 4096); "
        "region.forget_name(); print(region.name, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        name = process.stdout.readline().strip()
        try:
            assert not is_left_behind(name)
            sweep_locks()
            assert not is_left_behind(name)
            assert locks(name)
        finally:
            process.kill()
        process.wait()
        assert is_left_behind(name)
        assert locks(name)
        sweep_locks()
        assert not locks(name)
        assert is_left_behind(name)


def locks(name: str) -> list[Path]:
    return list(Path("/dev/shm").glob(f"*lock*{name.rpartition('-')[2]}"))


def test_a_region_that_nobody_holds_any_more_lets_go() -> None:
    region = Region(1, 4096)
    region.forget_name()
    name = region.name
    assert locks(name)
    del region
    gc.collect()
    assert not locks(name)


@pytest.mark.parametrize("name", ["", "lipsync-region-", "lipsync-region-../../etc/passwd", "lipsync-12-abcdef", "x"])
def test_what_others_named_is_not_ours_to_judge(name: str) -> None:
    assert not is_left_behind(name)
