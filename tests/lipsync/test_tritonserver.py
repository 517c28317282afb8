"""Installing and keeping the embedded Triton, with pip and tritonserver played by small stand-ins."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import platform
import random
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from compositor.errors import InvalidInput, LipsyncError, TritonUnavailable
from lipsync import triton_install, triton_keeper, triton_processes, tritonserver

DEADLINE_S = 60.0
# Answers as tritonserver does, keeps its models in memory, and dies when asked to load `deadly`.
FAKE_SERVER = """
import json, os, re, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
port, server_id, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
prefix = next(a for a in sys.argv if "shm-region-prefix-name=" in a).rpartition("=")[2]
open(f"/dev/shm/{prefix}region", "w").close()
with open(f"{folder}/starts", "a") as starts:
    starts.write(f"{os.getpid()}\\n")
if os.path.exists(f"{folder}/broken"):
    sys.exit("error: broken on purpose")
loaded = set()
class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args): pass
    def answer(self, body):
        self.send_response(200); self.end_headers(); self.wfile.write(json.dumps(body).encode())
    def do_GET(self):
        stats = {"model_stats": [{"name": n} for n in loaded]}
        self.answer({"/v2": {"name": server_id}, "/v2/models/stats": stats}.get(self.path, {}))
    def do_POST(self):
        name = re.fullmatch("/v2/repository/models/(.*)/load", self.path)[1]
        if name == "deadly" and os.path.exists(f"{folder}/deadly"):
            os._exit(1)
        loaded.add(name); self.answer({})
HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def eventually(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {DEADLINE_S:.0f} s: {what}"
        time.sleep(0.01)


# Installing


def test_home_by_environment_checkout_and_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIPSYNC_TRITON_HOME", str(tmp_path / "given"))
    assert triton_install.default_home() == tmp_path / "given"
    monkeypatch.delenv("LIPSYNC_TRITON_HOME")
    assert triton_install.default_home() == Path(__file__).resolve().parents[2] / ".triton"
    monkeypatch.setattr(triton_install, "_checkout", lambda: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert triton_install.default_home() == tmp_path / "triton-lipsync" / "triton"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert triton_install.default_home() == Path.home() / ".cache" / "triton-lipsync" / "triton"


@pytest.mark.parametrize(
    ("machine", "libc", "message"),
    [
        ("aarch64", ("glibc", "2.39"), "x86_64 Linux only, and this is aarch64"),
        ("x86_64", ("glibc", "2.31"), r"glibc 2\.35 or newer.*this is glibc 2\.31"),
        ("x86_64", ("glibc", "2.9"), r"this is glibc 2\.9"),
        ("x86_64", ("", ""), "this is no glibc"),
    ],
)
def test_unfit_platforms_are_named(
    machine: str, libc: tuple[str, str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(platform, "libc_ver", lambda: libc)
    with pytest.raises(InvalidInput, match=message):
        triton_install.install(tmp_path / "home", lambda _: None)
    assert not (tmp_path / "home").exists()


def test_missing_bash_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(InvalidInput, match="install the package `bash`"):
        triton_install.check_platform()


@pytest.mark.parametrize("name", ["my models", "a;b", "$(touch x)", "a'b", "a*"])
def test_paths_that_a_shell_would_take_apart_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="symbolic link") as fault:
        triton_install.require_plain_path(tmp_path / name, "the model repository", "repository")
    assert fault.value.field == "repository"
    triton_install.require_plain_path(tmp_path / "models-1.0_x@y=z", "the model repository", "repository")


@pytest.fixture
def wheel(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """pip replaced by one that lays out a wheel whose server knows a flag; returns the commands that were run."""
    commands: list[list[str]] = []

    def pip(command: list[str], fault: str, environment: dict[str, str] | None = None) -> None:
        commands.append(command)
        target = Path(command[command.index("--target") + 1])
        server = target / "pytriton" / "tritonserver"
        stub = server / "python_backend_stubs" / triton_install._PYTHON_VERSION / "triton_python_backend_stub"
        backend = server / "backends" / "python"
        files = [stub, backend / "libtriton_python.so", backend / "triton_python_backend_utils.py"]
        files += [target / "bin" / "pytriton", target / "pytriton" / "client" / "x.py"]
        for path in files:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")
        (target / "nvidia_pytriton.libs").mkdir()
        (server / "bin").mkdir()
        (server / "bin" / "tritonserver").write_text(
            "#!/bin/sh\necho --model-control-mode --allow-client-shm; exit 1\n"
        )
        (server / "bin" / "tritonserver").chmod(0o755)

    monkeypatch.setattr(triton_install, "_run", pip)
    monkeypatch.setattr(triton_install, "_find_libpython", lambda: Path("/lib/libpython.so"))
    return commands


def test_install_lays_out_everything_once(tmp_path: Path, wheel: list[list[str]]) -> None:
    lines: list[str] = []
    home = triton_install.install(tmp_path / "home", lines.append)
    assert home.server.is_file()
    assert sorted(path.name for path in (home.backends / "python").iterdir()) == [
        "libtriton_python.so",
        "triton_python_backend_stub",
        "triton_python_backend_utils.py",
    ]
    assert (home.backends / "onnxruntime" / "model.py").read_text() == triton_install.backend_source().read_text()
    assert (home.python_bin / "python3").resolve().is_file()
    assert home.flags == {"--allow-client-shm"}
    assert not (home.root / "wheel" / "bin").exists()
    assert [path.name for path in (home.root / "wheel" / "pytriton").iterdir()] == ["tritonserver"]
    assert len(lines) == 2
    assert triton_install.install(tmp_path / "home", lines.append) == home
    assert len(lines) == 2, "the second time is silent"
    assert len(wheel) == 1


def test_a_changed_backend_is_taken_up(tmp_path: Path, wheel: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    triton_install.install(tmp_path / "home", lambda _: None)
    changed = tmp_path / "model.py"
    changed.write_text("# changed")
    monkeypatch.setattr(triton_install, "backend_source", lambda: changed)
    home = triton_install.install(tmp_path / "home", lambda _: None)
    assert (home.backends / "onnxruntime" / "model.py").read_text() == "# changed"


def test_stub_environment_finds_this_environment_s_packages(tmp_path: Path, wheel: list[list[str]]) -> None:
    home = triton_install.install(tmp_path / "home", lambda _: None)
    # As the stub does: no variables, no user site, the first python3 of PATH.
    code = "import numpy, onnxruntime, sys; print(numpy.__file__, onnxruntime.__file__)"
    found = subprocess.run([home.python_bin / "python3", "-I", "-c", code], capture_output=True, text=True, check=True)
    import numpy
    import onnxruntime

    assert found.stdout.split() == [numpy.__file__, onnxruntime.__file__]


def test_interrupted_install_leaves_nothing_that_looks_complete(
    tmp_path: Path, wheel: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = triton_install._run

    def interrupted(command: list[str], fault: str, environment: dict[str, str] | None = None) -> None:
        pip(command, fault)
        raise KeyboardInterrupt

    monkeypatch.setattr(triton_install, "_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        triton_install.install(tmp_path / "home", lambda _: None)
    assert [path.name for path in (tmp_path / "home").iterdir()] == [".lock"]
    # Killed outright, the staging folder stays; the next install removes it.
    (tmp_path / "home" / "wheel.staging-killed").mkdir()
    monkeypatch.setattr(triton_install, "_run", pip)
    triton_install.install(tmp_path / "home", lambda _: None)
    assert not (tmp_path / "home" / "wheel.staging-killed").exists()


def test_failing_pip_gives_its_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_install, "WHEEL", "no such requirement")
    with pytest.raises(LipsyncError, match=r"pip could not install no such requirement: .*") as fault:
        triton_install.install(tmp_path / "home", lambda _: None)
    assert "\n" not in fault.value.message
    assert not (tmp_path / "home" / "wheel").exists()


def test_missing_libpython_names_the_package_unless_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apt-get").write_text("")
    (tmp_path / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    package = f"libpython{sys.version_info.major}.{sys.version_info.minor}"
    with pytest.raises(InvalidInput, match=f"sudo apt-get install {package}"):
        triton_install._install_libpython(lambda _: None)
    commands: list[list[str]] = []
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(triton_install, "_run", lambda command, *_: commands.append(command))
    triton_install._install_libpython(lambda _: None)
    assert commands[-1] == [str(tmp_path / "apt-get"), "install", "-y", "-qq", package]


def test_libpython_is_found_where_the_interpreter_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / triton_install._LIBPYTHON
    library.write_bytes(b"")
    monkeypatch.setattr(sysconfig, "get_config_var", lambda name: str(tmp_path) if name == "LIBDIR" else None)
    assert triton_install._find_libpython() == library


# Processes and regions


def test_start_time_names_a_living_process_only() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert process.stdin is not None
    started = triton_processes.process_start_time(process.pid)
    assert started is not None
    assert started == triton_processes.process_start_time(process.pid)
    process.stdin.close()
    # A zombie is gone, too.
    eventually(lambda: triton_processes.process_start_time(process.pid) is None, "the process ended")
    process.wait()
    assert triton_processes.process_start_time(process.pid) is None


def test_end_session_spares_the_leader_and_others() -> None:
    code = "import subprocess, sys; subprocess.Popen(['sleep', '100']); print('up', flush=True); input()"
    leaders = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        for _ in range(2)
    ]
    try:
        for leader in leaders:
            assert leader.stdout is not None
            assert leader.stdout.readline() == b"up\n"
        assert len(triton_processes.session_members(leaders[0].pid)) == 1
        triton_processes.end_session(leaders[0].pid, DEADLINE_S)
        assert triton_processes.session_members(leaders[0].pid) == []
        assert leaders[0].poll() is None
        assert len(triton_processes.session_members(leaders[1].pid)) == 1
    finally:
        for leader in leaders:
            triton_processes.end_session(leader.pid)
            leader.kill()
            leader.communicate()


def test_sweep_takes_the_regions_of_dead_keepers_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_processes, "SHM", tmp_path)
    namespace = triton_processes._pid_namespace()
    living = f"{triton_processes.region_prefix(os.getpid())}a"
    start = triton_processes.process_start_time(os.getpid())
    kept = [living, f"lipsync-triton-{namespace + 1}-{2**22 + 1}-5-a", "lipsync-triton-unlike", "other"]
    dead = [
        f"lipsync-triton-{namespace}-{2**22 + 1}-5-a",
        f"lipsync-triton-{namespace}-{os.getpid()}-{(start or 0) + 1}-a",
    ]
    for name in kept + dead:
        (tmp_path / name).touch()
    triton_processes.sweep_orphans()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
    triton_processes.sweep_regions(triton_processes.region_prefix(os.getpid()))
    assert living not in [path.name for path in tmp_path.iterdir()]


def test_sweep_ends_stubs_that_outlived_their_keeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_processes, "SHM", tmp_path)
    region = f"lipsync-triton-{triton_processes._pid_namespace()}-{2**22 + 1}-5-a"
    (tmp_path / region).touch()
    code = "print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code, region], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as stub:
        assert stub.stdout is not None
        # Its arguments are not there yet when Popen returns: the kernel sets them after it has closed the pipe by which
        # Popen knows that the program runs.
        stub.stdout.readline()
        triton_processes.sweep_orphans()
        assert stub.wait(DEADLINE_S) == -signal.SIGKILL


def test_logs_are_swept_once_nobody_has_them(tmp_path: Path) -> None:
    (path, ours), (left, theirs) = (triton_processes.new_log(tmp_path) for _ in range(2))
    os.write(ours, b"one\n")
    code = "print(flush=True); input()"
    keeper = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=ours)
    assert keeper.stdout is not None
    # Until it has begun its program, it has the other log, too.
    keeper.stdout.readline()
    other = tmp_path / "other.log"
    other.touch()
    os.close(ours)
    os.close(theirs)
    try:
        triton_processes.sweep_logs(tmp_path)
        assert sorted(tmp_path.iterdir()) == sorted([other, path])
        assert path.read_text() == "one\n"
    finally:
        keeper.kill()
        keeper.communicate()
    triton_processes.sweep_logs(tmp_path)
    assert list(tmp_path.iterdir()) == [other]
    assert left != path


# Keeping


@contextlib.contextmanager
def kept(folder: Path, **changes: object) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A keeper of the fake server: (it, the server's port)."""
    port = tritonserver._free_port("127.0.0.1")
    (folder / "server.py").write_text(FAKE_SERVER)
    spec = triton_keeper.Spec(
        command=[sys.executable, str(folder / "server.py"), str(port), "the-id", str(folder)],
        environment=dict(os.environ),
        http_host="127.0.0.1",
        http_port=port,
        server_id="the-id",
        log_path=str(folder / "log"),
        leftovers=[],
        start_timeout_s=DEADLINE_S,
        stop_grace_s=0.2,
    )
    keeper = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", tritonserver._KEEPER, str(Path(tritonserver.__file__).parents[1])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    assert keeper.stdin is not None
    prefix = triton_processes.region_prefix(keeper.pid)
    keeper.stdin.write(json.dumps({**dataclasses.asdict(spec), **changes}) + "\n")
    keeper.stdin.flush()
    try:
        yield keeper, port
    finally:
        keeper.communicate(timeout=DEADLINE_S)
        assert triton_processes.session_members(keeper.pid) == []
        assert list(triton_processes.SHM.glob(f"{prefix}*")) == []


def event(keeper: subprocess.Popen[str], kind: str) -> dict[str, object]:
    """The next event of that kind."""
    assert keeper.stdout is not None
    for line in keeper.stdout:
        found: dict[str, object] = json.loads(line)
        if found["event"] == kind:
            return found
    raise AssertionError(f"the keeper ended without saying {kind!r}")


def load(port: int, name: str) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(f"POST /v2/repository/models/{name}/load HTTP/1.0\r\n\r\n".encode())
        connection.recv(1000)


def starts(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "starts").read_text().split()]


def test_keeper_restarts_and_loads_again(tmp_path: Path) -> None:
    with kept(tmp_path) as (keeper, port):
        ready = event(keeper, "ready")
        assert ready == {"event": "ready", "pid": starts(tmp_path)[0], "restarts": 0}
        load(port, "tenant")
        assert event(keeper, "resident")["names"] == ["tenant"]
        os.kill(starts(tmp_path)[0], signal.SIGKILL)
        assert event(keeper, "down")["ending"] == "was ended by SIGKILL"
        assert event(keeper, "ready")["restarts"] == 1
        load(port, "second")
        assert event(keeper, "resident")["names"] == ["second", "tenant"]


def test_model_that_kills_the_server_is_left_out(tmp_path: Path) -> None:
    with kept(tmp_path) as (keeper, port):
        event(keeper, "ready")
        for name in ("deadly", "harmless"):
            load(port, name)
        while event(keeper, "resident")["names"] != ["deadly", "harmless"]:
            pass
        (tmp_path / "deadly").touch()
        os.kill(starts(tmp_path)[0], signal.SIGKILL)
        assert event(keeper, "ready")["restarts"] == 1
        assert event(keeper, "down")["ending"] == "exited with status 1"
        assert event(keeper, "ready")["restarts"] == 2
        assert keeper.stdin is not None
        eventually(lambda: "deadly was loaded again: it is left out" in (tmp_path / "log").read_text(), "said so")
        # The rest is not lost: the third server has it, and would have it again.
        load(port, "third")
        assert event(keeper, "resident")["names"] == ["harmless", "third"]


class LateEnd(threading.Event):
    """Of a server whose end is seen only after more than a poll's time."""

    def wait(self, timeout: float | None = None) -> bool:
        if timeout is None or timeout > triton_keeper.POLL_S:
            self.set()
        return self.is_set()


def test_model_that_kills_the_server_is_known_however_late_the_end_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def reset(*_: object) -> None:
        raise ConnectionResetError

    keeper = object.__new__(triton_keeper.Keeper)
    keeper.resident, keeper.loading = ["deadly", "harmless"], ""
    monkeypatch.setattr(triton_keeper.Keeper, "_ask", reset)
    keeper._track_resident(LateEnd())
    assert keeper.loading == "deadly"


def test_keeper_gives_up_at_once_when_the_first_start_fails(tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    with kept(tmp_path) as (keeper, _):
        assert "broken on purpose" in str(event(keeper, "failed")["tail"])
        assert keeper.wait(DEADLINE_S) == 1
    assert len(starts(tmp_path)) == 1


def test_keeper_gives_up_after_failed_restarts_in_a_row(tmp_path: Path) -> None:
    with kept(tmp_path) as (keeper, _):
        event(keeper, "ready")
        (tmp_path / "broken").touch()
        os.kill(starts(tmp_path)[0], signal.SIGKILL)
        assert "broken on purpose" in str(event(keeper, "failed")["tail"])
        assert keeper.wait(DEADLINE_S) == 1
    assert len(starts(tmp_path)) == 1 + triton_keeper.MAX_FAILED_STARTS


def test_server_that_is_not_ours_is_never_taken_for_ready(tmp_path: Path) -> None:
    with kept(tmp_path, server_id="another", start_timeout_s=0.5) as (keeper, _):
        event(keeper, "failed")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_keeper_ends_in_order_on_signals(tmp_path: Path, number: signal.Signals) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    with kept(tmp_path, leftovers=[str(tmp_path / "log"), str(lock), str(tmp_path / "none")]) as (keeper, _):
        event(keeper, "ready")
        keeper.send_signal(number)
        assert keeper.wait(DEADLINE_S) == 0
    assert not (tmp_path / "log").exists()
    assert not lock.exists()


def test_long_log_is_moved_aside_under_the_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_keeper, "LOG_LIMIT_BYTES", 100)
    keeper = object.__new__(triton_keeper.Keeper)
    fields = dict.fromkeys((field.name for field in dataclasses.fields(triton_keeper.Spec)), 0)
    keeper.spec = triton_keeper.Spec(**{**fields, "log_path": str(tmp_path / "log")})  # type: ignore[arg-type]
    with (tmp_path / "log").open("ab", buffering=0) as writer:
        writer.write(b"x" * 101)
        keeper._trim_log()
        writer.write(b"after")
    assert (tmp_path / "log").read_bytes() == b"after"
    assert (tmp_path / "log.1").read_bytes() == b"x" * 101


def test_log_tail_is_of_this_start_and_short(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("old\n" + "\n".join(f"line {i}" for i in range(100)))
    lines = triton_keeper.log_tail(log, 4).splitlines()
    assert lines[-1] == "line 99"
    assert len(lines) == triton_keeper.TAIL_LINES
    assert triton_keeper.log_tail(log, log.stat().st_size) == ""
    assert triton_keeper.log_tail(tmp_path / "none") == ""


# The owner's side


def test_missing_repository_is_named(tmp_path: Path) -> None:
    server = tritonserver.EmbeddedTriton(tmp_path / "none")
    with pytest.raises(InvalidInput, match="is not a directory"):
        server.start()
    assert not server.alive
    server.stop()


def test_chosen_ports_lie_below_the_ephemeral_range() -> None:
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = [tritonserver._free_port("127.0.0.1") for _ in range(20)]
    assert all(10240 <= port < max(low, 20480) for port in ports)


def test_taken_ports_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        free = iter([port, port, 12345])
        monkeypatch.setattr(random, "randrange", lambda *_: next(free))
        monkeypatch.setattr(tritonserver, "_is_free", lambda host, candidate: candidate != port)
        assert tritonserver._free_port("127.0.0.1") == 12345
    monkeypatch.setattr(tritonserver, "_is_free", lambda *_: False)
    monkeypatch.setattr(random, "randrange", lambda *_: 1)
    with pytest.raises(TritonUnavailable, match="no free port"):
        tritonserver._free_port("127.0.0.1")


def test_lost_port_race_is_tried_again_with_other_ports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    answers = iter(["Socket '127.0.0.1:1' already in use", None])

    def launch(self: tritonserver.EmbeddedTriton, home: object) -> str | None:
        chosen.append((self.grpc, self.http, self.metrics))
        return next(answers)

    ports = itertools.count(20_000)
    monkeypatch.setattr(tritonserver, "_free_port", lambda _: next(ports))
    monkeypatch.setattr(tritonserver, "install", lambda *_: None)
    monkeypatch.setattr(tritonserver.EmbeddedTriton, "_launch", launch)
    tritonserver.EmbeddedTriton(tmp_path).start()
    assert len(chosen) == 2
    assert not set(chosen[0]) & set(chosen[1])


def test_environment_of_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = triton_install.TritonHome(tmp_path, tmp_path, "/libs", tmp_path, tmp_path / "bin", False, frozenset())
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setenv("PATH", "/usr/bin")
    environment = tritonserver._environment(home)
    assert environment["PATH"] == f"{tmp_path / 'bin'}:/usr/bin"
    assert environment["LD_LIBRARY_PATH"] == "/libs"
    assert "PYTHONPATH" not in environment


def test_gpus_are_hidden_from_triton_where_onnxruntime_cannot_use_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    home = triton_install.TritonHome(tmp_path, tmp_path, "", tmp_path, tmp_path, cuda=True, flags=frozenset())
    assert tritonserver._environment(home)["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert tritonserver._environment(dataclasses.replace(home, cuda=False))["CUDA_VISIBLE_DEVICES"] == ""


def test_flags_are_passed_only_to_servers_that_know_them(tmp_path: Path) -> None:
    server = tritonserver.EmbeddedTriton(tmp_path)
    plain = triton_install.TritonHome(tmp_path, tmp_path, "", tmp_path, tmp_path, False, frozenset())
    newer = dataclasses.replace(plain, flags=frozenset({"--allow-client-shm"}))
    assert "--allow-client-shm=true" not in server._command(plain, "id")
    assert "--allow-client-shm=true" in server._command(newer, "id")
