"""The embedded Triton: in goes a model repository, out come the addresses of a real, supervised tritonserver on it.

Owns the keeper process (`triton_keeper`) that owns the server; knows nothing of tenants, models or inference.
"""

from __future__ import annotations

import json
import logging
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType

from compositor.errors import InvalidInput, LipsyncError, TritonUnavailable
from compositor.residency.host_lock import HostLock
from lipsync.triton_install import TritonHome, default_home, install, require_plain_path
from lipsync.triton_keeper import Spec, log_tail
from lipsync.triton_processes import end_session, new_log, region_prefix, sweep_logs, sweep_regions

__all__ = ["EmbeddedTriton", "TritonHome", "default_home", "install"]

# One region a model instance. Enough for four frames of a fused tenant (131 KB in, 1.3 MB out) without growing;
# Docker's /dev/shm of 64 MB holds 15 such.
SHM_DEFAULT_BYTES = 4 * 1024 * 1024
SHM_GROWTH_BYTES = 4 * 1024 * 1024
# Triton takes 2.5 s to stop with models loaded; killed before, it leaves a folder of its Python backend in /tmp.
STOP_GRACE_S = 5.0
_PORT_TRIES = 5
_KEEPER = "import sys; sys.path.append(sys.argv[1]); from lipsync.triton_keeper import main; sys.exit(main())"
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _State:
    """What the keeper last told of its server. Written by one thread at a time, whole."""

    server_pid: int | None = None
    restarts: int = 0
    resident: frozenset[str] = frozenset()
    failure: str | None = None
    """The end of the log, once the server is gone for good."""


