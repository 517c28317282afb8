"""Traces through the whole service: one call, one tree, and Triton's own spans in it."""

from __future__ import annotations

import contextlib
import json
import threading
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from websockets.sync.client import connect as connect_websocket

from compositor.proto import lipsync_v1_pb2 as pb
from compositor.settings import Settings
from lipsync.sentences import HELLO
from lipsync.tritonserver import EmbeddedTriton, TritonHome

from ..collector import Collector, attributes, collecting
from ..conftest import ServiceThread, connect
from .waiting import until

pytestmark = pytest.mark.triton

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACED = ("traceparent", f"00-{TRACE}-{CALLER}-01")
RATE = 16_000


class TritonsSpans:
    """What Triton sends to a collector of its own, by OTLP over HTTP, as JSON."""

    def __init__(self) -> None:
        self.spans: list[dict[str, Any]] = []
        spans = self.spans

        class Receiver(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                sent = json.loads(self.rfile.read(int(self.headers["content-length"])))
                for part in sent["resourceSpans"]:
                    for scope in part["scopeSpans"]:
                        spans.extend(scope["spans"])
                self.send_response(200)
                self.send_header("content-length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, format: str, *args: object) -> None:
                """Nobody reads it."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/v1/traces"


class Traced(EmbeddedTriton):
    """Traces every request."""

    url = ""

    def _command(self, home: TritonHome, server_id: str) -> list[str]:
        chosen = ["mode=opentelemetry", "rate=1", "level=TIMESTAMPS", f"opentelemetry,url={self.url}"]
        return [*super()._command(home, server_id), *(f"--trace-config={each}" for each in chosen)]


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No span is lost where a busy machine, and with it the collector, stands still for some seconds."""
    monkeypatch.setattr("compositor.telemetry._EXPORT_S", 60)


@pytest.fixture(scope="module")
def tritons() -> Iterator[TritonsSpans]:
    spans = TritonsSpans()
    thread = threading.Thread(target=spans.server.serve_forever)
    thread.start()
    try:
        yield spans
    finally:
        spans.server.shutdown()
        thread.join()
        spans.server.server_close()


@pytest.fixture(scope="module")
def triton(repository: Path, triton_home: Path, tritons: TritonsSpans) -> Iterator[EmbeddedTriton]:
    server = Traced(repository)
    server.url = tritons.url
    with server:
        yield server


@contextlib.contextmanager
def traced_service(repository: Path, triton: EmbeddedTriton) -> Iterator[tuple[ServiceThread, Collector]]:
    """A service whose spans are all there once the block is left."""
    with collecting() as collector:
        values = {"model_repository": repository, "server": {"port": 0}, "http": {"port": 0}}
        values |= {"triton": {"endpoints": triton.grpc}, "tracing": {"endpoint": collector.endpoint}}
        service = ServiceThread(Settings.model_validate(values))
        service.start()
        try:
            yield service, collector
        finally:
            service.stop()


def generate(service: ServiceThread, tenant: str, samples: NDArray[np.float32], *metadata: tuple[str, str]) -> int:
    """How many frames a speech gives."""
    speech = pb.Speech(data=samples.astype("<f4").tobytes(), encoding=pb.Speech.FLOAT32, sample_rate=RATE)
    for stub in connect(service.address):
        answers = stub.Generate(pb.GenerateRequest(tenant=tenant, speech=speech), metadata=metadata, timeout=60)
        return sum(answer.HasField("frame") for answer in answers)
    raise AssertionError("unreachable")


def begin_s(span: Span) -> float:
    return span.start_time_unix_nano / 1e9


def end_s(span: Span) -> float:
    return span.end_time_unix_nano / 1e9


def test_one_call_is_one_tree(
    repository: Path,
    triton: EmbeddedTriton,
    tritons: TritonsSpans,
    tone: Callable[[float, int], NDArray[np.float32]],
) -> None:
    with traced_service(repository, triton) as (service, collector):
        frames = generate(service, "plain", tone(2.0, RATE), TRACED, ("x-request-id", "one-call"))
    (root,) = collector.named("Generate")
    parts = [span for span in collector.spans if span is not root]
    assert {span.trace_id.hex() for span in collector.spans} == {TRACE}
    assert root.parent_span_id.hex() == CALLER
    assert {span.parent_span_id for span in parts} == {root.span_id}
    assert len({span.span_id for span in collector.spans}) == len(collector.spans)
    said = attributes(root)
    assert (said["lipsync.tenant"], said["lipsync.request"], said["lipsync.status"]) == ("plain", "one-call", "OK")
    assert root.status.code == Status.STATUS_CODE_UNSET

    count = Counter(span.name for span in parts)
    assert count.keys() == {"features", "load", "inference", "render", "send"}
    assert frames == 50
    assert count["inference"] == count["render"] == -(-frames // 4)  # the tenant's batches
    assert count["send"] == 1
    assert attributes(collector.named("send")[0])["lipsync.frames"] == frames
    for span in parts:
        assert begin_s(root) <= begin_s(span) <= end_s(span) <= end_s(root)
    # Batches are predicted first, and rendered then: as many as have been rendered at any time have been predicted.
    predicted, rendered = (sorted(map(end_s, collector.named(name))) for name in ("inference", "render"))
    assert all(before < after for before, after in zip(predicted, rendered, strict=True))
    assert begin_s(collector.named("send")[0]) >= min(rendered)

    # Triton was told whose request each is.
    ours = {span.span_id.hex() for span in parts if span.name in ("inference", "features")}

    def served() -> Counter[str]:
        """The models that Triton ran for them."""
        requests = {span["spanId"] for span in tritons.spans if span.get("parentSpanId") in ours}
        return Counter(span["name"] for span in tritons.spans if span.get("parentSpanId") in requests)

    # Not all: of requests that come at the same moment Triton 24.10 loses the context of some.
    until(lambda: served().keys() == {"plain", "audio_encoder"})


def test_a_call_that_fails_says_why_and_each_call_is_a_trace_of_its_own(
    repository: Path, triton: EmbeddedTriton, tone: Callable[[float, int], NDArray[np.float32]]
) -> None:
    with traced_service(repository, triton) as (service, collector):
        generate(service, "plain", tone(0.2, RATE))
        with pytest.raises(grpc.RpcError):
            generate(service, "nobody", tone(0.2, RATE))
        with httpx.Client(base_url=f"http://{service.http_address}", timeout=60) as http:
            for path in ("/healthz", "/metrics", "/", "/v1/tenants"):
                assert http.get(path).status_code == 200
            url = "/v1/tenants/plain/speak"
            assert http.post(url, content=HELLO.read_bytes(), headers={"x-request-id": "posted"}).status_code == 200
        with connect_websocket(f"ws://{service.http_address}/ws/plain", compression=None) as client:
            client.send('{"type": "start", "sample_rate": 16000, "flow": "plain"}')
            session = json.loads(client.recv())["session"]
            client.send(json.dumps({"type": "audio", "data": b64encode(HELLO.read_bytes()[44:]).decode()}))
            client.send('{"type": "segment_end"}')
            texts = (json.loads(message) for message in client if isinstance(message, str))
            finished = next(message for message in texts if message["type"] == "playback_finished")
    roots = [span for span in collector.spans if not span.parent_span_id]
    told = {span.name: attributes(span)["lipsync.status"] for span in roots if span.name != "Generate"}
    assert told == {"HTTP tenants": "OK", "HTTP speak": "OK", "WebSocket": "OK"}
    found, missing = sorted(collector.named("Generate"), key=begin_s)
    assert found.status.code == Status.STATUS_CODE_UNSET
    assert (missing.status.code, missing.status.message) == (Status.STATUS_CODE_ERROR, "NOT_FOUND")
    assert len({span.trace_id for span in roots}) == len(roots) == 5
    (talk,), (speech,) = collector.named("WebSocket"), collector.named("speech")
    assert attributes(talk).items() >= {"lipsync.session": session, "lipsync.tenant": "plain"}.items()
    assert speech.parent_span_id == talk.span_id
    assert attributes(speech) == {"lipsync.samples": finished["position"], "lipsync.interrupted": False}
    assert begin_s(talk) <= begin_s(speech) <= end_s(speech) <= end_s(talk)
    (posted,) = collector.named("HTTP speak")
    assert attributes(posted)["lipsync.request"] == "posted"
    parts = {span.name for span in collector.spans if span.parent_span_id == posted.span_id}
    assert parts >= {"features", "inference", "render", "send"}
