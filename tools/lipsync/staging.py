"""Installs directories into a model repository so that they are there whole or not at all.

A folder is built under `<repository>/.staging`, on the same file system, and renamed into place. Whoever dies while
building leaves a folder whose lock is free, and the next one to build removes it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from compositor.errors import InvalidInput

FOLDER = ".staging"
_LOCK = ".lock"


@contextlib.contextmanager
def staging(repository: Path, name: str) -> Iterator[Path]:
    """A new folder to build in, removed at the end whatever happens. A full disk becomes InvalidInput."""
    try:
        folder, lock = _new_folder(repository / FOLDER, name)
    except OSError as error:
        fault = f"{repository}: cannot be written ({error.strerror}); choose another model repository"
        raise InvalidInput(fault) from error
    try:
        yield folder
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise InvalidInput(
                f"{repository}: {error.strerror}; nothing was installed; free some space and try again"
            ) from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.close()


def install(built: Path, target: Path) -> None:
    """Moves a built folder to its place. InvalidInput when something is there already."""
    for path in [*built.rglob("*"), built]:
        _flush(path)
    try:
        built.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise InvalidInput(f"{target.name!r} exists already in {target.parent}; remove it first") from error
        raise
    _flush(target.parent)


def remove(target: Path) -> None:
    """Takes a folder out of the repository in one step, then deletes it."""
    with staging(target.parent, target.name) as folder:
        target.rename(folder / target.name)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _new_folder(root: Path, name: str) -> tuple[Path, IO[str]]:
    """A locked folder of our own, after those of the dead are removed. One process at a time does this."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / _LOCK).open("w") as door:
        fcntl.flock(door, fcntl.LOCK_EX)
        for stale in root.iterdir():
            with contextlib.suppress(OSError), (stale / _LOCK).open("r") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(stale, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{name}.", dir=root))
        own = (folder / _LOCK).open("w")
        fcntl.flock(own, fcntl.LOCK_EX)
    return folder, own
