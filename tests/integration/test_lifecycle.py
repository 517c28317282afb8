"""The service as a process, from its start to its end: what is under way when it is told to stop ends well, what does
not end is cut off and named, and nothing is left behind."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc as tritonclient
from grpc_health.v1 import health_pb2, health_pb2_grpc
from numpy.typing import NDArray
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from compositor import jpeg
from compositor.pcm import read_wav
from compositor.proto import lipsync_v1_pb2 as pb
from compositor.proto import lipsync_v1_pb2_grpc as pb_grpc
from compositor.server import running
from compositor.settings import Settings
from compositor.triton.shared_memory import is_left_behind
from lipsync.sentences import HELLO
from lipsync.tritonserver import EmbeddedTriton

from ..conftest import Stack
from ..lipsync.conftest import can_mount
from .processes import Service, alive, descendants, serving, write_settings
from .waiting import until

pytestmark = [pytest.mark.triton, pytest.mark.timeout(180)]

WAV = HELLO.read_bytes()
SAMPLES, RATE = read_wav(WAV)
FRAMES = round(len(SAMPLES) / RATE * 25)
SPEECH = WAV[44:]
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
Start = Callable[..., contextlib.AbstractContextManager[Service]]


@pytest.fixture
def start(stack: Stack, tmp_path: Path) -> Start:
    """Starts a service of its own on the shared Triton, with settings of the section `server`."""

    def begin(**server: Any) -> contextlib.AbstractContextManager[Service]:
        settings = write_settings(tmp_path, stack.repository, stack.triton.grpc, server={"port": 0, **server})
        return serving(settings)

    return begin


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
    until(lambda: httpx.get(f"http://{service.http_address}/readyz").status_code == 200)


def ended(service: Service) -> None:
    """Sees that it ended in order."""
    assert service.wait() == 0, service.said
    assert "stopped\n" in service.lines[-1]
    for word in ("Traceback", " ERROR ", "Exception"):
        assert word not in service.said, service.said


def code_of(call: Any) -> str:
    """The status with which a stream ends."""
    try:
        for _ in call:
            pass
    except grpc.RpcError as error:
        found: Any = error
        return str(found.code().name)
    return "OK"


# Calls.


def test_health_says_so_first_and_calls_under_way_finish(start: Start) -> None:
    with start(drain_s=60) as service, client(service) as (channel, stub):
        states = watch(channel)
        speaking = generate(stub)
        answers = [next(speaking)]
        address = service.address
        with httpx.stream("POST", f"http://{service.http_address}/v1/tenants/avatar/speak", content=WAV) as posted:
            parts = posted.iter_raw()
            body = next(parts)
            service.process.send_signal(signal.SIGTERM)
            assert next(states).status == NOT_SERVING
            answers += speaking
            body += b"".join(parts)
        frames = [answer.frame for answer in answers if answer.WhichOneof("event") == "frame"]
        assert [jpeg.decode(frame.data).shape for frame in frames] == [(360, 640, 3)] * FRAMES
        assert answers[-1].summary.frames == FRAMES
        assert body.count(b"Content-Type: image/jpeg") == FRAMES
        assert body.endswith(b"\r\n--frame--")
        ended(service)
        assert "cut off" not in service.said
        with grpc.insecure_channel(address) as late:
            with pytest.raises(grpc.RpcError) as caught:
                health_pb2_grpc.HealthStub(late).Check(health_pb2.HealthCheckRequest(), timeout=5)
            refused: Any = caught.value
            assert refused.code() is grpc.StatusCode.UNAVAILABLE


def test_a_load_balancer_gets_time_to_notice(start: Start) -> None:
    """Within the delay health says no, and new calls are taken. The second signal ends it."""
    with start(drain_delay_s=600, drain_s=600) as service, client(service) as (channel, stub):
        states = watch(channel)
        ready(service)
        service.process.send_signal(signal.SIGTERM)
        assert next(states).status == NOT_SERVING
        answer = httpx.get(f"http://{service.http_address}/readyz")
        assert (answer.status_code, answer.json()["error"]["reason"]) == (503, "STOPPING")
        assert httpx.get(f"http://{service.http_address}/healthz").status_code == 200
        assert sum(answer.WhichOneof("event") == "frame" for answer in generate(stub)) == FRAMES
        service.process.send_signal(signal.SIGTERM)
        ended(service)
        assert "cut off" not in service.said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_without_clients_it_ends_at_once(start: Start, number: signal.Signals) -> None:
    with start(drain_s=600) as service:
        service.process.send_signal(number)
        ended(service)
        assert "nothing is under way" in service.said


def test_a_signal_during_the_start_ends_it_as_well(stack: Stack, tmp_path: Path) -> None:
    """Told as soon as it hears signals, before it listens."""
    settings = write_settings(tmp_path, stack.repository, stack.triton.grpc)
    code = (
        "import os, signal, compositor.signals as s, compositor.__main__ as m\n"
        "begin = s.Signals.__init__\n"
        "def told(self): begin(self); os.kill(os.getpid(), signal.SIGTERM)\n"
        "s.Signals.__init__ = told\n"
        "raise SystemExit(m.main())"
    )
    with serving(settings, code=code) as service:
        ended(service)


# Live sessions.


class Viewer:
    """One live session: its events are taken, and its pictures acknowledged, until it ends."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []
        self.begun = threading.Event()
        self.ending = ""
        self._thread = threading.Thread(target=self._run)

    def start(self) -> None:
        self._thread.start()
        assert self.begun.wait(60)

    def join(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        raise NotImplementedError

    def took(self, kind: str, event: Any) -> None:
        self.events.append((kind, event))
        if kind == self.waits_for:
            self.begun.set()

    waits_for = "frame"

    def of(self, kind: str) -> list[Any]:
        return [event for name, event in self.events if name == kind]


class Caller(Viewer):
    """By gRPC."""

    def __init__(self, stub: pb_grpc.LipsyncStub, speech: bytes, *, whole: bool = True) -> None:
        super().__init__()
        self._stub, self._speech, self._whole = stub, speech, whole
        self.waits_for = "playback_started" if speech else "frame"
        self._acks: list[int] = []
        self._news = threading.Condition()
        self._over = False

    def _requests(self) -> Iterator[pb.SpeakRequest]:
        yield pb.SpeakRequest(start=pb.SpeakRequest.Start(tenant="avatar", sample_rate=RATE))
        if self._speech:
            yield pb.SpeakRequest(audio=pb.SpeakRequest.Audio(data=self._speech))
            if self._whole:
                yield pb.SpeakRequest(segment_end=pb.SpeakRequest.SegmentEnd())
        while True:
            with self._news:
                self._news.wait_for(lambda: self._acks or self._over)
                if self._over:
                    return
                pts = self._acks.pop()
            yield pb.SpeakRequest(ack=pb.SpeakRequest.Ack(pts=pts))

    def _run(self) -> None:
        call = self._stub.Speak(self._requests(), timeout=120)
        try:
            for response in call:
                kind = response.WhichOneof("event")
                self.took(kind, getattr(response, kind))
                if kind == "frame":
                    with self._news:
                        self._acks = [response.frame.pts]
                        self._news.notify()
            self.ending = "OK"
        except grpc.RpcError as error:
            found: Any = error
            self.ending = f"{found.code().name}: {found.details()}"
        with self._news:
            self._over = True
            self._news.notify()


class Guest(Viewer):
    """By WebSocket."""

    def __init__(self, service: Service, speech: bytes) -> None:
        super().__init__()
        self._url, self._speech = f"ws://{service.http_address}/ws/avatar", speech
        self.waits_for = "playback_started" if speech else "frame"

    def _run(self) -> None:
        with connect(self._url, compression=None, max_size=None) as socket:
            socket.send(json.dumps({"type": "start", "sample_rate": RATE, "binary": False}))
            if self._speech:
                socket.send(b"\1\1" + bytes(14) + len(self._speech).to_bytes(4, "little") + self._speech)
                socket.send('{"type":"segment_end"}')
            with contextlib.suppress(ConnectionClosed):
                while True:
                    self._take(socket)
            self.ending = f"{socket.close_code}: {socket.close_reason}"

    def _take(self, socket: ClientConnection) -> None:
        event = json.loads(socket.recv())
        self.took(event["type"], event)
        if event["type"] == "frame":
            socket.send(json.dumps({"type": "ack", "pts": event["pts"]}))


GOODBYES = ("UNAVAILABLE: the service stops", "1001: the service stops")


def heard(viewer: Viewer) -> int:
    """Bytes of speech that a viewer got."""
    if isinstance(viewer, Caller):
        return sum(len(piece.data) for piece in viewer.of("audio"))
    return sum(len(piece["data"]) * 3 // 4 - piece["data"].count("=") for piece in viewer.of("audio"))


def finished(viewer: Viewer) -> tuple[int, bool]:
    """(samples, interrupted) of its one segment."""
    (event,) = viewer.of("playback_finished")
    return (
        (event.position, event.interrupted) if isinstance(viewer, Caller) else (event["position"], event["interrupted"])
    )


def pictures(viewer: Viewer) -> list[NDArray[np.uint8]]:
    frames = viewer.of("frame")
    if isinstance(viewer, Caller):
        return [jpeg.decode(frame.data) for frame in frames]
    return [jpeg.decode(base64.b64decode(frame["data"])) for frame in frames]


@pytest.mark.parametrize("workers", [1, 2])
def test_speech_is_shown_to_its_end_and_idle_sessions_end_at_once(start: Start, workers: int) -> None:
    with start(drain_s=60, workers=workers) as service, client(service) as (_, stub):
        viewers: list[Viewer] = [Caller(stub, b""), Caller(stub, SPEECH), Guest(service, b""), Guest(service, SPEECH)]
        for viewer in viewers:
            viewer.start()
        with connect(f"ws://{service.http_address}/ws/avatar") as silent:
            started = descendants(service.process.pid)
            assert len(started) == (0 if workers == 1 else workers)
            service.process.send_signal(signal.SIGTERM)
            for viewer in (viewers[0], viewers[2]):
                viewer.join()
            assert service.process.poll() is None, "the others speak"
            with pytest.raises(ConnectionClosed):
                silent.recv()
            assert silent.close_code == 1001
        for viewer in viewers:
            viewer.join()
        ended(service)
        assert "cut off" not in service.said
        assert not any(alive(pid) for pid in started)
    assert tuple(viewer.ending for viewer in viewers) == (GOODBYES[0],) * 2 + (GOODBYES[1],) * 2
    for viewer in viewers:
        assert all(picture.shape == (360, 640, 3) for picture in pictures(viewer))
    for viewer in (viewers[1], viewers[3]):
        assert finished(viewer) == (len(SPEECH) // 2, False)
        assert heard(viewer) == len(SPEECH)
        assert len(pictures(viewer)) > 10


@pytest.mark.parametrize("how", ["grace", "second signal"])
def test_speech_that_does_not_end_in_time_is_accounted_for(start: Start, how: str) -> None:
    """A sentence of which no more comes; its viewers hear how much was shown."""
    with start(drain_s=0.3 if how == "grace" else 600) as service, client(service) as (_, stub):
        viewers: list[Viewer] = [Caller(stub, SPEECH * 4, whole=False), Guest(service, SPEECH * 4)]
        for viewer in viewers:
            viewer.start()
        service.process.send_signal(signal.SIGTERM)
        if how == "second signal":
            service.says("draining")
            service.process.send_signal(signal.SIGINT)
        for viewer in viewers:
            viewer.join()
        ended(service)
        assert "the time to drain is over; cut off: 2 live sessions" in service.said
    assert tuple(viewer.ending for viewer in viewers) == GOODBYES
    for viewer in viewers:
        position, interrupted = finished(viewer)
        assert interrupted
        assert 0 < 2 * position == heard(viewer) < 4 * len(SPEECH)
        assert all(picture.shape == (360, 640, 3) for picture in pictures(viewer))


# What does not end.


@pytest.fixture
def frozen(stack: Stack, triton_home: Path) -> Iterator[EmbeddedTriton]:
    """A Triton of the test's own, to be stopped with SIGSTOP; it goes on at the end."""
    with EmbeddedTriton(stack.repository) as triton:
        try:
            yield triton
        finally:
            if triton.pid is not None:
                os.kill(triton.pid, signal.SIGCONT)


@pytest.mark.parametrize(("workers", "signals"), [(1, 1), (1, 2), (2, 2)])
def test_a_load_that_hangs_is_left(
    frozen: EmbeddedTriton, stack: Stack, tmp_path: Path, workers: int, signals: int
) -> None:
    """Triton hangs as the call's model is loaded; the call's own time is long."""
    server = {"drain_s": 0.3 if signals == 1 else 600, "workers": workers}
    settings = write_settings(tmp_path, stack.repository, frozen.grpc, server=server)
    with serving(settings) as service, client(service) as (channel, stub):
        watch(channel)
        assert frozen.pid is not None
        os.kill(frozen.pid, signal.SIGSTOP)
        call = generate(stub)
        code = ""

        def wait() -> None:
            nonlocal code
            code = code_of(call)

        waiting = threading.Thread(target=wait)
        waiting.start()
        until(lambda: under_way(service) == 1)
        service.process.send_signal(signal.SIGTERM)
        if signals == 2:
            service.says("draining")
            service.process.send_signal(signal.SIGTERM)
        waiting.join(60)
        ended(service)
        assert code == "UNAVAILABLE"
        assert "the time to drain is over; cut off: 1 call\n" in service.said


def under_way(service: Service) -> int:
    """Requests to Triton, or for a model, of all workers."""
    text = httpx.get(f"http://{service.http_address}/metrics").text
    lines = [line for line in text.splitlines() if line.startswith("lipsync_model_misses_total{")]
    return sum(float(line.split()[-1]) > 0 for line in lines)


def test_who_reads_nothing_is_cut_off(start: Start) -> None:
    """More frames than the connections' buffers hold; the session waits for nobody's acknowledgement."""
    long = wav_of(SPEECH * 50)
    with start(drain_s=0.3) as service, client(service) as (_, stub):
        ready(service)
        stalled = generate(stub, wav=long)
        next(stalled)
        with (
            httpx.stream("POST", f"http://{service.http_address}/v1/tenants/avatar/speak", content=long) as posted,
            connect(f"ws://{service.http_address}/ws/avatar", compression=None, max_queue=1, close_timeout=0) as socket,
        ):
            parts = posted.iter_raw()
            body = next(parts)
            socket.send('{"type":"start","flow":"plain"}')
            until(lambda: missed(service) > 5)
            service.process.send_signal(signal.SIGTERM)
            ended(service)
            with pytest.raises(httpx.RemoteProtocolError):
                body += b"".join(parts)
        assert "the time to drain is over; cut off: 2 calls, 1 live session" in service.said
        assert code_of(stalled) in ("UNAVAILABLE", "CANCELLED")


def wav_of(samples: bytes) -> bytes:
    """PCM16 at the rate of the sentence as a WAV file."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setparams((1, 2, RATE, 0, "NONE", ""))
        writer.writeframes(samples)
    return file.getvalue()


def missed(service: Service) -> int:
    """Pictures that the one session's viewer did not take."""
    sessions = httpx.get(f"http://{service.http_address}/stats").json()["sessions"]
    return sum(session["dropped"] for session in sessions)


# What stops the start.

FAULTS = [
    ("server: {prot: 1}", "server.prot: no such setting; did you mean port?"),
    ("server: {threads: many}", "server.threads: "),
    ("triton: {gpus: [-1]}", "triton.gpus.0: "),
    ("triton: {endpoints: nowhere}", "triton.endpoints.0: "),
    ("triton: {key_file: MISSING}", "triton.key_file: MISSING cannot be read: No such file or directory"),
    ("triton: {key_file: EMPTY}", "triton.key_file: EMPTY is empty"),
    ("server: {port: TAKEN}", "server.port: 127.0.0.1:TAKEN cannot be bound; is another service on it? choose another"),
    ("http: {port: TAKEN}", "http.port: 127.0.0.1:TAKEN cannot be bound (Address already in use)"),
    ("server: {port: TAKEN, workers: 2}", "server.port: 127.0.0.1:TAKEN cannot be bound (Address already in use)"),
    ("server: {host: no.such.host.invalid}", "server.port: no.such.host.invalid:0 cannot be bound"),
    ("model_repository: MISSING", "model_repository: MISSING is no directory; create it, or name another"),
    ("model_repository: MISSING\nserver: {workers: 2}", "model_repository: MISSING is no directory; create it"),
    ("triton: {key_file: EMPTY}\nserver: {workers: 2}", "triton.key_file: EMPTY is empty"),
    ("server: [", "not usable YAML"),
    ("residency: {min_resident_s: -1}", "residency.min_resident_s: "),
]


@pytest.mark.parametrize(("text", "words"), FAULTS, ids=[text.splitlines()[-1] for text, _ in FAULTS])
def test_a_wrong_setting_stops_the_start(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "empty.key").touch()
    (tmp_path / "models").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        stands_for = {"TAKEN": taken.getsockname()[1], "MISSING": tmp_path / "none", "EMPTY": tmp_path / "empty.key"}
        for word, value in stands_for.items():
            text, words = text.replace(word, str(value)), words.replace(word, str(value))
        path = tmp_path / "settings.yaml"
        path.write_text(text)
        environment = {"MODEL_REPOSITORY": tmp_path / "models", "SERVER__PORT": 0, "HTTP__PORT": 0}
        done = subprocess.run(
            [sys.executable, "-m", "compositor", path],
            env={**os.environ, **{f"LIPSYNC_{k}": str(v) for k, v in environment.items() if words_of(k) not in text}},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert words in errors[0]
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def words_of(variable: str) -> str:
    """Of a setting in the environment, what a file says that sets it."""
    return variable.rpartition("__")[2].lower() + ":" if "__" in variable else variable.lower()


# A full disk.


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_told_and_passes(stack: Stack, tmp_path: Path, workers: int) -> None:
    """A real file system of its own, 32 MiB, filled to its last byte and emptied."""
    if not can_mount():
        pytest.skip("a file system cannot be mounted here, not even in a namespace of one's own")
    folder = tmp_path / "tmp"
    folder.mkdir()
    mount = f"mount -t tmpfs -o size=32m none {folder} && exec"
    wrapper = f"""exec {can_mount()} sh -c '{mount} "$@"' sh"""
    settings = write_settings(tmp_path, stack.repository, stack.triton.grpc, server={"workers": workers})
    with serving(settings, wrapper=wrapper, TMPDIR=str(folder)) as service, client(service) as (channel, stub):
        states = watch(channel)
        ready(service)
        before = descendants(service.process.pid)
        inside = Path(f"/proc/{service.process.pid}/root{folder}")
        fill(inside / "filling")
        assert next(states).status == NOT_SERVING
        reasons = {readiness(service) for _ in range(20 * workers)}
        until(lambda: {readiness(service) for _ in range(8)} == {(503, "DISK_FULL")})
        assert reasons <= {(503, "DISK_FULL"), (200, "")}
        message = httpx.get(f"http://{service.http_address}/readyz").json()["error"]["message"]
        assert message.startswith(f"{folder}: ")
        assert "free some space there, or set TMPDIR to a folder with room" in message
        assert f"not ready: {folder}: " in service.said
        # Whoever comes all the same is served where nothing has to be written.
        assert sum(answer.WhichOneof("event") == "frame" for answer in generate(stub)) == FRAMES
        assert code_of(generate(stub, tenant="nobody")) == "NOT_FOUND"
        film = httpx.post(f"http://{service.http_address}/v1/tenants/avatar/speak?format=mp4", content=WAV, timeout=60)
        assert film.status_code in (500, 503)
        assert httpx.get(f"http://{service.http_address}/metrics").status_code == 200
        (inside / "filling").unlink()
        assert next(states).status == SERVING
        until(lambda: {readiness(service) for _ in range(8)} == {(200, "")})
        assert descendants(service.process.pid) == before, "no worker died of it"
        film = httpx.post(f"http://{service.http_address}/v1/tenants/avatar/speak?format=mp4", content=WAV, timeout=60)
        assert film.status_code == 200
        assert service.stop() == 0
        assert "Traceback" not in service.said


def fill(path: Path) -> None:
    """Makes a file that takes all room that the disk has."""
    with path.open("wb") as file:
        status = os.statvfs(path)
        os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize)
    assert os.statvfs(path).f_bavail == 0


def readiness(service: Service) -> tuple[int, str]:
    answer = httpx.get(f"http://{service.http_address}/readyz")
    return answer.status_code, "" if answer.status_code == 200 else answer.json()["error"]["reason"]


def test_a_log_that_cannot_be_written_keeps_nobody_from_serving(stack: Stack, tmp_path: Path) -> None:
    """/dev/full stands for a disk that is full where the log goes; the ports are known beforehand."""
    grpc_port, http_port = free_ports(2)
    settings = write_settings(
        tmp_path, stack.repository, stack.triton.grpc, server={"port": grpc_port}, http={"port": http_port}
    )
    with Path("/dev/full").open("w") as full:
        process = subprocess.Popen([sys.executable, "-m", "compositor", settings], stderr=full)
        try:
            until(lambda: is_ready(http_port))
            process.terminate()
            assert process.wait(60) == 0
        finally:
            process.kill()
            process.wait()


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as sockets:
        return [sockets.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(count)]


def is_ready(port: int) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200
    return False


# Nothing is left.

RESTARTS = 100


def left() -> dict[str, object]:
    """What this process, or one that was killed, could have left behind."""
    gc.collect()
    return {
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "files": sorted(map(opened, Path("/proc/self/fd").iterdir())),
        "processes": sorted(descendants(os.getpid())),
        "shared memory": orphans(),
        "temporary": sorted(path.name for path in Path(tempfile.gettempdir()).iterdir()),
    }


def opened(path: Path) -> str:
    """What kind of file a descriptor is of."""
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
            httpx.AsyncClient() as http,
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
    with contextlib.suppress(AssertionError):
        until(lambda: left() == before, 20)
    assert left() == before
    assert regions(stack.triton) == mapped


@pytest.mark.parametrize("workers", [1, 2])
def test_what_a_kill_leaves_the_next_start_takes_away(stack: Stack, tmp_path: Path, workers: int) -> None:
    """Killed while it holds a region at Triton, a film and, with workers, the folder of their metrics."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    server = {"workers": workers, "drain_s": 0.5}
    settings = write_settings(tmp_path, stack.repository, stack.triton.grpc, server=server)
    kept = set(regions(stack.triton))
    for _ in range(3):
        with serving(settings, TMPDIR=str(folder)) as service, client(service) as (_, stub):
            ready(service)
            assert code_of(generate(stub)) == "OK"
            assert len(set(regions(stack.triton)) - kept) == 1, "those before it are gone"
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
    assert not orphans()
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
    command = [sys.executable, "-m", "lipsync", "up", "-r", str(stack.repository), "--port", "0", "--http-port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, "TMPDIR": str(folder)}
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
            assert not any(alive(pid) for pid in started)
        finally:
            process.kill()


def ignores(pid: int, number: signal.Signals) -> bool:
    """Whether a process ignores a signal. proc_pid_status(5)."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        mask = next(int(line.split()[1], 16) for line in lines if line.startswith("SigIgn:"))
        return bool(mask >> (number - 1) & 1)
    return False


def test_many_files_may_be_open(stack: Stack, tmp_path: Path) -> None:
    settings = write_settings(tmp_path, stack.repository, stack.triton.grpc)
    for limits, low in (("ulimit -Sn 256; exec", False), ("ulimit -n 256; exec", True)):
        with serving(settings, wrapper=limits) as service:
            text = Path(f"/proc/{service.process.pid}/limits").read_text()
            soft, hard = next(line for line in text.splitlines() if line.startswith("Max open files")).split()[3:5]
            assert soft == hard
            assert ("at most 256 files may be open" in service.said) == low
            assert service.stop() == 0
