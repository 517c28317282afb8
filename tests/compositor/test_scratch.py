"""Temporary folders: there while their process lives, swept when it was killed."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from compositor.errors import DiskFull
from compositor.scratch import PREFIX, scratch_folder, scratch_home, sweep

HOLDING = (
    "import time; from compositor.scratch import scratch_folder\n"
    "with scratch_folder() as path: (path / 'file').write_text('x'); print(path, flush=True); time.sleep(600)"
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def test_a_folder_goes_with_its_block(home: Path) -> None:
    with scratch_folder() as path:
        assert path.parent == home
        (path / "file").write_text("x")
    assert not list(home.iterdir())


def test_only_what_the_dead_left_is_swept(home: Path) -> None:
    strangers = [home / "lipsync-else", home / f"{PREFIX}file"]
    strangers[0].mkdir()
    strangers[1].touch()
    with scratch_folder() as own, subprocess.Popen([sys.executable, "-c", HOLDING], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        theirs = Path(other.stdout.readline().decode().strip())
        try:
            sweep()
            assert own.exists()
            assert theirs.exists()
        finally:
            other.kill()
        other.wait()
        assert theirs.exists()
        sweep()
        assert own.exists()
        assert not theirs.exists()
    assert sorted(home.iterdir()) == sorted(strangers)


def test_a_folder_that_is_swept_before_it_is_locked_is_made_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Swept at every point where that can happen."""
    made, make = list[Path](), tempfile.mkdtemp

    def swept(**options: str) -> str:
        path = Path(make(**options))
        made.append(path)
        if len(made) == 1:
            sweep()
        return str(path)

    locks, lock = list[int](), fcntl.flock

    def late(folder: int, how: int) -> None:
        locks.append(folder)
        if len(locks) == 2:  # the sweep's was the first
            made[1].rmdir()
        elif len(locks) == 3:
            raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK))
        lock(folder, how)

    monkeypatch.setattr(tempfile, "mkdtemp", swept)
    monkeypatch.setattr(fcntl, "flock", late)
    with scratch_folder() as path:
        assert path == made[-1]
        assert path.exists()
        assert len(made) == 4


def test_a_file_system_without_locks_will_do(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with scratch_folder() as path:
        sweep()
        assert path.exists()
    assert not list(home.iterdir())


def test_a_folder_that_cannot_be_made_is_said(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: str) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(DiskFull, match=f"{home}: no folder can be made"), scratch_folder():
        pass


def test_no_place_for_temporary_files_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    with pytest.raises(DiskFull, match="free some space, or set TMPDIR"):
        scratch_home()
