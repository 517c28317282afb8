"""Nothing is left behind: by a hundred starts and stops, by a process that was killed, by `lipsync up`."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import grpc
import httpx
import pytest
import tritonclient.grpc as tritonclient

from compositor.proto import lipsync_v1_pb2 as pb
from compositor.proto import lipsync_v1_pb2_grpc as pb_grpc
from compositor.server import running
from compositor.settings import Settings
from compositor.triton.shared_memory import is_left_behind
from lipsync.tritonserver import EmbeddedTriton

from ..conftest import Stack
from .processes import (
    RATE,
    SPEECH,
    Service,
    alive,
    client,
    code_of,
    descendants,
    generate,
    ready,
    serving,
    wav_of,
    write_settings,
)
from .waiting import until

pytestmark = [pytest.mark.triton, pytest.mark.timeout(180)]
RESTARTS = 100


def left() -> dict[str, Counter[object]]:
    """What this process, or one that was killed, could have left behind."""
    gc.collect()
    return {
        "threads": Counter(thread.name for thread in threading.enumerate()),
        "files": Counter(filter(None, map(opened, Path("/proc/self/fd").iterdir()))),
        "processes": Counter(descendants(os.getpid())),
        "shared memory": Counter(orphans()),
        "temporary": Counter(path.name for path in Path(tempfile.gettempdir()).iterdir()),
    }


def more(now: dict[str, Counter[object]], before: dict[str, Counter[object]]) -> dict[str, Counter[object]]:
    """What was not there before. What is gone since belonged to others: earlier tests, and the tests' own service,
    which is in this process too and opens and closes files all the time."""
    return {kind: new for kind in now if (new := now[kind] - before[kind])}


def opened(path: Path) -> str:
    """What kind of file a descriptor is of; nothing where it is closed by now."""
    with contextlib.suppress(FileNotFoundError):
        return str(path.readlink()).partition(":")[0]
    return ""


def orphans() -> list[str]:
    """Files beside regions of shared memory whose process is gone. Those of other processes come and go."""
    names = [path.name for path in Path("/dev/shm").glob("lipsync-lock-*")]
    return [name for name in names if is_left_behind(name.replace("lock", "region"))]


def regions(triton: EmbeddedTriton) -> list[str]:
    """The regions of shared memory that a Triton has mapped."""
    with tritonclient.InferenceServerClient(triton.grpc) as client:
        return sorted(client.get_system_shared_memory_status().regions)


async def visit(settings: Settings) -> set[str]:
    """One start, a call, a page and a stop; the tasks that the service left in the loop."""
    async with running(settings) as service:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
        async with (
            grpc.aio.insecure_channel(f"127.0.0.1:{service.port}", options=options) as channel,
            httpx.AsyncClient(timeout=60) as http,
        ):
            speech = pb.Speech(data=SPEECH[: RATE // 5], encoding=pb.Speech.PCM16, sample_rate=RATE)
            stub = pb_grpc.LipsyncStub(channel)  # type: ignore[no-untyped-call]
            answer = await stub.Composite(pb.CompositeRequest(tenant="plain", speech=speech), timeout=60)
            assert len(answer.frames) > 1
            assert (await http.get(f"http://127.0.0.1:{service.http_port}/healthz")).status_code == 200
    return {task.get_name() for task in asyncio.all_tasks() - {asyncio.current_task()}}


def test_a_hundred_restarts_leave_nothing(stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    settings = stack.service.settings.with_ports(0, 0)
    asyncio.run(visit(settings))
    before, mapped = left(), regions(stack.triton)
    for _ in range(RESTARTS):
        assert asyncio.run(visit(settings)) == set()
    give_up = time.monotonic() + 60
    while (found := more(left(), before)) and time.monotonic() < give_up:
        pass
    assert not found
    assert set(regions(stack.triton)) <= set(mapped)


@pytest.mark.parametrize("workers", [1, 2])
def test_what_a_kill_leaves_the_next_start_takes_away(stack: Stack, tmp_path: Path, workers: int) -> None:
    """Killed while it holds a region at Triton, a film and, with workers, the folder of their metrics."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    server = {"workers": workers, "drain_s": 0.5}
    settings = write_settings(tmp_path, stack.repository, stack.triton.grpc, server=server)
    kept, ours = set(regions(stack.triton)), set[str]()
    for _ in range(2):
        with serving(settings, TMPDIR=str(folder)) as service, client(service) as (_, stub):
            ready(service)
            assert code_of(generate(stub)) == "OK"
            (region,) = set(regions(stack.triton)) - kept  # those before it are gone
            ours.add(region)
            film = threading.Thread(target=post_film, args=(service,))
            film.start()
            until(lambda: bool(list(folder.glob("lipsync-scratch-*/speech*"))))
            started = descendants(service.process.pid)
            service.process.kill()
            assert service.wait() == -signal.SIGKILL
            film.join()
            until(lambda: not any(alive(pid) for pid in started))  # noqa: B023
        assert list(folder.glob("lipsync-scratch-*"))
    with serving(settings, TMPDIR=str(folder)) as service, client(service) as (_, stub):
        ready(service)
        assert code_of(generate(stub)) == "OK"
        assert len(set(regions(stack.triton)) - kept) == 1
        assert len(list(folder.glob("lipsync-scratch-*"))) == (workers > 1)
        assert service.stop() == 0
    assert set(regions(stack.triton)) == kept
    assert not [name for name in ours if Path("/dev/shm", name.replace("region", "lock")).exists()]
    assert not list(folder.glob("lipsync-scratch-*"))


