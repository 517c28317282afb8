"""Several processes on the same ports: both answer, one that dies is replaced, and all end with their parent."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from compositor import workers
from compositor.errors import LipsyncError, SettingsInvalid
from compositor.metrics import SHARED_VARIABLE, forget_worker
from compositor.settings import Settings

LONGEST_S = 60.0


def settings_of(repository: Path, **server: object) -> Settings:
    """Two workers, and a Triton that nobody runs."""
    return Settings.model_validate(
        {
            "model_repository": repository,
            "server": {"port": 0, "workers": 2, "drain_s": 0, **server},
            "http": {"port": 0},
            "triton": {"endpoints": "127.0.0.1:1"},
        }
    )


def children(pid: int | str = "self") -> set[int]:
    """The living processes that a process started; of this one, those of other tests among them."""
    found = set[int]()
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread that has ended
            found.update(map(int, (task / "children").read_text().split()))
    return {child for child in found if alive(child)}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONGEST_S
    while not reached():
        assert time.monotonic() < deadline, "it did not come to pass"
        await asyncio.sleep(0.02)


async def answers(port: int) -> bool:
    """Whether a new connection is served."""
    async with grpc.aio.insecure_channel(
        f"127.0.0.1:{port}", options=[("grpc.use_local_subchannel_pool", 1)]
    ) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=LONGEST_S
        )
        return bool(answer.status == health_pb2.HealthCheckResponse.NOT_SERVING)


def listeners(port: int) -> set[str]:
    """The sockets that listen on a port of this machine, by inode. proc_net_tcp(5)."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {row[9] for row in rows if int(row[1].rpartition(":")[2], 16) == port and row[3] == "0A"}


async def test_workers_share_ports_and_one_that_dies_is_replaced(tmp_path: Path) -> None:
    others = children()
    async with workers.running(settings_of(tmp_path)) as ports:
        first = children() - others
        assert len(first) == 2
        assert len(listeners(ports.http_port)) == 2
        assert await answers(ports.port)
        os.kill(min(first), signal.SIGKILL)
        os.kill(max(first), signal.SIGTERM)
        await until(lambda: len(children() - first - others) == 2 and len(listeners(ports.http_port)) == 2)
        second = children() - others
        assert len(second) == 2
        assert not first & second
        for _ in range(8):
            assert await answers(ports.port)
        text = await asyncio.to_thread(read, ports.http_port, "/metrics")
        assert "lipsync_sessions 0.0" in text
        assert all(f'process_resident_memory_bytes{{worker="{number}"}}' in text for number in (1, 2))
        with pytest.raises(SettingsInvalid, match="is another service on it"):
            async with workers.running(settings_of(tmp_path, port=ports.port)):
                pass
    assert not any(alive(pid) for pid in first | second)
    assert not listeners(ports.port)


def read(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=LONGEST_S) as answer:
        return str(answer.read().decode())


async def test_a_worker_that_cannot_start_ends_it_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others = children()
    monkeypatch.setattr(workers, "_MODULE", "compositor.nothing")
    with pytest.raises(LipsyncError, match=r"worker \d did not start but ended with status 1"):
        async with workers.running(settings_of(tmp_path)):
            pass
    assert children() <= others


async def test_what_is_wrong_for_all_is_said_once(tmp_path: Path) -> None:
    others = children()
    with pytest.raises(SettingsInvalid, match=r"model_repository: .* is no directory"):
        async with workers.running(settings_of(tmp_path / "missing")):
            pass
    assert children() <= others


async def test_a_port_that_is_taken_is_refused(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SettingsInvalid, match=rf"server.port: 127.0.0.1:{port} cannot be bound"):
            async with workers.running(settings_of(tmp_path, port=port)):
                pass


async def test_what_goes_wrong_later_is_no_fault_of_the_ports(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="a file of somebody else's"):
        async with workers.running(settings_of(tmp_path)):
            raise FileNotFoundError("a file of somebody else's")


@pytest.mark.parametrize(
    ("number", "to_all", "status"),
    [(signal.SIGTERM, False, 0), (signal.SIGTERM, True, 0), (signal.SIGKILL, False, -signal.SIGKILL)],
)
async def test_workers_end_with_their_parent(tmp_path: Path, number: signal.Signals, to_all: bool, status: int) -> None:
    """Told as they start: by a signal to their parent, or to each of them, too."""
    settings = tmp_path / "settings.yaml"
    settings.write_text(settings_of(tmp_path).model_dump_json())
    parent = await asyncio.create_subprocess_exec(sys.executable, "-m", "compositor", str(settings))
    try:
        await until(lambda: len(children(parent.pid)) == 2)
        started = children(parent.pid)
        parent.send_signal(number)
        for pid in started if to_all else ():
            os.kill(pid, number)
        assert await asyncio.wait_for(parent.wait(), LONGEST_S) == status
        await until(lambda: not any(alive(pid) for pid in started))
    finally:
        if parent.returncode is None:
            parent.kill()
            await parent.wait()


