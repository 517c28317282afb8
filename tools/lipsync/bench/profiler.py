"""py-spy on a running process: its threads' samples, their exact CPU time, and a flame graph.

Samples say where a thread was, the kernel's accounts how much CPU it took; neither alone tells what a function costs.
Needs ptrace (root, or the capability SYS_PTRACE).
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from compositor.errors import LipsyncError

_RATE = 250
_THREAD = re.compile(r"thread \((\d+)\)")
_FRAME = re.compile(r"(?P<function>.*) \((?P<file>[^()]*?)(?::(?P<line>\d+))?\)$")
_SLACK_S = 60


class ProfilerMissing(LipsyncError):
    """py-spy is not installed, or may not look into the process."""


@dataclass(frozen=True)
class Frame:
    """One call of a stack. file: a path, or the library's of a native function; line: 0 where it has none."""

    function: str
    file: str
    line: int = 0


@dataclass(frozen=True)
class Stack:
    """What a thread, by its kernel id, was seen doing `samples` times: from the outermost call to the innermost."""

    thread: int
    frames: tuple[Frame, ...]
    samples: int


@dataclass(frozen=True)
class Profile:
    """Stacks of some seconds, and the CPU seconds that each thread of the process took just before, by (id, name):
    being sampled takes CPU itself, most of it of threads that wait."""

    stacks: list[Stack]
    cpu_s: dict[tuple[int, str], float]


def find() -> str:
    """The program. Raises ProfilerMissing."""
    beside = Path(sys.executable).parent / "py-spy"
    found = str(beside) if beside.is_file() else shutil.which("py-spy")
    if found is None:
        raise ProfilerMissing("py-spy is not installed; get it with `pip install 'triton-lipsync[bench]'`")
    return found


def record(pid: int, seconds: float, path: Path) -> Profile:
    """Accounts of a process for a quarter of the time, then its samples; native functions are among them where py-spy
    can see them. Raises ProfilerMissing."""
    find()
    spent = _account(pid, seconds / 4)
    options = ["--format", "raw", "--threads", "--full-filenames"]
    try:
        _spy(pid, seconds * 3 / 4, path, *options, "--native")
    except ProfilerMissing:
        _spy(pid, seconds * 3 / 4, path, *options)
    return Profile(list(stacks(path.read_text())), spent)


def _account(pid: int, seconds: float) -> dict[tuple[int, str], float]:
    before = thread_cpu_s(pid)
    time.sleep(seconds)
    return {thread: total - before.get(thread, 0.0) for thread, total in thread_cpu_s(pid).items()}


def draw(pid: int, seconds: float, path: Path) -> str:
    """A flame graph (SVG) of a process's Python functions. Raises ProfilerMissing."""
    _spy(pid, seconds, path, "--format", "flamegraph")
    return path.read_text()


def stacks(text: str) -> Iterator[Stack]:
    """The lines of py-spy's raw format: `thread (id): name;function (file:line);... samples`."""
    for line in text.splitlines():
        chain, _, samples = line.rpartition(" ")
        head, *calls = chain.split(";")
        if match := _THREAD.match(head):
            yield Stack(int(match[1]), tuple(_frame(call) for call in calls), int(samples))


def _frame(call: str) -> Frame:
    match = _FRAME.match(call)
    return Frame(match["function"], match["file"], int(match["line"] or 0)) if match else Frame(call, "")


def thread_cpu_s(pid: int) -> dict[tuple[int, str], float]:
    """CPU seconds of each thread since it began, in nanoseconds' precision, by (id, name). proc(5): schedstat."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            name = (task / "comm").read_text().strip()
            found[int(task.name), name] = int((task / "schedstat").read_text().split()[0]) / 1e9
    return found


def _spy(pid: int, seconds: float, path: Path, *options: str) -> None:
    command = [find(), "record", "--pid", str(pid), "--rate", str(_RATE), "--duration", str(max(1, round(seconds)))]
    try:
        done = subprocess.run(
            [*command, *options, "--output", str(path)],
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds + _SLACK_S,
            env={**os.environ, "RUST_BACKTRACE": "0"},
        )
    except subprocess.TimeoutExpired as error:
        raise ProfilerMissing("py-spy did not end") from error
    if done.returncode or not path.is_file():
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise ProfilerMissing(f"py-spy cannot look into the process: {last.strip()}")
