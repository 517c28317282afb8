"""A lock that the processes of one user on one host share, one for each Triton, with notes on what they load.

An flock on a file among the temporary ones: the kernel frees it when its process ends, however that happens. Processes
with a temporary directory of their own (containers), or of other users, do not see each other.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import re
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

log = logging.getLogger(__name__)

Note = tuple[int, ...]
"""When a model was loaded, nanoseconds since 1970, and the stamp of its files; without it, its load may go on."""

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.002, 0.02
_TURN_S = 1.0
"""How long a process that has the lock may go on taking it while another waits."""
_PAUSE_S = 2 * _LONGEST_WAIT_S
"""Between two turns: long enough for one who waits to look."""


class HostLock:
    """Shared by all tasks of this process that hold it at the same time; excludes the other processes.

    `notes` says, while it is held, what was loaded of late by any of the processes.
    """

    def __init__(self, endpoint: str, folder: Path | None = None) -> None:
        """endpoint: of the Triton, host:port. folder: default the system's temporary directory."""
        words = re.sub(r"[^0-9A-Za-z.-]", "_", endpoint)
        self.path = (folder or Path(tempfile.gettempdir())) / f"lipsync-{os.getuid()}-{words}.lock"
        self.notes: dict[str, Note] = {}
        self._written: dict[str, Note] = {}
        self._queue = self.path.with_suffix(".queue")
        self._file: int | None = None
        self._holders = 0
        self._since_s = 0.0
        self._turn = asyncio.Lock()
        self._free = asyncio.Event()

    @contextlib.asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """The block has the lock."""
        await self.acquire()
        try:
            yield
        finally:
            self.release()

    async def acquire(self) -> None:
        """Returns with the lock; each holder gives it back by `release`. A cancelled wait leaves nothing."""
        async with self._turn:
            if self._holders and asyncio.get_running_loop().time() - self._since_s > _TURN_S and self._is_awaited():
                await self._free.wait()
                await asyncio.sleep(_PAUSE_S)
            if not self._holders:
                await self._lock()
            self._holders += 1

    def share(self) -> None:
        """One more holder, while there is one already."""
        assert self._holders
        self._holders += 1

    def release(self) -> None:
        """Ends one hold; with the last one goes the lock."""
        self._holders -= 1
        if not self._holders:
            self._unlock()
            self._free.set()

    def close(self) -> None:
        """Removes those of the files that say nothing to anybody; called when this process is done with the lock.

        Notes stay, for others and for whoever comes next on the same Triton: it would load again what is there.
        """
        for path in (self._queue, self.path):
            with contextlib.suppress(OSError):  # another process has it, and closes it later
                _remove(path)

    async def _lock(self) -> None:
        wait_s, queue = _FIRST_WAIT_S, None
        try:
            while not self._locked():
                if queue is None:
                    queue = self._stand_in_line()
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
        finally:
            if queue is not None:
                os.close(queue)
        self._since_s = asyncio.get_running_loop().time()
        self._free.clear()

    def _stand_in_line(self) -> int | None:
        """The queue's file, which says, while it is open, that somebody waits; None where it cannot be had just now."""
        try:
            return _lock_file(self._queue, fcntl.LOCK_SH)
        except OSError:
            return None

    def _is_awaited(self) -> bool:
        """Whether another process waits for the lock."""
        try:
            os.close(_lock_file(self._queue, fcntl.LOCK_EX))
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def _locked(self) -> bool:
        """Whether the lock could be taken just now; where the file cannot be had, there is nobody to be kept out."""
        try:
            self._file = _lock_file(self.path, fcntl.LOCK_EX)
        except BlockingIOError:
            return False
        except OSError as error:
            log.warning("%s: no lock on this host (%s): budgets may be exceeded for a moment", self.path, error)
            self._file = None
        self.notes = _read(self._file)
        self._written = dict(self.notes)
        return True

    def save(self) -> None:
        """Writes the notes, as the last `release` does, lest they are lost with this process."""
        if self._file is None or self.notes == self._written:
            return
        try:
            _write(self._file, self.notes)
            self._written = dict(self.notes)
        except OSError as error:
            log.warning("%s: cannot be written (%s)", self.path, error)

    def _unlock(self) -> None:
        self.save()
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _lock_file(path: Path, kind: int) -> int:
    """A descriptor of the file, locked. kind: LOCK_EX or LOCK_SH.

    Raises BlockingIOError where another process's lock keeps it, and other OSErrors.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
        if not _is_at(path, file):
            # Taken away between the two calls, by another's `close` or by whoever tidies temporary files: a third
            # process may have locked the next one.
            raise BlockingIOError(f"{path} was replaced")
    except BaseException:
        os.close(file)
        raise
    return file


def _is_at(path: Path, file: int) -> bool:
    """Whether the path still names the open file."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _remove(path: Path) -> None:
    """Removes a file of ours that holds no notes. Raises OSError where it is in use.

    Nobody is left with a lock on a file that is gone: locks are taken in `_lock_file`, which looks for that.
    """
    if path.exists():
        file = _lock_file(path, fcntl.LOCK_EX)
        try:
            if not _read(file):
                path.unlink()
        finally:
            os.close(file)


def _read(file: int | None) -> dict[str, Note]:
    """The notes; none where there are none, or half of them, written by a process as it died."""
    if file is None:
        return {}
    try:
        notes = json.loads(os.pread(file, os.fstat(file).st_size, 0) or b"{}")
        return {str(model): tuple(map(int, note)) for model, note in notes.items()}
    except (ValueError, TypeError, AttributeError):
        return {}


def _write(file: int, notes: dict[str, Note]) -> None:
    os.ftruncate(file, 0)
    os.pwrite(file, json.dumps(notes).encode(), 0)