class EmbeddedTriton:
    """A tritonserver on `repository`, explicit model control, nothing loaded, kept alive until `stop`.

    A port of 0 is chosen free and kept over restarts. Models that were READY when the server died are loaded again,
    from the repository's config (a config given at load time is not remembered). The server, its stubs and its shared
    memory end with this object or with this process, however it ends.
    """

    def __init__(
        self,
        repository: Path,
        *,
        home: Path | None = None,
        grpc_port: int = 0,
        http_port: int = 0,
        metrics_port: int = 0,
        host: str = "127.0.0.1",
        log_path: Path | None = None,
        start_timeout_s: float = 30.0,
    ) -> None:
        self._repository = Path(repository).absolute()
        self._home = home
        self._given_ports = {"grpc_port": grpc_port, "http_port": http_port, "metrics_port": metrics_port}
        self._ports = dict(self._given_ports)
        self._host = host
        self._log_path = log_path.absolute() if log_path is not None else None
        self._start_timeout_s = start_timeout_s
        self._keeper: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._changed = threading.Condition()
        self._state = _State()
        self._prefix = ""

    @property
    def grpc(self) -> str:
        """Address of the gRPC service, `host:port`."""
        return f"{self._host}:{self._ports['grpc_port']}"

    @property
    def http(self) -> str:
        """Address of the HTTP service, `host:port`."""
        return f"{self._host}:{self._ports['http_port']}"

    @property
    def metrics(self) -> str:
        """Address of the Prometheus metrics (path `/metrics`), `host:port`."""
        return f"{self._host}:{self._ports['metrics_port']}"

    @property
    def pid(self) -> int | None:
        """Process id of the server that is ready now; None while there is none."""
        return self._state.server_pid

    @property
    def restarts(self) -> int:
        """How often the server died and was started again."""
        return self._state.restarts

    @property
    def resident(self) -> frozenset[str]:
        """The models that would be loaded again if the server died now; at most about 0.3 s old."""
        return self._state.resident

    @property
    def keeper_pid(self) -> int | None:
        """Process id of the keeper, which is also the session id of the server and its stubs."""
        return self._keeper.pid if self._keeper is not None else None

    @property
    def alive(self) -> bool:
        """False before `start`, after `stop`, and once the keeper gave up or was killed."""
        return self._keeper is not None and self._state.failure is None

    def __enter__(self) -> EmbeddedTriton:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Installs what is missing, starts the server and returns when it is ready.

        Raises `InvalidInput` for a repository or port that cannot be used, and `TritonUnavailable`, with the end of
        the server's log, when it does not become ready within the start timeout.
        """
        if self._keeper is not None:
            raise LipsyncError("this embedded Triton is already started")
        require_plain_path(self._repository, "the model repository", "repository")
        if not self._repository.is_dir():
            raise InvalidInput(
                f"the model repository {self._repository} is not a directory:"
                " create it, or name another (--repository)",
                field="repository",
            )
        home = install(self._home or default_home(), _logger.info)
        for tries_left in reversed(range(_PORT_TRIES)):
            self._choose_ports()
            tail = self._launch(home)
            if tail is None:
                return
            # Another process took a port between its choice and the server's bind.
            if "already in use" not in tail or 0 not in self._given_ports.values() or not tries_left:
                raise TritonUnavailable(f"the embedded Triton did not start; its log ends with:\n{tail}")

    def stop(self) -> None:
        """Ends the server, its stubs and the keeper, and removes their shared memory. Safe to call twice."""
        keeper, self._keeper = self._keeper, None
        if keeper is None or keeper.stdin is None or keeper.stdout is None:
            return
        keeper.stdin.close()
        try:
            keeper.wait(timeout=STOP_GRACE_S + 15.0)
        except subprocess.TimeoutExpired:
            keeper.kill()
            keeper.wait()
        if self._reader is not None:
            self._reader.join()
        keeper.stdout.close()

    def _choose_ports(self) -> None:
        self._ports = dict(self._given_ports)
        for field, port in self._given_ports.items():
            if port and not _is_free(self._host, port):
                raise InvalidInput(
                    f"{field} {port} on {self._host} is in use or not allowed: give another, or 0 to have one chosen",
                    field=field,
                )
            while not self._ports[field]:
                candidate = _free_port(self._host)
                self._ports[field] = 0 if candidate in self._ports.values() else candidate

    def _launch(self, home: TritonHome) -> str | None:
        """Starts a keeper; None once the server is ready, else the end of the log of what was ended again."""
        log_path, log, leftovers = self._open_log()
        server_id = f"lipsync-{uuid.uuid4().hex}"
        spec = Spec(
            command=self._command(home, server_id),
            environment=_environment(home),
            http_host=self._host,
            http_port=self._ports["http_port"],
            server_id=server_id,
            log_path=str(log_path),
            leftovers=[str(path) for path in leftovers],
            start_timeout_s=self._start_timeout_s,
            stop_grace_s=STOP_GRACE_S,
        )
        self._note(_State())
        try:
            # A session of its own: the terminal's Ctrl-C reaches this process only, which then ends the rest in order.
            # Without site-packages it starts in 20 ms and cannot be broken by the environment.
            keeper = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _KEEPER, str(Path(__file__).resolve().parents[1])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        finally:
            os.close(log)
        self._keeper = keeper
        self._prefix = region_prefix(keeper.pid)
        self._reader = threading.Thread(target=self._follow, args=(keeper, log_path, leftovers), daemon=True)
        self._reader.start()
        try:
            assert keeper.stdin is not None
            keeper.stdin.write(json.dumps(asdict(spec)).encode() + b"\n")
            keeper.stdin.flush()
            with self._changed:
                self._changed.wait_for(lambda: self._state.server_pid is not None or self._state.failure is not None)
        except BaseException:
            self.stop()
            raise
        if self._state.failure is not None:
            self.stop()
        return self._state.failure

    def _open_log(self) -> tuple[Path, int, list[Path]]:
        """The log, a descriptor that appends to it, and the files that are nobody's once the server has gone."""
        # What compositors of this host share as long as there is a server at this address.
        lock = HostLock(self.grpc).path
        leftovers = [lock, lock.with_suffix(".queue")]
        if self._log_path is None:
            folder = Path(tempfile.gettempdir())
            sweep_logs(folder)
            path, log = new_log(folder)
            return path, log, [path, path.with_name(path.name + ".1"), *leftovers]
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        return self._log_path, os.open(self._log_path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o666), leftovers

    def _follow(self, keeper: subprocess.Popen[bytes], log_path: Path, leftovers: list[Path]) -> None:
        """Takes in the keeper's events until it ends, and cleans up where it could not."""
        assert keeper.stdout is not None
        was_ready = False
        for line in keeper.stdout:
            match json.loads(line):
                case {"event": "ready", "pid": pid, "restarts": restarts}:
                    was_ready = True
                    self._note(replace(self._state, server_pid=pid, restarts=restarts))
                case {"event": "resident", "names": names}:
                    self._note(replace(self._state, resident=frozenset(names)))
                case {"event": "down", "ending": ending, "tail": tail}:
                    self._note(replace(self._state, server_pid=None))
                    _logger.warning(
                        "the embedded Triton %s and is started again; the end of its log:\n%s", ending, tail
                    )
                case {"event": "failed", "tail": tail}:
                    self._note(replace(self._state, server_pid=None, failure=tail))
        tail = log_tail(log_path)
        # Does nothing after an orderly end; the keeper itself may have been killed, though.
        end_session(keeper.pid)
        sweep_regions(self._prefix)
        for path in leftovers:
            path.unlink(missing_ok=True)
        failure = tail if self._state.failure is None else self._state.failure
        self._note(replace(self._state, server_pid=None, failure=failure))
        if was_ready and self._keeper is keeper:
            _logger.error("the embedded Triton is gone for good; its log ends with:\n%s", failure)

    def _note(self, state: _State) -> None:
        with self._changed:
            self._state = state
            self._changed.notify_all()

    def _command(self, home: TritonHome, server_id: str) -> list[str]:
        address, ports = self._host, self._ports
        command = [
            str(home.server),
            f"--id={server_id}",
            f"--model-repository={self._repository}",
            f"--backend-directory={home.backends}",
            "--model-control-mode=explicit",
            # With it a cold load takes 105 ms, without 1360 ms: the backend need not run once more to be asked.
            "--disable-auto-complete-config",
            # Otherwise the server is 'not ready' whenever any model is unloading.
            "--strict-readiness=false",
            f"--http-address={address}",
            f"--http-port={ports['http_port']}",
            f"--grpc-address={address}",
            f"--grpc-port={ports['grpc_port']}",
            f"--metrics-address={address}",
            f"--metrics-port={ports['metrics_port']}",
            "--allow-sagemaker=false",
            "--allow-vertex-ai=false",
            f"--backend-config=python,shm-default-byte-size={SHM_DEFAULT_BYTES}",
            f"--backend-config=python,shm-growth-byte-size={SHM_GROWTH_BYTES}",
        ]
        if "--allow-client-shm" in home.flags:
            command.append("--allow-client-shm=true")
        return command


def _environment(home: TritonHome) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    path = os.environ.get("PATH") or os.defpath
    if not home.cuda:
        # KIND_AUTO shall mean the CPU where onnxruntime could not use the GPU that Triton sees.
        kept["CUDA_VISIBLE_DEVICES"] = ""
    return {**kept, "PATH": f"{home.python_bin}:{path}", "LD_LIBRARY_PATH": home.library_path}


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        # As the server does: a port in TIME_WAIT is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except (OSError, OverflowError):
            return False
    return True


def _free_port(host: str) -> int:
    """A free port below the range that outgoing connections draw from, so that none takes it during a restart."""
    try:
        low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:
        low = 32768
    for _ in range(200):
        port = random.randrange(10240, max(low, 20480))
        if _is_free(host, port):
            return port
    raise TritonUnavailable(f"no free port found on {host}")
