"""The service as a process of its own: started, called, told to stop, and what it starts itself."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import threading
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from compositor.pcm import read_wav
from compositor.proto import lipsync_v1_pb2 as pb
from compositor.proto import lipsync_v1_pb2_grpc as pb_grpc
from lipsync.sentences import HELLO

from .waiting import until

LONGEST_S = 60.0
WAV = HELLO.read_bytes()
SAMPLES, RATE = read_wav(WAV)
FRAMES = round(len(SAMPLES) / RATE * 25)
SPEECH = WAV[44:]
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
_GRPC = re.compile(r"listening on \S+:(\d+), Triton at")
_HTTP = re.compile(r"the page is at http://\S+:(\d+)/")


class Service:
    """A running `python -m compositor`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines += iter(self.process.stderr.readline, "")

    def wait(self) -> int:
        """The exit status, once the process has ended and all it said was read."""
        status = self.process.wait(LONGEST_S)
        self._reader.join(LONGEST_S)
        return status

    def stop(self, *numbers: signal.Signals) -> int:
        """Sends signals, and waits."""
        for number in numbers or (signal.SIGTERM,):
            self.process.send_signal(number)
        return self.wait()

    @property
    def said(self) -> str:
        return "".join(self.lines)

    def says(self, words: str) -> None:
        """Waits for words in what it says."""
        self._comes(lambda: words in self.said)

    def serves(self, workers: int) -> None:
        """Waits until so many of its processes serve: one that says so twice has said meanwhile that it does not."""
        self._comes(lambda: self.said.count("ready to serve") - self.said.count("not ready: ") >= workers)

    def _comes(self, condition: Callable[[], bool]) -> None:
        # Not the end of the process, which may be seen before its last words are read.
        until(lambda: condition() or not self._reader.is_alive(), LONGEST_S)
        assert condition(), self.said

    @property
    def port(self) -> int:
        return self._announced(_GRPC)

    @property
    def http_port(self) -> int:
        return self._announced(_HTTP)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def http_address(self) -> str:
        return f"127.0.0.1:{self.http_port}"

    def _announced(self, pattern: re.Pattern[str]) -> int:
        match = pattern.search(self.said)
        assert match is not None, self.said
        return int(match[1])

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()


def write_settings(folder: Path, repository: Path, triton: str, **sections: dict[str, Any]) -> Path:
    """A settings file with free ports, sessions without measure, and these sections."""
    values: dict[str, Any] = {"server": {"port": 0}, "http": {"port": 0}, "triton": {"endpoints": triton}}
    values["live"] = {"max_late": 1}
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump({"model_repository": str(repository), **values}))
    return path


@contextlib.contextmanager
def serving(settings: Path, *, wrapper: str = "", code: str = "", **environment: str) -> Iterator[Service]:
    """The service, listening, and all its workers serving if it has several; killed at the end if it still runs.

    wrapper: shell words before the command. code: Python that runs it in its own way.
    """
    command = [sys.executable, *(["-c", code] if code else ["-m", "compositor"]), str(settings)]
    if wrapper:
        command = ["sh", "-c", f'{wrapper} "$@"', "sh", *command]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})
    service = Service(process)
    try:
        workers = yaml.safe_load(settings.read_text())["server"].get("workers", 1)
        if workers == 1:
            service.says("the page is at")
        else:
            service.serves(workers)
        yield service
    finally:
        service.close()


def children(pid: int) -> set[int]:
    """The processes that one started; none where it has ended meanwhile."""
    found = set[int]()
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            # A thread may end meanwhile, and those beside it have children all the same.
            with contextlib.suppress(OSError):
                found |= {int(child) for child in (task / "children").read_text().split()}
    return found


def descendants(pid: int) -> set[int]:
    """The processes that one started, and those that these started."""
    found = set[int]()
    waiting = [pid]
    while waiting:
        new = children(waiting.pop()) - found
        found |= new
        waiting += new
    return found


def alive(pid: int) -> bool:
    return _state(Path(f"/proc/{pid}/stat")) != "Z"


def freeze(pid: int) -> None:
    """Stops all threads of a process with SIGSTOP: some still run for a moment when a busy machine has sent it."""
    os.kill(pid, signal.SIGSTOP)
    until(lambda: all(_state(task / "stat") in "TZ" for task in Path(f"/proc/{pid}/task").iterdir()))


def _state(stat: Path) -> str:
    """Of a thread, as proc_pid_stat(5) says; that of one that has ended meanwhile is Z."""
    with contextlib.suppress(OSError):
        return stat.read_text().rpartition(")")[2].split()[0]
    return "Z"


@contextlib.contextmanager
def client(service: Service) -> Iterator[tuple[grpc.Channel, pb_grpc.LipsyncStub]]:
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(service.address, options=options) as channel:
        yield channel, pb_grpc.LipsyncStub(channel)  # type: ignore[no-untyped-call]


def generate(stub: pb_grpc.LipsyncStub, tenant: str = "avatar", wav: bytes = WAV) -> Any:
    speech = pb.Speech(data=wav, encoding=pb.Speech.WAV)
    return stub.Generate(pb.GenerateRequest(tenant=tenant, speech=speech), timeout=60)


def watch(channel: grpc.Channel) -> Any:
    """The stream of the service's health, once it is SERVING."""
    states = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=60)
    assert any(state.status == SERVING for state in states)
    return states


def ready(service: Service) -> None:
    until(lambda: httpx.get(f"http://{service.http_address}/readyz", timeout=LONGEST_S).status_code == 200)


def code_of(call: Any) -> str:
    """The status with which a stream ends."""
    try:
        for _ in call:
            pass
    except grpc.RpcError as error:
        found: Any = error
        return str(found.code().name)
    return "OK"


def wav_of(samples: bytes) -> bytes:
    """PCM16 at the rate of the sentence as a WAV file."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setparams((1, 2, RATE, 0, "NONE", ""))
        writer.writeframes(samples)
    return file.getvalue()
