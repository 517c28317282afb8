from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Iterator

import pytest

from compositor.memory import keep_pauses_short


class Ring:
    """Garbage that only a collection finds."""

    def __init__(self) -> None:
        self.own = self


@pytest.fixture
def as_before() -> Iterator[None]:
    threshold = gc.get_threshold()
    yield
    gc.set_threshold(*threshold)
    gc.unfreeze()


@pytest.mark.usefixtures("as_before")
def test_collections_leave_out_what_is_there_and_still_find_garbage() -> None:
    before = len(gc.get_objects())
    keep_pauses_short()
    assert len(gc.get_objects()) < before / 10
    ring = Ring()
    found = weakref.ref(ring)
    del ring
    gc.collect()
    assert found() is None


_FAULTS = """
import resource
import numpy as np
from compositor.memory import keep_pauses_short
keep_pauses_short()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def paint():
    blocks = [np.ones(size, np.uint8) for size in (1 << 20, 2 << 20, 3 << 20)]
    del blocks
paint()
before = faults()
for _ in range(20):
    paint()
print(faults() - before)
"""


def test_freed_blocks_are_used_again_without_page_faults() -> None:
    """By glibc's defaults each of the 20 rounds fetches 1,536 pages."""
    done = subprocess.run([sys.executable, "-c", _FAULTS], capture_output=True, text=True, check=True, timeout=60)
    assert int(done.stdout) < 100
