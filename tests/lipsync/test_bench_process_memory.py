"""The kernel's and the driver's figures of memory, read of a process that takes a known amount."""

from __future__ import annotations

import mmap
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lipsync.bench.process_memory import (
    ROLLUP,
    available_bytes,
    folder_bytes,
    gpu_bytes,
    mapping_bytes,
    process_bytes,
    rollup_bytes,
)

MEGABYTE = 1_000_000
SIZE = 16 * mmap.PAGESIZE
# Reports each step by a line and goes on when it gets one.
CHILD = """
import mmap, sys
def step():
    print(flush=True)
    sys.stdin.readline()
step()
taken = bytearray(b"x" * 40_000_000)
step()
del taken
with open(sys.argv[1], "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
for begin in range(0, len(mapped), mmap.PAGESIZE):
    mapped[begin]
step()
mapped[0] = 1
step()
"""


@pytest.fixture
def mapped(tmp_path: Path) -> Path:
    file = tmp_path / "a file"
    file.write_bytes(b"x" * SIZE)
    return file


@pytest.fixture
def child(mapped: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", CHILD, str(mapped)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def advance(child: subprocess.Popen[str]) -> None:
    """Lets the child take its next step, and returns when it has."""
    assert child.stdin is not None
    child.stdin.write("\n")
    child.stdin.flush()
    reached(child)


def reached(child: subprocess.Popen[str]) -> None:
    assert child.stdout is not None
    assert child.stdout.readline() == "\n"


def test_private_memory_and_its_peak(child: subprocess.Popen[str]) -> None:
    reached(child)
    before = process_bytes(child.pid)
    advance(child)
    grown = process_bytes(child.pid)
    advance(child)
    after = process_bytes(child.pid)
    assert 39 * MEGABYTE < grown["private"] - before["private"] < 90 * MEGABYTE
    assert after["private"] < grown["private"] - 39 * MEGABYTE
    assert after["peak"] >= grown["private"] + grown["mapped"] - MEGABYTE


def test_a_mapped_file_is_not_copied_until_it_is_written_to(child: subprocess.Popen[str], mapped: Path) -> None:
    reached(child)
    assert mapping_bytes(child.pid, mapped) == {"resident": 0, "copied": 0}
    advance(child)
    advance(child)
    assert mapping_bytes(child.pid, mapped) == {"resident": SIZE, "copied": 0}
    advance(child)
    assert mapping_bytes(child.pid, mapped) == {"resident": SIZE, "copied": mmap.PAGESIZE}


def test_what_is_mapped_below_a_folder(child: subprocess.Popen[str], mapped: Path) -> None:
    reached(child)
    assert folder_bytes(child.pid, mapped.parent) == 0
    advance(child)
    advance(child)
    assert folder_bytes(child.pid, mapped.parent) == SIZE
    assert folder_bytes(child.pid, mapped.parent / "a") == 0


def test_the_kernels_sums_grow_by_what_is_taken(child: subprocess.Popen[str]) -> None:
    reached(child)
    before = rollup_bytes(child.pid)
    advance(child)
    grown = rollup_bytes(child.pid)
    assert tuple(grown) == tuple(rollup_bytes()) == ROLLUP
    assert all(grown[field] - before[field] > 39 * MEGABYTE for field in ("Rss", "Pss_Anon"))
    # What of it other processes share, and so its share of that, changes as they come and go.
    assert grown["Rss"] >= grown["Pss"] >= grown["Pss_Anon"]


def test_available_memory_is_some_of_all() -> None:
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal:"))
    assert 0 < available_bytes() <= int(total.split()[1]) * 1024


@pytest.mark.parametrize(
    ("script", "expected"),
    [("echo 1234; echo 99", 1234 << 20), ("echo; exit 9", None), ("true", None), ("echo '[N/A]'", None)],
)
def test_a_gpus_memory_is_what_its_driver_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, expected: int | None
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert gpu_bytes() == expected


def test_without_a_driver_there_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_bytes() is None
