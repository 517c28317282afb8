"""What the C library does with large blocks: the page faults of processes that allocate them again and again."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lipsync.bench.allocator import KEEPING

# Faults of ten blocks of 50 MB, one after another; the first is not counted.
CODE = """
import resource, sys
from lipsync.bench.allocator import keep_large_blocks
if sys.argv[1] == "told":
    keep_large_blocks()
bytearray(50_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    bytearray(50_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.parametrize(
    ("how", "environment", "kept"), [("", {}, False), ("told", {}, True), ("", KEEPING, True)], ids=str
)
def test_large_blocks_are_kept_where_it_is_asked_for(how: str, environment: dict[str, str], kept: bool) -> None:
    others = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", CODE, how]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=60, env={**others, **environment}
    )
    assert (int(done.stdout) < 100) is kept
