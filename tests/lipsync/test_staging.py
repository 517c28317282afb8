"""Folders get into a repository whole or not at all, whoever dies or collides on the way."""

from __future__ import annotations

import errno
import fcntl
import os
import queue
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import pytest

from compositor.errors import InvalidInput
from lipsync import staging as staging_module
from lipsync.staging import FOLDER, install, remove, staging

from .conftest import tree


def build(folder: Path, name: str, content: str = "new") -> Path:
    (folder / name / "1").mkdir(parents=True)
    (folder / name / "1" / "file").write_text(content)
    return folder / name


def content(repository: Path, name: str) -> str:
    return (repository / name / "1" / "file").read_text()


def test_what_is_not_installed_leaves_nothing(tmp_path: Path) -> None:
    with staging(tmp_path, "anna") as folder:
        build(folder, "anna")
        assert folder.parent == tmp_path / FOLDER
    assert tree(tmp_path) == {}


def test_what_is_installed_is_all_there_is(tmp_path: Path) -> None:
    with staging(tmp_path / "new" / "models", "anna") as folder:
        install(build(folder, "anna"), [build(folder, "anna.raw", "raw")], tmp_path / "new" / "models")
    assert sorted(tree(tmp_path / "new" / "models")) == [
        "anna", "anna.raw", "anna.raw/1", "anna.raw/1/file", "anna/1", "anna/1/file"
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["folder", "empty", "file", "dangling"])
def test_what_is_there_stays(tmp_path: Path, kind: str) -> None:
    build(tmp_path, "anna.raw", "old")
    if kind == "folder":
        build(tmp_path, "anna", "old")
    elif kind == "empty":
        (tmp_path / "anna").mkdir()
    elif kind == "file":
        (tmp_path / "anna").write_text("old")
    else:
        (tmp_path / "anna").symlink_to("nowhere")
    before = tree(tmp_path)
    with (
        pytest.raises(InvalidInput, match=r"'anna' exists already in .*; remove it first"),
        staging(tmp_path, "anna") as f,
    ):
        install(build(f, "anna"), [build(f, "anna.raw")], tmp_path)
    assert tree(tmp_path) == before


def test_an_orphaned_companion_makes_way(tmp_path: Path) -> None:
    build(tmp_path, "anna.raw", "orphan")
    with staging(tmp_path, "anna") as folder:
        install(build(folder, "anna"), [build(folder, "anna.raw")], tmp_path)
    assert content(tmp_path, "anna.raw") == "new"
    assert not (tmp_path / FOLDER).exists()


def test_replacing_puts_the_new_in_the_old_ones_place(tmp_path: Path) -> None:
    build(tmp_path, "encoder", "old")
    with staging(tmp_path, "encoder") as folder:
        install(build(folder, "encoder"), [], tmp_path, replace=True)
    assert content(tmp_path, "encoder") == "new"


@pytest.mark.parametrize("failing", [1, 2, 3, 4])
def test_a_failing_rename_undoes_those_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    build(tmp_path, "encoder", "old")
    build(tmp_path, "companion", "old")
    before = tree(tmp_path)
    rename, calls = Path.rename, []

    def fail_once(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) == failing:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(OSError, match="Input/output error"), staging(tmp_path, "encoder") as folder:
        install(build(folder, "encoder"), [build(folder, "companion")], tmp_path, replace=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_said_in_one_line(tmp_path: Path, number: int) -> None:
    with pytest.raises(InvalidInput, match="nothing was installed; free some space") as caught, staging(tmp_path, "a"):
        raise OSError(number, "No space left on device")
    assert str(tmp_path) in caught.value.message
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("bug"), OSError(errno.EIO, "I/O")])
def test_whatever_goes_wrong_leaves_nothing_and_is_passed_on(tmp_path: Path, error: BaseException) -> None:
    def fail() -> None:
        with staging(tmp_path, "anna") as folder:
            build(folder, "anna")
            raise error

    with pytest.raises(type(error)) as caught:
        fail()
    assert caught.value is error
    assert tree(tmp_path) == {}


