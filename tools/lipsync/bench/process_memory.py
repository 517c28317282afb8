"""A process's memory, as the kernel and the GPU's driver count it: a pid or a file comes in, bytes come out."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROLLUP = ("Rss", "Pss", "Pss_Anon", "Pss_File")
"""What `rollup_bytes` tells."""

_GPU_QUERY = ("nvidia-smi", "--id=0", "--query-gpu=memory.used", "--format=csv,noheader,nounits")
_TIMEOUT_S = 20.0


def process_bytes(pid: int) -> dict[str, int]:
    """Memory of a process, by what it is (proc(5), status).

    `private`: anonymous, nobody else's. `mapped`: pages of files that are in memory, which other processes may share
    and the kernel may drop. `peak`: the most that was resident at a time, mapped files included.
    """
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines)
    return {name: _kib(found[field]) for name, field in _STATUS.items()}


_STATUS = {"private": "RssAnon", "mapped": "RssFile", "peak": "VmHWM"}


def rollup_bytes(pid: int | None = None) -> dict[str, int]:
    """Bytes of a process, this one unless given, by the kernel's own sums (proc(5), smaps_rollup)."""
    lines = Path(f"/proc/{pid or 'self'}/smaps_rollup").read_text().splitlines()
    found = dict(line.partition(":")[::2] for line in lines)
    return {field: _kib(found[field]) for field in ROLLUP}


def mapping_bytes(pid: int, file: Path) -> dict[str, int]:
    """What a process holds of one mapped file, summed over its mappings (proc(5), smaps): `resident` pages, and those
    of them that are copies of the process's own by now, `copied`. Zeros where it does not map the file."""
    found = dict.fromkeys(("resident", "copied"), 0)
    ours = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        head, _, rest = line.partition(" ")
        if not head.endswith(":"):
            ours = line.endswith(f" {file}")
        elif ours and head == "Rss:":
            found["resident"] += _kib(rest)
        elif ours and head == "Anonymous:":
            found["copied"] += _kib(rest)
    return found


def folder_bytes(pid: int, folder: Path) -> int:
    """What is resident of the files below a folder that a process maps, summed over its mappings (proc(5), smaps)."""
    total, ours = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        head, _, rest = line.partition(" ")
        if not head.endswith(":"):
            ours = f" {folder}/" in rest
        elif ours and head == "Rss:":
            total += _kib(rest)
    return total


def available_bytes() -> int:
    """What processes can still take without swapping (proc(5), meminfo)."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(_kib(line.partition(":")[2]) for line in lines if line.startswith("MemAvailable:"))


def gpu_bytes() -> int | None:
    """Memory in use on the first GPU, by everybody, as nvidia-smi says; None where there is no GPU."""
    try:
        done = subprocess.run(_GPU_QUERY, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
        return int(done.stdout.split()[0]) << 20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def _kib(text: str) -> int:
    """Bytes of a value such as ` 123 kB`."""
    return int(text.split()[0]) * 1024
