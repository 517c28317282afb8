"""Room on the disk: what is found wrong, what is said about it, and that it passes. The file systems are real in
tests/integration/test_starts.py."""

from __future__ import annotations

import asyncio
import errno
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from compositor.disk import LEAST_BYTES, Disk, check_room, reserve
from compositor.errors import DiskFull

from ..integration.waiting import until


def free(monkeypatch: pytest.MonkeyPatch, size: int, whole: int = 1 << 30) -> None:
    status = SimpleNamespace(f_blocks=whole // 4096, f_bavail=size // 4096, f_frsize=4096)
    monkeypatch.setattr("os.statvfs", lambda path: status)


def refuse(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Every write fails."""

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tempfile, "TemporaryFile", fail)


def test_a_folder_with_room_is_fine_and_stays_empty(tmp_path: Path) -> None:
    check_room(tmp_path)
    assert not list(tmp_path.iterdir())


def test_little_room_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, LEAST_BYTES)
    check_room(tmp_path)
    free(monkeypatch, LEAST_BYTES - 4096)
    with pytest.raises(DiskFull) as caught:
        check_room(tmp_path)
    assert caught.value.message == (
        f"{tmp_path}: less than 8 MiB free; free some space there, or set TMPDIR to a folder with room"
    )


def test_a_file_system_without_a_size_is_not_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ramfs says, and tmpfs where it has no limit."""
    free(monkeypatch, 0, whole=0)
    check_room(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES])
def test_a_write_that_fails_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    refuse(monkeypatch, number)
    with pytest.raises(DiskFull, match=rf"temporary files cannot be written \({os.strerror(number)}\)"):
        check_room(tmp_path)


def test_a_folder_that_is_gone_is_said(tmp_path: Path) -> None:
    with pytest.raises(DiskFull, match="No such file or directory"):
        check_room(tmp_path / "gone")


def test_a_fault_passes_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(tmp_path)
    disk.look()
    assert disk.fault is None
    with monkeypatch.context() as patch:
        refuse(patch, errno.ENOSPC)
        disk.look()
        first = disk.fault
        assert first is not None
        assert first.retry_after_s
        disk.look()
        assert disk.fault is first, "the same one"
    with monkeypatch.context() as patch:
        free(patch, 0)
        disk.look()
        assert disk.fault is not None
        assert "less than" in disk.fault.message
    disk.look()
    assert disk.fault is None


async def test_it_is_watched(tmp_path: Path) -> None:
    folder, away = tmp_path / "folder", tmp_path / "away"
    away.mkdir()
    disk = Disk(folder, period_s=0.01)
    watching = asyncio.create_task(disk.watch())
    try:
        for there in (False, True, False):
            # A folder that is just being written to can be moved, and not always be removed.
            if there:
                away.rename(folder)
            elif folder.exists():
                folder.rename(away)
            await asyncio.to_thread(until, lambda: (disk.fault is None) == there)  # noqa: B023
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


def test_reserved_files_have_their_room(tmp_path: Path) -> None:
    path = tmp_path / "counter_1.db"
    reserve(path, 1 << 20)
    assert path.read_bytes() == bytes(1 << 20)
    assert path.stat().st_blocks * 512 >= 1 << 20
    with pytest.raises(DiskFull, match="no room for large"):
        reserve(tmp_path / "large", 1 << 60)
