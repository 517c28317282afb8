"""Runs a stranger's model in a child process: a module of ours and its request go in, what became of it comes out.

The child shares nothing with this process but what is written here: no environment beyond what it needs, no folder, no
session, and no more time than it is given.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

# What the child needs of the environment: not the secrets of the process that started it.
_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "PYTHONHOME")


@dataclass(frozen=True)
class Ended:
    """A child that has ended: its exit code, or None where it was killed for taking too long, what it wrote to standard
    output, and what it said on standard error."""

    code: int | None
    written: bytes
    said: str


def run_child(module: str, request: Mapping[str, object], timeout_s: float) -> Ended:
    """Runs `python -m module REQUEST`, the request as JSON, in a session of its own."""
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path if entry)
    environment["OPENBLAS_NUM_THREADS"] = "1"
    command = [sys.executable, "-B", "-m", module, json.dumps(request)]
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as messages:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=messages,
            env=environment,
            cwd="/",
            start_new_session=True,
        )
        code = _wait(process, timeout_s)
        return Ended(code, _content(output), _content(messages).decode("utf-8", "replace"))


def _wait(process: subprocess.Popen[bytes], timeout_s: float) -> int | None:
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.returncode is None:
            # Not yet reaped, so the group is still this child's.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _content(file: IO[bytes], limit_bytes: int = 1 << 20) -> bytes:
    file.seek(0)
    return file.read(limit_bytes)
