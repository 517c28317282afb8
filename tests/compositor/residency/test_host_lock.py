from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from compositor.residency.host_lock import HostLock

_LONGEST_S = 240

HOLDER = """
import asyncio, sys
from pathlib import Path
from compositor.residency.host_lock import HostLock

async def main():
    lock = HostLock("triton:8001", Path(sys.argv[1]))
    await lock.acquire()
    lock.notes = {**lock.notes, "theirs": (1, 2)}
    print("held", flush=True)
    sys.stdin.readline()
    lock.release()
    print("free", flush=True)
    sys.stdin.readline()

asyncio.run(main())
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    """Another process, which has the lock when this returns."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    return process


def is_free(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


async def test_processes_exclude_each_other_and_read_each_others_notes(tmp_path: Path) -> None:
    lock = HostLock("triton:8001", tmp_path)
    with holder(tmp_path) as process:
        waiting = asyncio.create_task(lock.acquire())
        await asyncio.sleep(0.05)
        assert not waiting.done()
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
        await waiting
        assert lock.notes == {"theirs": (1, 2)}
        lock.notes = {"mine": (3, 4)}
        lock.release()
    assert is_free(lock.path)
    async with HostLock("triton:8001", tmp_path).held():
        pass
    again = HostLock("triton:8001", tmp_path)
    async with again.held():
        assert again.notes == {"mine": (3, 4)}


async def test_the_lock_of_a_process_that_is_killed_is_free(tmp_path: Path) -> None:
    lock = HostLock("triton:8001", tmp_path)
    with holder(tmp_path) as process:
        waiting = asyncio.create_task(lock.acquire())
        await asyncio.sleep(0.02)
        process.kill()
        await waiting
        lock.release()


async def test_a_wait_that_is_cancelled_leaves_nothing(tmp_path: Path) -> None:
    first, second = HostLock("triton:8001", tmp_path), HostLock("triton:8001", tmp_path)
    await first.acquire()
    waiting = [asyncio.create_task(second.acquire()) for _ in range(4)]
    await asyncio.sleep(0.02)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    first.release()
    assert is_free(first.path)
    async with second.held():
        assert not is_free(first.path)
    assert is_free(first.path)


async def test_tasks_of_one_process_hold_it_together(tmp_path: Path) -> None:
    first, second = HostLock("triton:8001", tmp_path), HostLock("triton:8001", tmp_path)
    await first.acquire()
    await first.acquire()
    first.share()
    waiting = asyncio.create_task(second.acquire())
    for _ in range(3):
        await asyncio.sleep(0.01)
        assert not waiting.done()
        first.release()
    await waiting
    second.release()


async def test_one_process_does_not_keep_it_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compositor.residency.host_lock._TURN_S", 0.05)
    first, second = HostLock("triton:8001", tmp_path), HostLock("triton:8001", tmp_path)
    stop = asyncio.Event()

    async def overlap() -> None:
        while not stop.is_set():
            async with first.held():
                await asyncio.sleep(0.01)

    greedy = [asyncio.create_task(overlap()) for _ in range(4)]
    await asyncio.sleep(0.02)
    await asyncio.wait_for(second.acquire(), 30)
    second.release()
    stop.set()
    await asyncio.gather(*greedy)
    assert is_free(first.path)


async def test_a_process_that_is_alone_goes_on_taking_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compositor.residency.host_lock._TURN_S", 0)
    lock, other = HostLock("triton:8001", tmp_path), HostLock("triton:8001", tmp_path)
    async with lock.held(), lock.held(), lock.held():
        waiting = asyncio.create_task(other.acquire())
        await asyncio.sleep(0.05)
        again = asyncio.create_task(lock.acquire())
        await asyncio.sleep(0.05)
        assert not again.done(), "another waits, and comes first"
    await waiting
    assert not again.done()
    other.release()
    await again
    lock.release()
    assert is_free(lock.path)


async def test_each_server_has_its_own(tmp_path: Path) -> None:
    paths = {HostLock(endpoint, tmp_path).path for endpoint in ("a:1", "a:2", "[::1]:1", "../../a:1")}
    assert len(paths) == 4
    assert {path.parent for path in paths} == {tmp_path}
    async with HostLock("a:1", tmp_path).held(), HostLock("a:2", tmp_path).held():
        pass


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"m": 5}', b'{"m": ["x"]}', b"\xff"])
async def test_notes_that_cannot_be_read_are_none(tmp_path: Path, content: bytes) -> None:
    lock = HostLock("triton:8001", tmp_path)
    lock.path.write_bytes(content)
    async with lock.held():
        assert lock.notes == {}
        lock.notes = {"m": (1,)}
    async with lock.held():
        assert lock.notes == {"m": (1,)}


