"""Whether the service can write what it has to: videos that are asked for, notes beside its lock, workers' metrics."""

from __future__ import annotations

import asyncio
import errno
import os
import tempfile
from pathlib import Path

from .errors import DiskFull

LEAST_BYTES = 8 << 20
"""Room below which the folder counts as full: a few seconds of video."""
PERIOD_S = 1.0
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a write fails with where the disk, or what the process may have of it, is full."""
_PROBE = bytes(4096)


class Disk:
    """The folder of temporary files, looked at from time to time. `fault` says what is wrong with it, if anything."""

    def __init__(self, folder: Path, period_s: float = PERIOD_S) -> None:
        self.fault: DiskFull | None = None
        self._folder = folder
        self._period_s = period_s

    def look(self) -> None:
        """Looks once."""
        try:
            check_room(self._folder)
        except DiskFull as error:
            if self.fault is None or self.fault.message != error.message:
                self.fault = error
        else:
            self.fault = None

    async def watch(self) -> None:
        """Looks until it is cancelled."""
        while True:
            # A file system may be far away.
            await asyncio.to_thread(self.look)
            await asyncio.sleep(self._period_s)


def check_room(folder: Path) -> None:
    """Raises DiskFull unless a folder has room and can be written.

    Quotas and rights show in a write only; but a write of a page finds room to the last.
    """
    try:
        status = os.statvfs(folder)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            file.write(_PROBE)
    except OSError as error:
        raise disk_fault(folder, f"temporary files cannot be written ({error.strerror})") from error
    # A file system without a size, tmpfs or ramfs say, tells none.
    if status.f_blocks and status.f_bavail * status.f_frsize < LEAST_BYTES:
        raise disk_fault(folder, f"less than {LEAST_BYTES >> 20} MiB free")


def reserve(path: Path, size: int) -> None:
    """Makes a file of zeros whose room is its own. Raises DiskFull.

    For files that are written through a mapping: where their room is only promised, and the disk is full, the write
    kills the process (SIGBUS).
    """
    try:
        with path.open("xb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        raise disk_fault(path.parent, f"no room for {path.name} ({error.strerror})") from error


def disk_fault(folder: Path, reason: str) -> DiskFull:
    """What to tell where nothing can be written to a folder, and what to do about it."""
    words = f"{folder}: {reason}; free some space there, or set TMPDIR to a folder with room"
    return DiskFull(words, retry_after_s=PERIOD_S)