def test_a_repository_that_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("hello")
    for repository in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InvalidInput, match=r"cannot be written .*choose another model repository"):
            staging(repository, "anna").__enter__()
    assert tree(tmp_path).keys() == {"file"}


def test_a_disk_that_is_full_from_the_start_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**options: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    with pytest.raises(InvalidInput, match="No space left on device"):
        staging(tmp_path, "anna").__enter__()
    assert tree(tmp_path) == {}
    build(tmp_path, "anna")
    build(tmp_path, "berta")
    remove(tmp_path, ["anna"])
    assert not (tmp_path / "anna").exists(), "a full disk does not hinder making room"
    assert content(tmp_path, "berta") == "new"


def test_the_dead_are_swept_and_the_living_left_alone(tmp_path: Path) -> None:
    dead, unlocked = tmp_path / FOLDER / "dead.1", tmp_path / FOLDER / "unlocked.1"
    build(dead, "dead")
    (dead / ".lock").write_text("")
    build(unlocked, "unlocked")
    with staging(tmp_path, "living") as living:
        assert not dead.exists()
        assert not unlocked.exists()
        with staging(tmp_path, "other"):
            assert living.exists()
            assert len([path for path in (tmp_path / FOLDER).iterdir() if path.is_dir()]) == 2
        assert living.exists()
    assert tree(tmp_path) == {}


def test_a_killed_builder_is_swept_only_once_it_is_dead(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from lipsync.staging import staging\n"
    code += "with staging(Path(sys.argv[1]), 'anna') as f: (f / 'x').write_text('x'); print(f, flush=True); input()"
    builder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with builder:
        assert builder.stdout is not None
        folder = Path(builder.stdout.readline().strip())
        with staging(tmp_path, "other"):
            assert (folder / "x").exists()
        builder.kill()
        builder.wait()
    assert (folder / "x").exists()
    with staging(tmp_path, "other"):
        assert not folder.exists()
    assert tree(tmp_path) == {}


def test_a_door_that_was_removed_while_one_waited_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A waiter gets the lock of a file that the last one out has unlinked: it must come back for the new one."""
    root = tmp_path / FOLDER
    root.mkdir()
    asked: queue.Queue[int] = queue.Queue()
    entered = threading.Event()

    def flock(file: IO[str], operation: int) -> None:
        asked.put(os.fstat(file.fileno()).st_ino)
        fcntl.flock(file, operation)

    def enter() -> None:
        with staging_module._door(tmp_path):
            entered.set()

    monkeypatch.setattr(staging_module, "fcntl", SimpleNamespace(flock=flock, LOCK_EX=fcntl.LOCK_EX))
    waiter = threading.Thread(target=enter)
    with (root / ".lock").open("w") as old:
        fcntl.flock(old, fcntl.LOCK_EX)
        waiter.start()
        assert asked.get(timeout=60) == os.fstat(old.fileno()).st_ino
        (root / ".lock").unlink()
        new = (root / ".lock").open("w")
        fcntl.flock(new, fcntl.LOCK_EX)
    with new:
        assert asked.get(timeout=60) == os.fstat(new.fileno()).st_ino
        assert not entered.is_set(), "the old file's lock is free, but it is not the door's any more"
    waiter.join(60)
    assert entered.is_set()


def test_many_at_once_do_not_hinder_each_other(tmp_path: Path) -> None:
    won: list[int] = []
    lost: list[str] = []

    def one(number: int) -> None:
        try:
            with staging(tmp_path, "anna") as folder:
                install(build(folder, "anna", str(number)), [build(folder, "anna.raw", str(number))], tmp_path)
            won.append(number)
        except InvalidInput as error:
            lost.append(error.message)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(won) == 1
    assert len(lost) == 11
    assert all("exists already" in message for message in lost)
    assert content(tmp_path, "anna") == content(tmp_path, "anna.raw") == str(won[0])
    assert not (tmp_path / FOLDER).exists()


def test_removing_takes_all_names(tmp_path: Path) -> None:
    for name in ("anna", "anna.raw", "berta"):
        build(tmp_path, name)
    remove(tmp_path, ["anna", "anna.raw"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["berta"]
