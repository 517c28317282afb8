"""A service that is told to stop: what is under way ends well, and what does not end is cut off and named."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from compositor import jpeg
from lipsync.tritonserver import EmbeddedTriton

from ..conftest import Stack
from .processes import (
    FRAMES,
    NOT_SERVING,
    SPEECH,
    WAV,
    Service,
    alive,
    client,
    code_of,
    descendants,
    freeze,
    generate,
    ready,
    serving,
    watch,
    wav_of,
    write_settings,
)
from .viewers import GOODBYES, Caller, Guest, Viewer, finished, heard, pictures
from .waiting import until

pytestmark = [pytest.mark.triton, pytest.mark.timeout(180)]
Start = Callable[..., contextlib.AbstractContextManager[Service]]


@pytest.fixture
def start(stack: Stack, tmp_path: Path) -> Start:
    """Starts a service of its own on the shared Triton, with settings of the section `server`."""

    def begin(**server: Any) -> contextlib.AbstractContextManager[Service]:
        # Who connects and says nothing waits for the stop, however long a busy machine takes to it.
        patient = {"start_timeout_s": 600}
        settings = write_settings(tmp_path, stack.repository, stack.triton.grpc, server=server, live=patient)
        return serving(settings)

    return begin


def ended(service: Service) -> None:
    """Sees that it ended in order."""
    assert service.wait() == 0, service.said
    assert "stopped\n" in service.lines[-1]
    for word in ("Traceback", " ERROR ", "Exception"):
        assert word not in service.said, service.said


# Calls.


def test_health_says_so_first_and_calls_under_way_finish(start: Start) -> None:
    with start(drain_s=60) as service, client(service) as (channel, stub):
        states = watch(channel)
        speaking = generate(stub)
        answers = [next(speaking)]
        address = service.address
        url = f"http://{service.http_address}/v1/tenants/avatar/speak"
        with httpx.stream("POST", url, content=WAV, timeout=60) as posted:
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
                health_pb2_grpc.HealthStub(late).Check(health_pb2.HealthCheckRequest(), timeout=60)
            refused: Any = caught.value
            assert refused.code() is grpc.StatusCode.UNAVAILABLE


def test_a_load_balancer_gets_time_to_notice(start: Start) -> None:
    """Within the delay health says no, and new calls are taken. The second signal ends it."""
    with start(drain_delay_s=600, drain_s=600) as service, client(service) as (channel, stub):
        states = watch(channel)
        ready(service)
        service.process.send_signal(signal.SIGTERM)
        assert next(states).status == NOT_SERVING
        answer = httpx.get(f"http://{service.http_address}/readyz", timeout=60)
        assert (answer.status_code, answer.json()["error"]["reason"]) == (503, "STOPPING")
        assert httpx.get(f"http://{service.http_address}/healthz", timeout=60).status_code == 200
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


def test_a_signal_while_libraries_are_loaded_ends_it_at_once(tmp_path: Path) -> None:
    """Told as its own modules begin to be imported, before it reads its settings."""
    code = (
        "import os, signal, sys\n"
        "import compositor.__main__ as m\n"
        "class Told:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'compositor.workers': os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.meta_path.insert(0, Told())\n"
        "raise SystemExit(m.main())"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "none"], capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


# Live sessions.


@pytest.mark.parametrize(("workers", "told"), [(1, "once"), (2, "once"), (2, "each"), (2, "each, the first earlier")])
def test_speech_is_shown_to_its_end_and_idle_sessions_end_at_once(start: Start, workers: int, told: str) -> None:
    """Told once, or as systemd does it: each of its processes, in any order of arrival."""
    with start(drain_s=60, workers=workers) as service, client(service) as (_, stub):
        speaking: list[Viewer] = [Caller(stub, SPEECH, whole=False), Guest(service, SPEECH, whole=False)]
        idle: list[Viewer] = [Caller(stub, b""), Guest(service, b"")]
        for viewer in (*speaking, *idle):
            viewer.start()
        with connect(f"ws://{service.http_address}/ws/avatar") as silent:
            started = descendants(service.process.pid)
            assert len(started) == (0 if workers == 1 else workers)
            service.process.send_signal(signal.SIGTERM)
            if told == "each, the first earlier":
                until(lambda: service.said.count("draining, at most") == workers)
            for pid in started if told != "once" else ():
                with contextlib.suppress(ProcessLookupError):  # it had only idle sessions
                    os.kill(pid, signal.SIGTERM)
            for viewer in idle:
                viewer.join()
            assert service.process.poll() is None, "the others speak"
            with pytest.raises(ConnectionClosed):
                silent.recv()
            assert silent.close_code == 1001
        for viewer in speaking:
            until(lambda viewer=viewer: len(viewer.of("frame")) > 10)  # type: ignore[misc]
            viewer.finish()
        for viewer in speaking:
            viewer.join()
        ended(service)
        assert "cut off" not in service.said
        assert not any(alive(pid) for pid in started)
    assert tuple(viewer.ending for viewer in (*speaking, *idle)) == GOODBYES * 2
    for viewer in (*speaking, *idle):
        assert all(picture.shape == (360, 640, 3) for picture in pictures(viewer))
    for viewer in speaking:
        assert finished(viewer) == (len(SPEECH) // 2, False)
        # A viewer that is held up for half a second misses speech; the tests of `Live` count exactly.
        assert 0 < heard(viewer) <= len(SPEECH)


@pytest.mark.parametrize("how", ["grace", "second signal"])
def test_speech_that_does_not_end_in_time_is_accounted_for(start: Start, how: str) -> None:
    """A sentence of which no more comes; its viewers hear how much was shown."""
    with start(drain_s=0.3 if how == "grace" else 600) as service, client(service) as (_, stub):
        viewers: list[Viewer] = [Caller(stub, SPEECH * 4, whole=False), Guest(service, SPEECH * 4, whole=False)]
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
        assert 0 < heard(viewer) <= 2 * position < 4 * len(SPEECH)
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


@contextlib.contextmanager
def loading(settings: Path, triton: EmbeddedTriton) -> Iterator[tuple[Service, Future[str]]]:
    """A service, and what becomes of a call to it: Triton hangs as it loads the call's model."""
    # The call waits for Triton as long as a busy machine takes to do what it does meanwhile.
    variables = {"LIPSYNC_TRITON__RESTART_WAIT_S": "600"}
    with (
        serving(settings, **variables) as service,
        client(service) as (channel, stub),
        ThreadPoolExecutor(1) as pool,
    ):
        watch(channel)
        assert triton.pid is not None
        freeze(triton.pid)
        status = pool.submit(code_of, generate(stub))
        until(lambda: under_way(service) == 1)
        yield service, status


