"""The compositor as a process of its own, for parts that measure it: a repository and a Triton in, its address out.

A benchmark in the same process would count the client's CPU as the service's and share its interpreter lock.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from compositor.errors import LipsyncError
from compositor.settings import PREFIX, RESERVED
from lipsync.triton_processes import session_members
from lipsync.tritonserver import EmbeddedTriton

from .clocks import process_clock

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0
_LISTENING = re.compile(r" listening on (\S+:\d+), .* the page is at http://(\S+:\d+)/", re.DOTALL)
# PR_SET_PDEATHSIG: the child is told to end when this process does, however that ends.
_FOLLOWING = (
    "import ctypes, runpy, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGTERM); del sys.argv[0]; "
    "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
)


@dataclass(frozen=True)
class Service:
    """A compositor that listens. address: host:port of its gRPC service; http: of its page, WebSocket and metrics; log:
    what it writes to stderr."""

    address: str
    http: str
    pid: int
    log: Path

    def cpu_s(self) -> float:
        """CPU seconds that its process, all threads, took since it began. Raises OSError once it is gone."""
        return time.clock_gettime(process_clock(self.pid))


@contextlib.contextmanager
def running(
    repository: Path,
    triton: str,
    folder: Path,
    *,
    cores: Iterable[int] | None = None,
    settings: Mapping[str, object] | None = None,
) -> Iterator[Service]:
    """`python -m compositor` on a free port; leaving the block stops it.

    triton: its gRPC address. folder: takes the log. cores: those that it may run on. settings: others than the
    defaults, by dotted path such as `server.threads`. Raises LipsyncError where it does not start.
    """
    values = {
        "model_repository": repository.absolute(),
        "server.port": 0,
        "http.port": 0,
        "server.drain_s": 0,
        "triton.endpoints": triton,
        "logging.level": "info",
        **(settings or {}),
    }
    descriptor, log = tempfile.mkstemp(prefix="compositor-", suffix=".log", dir=folder)
    with os.fdopen(descriptor, "wb") as stderr:
        process = subprocess.Popen(
            following("compositor"), stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr, env=_environment(values)
        )
    try:
        if cores is not None:
            pin([process.pid], cores)
        yield Service(*_addresses(process, Path(log)), process.pid, Path(log))
    finally:
        stop(process)


def wait_until_ready(address: str) -> None:
    """Returns when the service at `address` says that it serves. Raises LipsyncError where it does not within
    START_TIMEOUT_S."""
    serving = health_pb2.HealthCheckResponse.SERVING
    with grpc.insecure_channel(address) as channel:
        watching = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(), timeout=START_TIMEOUT_S, wait_for_ready=True
        )
        try:
            next(answer for answer in watching if answer.status == serving)
        except (grpc.RpcError, StopIteration) as error:
            raise LipsyncError(f"the compositor at {address} was not ready within {START_TIMEOUT_S:.0f} s") from error
        finally:
            watching.cancel()


def following(module: str, *arguments: str) -> list[str]:
    """The command of `python -m module arguments` that ends when the process that starts it does."""
    return [sys.executable, "-c", _FOLLOWING, module, *arguments]


def pin(pids: Iterable[int], cores: Iterable[int]) -> None:
    """Binds all threads of these processes to cores; what they start later inherits it."""
    for pid in pids:
        bound = set[int]()
        # One that was not bound yet may have started others meanwhile.
        while fresh := {int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()} - bound:
            for thread in fresh:
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setaffinity(thread, cores)
            bound |= fresh


def triton_pids(triton: EmbeddedTriton) -> list[int]:
    """A started Triton's processes: keeper, server and the models' backend processes that live now."""
    keeper = triton.keeper_pid
    return [] if keeper is None else [keeper, *session_members(keeper)]


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a process in order, or else at once."""
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _environment(values: Mapping[str, object]) -> dict[str, str]:
    """This process's, with the settings in it and nobody else's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX) or name in RESERVED}
    kept.pop("LIPSYNC_CONFIG", None)
    return {**kept, **{PREFIX + key.upper().replace(".", "__"): str(value) for key, value in values.items()}}


def _addresses(process: subprocess.Popen[bytes], log: Path) -> tuple[str, str]:
    """Where the service says that it listens, for gRPC and for HTTP."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        ended = process.poll() is not None
        said = log.read_text(errors="replace")
        if match := _LISTENING.search(said):
            return match[1], match[2]
        if ended:
            last = (said.strip().splitlines() or [f"status {process.returncode}"])[-1]
            raise LipsyncError(f"the compositor did not start: {last.removeprefix('error: ')}")
        time.sleep(0.02)
    raise LipsyncError(f"the compositor did not listen within {START_TIMEOUT_S:.0f} s")
