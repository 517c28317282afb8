"""Every call, whichever way it comes: counted once by how it ended, named in its answer and in the service's log."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import wave
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from websockets.asyncio.client import connect as connect_websocket
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect as connect_now
from websockets.typing import Subprotocol

from compositor.proto import lipsync_v1_pb2 as pb
from compositor.proto import lipsync_v1_pb2_grpc as pb_grpc
from compositor.settings import Settings
from lipsync.sentences import HELLO

from ..conftest import ServiceThread, Stack, connect
from .waiting import until

pytestmark = pytest.mark.triton

ONE = np.zeros((1, 32, 16, 16), np.float32).tobytes()
SPEECH = pb.Speech(data=HELLO.read_bytes(), encoding=pb.Speech.WAV)
RATE = 16_000
LONG = np.sin(np.arange(60 * RATE, dtype=np.float32) / 20) * np.float32(0.1)
"""A minute of speech: nobody makes its 1,500 frames before a client has left."""
KEY = "a key that nobody may read"
TOKEN = "Bearer of what a caller keeps for itself"
FORGED = "nobody\n{}\r\x1b[2J\u2028"


@dataclass
class Logged:
    """A service of its own, in a process, and what it wrote."""

    process: subprocess.Popen[str]
    lines: list[dict[str, Any]] = field(default_factory=list)
    text: list[str] = field(default_factory=list)

    def read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.text.append(line)
            self.lines.append(json.loads(line))

    def port(self, words: str) -> int:
        """The port that a line of the log names, once it is there."""
        found: list[int] = []

        def look() -> bool:
            matches = (re.search(words, str(line["message"])) for line in list(self.lines))
            found.extend(int(match[1]) for match in matches if match)
            return bool(found)

        until(look)
        return found[0]

    def of(self, **values: object) -> list[dict[str, Any]]:
        """The lines that have all these."""
        return [line for line in self.lines if line.items() >= values.items()]


@pytest.fixture
def logged(stack: Stack, tmp_path: Path) -> Iterator[Logged]:
    (tmp_path / "key").write_text(KEY)
    settings = {
        "model_repository": str(stack.repository),
        "server": {"port": 0},
        "http": {"port": 0},
        "triton": {"endpoints": stack.triton.grpc, "key_file": str(tmp_path / "key")},
        "logging": {"level": "debug", "format": "json"},
    }
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "compositor", str(tmp_path / "settings.yaml")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        logged = Logged(process)
        reading = threading.Thread(target=logged.read)
        reading.start()
        try:
            yield logged
        finally:
            process.kill()
            reading.join()


@dataclass
class Counts:
    """How many calls have ended since this was made, by method and status."""

    address: str

    def __post_init__(self) -> None:
        self._before = self._now()

    def _now(self) -> dict[tuple[str, str], float]:
        text = httpx.get(f"http://{self.address}/metrics", timeout=60).text
        found = re.findall(r'^lipsync_calls_total\{method="(.*)",status="(.*)"\} (.*)$', text, re.MULTILINE)
        return {(method, status): float(value) for method, status, value in found}

    def ended(self) -> dict[tuple[str, str], float]:
        now = {key: value - self._before.get(key, 0) for key, value in self._now().items()}
        return {key: value for key, value in now.items() if value and key[0] != "HTTP expose"}


@pytest.fixture
def counts(stack: Stack) -> Counts:
    """From when the service is ready."""
    address = stack.service.http_address
    until(lambda: httpx.get(f"http://{address}/readyz", timeout=60).status_code == 200)
    return Counts(address)


def wav(samples: NDArray[np.float32]) -> bytes:
    with io.BytesIO() as file:
        with wave.open(file, "wb") as written:
            written.setnchannels(1)
            written.setsampwidth(2)
            written.setframerate(RATE)
            written.writeframes((samples * 32767).astype("<i2").tobytes())
        return file.getvalue()


def named(call: grpc.Call | grpc.RpcError) -> str:
    """The name that a call's trailing metadata gives it."""
    return str(dict(call.trailing_metadata())["x-request-id"])


