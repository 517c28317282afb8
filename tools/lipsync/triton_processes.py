"""Processes and shared memory of a keeper: in come pids and region names, out goes what lives, and away goes the rest.

Knows nothing of Triton. Standard library only, as the keeper runs without the rest.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import signal
import time
from collections.abc import Iterator
from pathlib import Path

SHM = Path("/dev/shm")
REGION_PREFIX = "lipsync-triton-"
_REGION = re.compile(rf"{REGION_PREFIX}(\d+)-(\d+)-(\d+)-")


def region_prefix(keeper_pid: int) -> str:
    """Names the shared memory of one keeper so that anyone can tell whether its owner still lives."""
    return f"{REGION_PREFIX}{_pid_namespace()}-{keeper_pid}-{process_start_time(keeper_pid)}-"


def sweep_regions(prefix: str) -> None:
    """Removes the shared memory regions whose name starts with `prefix`."""
    for path in SHM.glob(f"{prefix}*"):
        path.unlink(missing_ok=True)


def sweep_orphans() -> None:
    """Removes the regions, and ends the stubs, of keepers of this PID namespace that no longer live."""
    for path in SHM.glob(f"{REGION_PREFIX}*"):
        match = _REGION.match(path.name)
        if match is None or int(match[1]) != _pid_namespace():
            continue
        if process_start_time(int(match[2])) != int(match[3]):
            for pid in _users_of(path.name):
                _kill(pid)
            path.unlink(missing_ok=True)


def new_log(folder: Path) -> tuple[Path, int]:
    """A log file among temporary ones, and a descriptor that appends to it: as long as somebody has that, the log is
    not swept."""
    new = folder / f"lipsync-new-log-{secrets.token_hex(8)}"
    log = os.open(new, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_APPEND | os.O_CLOEXEC, 0o600)
    # Before it has its name: whoever sweeps shall not find it unlocked.
    fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    path = folder / f"{REGION_PREFIX}{new.name.rpartition('-')[2]}.log"
    new.rename(path)
    return path, log


def sweep_logs(folder: Path) -> None:
    """Removes this user's logs that nobody has any more: their owner and their keeper were killed."""
    for path in folder.glob(f"{REGION_PREFIX}*.log"):
        with contextlib.suppress(OSError):
            log = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(log).st_uid == os.getuid():
                    path.unlink()
                    path.with_name(path.name + ".1").unlink(missing_ok=True)
            finally:
                os.close(log)


def process_start_time(pid: int) -> int | None:
    """Start of a living process in clock ticks after boot, which with its pid names it for good; None if it is gone."""
    fields = _stat(pid)
    return None if fields is None or fields[0] == "Z" else int(fields[19])


def session_members(session: int) -> list[int]:
    """The living processes of a session, its leader left out."""
    members = []
    for pid in _pids():
        fields = _stat(pid)
        if fields is not None and fields[0] != "Z" and int(fields[3]) == session and pid != session:
            members.append(pid)
    return members


def end_session(session: int, timeout_s: float = 5.0) -> None:
    """Kills every process of the session but its leader, and sees them go."""
    deadline = time.monotonic() + timeout_s
    while (members := session_members(session)) and time.monotonic() < deadline:
        for pid in members:
            _kill(pid)
        time.sleep(0.01)


def _pids() -> Iterator[int]:
    return (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/<pid>/stat from the state on (proc(5): field 3)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _users_of(region: str) -> list[int]:
    users = []
    for pid in _pids():
        with contextlib.suppress(OSError):
            if region.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                users.append(pid)
    return users


def _pid_namespace() -> int:
    return Path("/proc/self/ns/pid").stat().st_ino


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def reap() -> dict[int, int]:
    """Collects ended children, adopted ones included: a stub exits when it sees its server gone, not a zombie.

    Their exit codes by pid; a signal that ended one is a negative number, as subprocess has it.
    """
    ended = {}
    with contextlib.suppress(ChildProcessError):
        while (child := os.waitpid(-1, os.WNOHANG))[0] != 0:
            ended[child[0]] = os.waitstatus_to_exitcode(child[1])
    return ended


def how_it_ended(exit_code: int) -> str:
    """How a process ended, in words."""
    if exit_code >= 0:
        return f"exited with status {exit_code}"
    with contextlib.suppress(ValueError):
        return f"was ended by {signal.Signals(-exit_code).name}"
    return f"was ended by signal {-exit_code}"
