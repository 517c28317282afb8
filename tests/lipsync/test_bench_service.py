"""The compositor as a process of its own: it answers, its CPU is read, and it is gone in the end."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from compositor.errors import LipsyncError
from compositor.proto import lipsync_v1_pb2 as pb
from compositor.proto import lipsync_v1_pb2_grpc as pb_grpc
from lipsync.bench import service
from lipsync.triton_processes import process_start_time
from lipsync.tritonserver import EmbeddedTriton

NOBODY = "127.0.0.1:1"


def test_it_answers_on_its_cores_and_is_gone_afterwards(tmp_path: Path) -> None:
    core = min(os.sched_getaffinity(0))
    with service.running(tmp_path, NOBODY, tmp_path, cores={core}) as running:
        with grpc.insecure_channel(running.address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            answer = stub.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=60)
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert set(cores_of_threads(running.pid)) == {frozenset({core})}
        assert running.cpu_s() > 0
    assert process_start_time(running.pid) is None
    with pytest.raises(OSError):
        running.cpu_s()


def cores_of_threads(pid: int) -> Iterator[frozenset[int]]:
    """Of those that do not end meanwhile."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(ProcessLookupError):
            yield frozenset(os.sched_getaffinity(int(task.name)))


def test_without_triton_it_is_not_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with service.running(tmp_path, NOBODY, tmp_path) as running:
        monkeypatch.setattr(service, "START_TIMEOUT_S", 0.3)
        with pytest.raises(LipsyncError, match=f"the compositor at {running.address} was not ready within"):
            service.wait_until_ready(running.address)
        assert "listening on" in running.log.read_text()


def test_it_is_gone_after_a_failure_in_the_block(tmp_path: Path) -> None:
    with contextlib.suppress(KeyError), service.running(tmp_path, NOBODY, tmp_path) as running:
        raise KeyError
    assert process_start_time(running.pid) is None


def test_settings_of_the_environment_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIPSYNC_SERVER__PORT", "no number")
    monkeypatch.setenv("LIPSYNC_CONFIG", str(tmp_path / "missing.yaml"))
    with service.running(tmp_path, NOBODY, tmp_path, settings={"server.threads": 1}) as running:
        assert running.address.startswith("127.0.0.1:")


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"server.threads": "many"}, "LIPSYNC_SERVER__THREADS: server.threads"),
        ({"server.host": "192.0.2.1"}, "cannot be bound"),  # TEST-NET-1, RFC 5737: no machine has it
    ],
)
def test_a_service_that_does_not_start_says_why(tmp_path: Path, settings: dict[str, object], line: str) -> None:
    with (
        pytest.raises(LipsyncError, match=rf"the compositor did not start: .*{line}"),
        service.running(tmp_path, NOBODY, tmp_path, settings=settings),
    ):
        pass


def test_a_child_ends_with_whoever_started_it(tmp_path: Path) -> None:
    (tmp_path / "waiting.py").write_text("import os, signal; print(os.getpid(), flush=True); signal.pause()")
    starts = "import subprocess; from lipsync.bench.service import following; subprocess.run(following('waiting'))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", starts], stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert process_start_time(child) is not None
        parent.kill()
    deadline = time.monotonic() + 60
    while process_start_time(child) is not None:
        assert time.monotonic() < deadline, "the child outlived its parent"


@pytest.mark.triton
def test_it_makes_frames_with_triton(repository: Path, triton_home: Path, tmp_path: Path) -> None:
    with EmbeddedTriton(repository) as triton, service.running(repository, triton.grpc, tmp_path) as running:
        with grpc.insecure_channel(running.address) as channel:
            stub = pb_grpc.LipsyncStub(channel)  # type: ignore[no-untyped-call]
            features = bytes(2 * 32 * 16 * 16 * 4)
            request = pb.CompositeRequest(tenant="plain", numbers=pb.FrameNumbers(numbers=[0, 1]), features=features)
            assert [frame.number for frame in stub.Composite(request, timeout=60).frames] == [0, 1]
        service.wait_until_ready(running.address)
        pids = service.triton_pids(triton)
        assert triton.pid in pids
        service.pin(pids, os.sched_getaffinity(0))