def test_grpc_calls_are_counted_and_named(stub: pb_grpc.LipsyncStub, counts: Counts) -> None:
    name = (("x-request-id", "mine/1"),)
    wanted = pb.CompositeRequest(tenant="plain", start=0, features=ONE)
    _, call = stub.Composite.with_call(wanted, metadata=name, timeout=60)
    assert named(call) == "mine/1"
    with pytest.raises(grpc.RpcError) as refused:
        stub.Composite(pb.CompositeRequest(tenant="nobody", start=0, features=ONE), metadata=name, timeout=60)
    assert named(refused.value) == "mine/1"
    assert dict(refused.value.trailing_metadata()).keys() == {"x-request-id", "grpc-status-details-bin"}
    answers = stub.Generate(pb.GenerateRequest(tenant="plain", speech=SPEECH), timeout=60)
    assert len(list(answers)) > 10
    assert re.fullmatch(r"[0-9a-f]{16}", named(answers))
    start = pb.SpeakRequest(start=pb.SpeakRequest.Start(tenant="plain", flow=pb.SpeakRequest.PLAIN))
    talk = stub.Speak(iter([start]), timeout=60)
    assert next(talk).started.session
    list(talk)
    with pytest.raises(grpc.RpcError):
        list(stub.Speak(iter([pb.SpeakRequest()]), timeout=60))

    expected = {
        ("Composite", "OK"): 1,
        ("Composite", "NOT_FOUND"): 1,
        ("Generate", "OK"): 1,
        ("Speak", "OK"): 1,
        ("Speak", "INVALID_ARGUMENT"): 1,
    }
    until(lambda: counts.ended() == expected)


@pytest.mark.parametrize(("timeout_s", "status"), [(60, "CANCELLED"), (5, "DEADLINE_EXCEEDED")])
def test_grpc_calls_whose_client_leaves_are_told_from_those_whose_time_is_up(
    stub: pb_grpc.LipsyncStub,
    counts: Counts,
    caplog: pytest.LogCaptureFixture,
    timeout_s: float,
    status: str,
) -> None:
    stub.Composite(pb.CompositeRequest(tenant="plain", start=0, features=ONE), timeout=60)  # it is loaded now
    speech = pb.Speech(data=LONG.astype("<f4").tobytes(), encoding=pb.Speech.FLOAT32, sample_rate=RATE)
    raw = pb.Output(format=pb.Output.BGR24)  # a few of which fill what gRPC takes unread
    start = pb.SpeakRequest(start=pb.SpeakRequest.Start(tenant="plain", flow=pb.SpeakRequest.PLAIN))
    requests = queue.SimpleQueue[pb.SpeakRequest | None]()
    requests.put(start)
    wanted = pb.GenerateRequest(tenant="plain", speech=speech, output=raw)
    with caplog.at_level("INFO"):
        calls = [stub.Generate(wanted, timeout=timeout_s), stub.Speak(iter(requests.get, None), timeout=timeout_s)]
        for call in calls:
            next(call)  # the service has it
            if status == "CANCELLED":
                call.cancel()
        expected = {("Composite", "OK"): 1, ("Generate", status): 1, ("Speak", status): 1}
        until(lambda: counts.ended() == expected)
    requests.put(None)
    own = (record for record in caplog.records if not record.name.startswith("compositor.triton."))
    lines = [record.getMessage() for record in own if record.levelname in ("WARNING", "ERROR")]
    told = [] if status == "CANCELLED" else [f"{method} failed: {status}" for method in ("Generate", "Speak")]
    assert sorted(lines) == told


def test_http_requests_are_counted_and_named(stack: Stack, counts: Counts) -> None:
    with httpx.Client(base_url=f"http://{stack.service.http_address}", timeout=60) as http:
        answers = [
            http.get(path, headers={"x-request-id": f"n{number}"})
            for number, path in enumerate(
                ("/healthz", "/readyz", "/", "/nothing.js", "/v1/tenants/plain", "/v1/tenants/nobody", "/v1/nothing")
            )
        ]
        assert [answer.headers["x-request-id"] for answer in answers] == [f"n{number}" for number in range(7)]
        assert re.fullmatch(
            r"[0-9a-f]{16}", http.get("/stats", headers={"x-request-id": "a b"}).headers["x-request-id"]
        )
        url = "/v1/tenants/plain/speak"
        assert http.post(url, content=HELLO.read_bytes()).status_code == 200
        assert http.post(url, content=b"no wav").status_code == 400
        assert http.get(url).status_code == 405
        with http.stream("POST", url, content=wav(LONG)) as answer:
            assert answer.status_code == 200
    expected = {
        ("HTTP alive", "OK"): 1,
        ("HTTP ready", "OK"): 1,
        ("HTTP page", "OK"): 1,
        ("HTTP page", "NOT_FOUND"): 2,
        ("HTTP tenant", "OK"): 1,
        ("HTTP tenant", "NOT_FOUND"): 1,
        ("HTTP stats", "OK"): 1,
        ("HTTP speak", "OK"): 1,
        ("HTTP speak", "INVALID_ARGUMENT"): 1,
        ("HTTP speak", "UNIMPLEMENTED"): 1,
        ("HTTP speak", "CANCELLED"): 1,
    }
    until(lambda: counts.ended() == expected)


