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
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def staging(repository: Path, name: str) -> Iterator[Path]:
    """A new folder to build in, removed at the end whatever happens.

    Raises InvalidInput where the repository cannot be written or the disk gets full.
    """
    try:
        folder, lock = _new_folder(repository, name)
    except OSError as error:
        raise InvalidInput(
            f"{repository}: cannot be written ({error.strerror}); free some space, or choose another model repository"
        ) from error
    try:
        yield folder
    except OSError as error:
        if error.errno in _FULL:
            raise InvalidInput(
                f"{repository}: {error.strerror}; nothing was installed; free some space and try again"
            ) from error
        raise
    finally:
        with _door(repository):
            shutil.rmtree(folder, ignore_errors=True)
            lock.close()
            _remove_if_empty(repository / FOLDER)


def install(built: Path, companions: list[Path], repository: Path, *, replace: bool = False) -> None:
    """Moves folders built in one staging folder into the repository, under their own names, all of them or none.

    `built` comes last and decides: where it is installed already and not to be replaced, InvalidInput is raised and
    nothing changes. A companion that is there already belongs to nobody and makes way.
    """
    for folder in (*companions, built):
        for path in (*folder.rglob("*"), folder):
            _flush(path)
    target = repository / built.name
    with _door(repository), contextlib.ExitStack() as undo:
        if not replace and os.path.lexists(target):
            raise InvalidInput(f"{built.name!r} exists already in {repository}; remove it first")
        for number, folder in enumerate((*companions, built)):
            place = repository / folder.name
            if os.path.lexists(place):
                old = folder.parent / f"replaced.{number}"
                place.rename(old)
                undo.callback(old.rename, place)
            folder.rename(place)
            undo.callback(place.rename, folder)
        _flush(repository)
        undo.pop_all()


def remove(repository: Path, names: list[str]) -> None:
    """Takes folders out of the repository, each in one step, then deletes them. A full disk does not hinder it."""
    try:
        with staging(repository, names[0]) as folder:
            for name in names:
                (repository / name).rename(folder / name)
    except InvalidInput:
        if not os.access(repository, os.W_OK):
            raise
        for name in names:
            shutil.rmtree(repository / name, ignore_errors=True)
        if left := [name for name in names if (repository / name).exists()]:
            raise InvalidInput(f"{repository}: {left[0]} cannot be deleted; check the permissions") from None


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _door(repository: Path) -> Iterator[Path]:
    """The staging root, made if need be, for one process at a time."""
    root = repository / FOLDER
    while True:
        root.mkdir(parents=True, exist_ok=True)
        try:
            opened = (root / _LOCK).open("w")
        except FileNotFoundError:
            continue  # the last one out removed the root in between
        with opened:
            fcntl.flock(opened, fcntl.LOCK_EX)
            if _is_at(opened, root / _LOCK):
                yield root
                return


def _is_at(opened: IO[str], path: Path) -> bool:
    """Whether the open file is still the one at `path`: its lock counts only then."""
    try:
        return os.path.samestat(os.fstat(opened.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _new_folder(repository: Path, name: str) -> tuple[Path, IO[str]]:
    """A locked folder of our own, after those of the dead are removed."""
    with _door(repository) as root:
        for stale in root.iterdir():
            if stale.name != _LOCK and _is_dead(stale):
                shutil.rmtree(stale, ignore_errors=True)
        try:
            folder = Path(tempfile.mkdtemp(prefix=f"{name}.", dir=root))
            lock = (folder / _LOCK).open("w")
        except OSError:
            # A folder without a lock goes with the next sweep.
            _remove_if_empty(root)
            raise
        fcntl.flock(lock, fcntl.LOCK_EX)
    return folder, lock


def _is_dead(folder: Path) -> bool:
    """Whether no living process builds there. Asked at the door, where no folder is between its making and its lock."""
    try:
        with (folder / _LOCK).open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _remove_if_empty(root: Path) -> None:
    if [path.name for path in root.iterdir()] == [_LOCK]:
        (root / _LOCK).unlink()
        root.rmdir()