def post_film(service: Service) -> None:
    """Asks for a film so long that it is not done soon."""
    with contextlib.suppress(httpx.TransportError):
        url = f"http://{service.http_address}/v1/tenants/avatar/speak?format=mp4"
        httpx.post(url, content=wav_of(SPEECH * 50), timeout=60)


@pytest.mark.parametrize(
    "numbers", [[signal.SIGTERM], [signal.SIGKILL], [signal.SIGHUP], [signal.SIGINT, signal.SIGTERM, signal.SIGTERM]]
)
def test_up_leaves_no_triton(stack: Stack, tmp_path: Path, numbers: list[signal.Signals]) -> None:
    folder = tmp_path / "tmp"
    folder.mkdir()
    heard = ["env", "--default-signal=HUP"]  # tests that are run with nohup ignore it
    command = [sys.executable, "-m", "lipsync", "up", "-r", str(stack.repository), "--port", "0", "--http-port", "0"]
    with subprocess.Popen(
        heard + command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "TMPDIR": str(folder)},
    ) as process:
        try:
            assert process.stdout is not None
            line = next(line for line in process.stdout if "listens on port" in line)
            port = int(line.split("listens on port ")[1].split()[0])
            started = descendants(process.pid)
            assert len(started) >= 2, "a keeper and a Triton"
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                assert code_of(generate(pb_grpc.LipsyncStub(channel))) == "OK"  # type: ignore[no-untyped-call]
            started |= descendants(process.pid)
            for number in numbers:
                process.send_signal(number)
            assert process.wait(60) == (0 if signal.SIGTERM in numbers else -numbers[0])
            until(lambda: not any(alive(pid) for pid in started))
            until(lambda: not [path for pid in started for path in Path("/dev/shm").glob(f"lipsync-triton-*-{pid}-*")])
            until(lambda: not list(folder.glob("lipsync-*")))
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_up_that_is_told_while_triton_starts_ends_well(stack: Stack, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "lipsync", "up", "-r", str(stack.repository), "--port", "0", "--http-port", "0"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            until(lambda: bool(descendants(process.pid)))
            process.send_signal(number)
            started = descendants(process.pid)
            _, said = process.communicate(timeout=60)
            assert process.returncode == 0
            assert b"Traceback" not in said
            until(lambda: not any(alive(pid) for pid in started))
        finally:
            process.kill()


def test_up_ends_well_although_it_is_told_again(stack: Stack) -> None:
    """After the compositor has stopped, while Triton does."""
    command = [sys.executable, "-m", "lipsync", "up", "-r", str(stack.repository), "--port", "0", "--http-port", "0"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            assert any("the page is at" in line for line in process.stderr)
            process.terminate()
            started = descendants(process.pid)
            until(lambda: not alive(process.pid) or ignores(process.pid, signal.SIGTERM))
            process.terminate()
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
            until(lambda: not any(alive(pid) for pid in started))
        finally:
            process.kill()


def ignores(pid: int, number: signal.Signals) -> bool:
    """Whether a process ignores a signal. proc_pid_status(5)."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        mask = next(int(line.split()[1], 16) for line in lines if line.startswith("SigIgn:"))
        return bool(mask >> (number - 1) & 1)
    return False