@pytest.mark.parametrize("method", ["HTTP speak", "WebSocket", "Speak"])
def test_who_does_not_send_what_it_began_is_no_failure_of_the_service(
    stack: Stack, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    """Told that its time is up, and counted as who leaves: no alert looks at that."""
    values = {"model_repository": stack.repository, "triton": {"endpoints": stack.triton.grpc}, "http": {"port": 0}}
    limits = {"server": {"port": 0, "timeout_s": 0.2}, "live": {"start_timeout_s": 0.2}}
    service = ServiceThread(Settings.model_validate(values | limits))
    service.start()
    try:
        counts = Counts(service.http_address)
        with caplog.at_level("INFO"):
            assert begin_only(service, method) == {"HTTP speak": "408", "WebSocket": "4408"}.get(
                method, "DEADLINE_EXCEEDED"
            )
            until(lambda: counts.ended() == {(method, "CANCELLED"): 1})
    finally:
        service.stop()
    said = {"HTTP speak": "the WAV did not come within 0.2 s"}.get(method, "no start within 0.2 s")
    lines = [(record.levelname, record.getMessage()) for record in caplog.records if "failed" in record.getMessage()]
    assert lines == [("INFO", f"{method} failed: CANCELLED: {said}")]


def begin_only(service: ServiceThread, method: str) -> str:
    """Begins a call, sends nothing more, and says how it was ended."""
    if method == "HTTP speak":
        with socket.create_connection(("127.0.0.1", service.http_port), 30) as slow:
            slow.sendall(b"POST /v1/tenants/plain/speak HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nRIFF")
            return slow.recv(4096).split()[1].decode()
    if method == "WebSocket":
        with connect_now(f"ws://{service.http_address}/ws/plain", compression=None) as client:
            with contextlib.suppress(ConnectionClosed):
                while True:
                    client.recv(60)
            return str(client.close_code)
    requests = queue.SimpleQueue[pb.SpeakRequest | None]()
    for stub in connect(service.address):
        with pytest.raises(grpc.RpcError) as refused:
            list(stub.Speak(iter(requests.get, None), timeout=60))
    requests.put(None)
    return str(refused.value.code().name)


async def test_conversations_are_counted_and_named(stack: Stack, counts: Counts) -> None:
    url = f"ws://{stack.service.http_address}/ws/plain"
    headers = {"X-Request-Id": "mine"}
    async with connect_websocket(url, compression=None, additional_headers=headers) as client:
        assert client.response
        assert client.response.headers["x-request-id"] == "mine"
        await client.send('{"type": "start"}')
        await client.recv()
    async with connect_websocket(url, compression=None) as client:
        await client.send("nonsense")
        await client.wait_closed()
    async with connect_websocket(url, compression=None) as client:
        client.transport.abort()
    with pytest.raises(InvalidStatus) as refused:
        await connect_websocket(url, subprotocols=[Subprotocol("other")], additional_headers=headers)
    assert refused.value.response.headers["x-request-id"] == "mine"
    expected = {("WebSocket", "OK"): 1, ("WebSocket", "INVALID_ARGUMENT"): 2, ("WebSocket", "CANCELLED"): 1}
    await asyncio.to_thread(until, lambda: counts.ended() == expected)


def test_a_services_log_is_json_that_tells_of_calls_and_sessions_and_no_secret(logged: Logged) -> None:
    port = logged.port(r"listening on .*:(\d+), Triton")
    http_port = logged.port(r"page is at http://.*:(\d+)/")
    until(lambda: bool(logged.of(message="ready to serve")))
    for stub in connect(f"127.0.0.1:{port}"):
        secretly = (("x-request-id", "composite-1"), ("authorization", TOKEN))
        stub.Composite(pb.CompositeRequest(tenant="plain", start=0, features=ONE), metadata=secretly, timeout=60)
        forged = FORGED.format('{"level": "error", "message": "forged"}')
        name = (("x-request-id", "forged-1"),)
        with pytest.raises(grpc.RpcError):
            stub.Composite(pb.CompositeRequest(tenant=forged, start=0, features=ONE), metadata=name, timeout=60)
        start = pb.SpeakRequest.Start(tenant="plain", flow=pb.SpeakRequest.PLAIN, sample_rate=16_000)
        said = pb.SpeakRequest.Audio(data=HELLO.read_bytes()[44:])
        requests = [pb.SpeakRequest(start=start), pb.SpeakRequest(audio=said)]
        events = list(stub.Speak(iter(requests), metadata=(("x-request-id", "speak-1"),), timeout=60))
    with contextlib.suppress(httpx.HTTPError):
        httpx.post(
            f"http://127.0.0.1:{http_port}/v1/tenants/nobody/speak",
            headers={"x-request-id": "post-1", "authorization": TOKEN},
            timeout=60,
        )
    cookie = {"cookie": TOKEN, "authorization": TOKEN}
    with connect_now(f"ws://127.0.0.1:{http_port}/ws/plain", compression=None, additional_headers=cookie) as client:
        client.send("nonsense")
        assert "error" in str(client.recv(60))
    logged.process.send_signal(signal.SIGTERM)
    assert logged.process.wait(60) == 0
    until(lambda: bool(logged.of(message="stopped")))

    session = events[0].started.session
    begin, end = (line for line in logged.of(session=session, level="info") if line["logger"].endswith("live"))
    assert begin.items() >= {"request": "speak-1", "tenant": "plain", "fps": 25, "picture": "frames"}.items()
    assert end.items() >= {"request": "speak-1", "reason": "OK", "dropped_audio": 0}.items()
    assert end["pictures"]["speaking"] + end["pictures"]["late"] > 10
    assert 0 <= end["most_late_s"] < 60
    assert end["seconds"] > 1
    (failed,) = logged.of(request="forged-1")
    assert failed.items() >= {"method": "Composite", "level": "info", "status": "INVALID_ARGUMENT"}.items()
    (failed,) = logged.of(request="post-1")
    assert failed.items() >= {"method": "HTTP speak", "status": "NOT_FOUND", "reason": "TENANT_NOT_FOUND"}.items()
    assert any("draining" in line["message"] for line in logged.lines)
    for line in logged.lines:
        assert line.keys() >= {"time", "level", "logger", "message"}
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
    assert len(logged.of(method="WebSocket", status="INVALID_ARGUMENT")) == 1
    for secret in (KEY, TOKEN):
        assert secret not in "".join(logged.text)
    assert not logged.of(message="forged")


@pytest.mark.parametrize("kind", ["mjpeg", "mp4"])
def test_a_request_that_is_cut_off_was_not_left_by_its_caller(
    stack: Stack, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    server = {"port": 0, "drain_s": 0}
    values = {"model_repository": stack.repository, "server": server, "http": {"port": 0}}
    service = ServiceThread(Settings.model_validate(values | {"triton": {"endpoints": stack.triton.grpc}}))
    service.start()
    url = f"http://{service.http_address}"
    answers: list[httpx.Response] = []
    begun, stopped = threading.Event(), threading.Event()

    def post() -> None:
        path, headers = f"{url}/v1/tenants/plain/speak?format={kind}&fps=60", {"x-request-id": "cut-off"}
        with (
            contextlib.suppress(httpx.HTTPError),
            httpx.stream("POST", path, content=wav(LONG), headers=headers, timeout=60) as answer,
        ):
            begun.set()
            # Read at once, it might be whole before the service stops.
            stopped.wait(60)
            answer.read()
            answers.append(answer)

    def is_under_way() -> bool:
        """A video is made before its answer begins."""
        metrics = httpx.get(f"{url}/metrics", timeout=60).text
        return begun.is_set() if kind == "mjpeg" else 'seconds_count{stage="encode"} 0.0' not in metrics

    posting = threading.Thread(target=post)
    posting.start()
    with caplog.at_level("INFO"):
        until(is_under_way)
        service.stop()
        stopped.set()
        posting.join()
    lines = [(record.levelname, record.getMessage()) for record in caplog.records if "failed" in record.getMessage()]
    assert lines == [("INFO", "HTTP speak failed: UNAVAILABLE: the service stops")]
    assert [answer.status_code for answer in answers] == ([503] if kind == "mp4" else [])
    for answer in answers:
        error = answer.json()["error"]
        assert (error["status"], error["reason"], error["retry_after_s"]) == ("UNAVAILABLE", "STOPPING", 1)
        wanted = {"x-request-id": "cut-off", "retry-after": "1", "connection": "close", "cache-control": "no-store"}
        assert answer.headers.items() >= wanted.items()
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
