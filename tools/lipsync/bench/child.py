"""A baseline's process: started as a module, it announces itself by one line and ends with its standard input."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from types import TracebackType
from typing import NoReturn

from compositor.errors import LipsyncError

from .allocator import KEEPING

_STOP_S = 20.0


class Child:
    """The parent's side. Raises LipsyncError, with the child's last line on stderr, where it ends unasked."""

    def __init__(self, module: str, arguments: Sequence[str]) -> None:
        self._module, self._arguments = module, arguments
        self.announced = ""

    def __enter__(self) -> Child:
        # Not a pipe, which a child that complains a lot would fill, and then wait for a reader.
        self._complaints = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", self._module, *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            text=True,
            env={**os.environ, **KEEPING},
        )
        try:
            self.announced = self.hear()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    @property
    def pid(self) -> int:
        return self._process.pid

    def say(self, line: str) -> None:
        """Gives the child a line."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._failed()

    def hear(self) -> str:
        """The child's next line, awaited."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._failed()
        return line.rstrip("\n")

    def _failed(self) -> NoReturn:
        status = self._process.wait()
        self._complaints.seek(0)
        lines = self._complaints.read().strip().splitlines() or [f"status {status}"]
        raise LipsyncError(f"{self._module} ended: {lines[-1]}")

    def _end(self) -> None:
        try:
            self._process.communicate(timeout=_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        finally:
            self._complaints.close()


def announce(line: str) -> None:
    """The child's side: tells the parent."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def wait_for_end() -> None:
    """The child's side: returns when the parent closes this process's standard input, or ends."""
    sys.stdin.read()
