"""The process between the project and tritonserver: in comes a spec as one JSON line, out go events as JSON lines.

It starts the server, starts it again when it dies, loads what was resident, and ends everything (server, stubs, shared
memory) when its standard input closes, that is when its owner is gone in whatever way. Standard library only: it runs
without site-packages.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lipsync.triton_processes import end_session, how_it_ended, reap, region_prefix, sweep_orphans, sweep_regions

POLL_S = 0.25
LOG_LIMIT_BYTES = 16 * 1024 * 1024
TAIL_LINES = 15
MAX_FAILED_STARTS = 5
STEADY_S = 10.0
FIRST_BACKOFF_S = 0.05
MAX_BACKOFF_S = 5.0
LOAD_TIMEOUT_S = 300.0
LATE_END_S = 10.0
"""How long a server that broke a connection off may take to end."""
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Spec:
    """What to keep running."""

    command: list[str]
    environment: dict[str, str]
    http_host: str
    http_port: int
    server_id: str
    log_path: str
    leftovers: list[str]
    """Files to remove at the end."""
    start_timeout_s: float
    stop_grace_s: float


def log_tail(path: Path, offset: int = 0) -> str:
    """The last lines of the log, of what was written from `offset` on."""
    with contextlib.suppress(OSError), path.open("rb") as log:
        log.seek(max(offset, path.stat().st_size - 4096))
        return "\n".join(log.read().decode(errors="replace").splitlines()[-TAIL_LINES:])
    return ""


class Keeper:
    """Runs one tritonserver until its owner is gone."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.prefix = region_prefix(os.getpid())
        self.owner_pid = os.getppid()
        self.server_pid = 0
        self.ending = ""
        self.resident: list[str] = []
        self.loading = ""
        self.log_offset = 0
        self._stopping = False
        self._tracker_stop = threading.Event()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)

    def run(self) -> int:
        """Keeps the server up; returns 0 when told to end, 1 when the server cannot be started."""
        self._take_signals()
        sweep_orphans()
        restarts, failures, backoff_s, ready_once = 0, 0, FIRST_BACKOFF_S, False
        try:
            while not self._stopping:
                self._spawn()
                started_at = time.monotonic()
                if self._wait_ready():
                    ready_once, failures = True, 0
                    _emit(event="ready", pid=self.server_pid, restarts=restarts)
                    self._supervise()
                    if self.ending:
                        self._note(f"the server {self.ending}")
                else:
                    failures += 1
                self._end_server()
                if self._stopping:
                    break
                if not ready_once or failures >= MAX_FAILED_STARTS:
                    _emit(event="failed", tail=log_tail(Path(self.spec.log_path), self.log_offset))
                    return 1
                restarts += 1
                ending = self.ending or f"was not ready within {self.spec.start_timeout_s:g} s"
                _emit(event="down", ending=ending, tail=log_tail(Path(self.spec.log_path), self.log_offset))
                steady = time.monotonic() - started_at > STEADY_S
                backoff_s = FIRST_BACKOFF_S if steady else min(2 * backoff_s, MAX_BACKOFF_S)
                self._pause(backoff_s)
        finally:
            self._end_server()
            for path in self.spec.leftovers:
                Path(path).unlink(missing_ok=True)
        return 0

    def _take_signals(self) -> None:
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: setattr(self, "_stopping", True))
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def _spawn(self) -> None:
        spec, keeper = self.spec, os.getpid()
        Path(spec.log_path).parent.mkdir(parents=True, exist_ok=True)
        command = [*spec.command, f"--backend-config=python,shm-region-prefix-name={self.prefix}"]

        def die_with_keeper() -> None:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != keeper:
                os._exit(1)

        with Path(spec.log_path).open("ab") as log:
            self.log_offset = log.tell()
            process = subprocess.Popen(
                command,
                env=spec.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=die_with_keeper,
            )
        self.server_pid, self.ending = process.pid, ""
        # `reap` collects it; Popen must not wait for a pid that may be another process by then.
        process.returncode = 0

    def _wait_ready(self) -> bool:
        deadline = time.monotonic() + self.spec.start_timeout_s
        while self._alive(0.02) and time.monotonic() < deadline:
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
                # The id tells this server from a stranger on the same port.
                if self._ask("GET", "/v2").get("name") == self.spec.server_id:
                    self._ask("GET", "/v2/health/ready")
                    return self.server_pid != 0
        return False

    def _supervise(self) -> None:
        self._tracker_stop = threading.Event()
        tracker = threading.Thread(target=self._track_resident, args=(self._tracker_stop,), daemon=True)
        tracker.start()
        while self._alive(POLL_S):
            self._trim_log()
        self._tracker_stop.set()
        # Forking beside a running thread is asking for deadlocks, and the next server is about to be forked.
        tracker.join(timeout=0 if self._stopping else 10)
        if self.loading and not self._stopping:
            self._note(f"the server ended while {self.loading} was loaded again: it is left out from now on")
            self.resident = [name for name in self.resident if name != self.loading]

    def _track_resident(self, stop: threading.Event) -> None:
        """Loads what was resident before, then keeps the list of what is."""
        for name in list(self.resident):
            if stop.is_set():
                return
            self.loading = name
            try:
                self._ask("POST", f"/v2/repository/models/{name}/load", LOAD_TIMEOUT_S)
            except (OSError, http.client.HTTPException, ValueError) as fault:
                # The connection goes before the process, whose end the other thread sees.
                if stop.wait(POLL_S if isinstance(fault, ValueError) else LATE_END_S):
                    return
                self._note(f"{name} could not be loaded again: {fault}")
            self.loading = ""
        while not stop.wait(POLL_S):
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
                statistics = self._ask("GET", "/v2/models/stats")["model_stats"]
                names = sorted({entry["name"] for entry in statistics})
                if names != self.resident and not stop.is_set():
                    self.resident = names
                    _emit(event="resident", names=names)

    def _ask(self, method: str, path: str, timeout_s: float = 5.0) -> Any:
        """One HTTP request to the server; its JSON answer. Raises ValueError for any status but 200."""
        connection = http.client.HTTPConnection(self.spec.http_host, self.spec.http_port, timeout=timeout_s)
        with contextlib.closing(connection):
            connection.request(method, path)
            answer = connection.getresponse()
            body = answer.read()
        if answer.status != 200:
            raise ValueError(body.decode(errors="replace"))
        return json.loads(body) if body else {}

    def _alive(self, wait_s: float) -> bool:
        """Waits at most `wait_s`; whether the server lives and is still wanted."""
        readable, _, _ = select.select([sys.stdin, self._wake_read], [], [], wait_s)
        if self._wake_read in readable:
            os.read(self._wake_read, 4096)
        # The owner never writes after the spec, so readable means closed. The parent's pid covers the case that
        # a process forked off the owner still holds the other end.
        if sys.stdin in readable or os.getppid() != self.owner_pid:
            self._stopping = True
        if (exit_code := reap().get(self.server_pid)) is not None:
            self.server_pid, self.ending = 0, how_it_ended(exit_code)
        return self.server_pid != 0 and not self._stopping

    def _pause(self, wait_s: float) -> None:
        deadline = time.monotonic() + wait_s
        while not self._stopping and (left_s := deadline - time.monotonic()) > 0:
            self._alive(left_s)

    def _end_server(self) -> None:
        self._tracker_stop.set()
        if self.server_pid:
            os.kill(self.server_pid, signal.SIGTERM)
            deadline = time.monotonic() + self.spec.stop_grace_s
            while self.server_pid not in reap() and time.monotonic() < deadline:
                time.sleep(0.01)
            self.server_pid = 0
        end_session(os.getpid())
        reap()
        sweep_regions(self.prefix)

    def _trim_log(self) -> None:
        """Moves a log that has grown too long aside, under the server's open (appending) descriptor."""
        path = Path(self.spec.log_path)
        with contextlib.suppress(OSError):
            if path.stat().st_size > LOG_LIMIT_BYTES:
                path.with_name(path.name + ".1").write_bytes(path.read_bytes())
                os.truncate(path, 0)
                self.log_offset = 0

    def _note(self, line: str) -> None:
        with contextlib.suppress(OSError), Path(self.spec.log_path).open("a") as log:
            log.write(f"keeper: {line}\n")


_emitting = threading.Lock()


def _emit(**event: object) -> None:
    with _emitting, contextlib.suppress(OSError):
        sys.stdout.write(json.dumps(event) + "\n")
        sys.stdout.flush()


def main() -> int:
    """Reads the spec from the first line of standard input and keeps the server until that closes."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    line = b""
    while not line.endswith(b"\n"):
        # Unbuffered: select must see what follows, which is the end of the file.
        byte = os.read(0, 65536)
        if not byte:
            return 0
        line += byte
    return Keeper(Spec(**json.loads(line))).run()