@pytest.mark.parametrize(("workers", "signals"), [(1, 1), (1, 2), (2, 2)])
def test_a_load_that_hangs_is_left(
    frozen: EmbeddedTriton, stack: Stack, tmp_path: Path, workers: int, signals: int
) -> None:
    """The call's own time is long."""
    server = {"drain_s": 0.3 if signals == 1 else 600, "workers": workers}
    settings = write_settings(tmp_path, stack.repository, frozen.grpc, server=server)
    with loading(settings, frozen) as (service, status):
        service.process.send_signal(signal.SIGTERM)
        if signals == 2:
            service.says("draining")
            service.process.send_signal(signal.SIGTERM)
        assert status.result() == "UNAVAILABLE"
        ended(service)
        assert "the time to drain is over; cut off: 1 call\n" in service.said


def test_a_load_that_comes_is_waited_for(frozen: EmbeddedTriton, stack: Stack, tmp_path: Path) -> None:
    settings = write_settings(tmp_path, stack.repository, frozen.grpc, server={"drain_s": 60})
    with loading(settings, frozen) as (service, status):
        service.process.send_signal(signal.SIGTERM)
        service.says("draining, at most 60 s: 1 call\n")
        assert frozen.pid is not None
        os.kill(frozen.pid, signal.SIGCONT)
        assert status.result() == "OK"
        ended(service)
        assert "cut off" not in service.said


def test_a_triton_that_hangs_from_the_start_holds_nobody(frozen: EmbeddedTriton, stack: Stack, tmp_path: Path) -> None:
    """While a tenant is to be loaded that nobody asked for yet."""
    assert frozen.pid is not None
    freeze(frozen.pid)
    residency = {"preload": ["avatar"]}
    settings = write_settings(tmp_path, stack.repository, frozen.grpc, server={"drain_s": 600}, residency=residency)
    with serving(settings) as service:
        service.process.send_signal(signal.SIGTERM)
        ended(service)
        assert "nothing is under way" in service.said


def under_way(service: Service) -> int:
    """How many models were asked for that are not loaded, of all workers."""
    text = httpx.get(f"http://{service.http_address}/metrics", timeout=60).text
    lines = [line for line in text.splitlines() if line.startswith("lipsync_model_misses_total{")]
    return sum(float(line.split()[-1]) > 0 for line in lines)


def test_who_reads_nothing_is_cut_off(start: Start) -> None:
    """More frames than the connections' buffers hold; the session waits for nobody's acknowledgement."""
    long = wav_of(SPEECH * 50)
    with start(drain_s=0.3) as service, client(service) as (_, stub):
        ready(service)
        stalled = generate(stub, wav=long)
        next(stalled)
        url = f"http://{service.http_address}/v1/tenants/avatar/speak"
        with (
            httpx.stream("POST", url, content=long, timeout=60) as posted,
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
        assert "WebSocket failed: UNAVAILABLE: the service stops" in service.said
        assert code_of(stalled) in ("UNAVAILABLE", "CANCELLED")


def missed(service: Service) -> int:
    """Pictures that the one session's viewer did not take."""
    sessions = httpx.get(f"http://{service.http_address}/stats", timeout=60).json()["sessions"]
    return sum(session["dropped"] for session in sessions)