async def test_a_file_that_is_tidied_away_is_made_again(tmp_path: Path) -> None:
    first, second = HostLock("triton:8001", tmp_path), HostLock("triton:8001", tmp_path)
    async with first.held():
        first.path.unlink()
    async with second.held():
        assert not is_free(second.path)


async def test_a_file_that_is_taken_away_as_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lock = HostLock("triton:8001", tmp_path)
    look = os.fstat

    def late(file: int) -> os.stat_result:
        lock.path.unlink()
        monkeypatch.undo()
        return look(file)

    monkeypatch.setattr(os, "fstat", late)
    async with lock.held():
        assert not is_free(lock.path)
    assert not caplog.messages


async def test_where_the_file_cannot_be_had_nobody_is_kept_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = tmp_path / "elsewhere"
    lock = HostLock("triton:8001", tmp_path)
    lock.path.symlink_to(target)
    async with lock.held():
        assert lock.notes == {}
    assert not target.exists(), "a link that somebody left there is not followed"
    assert "no lock on this host" in caplog.text


async def test_the_file_is_the_owners_alone(tmp_path: Path) -> None:
    lock = HostLock("triton:8001", tmp_path)
    async with lock.held():
        assert lock.path.stat().st_mode & 0o777 == 0o600


async def test_what_says_nothing_is_removed_and_notes_stay(tmp_path: Path) -> None:
    lock, other = HostLock("triton:8001", tmp_path), HostLock("triton:8001", tmp_path)
    async with lock.held():
        waiting = asyncio.create_task(other.acquire())
        while len(files(tmp_path)) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0)
        lock.close()
        assert {path.suffix for path in files(tmp_path)} == {".lock", ".queue"}, "it is in use, and somebody waits"
    await waiting
    other.notes = {"m": (1,)}
    other.release()
    other.close()
    assert files(tmp_path) == [lock.path]
    async with lock.held():
        assert lock.notes == {"m": (1,)}
        lock.notes = {}
    lock.close()
    lock.close()
    assert not files(tmp_path)


def files(folder: Path) -> list[Path]:
    return list(folder.iterdir())


RACER = """
import asyncio, os, sys
from pathlib import Path
from compositor.residency.host_lock import HostLock

folder, inside = Path(sys.argv[1]), Path(sys.argv[2])

async def main():
    for _ in range(300):
        lock = HostLock("triton:8001", folder)
        async with lock.held():
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
            # The others get to try, and to stand in line.
            await asyncio.sleep(0.0005)
            inside.unlink()
        lock.close()

asyncio.run(main())
"""


@contextlib.contextmanager
def started(commands: Sequence[Sequence[str]]) -> Iterator[list[subprocess.Popen[str]]]:
    """A process for each, none of which outlives the block."""
    with contextlib.ExitStack() as stack:
        processes = []
        for command in commands:
            process = stack.enter_context(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
            stack.callback(process.kill)
            processes.append(process)
        yield processes


def test_processes_that_remove_the_files_as_others_lock_them_exclude_each_other(tmp_path: Path) -> None:
    """Each ends hundreds of times, as others begin. Two that have the lock at once would meet in `inside`."""
    folder = tmp_path / "locks"
    folder.mkdir()
    command = [sys.executable, "-c", RACER, str(folder), str(tmp_path / "inside")]
    with started([command] * 4) as racers:
        said = [racer.communicate(timeout=_LONGEST_S)[1] for racer in racers]
    assert said == [""] * 4
    assert [racer.returncode for racer in racers] == [0, 0, 0, 0]
    assert not files(folder), "the last one took them away"
