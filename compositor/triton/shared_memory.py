"""A region of system shared memory, cut into slots of equal size, that another process writes answers into.

The region's name is needed only until the other process has mapped it, and is removed right then: whatever ends this
process, no memory stays in /dev/shm. The other process, though, keeps what it has mapped until it is told otherwise. So
that somebody can tell it after a process was killed, each region has an empty file beside it, locked while it is used.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import re
import secrets
import weakref
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_DIRECTORY = Path("/dev/shm")
_NAME = re.compile(r"lipsync-region-([0-9a-f]{16})")
_LOCK, _NEW = "lipsync-lock-", "lipsync-new-lock-"


class Region:
    """`slots` pieces of `slot_bytes` each; `free` holds the numbers of those that nobody uses."""

    def __init__(self, slots: int, slot_bytes: int) -> None:
        """Reserves the memory. Raises OSError where /dev/shm is missing or too small."""
        number = secrets.token_hex(8)
        self.name = f"lipsync-region-{number}"
        self.slot_bytes = slot_bytes
        self.size = slots * slot_bytes
        self.free = list(range(slots))
        # Also where nobody does it, this comes to its end with the region, or with the interpreter.
        self.let_go = weakref.finalize(self, _let_go, *_hold(number))
        """Whoever has the region mapped may be told that it is not used any more."""
        path = _DIRECTORY / self.name
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            # Reserved, not only promised: a write beyond what /dev/shm holds would be a SIGBUS.
            os.posix_fallocate(descriptor, 0, self.size)
            self._memory = mmap.mmap(descriptor, self.size)
        except OSError:
            path.unlink()
            self.let_go()
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


def is_left_behind(name: str) -> bool:
    """Whether nobody uses the region of that name any more; only for processes that share this /dev/shm."""
    match = _NAME.fullmatch(name)
    return match is not None and _is_free(_DIRECTORY / f"{_LOCK}{match[1]}")


def sweep_locks() -> None:
    """Removes the files beside regions whose process was killed."""
    for path in _DIRECTORY.glob(f"{_LOCK}*"):
        if _is_free(path):
            path.unlink(missing_ok=True)


def _hold(number: str) -> tuple[Path, int]:
    """The locked file beside a region, and its descriptor. Raises OSError."""
    new, path = _DIRECTORY / f"{_NEW}{number}", _DIRECTORY / f"{_LOCK}{number}"
    lock = os.open(new, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    # Before it has its name: whoever sweeps shall not find it unlocked.
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    new.rename(path)
    return path, lock


def _let_go(path: Path, lock: int) -> None:
    path.unlink(missing_ok=True)
    os.close(lock)


def _is_free(path: Path) -> bool:
    """Whether a lock is gone, or nobody's; not where it is another user's."""
    try:
        lock = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True
