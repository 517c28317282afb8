"""What `lipsync doctor` says of real Tritons, sound and broken."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from compositor.settings import Settings
from lipsync import doctor, doctor_triton
from lipsync.doctor import Finding, State
from lipsync.doctor_triton import check_triton
from lipsync.tritonserver import EmbeddedTriton, TritonHome

from ..conftest import Stack
from .processes import freeze
from .waiting import until

pytestmark = pytest.mark.triton

KEY = "a key"


class Other(EmbeddedTriton):
    """An embedded Triton, started in another way."""

    replace: tuple[str, str] = ("", "")
    add: tuple[str, ...] = ()

    def _command(self, home: TritonHome, server_id: str) -> list[str]:
        return [option.replace(*self.replace) for option in super()._command(home, server_id)] + [*self.add]


class Restricted(Other):
    add = (f"--grpc-restricted-protocol=model-repository,shared-memory:lipsync-key={KEY}",)


class Uncontrolled(Other):
    replace = ("--model-control-mode=explicit", "--model-control-mode=none")


class Backendless(Other):
    replace = ("--backend-directory=", "--backend-directory=/nowhere")


@pytest.fixture
def triton(request: pytest.FixtureRequest, repository: Path, triton_home: Path, tmp_path: Path) -> Iterator[Other]:
    """Of the class that is asked for; on an empty repository where it would load all that it finds."""
    empty = request.param is Uncontrolled
    with request.param(tmp_path if empty else repository) as server:
        yield server


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the machine is, a Triton that answers is no finding."""
    monkeypatch.setattr(doctor_triton, "_WAIT_S", 60.0)


def states(findings: list[Finding]) -> list[State]:
    return [finding.state for finding in findings]


def test_a_sound_triton(stack: Stack) -> None:
    before = regions()
    found = list(check_triton(stack.triton.grpc, stack.repository))
    assert states(found) == [State.OK] * 6, found
    assert [finding.found for finding in found] == [
        "version 2.51.0 takes requests",
        "models may be loaded and unloaded",
        "it sees all of 3 tenants",
        "a model loads into the backend `onnxruntime` and runs",
        "its clock agrees with ours",
        "it maps shared memory",
    ]
    # Another process's is there for a moment.
    until(lambda: regions() <= before)


def regions() -> set[Path]:
    return set(Path("/dev/shm").glob("lipsync-doctor-*"))


def test_the_ports_of_the_service_itself(stack: Stack) -> None:
    ports = {"server": {"port": stack.service.port}, "http": {"port": stack.service.http_port}}

    def found() -> list[str]:
        return [each.found.partition(" is ")[2] for each in doctor.check_ports(Settings.model_validate(ports))]

    # It has 5 s to answer, which may be too short on a busy machine.
    until(lambda: found() == ["the service, which runs"] * 2)


def test_another_repository(stack: Stack, tmp_path: Path) -> None:
    with EmbeddedTriton(tmp_path) as other:
        found = list(check_triton(other.grpc, stack.repository))
    assert states(found) == [State.OK, State.OK, State.WRONG, State.OK, State.OK, State.OK]
    assert found[2].found == "it does not see 3 of 3 tenants (avatar, plain, sent)"
    assert found[2].advice == f"give it the same folder: --model-repository={stack.repository}"


@pytest.mark.parametrize("triton", [Restricted], indirect=True)
@pytest.mark.parametrize("key", [KEY, None, "another"])
def test_a_key(triton: Restricted, repository: Path, key: str | None) -> None:
    found = list(check_triton(triton.grpc, repository, key))
    if key == KEY:
        assert states(found) == [State.OK] * 6
    else:
        assert states(found) == [State.OK, State.WRONG]
        assert "triton.key_file" in found[1].advice


@pytest.mark.parametrize("triton", [Uncontrolled], indirect=True)
def test_a_triton_that_loads_by_itself(triton: Uncontrolled, repository: Path) -> None:
    found = list(check_triton(triton.grpc, repository))
    assert states(found) == [State.OK, State.WRONG]
    assert found[1].advice == "start it with --model-control-mode=explicit"


@pytest.mark.parametrize("triton", [Backendless], indirect=True)
def test_a_triton_without_the_backend(triton: Backendless, repository: Path) -> None:
    found = list(check_triton(triton.grpc, repository))
    assert states(found) == [State.OK, State.OK, State.OK, State.WRONG]
    assert "a model does not run" in found[3].found
    assert "needs the backend `onnxruntime`" in found[3].advice


@pytest.mark.parametrize("triton", [Other], indirect=True)
def test_a_triton_that_hangs(triton: Other, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_triton, "_WAIT_S", 5.0)
    assert triton.pid is not None
    freeze(triton.pid)
    try:
        (finding,) = check_triton(triton.grpc, repository)
    finally:
        os.kill(triton.pid, signal.SIGCONT)
    assert (finding.state, finding.found) == (State.WRONG, "nothing answers within 5 s")


def test_something_that_is_no_triton(repository: Path) -> None:
    other = grpc.server(ThreadPoolExecutor(1))
    port = other.add_insecure_port("127.0.0.1:0")
    other.start()
    (finding,) = check_triton(f"127.0.0.1:{port}", repository)
    other.stop(0).wait()
    assert (finding.state, finding.found) == (State.WRONG, "something else answers there")


def test_a_triton_that_is_named_has_to_run_and_another_need_not(repository: Path) -> None:
    command = [sys.executable, "-m", "lipsync", "doctor", "-r", str(repository)]
    with socket.socket() as closed:
        # Nobody listens, and nobody else can have the port meanwhile.
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        done = subprocess.run([*command, "--triton", address], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert f"wrong   Triton {address}: it cannot be reached" in done.stdout
    assert "start it (`lipsync triton`, or `lipsync up` for both), or set triton.endpoints" in done.stdout