COUNTING = (
    "import pathlib, sys; from compositor.metrics import Metrics;"
    "metrics = Metrics(pathlib.Path(sys.argv[1]), int(sys.argv[2]));"
    "metrics.interrupts.inc(2); metrics.sessions.set(3); metrics.pictures.labels('late').inc();"
    "metrics.observe_stage('blend', 1)"
)
SHOWING = (
    "import pathlib, sys; from compositor.metrics import Metrics;"
    "print(Metrics(pathlib.Path(sys.argv[1]), 9).exposition().decode())"
)


def test_numbers_are_those_of_all_processes(tmp_path: Path) -> None:
    def run(program: str, *arguments: str) -> str:
        command = [sys.executable, "-c", program, str(tmp_path), *arguments]
        environment = {**os.environ, SHARED_VARIABLE: str(tmp_path)}
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

    for worker in ("1", "2"):
        run(COUNTING, worker)
    text = run(SHOWING)
    assert "lipsync_interrupts_total 4.0" in text
    assert 'lipsync_pictures_total{kind="late"} 2.0' in text
    assert "lipsync_sessions 6.0" in text
    forget_worker(1, tmp_path)
    text = run(SHOWING)
    assert "lipsync_interrupts_total 4.0" in text
    assert "lipsync_sessions 3.0" in text

    # The next one in its place counts on, in the same files.
    files = set(tmp_path.iterdir())
    run(COUNTING, "1")
    text = run(SHOWING)
    assert "lipsync_interrupts_total 6.0" in text
    assert 'lipsync_stage_seconds_sum{stage="blend"} 3.0' in text
    assert "lipsync_sessions 6.0" in text
    added = {path.name for path in set(tmp_path.iterdir()) - files}
    assert "gauge_livesum_1.db" in added
    assert all(re.fullmatch(r"gauge_live\w+_1\.db", name) for name in added), "what living processes measure"


FILLING = """
import json, pathlib, sys
from compositor.errors import LipsyncError, Status
from compositor.metrics import Metrics
from compositor.residency.models import devices_of
from compositor.settings import Settings
from compositor.transports.ledger import CANCELLED, OK, Ledger
from compositor.workers import _reserve_metrics

folder, settings = pathlib.Path(sys.argv[1]), Settings.model_validate_json(sys.argv[2])

def used():
    # A file begins with how much of it is in use.
    return {path.name: (path.stat().st_size, int.from_bytes(path.read_bytes()[:4], "little"))
            for path in folder.glob("*.db")}

_reserve_metrics(settings, folder, 1)
reserved = used()
metrics = Metrics(folder, 1)
Ledger(metrics)
for endpoint in settings.triton.endpoints:
    observer = metrics.observer(endpoint, 40, 0)
    metrics.up.labels(endpoint).set(1)
    for device in devices_of(settings.triton.gpus):
        observer.occupied(device.name, 1, 1)
for word in ("alive", "ready", "expose", "stats", "tenants", "tenant", "frame", "speak", "page"):
    for status in (OK, CANCELLED, *(each.value for each in Status)):
        metrics.calls.labels(f"HTTP {word}", status)
kinds = [LipsyncError]
for kind in kinds:
    metrics.failures.labels(kind("").reason)
    kinds += kind.__subclasses__()
for kind in ("speaking", "idle", "fade", "late"):
    metrics.pictures.labels(kind)
print(json.dumps([reserved, used()]))
"""


@pytest.mark.parametrize(
    ("endpoints", "gpus"),
    [
        (["127.0.0.1:8001"], []),
        ([f"triton-{number}.inference.svc.cluster.local:8001" for number in range(16)], [0, 1]),
        ([f"{number}.{'x' * 60}.{'é' * 30}.example.org:8001" for number in range(64)], list(range(16))),
    ],
)
def test_the_room_of_metrics_is_enough_for_all_labels(tmp_path: Path, endpoints: list[str], gpus: list[int]) -> None:
    """A file that grows has no room of its own on a disk that is full, and its next write kills the process."""
    settings = Settings.model_validate({"triton": {"endpoints": endpoints, "gpus": gpus}})
    command = [sys.executable, "-c", FILLING, str(tmp_path), settings.model_dump_json()]
    environment = {**os.environ, SHARED_VARIABLE: str(tmp_path)}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    reserved, filled = json.loads(done.stdout)
    assert len(reserved) == 5
    assert filled.keys() == reserved.keys(), "no other file was made"
    for name, (size, used) in filled.items():
        assert size == reserved[name][0], f"{name} grew"
        assert 0 < used <= size
    assert sum(size for size, _ in filled.values()) < 4 * sum(used for _, used in filled.values()) + (1 << 20)
