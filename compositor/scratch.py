"""Temporary folders that do not outlive their process for long, however it ends.

A folder is locked by whoever made it. The kernel frees the lock with the process, so that a later one can tell what was
left behind, and removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .disk import disk_fault
from .errors import DiskFull

log = logging.getLogger(__name__)

PREFIX = "lipsync-scratch-"


def scratch_home() -> Path:
    """Where temporary files are made. Raises DiskFull where none can be."""
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise DiskFull(
            "no temporary file can be made in any of the usual places: free some space, or set TMPDIR to a folder that"
            " can be written"
        ) from error


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new folder, removed with all that is in it. Raises DiskFull."""
    path, lock = _make()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def sweep() -> None:
    """Removes the folders of this user whose process is gone."""
    for path in scratch_home().glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if path.lstat().st_uid != os.getuid():
                continue
            lock = _lock(path)
            try:
                shutil.rmtree(path)
                log.info("%s removed: a process that was killed left it", path)
            finally:
                os.close(lock)


def _make() -> tuple[Path, int]:
    """A folder and its lock."""
    while True:
        path = _new()
        try:
            lock = _lock(path)
        except (BlockingIOError, FileNotFoundError):
            continue  # Another process sweeps it up, as it was not locked yet.
        except OSError:
            # A file system without locks, NFS say: as nobody can lock the folder, nobody sweeps it up.
            return path, _open(path)
        if path.exists():
            return path, lock
        os.close(lock)


def _new() -> Path:
    home = scratch_home()
    try:
        return Path(tempfile.mkdtemp(prefix=PREFIX, dir=home))
    except OSError as error:
        raise disk_fault(home, f"no folder can be made ({error.strerror})") from error


def _lock(path: Path) -> int:
    """A descriptor that holds the folder's lock. Raises BlockingIOError where another one does, OSError where there are
    no locks."""
    folder = _open(path)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(folder)
        raise
    return folder


def _open(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
