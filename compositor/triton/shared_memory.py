"""A region of system shared memory, cut into slots of equal size, that another process writes answers into.

The region's name is needed only until the other process has mapped it, and is removed right then: whatever ends this
process, nothing stays in /dev/shm.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_DIRECTORY = Path("/dev/shm")


class Region:
    """`slots` pieces of `slot_bytes` each; `free` holds the numbers of those that nobody uses."""

    def __init__(self, slots: int, slot_bytes: int) -> None:
        """Reserves the memory. Raises OSError where /dev/shm is missing or too small."""
        self.name = f"lipsync-{os.getpid()}-{secrets.token_hex(6)}"
        self.slot_bytes = slot_bytes
        self.size = slots * slot_bytes
        self.free = list(range(slots))
        path = _DIRECTORY / self.name
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            # Reserved, not only promised: a write beyond what /dev/shm holds would be a SIGBUS.
            os.posix_fallocate(descriptor, 0, self.size)
            self._memory = mmap.mmap(descriptor, self.size)
        except OSError:
            path.unlink()
            raise
        finally:
            os.close(descriptor)

    @property
    def key(self) -> str:
        """The name by which shm_open finds the region."""
        return f"/{self.name}"

    def forget_name(self) -> None:
        """Removes the name; the memory lives on with those who mapped it."""
        with contextlib.suppress(FileNotFoundError):
            (_DIRECTORY / self.name).unlink()

    def offset(self, slot: int) -> int:
        return slot * self.slot_bytes

    def view(self, slot: int, size: int) -> NDArray[np.uint8]:
        """The first `size` bytes of a slot."""
        return np.frombuffer(self._memory, np.uint8, size, self.offset(slot))
