"""HTTP against the whole system: what is installed, prepared frames, posted speech, and what is refused."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from email.parser import BytesParser
from pathlib import Path
from typing import Any

import av
import cv2
import httpx
import numpy as np
import pytest

from compositor.settings import Settings
from compositor.transports.http import PAGE
from lipsync.sentences import HELLO
from tests.conftest import ServiceThread, Stack
from tests.integration.waiting import until

WAV = HELLO.read_bytes()
SPEAK = "/v1/tenants/avatar/speak"


@pytest.fixture
def http(stack: Stack) -> Iterator[httpx.Client]:
    with client_of(stack.service) as client:
        yield client


@contextlib.contextmanager
def client_of(service: ServiceThread) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://{service.http_address}", timeout=60) as client:
        yield client


@contextlib.contextmanager
def service_with(stack: Stack, server: dict[str, float], **http: object) -> Iterator[ServiceThread]:
    """A service of its own on the same Triton, for small messages."""
    settings = Settings.model_validate(
        {
            "model_repository": stack.repository,
            "server": {"port": 0, **server},
            "http": {"port": 0, "max_message_mb": 1, **http},
            "triton": {"endpoints": stack.triton.grpc},
        }
    )
    service = ServiceThread(settings)
    service.start()
    try:
        yield service
    finally:
        service.stop()


@pytest.fixture
def narrow(stack: Stack) -> Iterator[ServiceThread]:
    """A service that takes one call at a time, and lets it end however busy the machine is."""
    with service_with(stack, {"max_calls": 1, "drain_s": 60}) as service:
        yield service


def connected(service: ServiceThread) -> socket.socket:
    return socket.create_connection(("127.0.0.1", service.http_port), 30)


def fault(response: httpx.Response) -> tuple[int, str, str, str]:
    error = response.json()["error"]
    assert error.keys() == {"status", "reason", "message", "field", "retry_after_s"}
    return response.status_code, error["status"], error["reason"], error["field"]


def test_health(http: httpx.Client) -> None:
    assert http.get("/healthz").text == "ok\n"
    until(lambda: http.get("/readyz").status_code == 200)


def test_it_is_not_ready_without_triton(stack: Stack) -> None:
    settings = {"model_repository": stack.repository, "server": {"port": 0}, "http": {"port": 0}}
    service = ServiceThread(Settings.model_validate({**settings, "triton": {"endpoints": "127.0.0.1:1"}}))
    service.start()
    try:
        with client_of(service) as http:
            assert http.get("/healthz").status_code == 200
            response = http.get("/readyz")
            assert fault(response) == (503, "UNAVAILABLE", "TRITON_UNAVAILABLE", "")
            assert response.headers["Retry-After"] == "1"
    finally:
        service.stop()


def test_tenants(http: httpx.Client) -> None:
    tenants = http.get("/v1/tenants").json()
    assert tenants == {"tenants": [{"id": "avatar"}, {"id": "plain"}, {"id": "sent"}]}
    fields = http.get("/v1/tenants/plain").json()
    version = fields.pop("version")
    assert fields.pop("frame_url") == f"/v1/tenants/plain/frames/{{number}}.jpg?v={version}"
    assert fields == {"id": "plain", "frames": 8, "width": 320, "height": 240, "fps": 25, "quality": 75}


def test_frames_are_cached_for_good_under_their_version(http: httpx.Client) -> None:
    fields = http.get("/v1/tenants/plain").json()
    response = http.get(fields["frame_url"].replace("{number}", "7"))
    picture = cv2.imdecode(np.frombuffer(response.content, np.uint8), cv2.IMREAD_COLOR)
    assert picture is not None
    assert picture.shape == (240, 320, 3)
    assert response.headers["Content-Type"] == "image/jpeg"
    assert response.headers["Cache-Control"] == "public, max-age=31536000, immutable"
    again = http.get("/v1/tenants/plain/frames/7.jpg", headers={"If-None-Match": response.headers["ETag"]})
    assert (again.status_code, again.content) == (304, b"")
    other = http.get("/v1/tenants/plain/frames/6.jpg", headers={"If-None-Match": response.headers["ETag"]})
    assert other.status_code == 200
    assert other.headers["ETag"] != response.headers["ETag"]


@pytest.mark.parametrize("query", ["", "?v=", "?v=0000000000000000"])
def test_frames_without_their_version_are_asked_after(http: httpx.Client, query: str) -> None:
    assert http.get(f"/v1/tenants/plain/frames/0.jpg{query}").headers["Cache-Control"] == "no-cache"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v1/tenants/nobody", (404, "NOT_FOUND", "TENANT_NOT_FOUND", "tenant")),
        ("/v1/tenants/Nobody", (400, "INVALID_ARGUMENT", "INVALID_INPUT", "tenant")),
        ("/v1/tenants/..", (404, "NOT_FOUND", "HTTP_404", "")),
        ("/v1/tenants/%2e%2e", (400, "INVALID_ARGUMENT", "INVALID_INPUT", "tenant")),
        ("/v1/tenants/plain/frames/8.jpg", (404, "NOT_FOUND", "HTTP_404", "")),
        ("/v1/tenants/plain/frames/-1.jpg", (404, "NOT_FOUND", "HTTP_404", "")),
        ("/v1/tenants/plain/frames/٤.jpg", (404, "NOT_FOUND", "HTTP_404", "")),
        (f"/v1/tenants/plain/frames/{'9' * 5000}.jpg", (404, "NOT_FOUND", "HTTP_404", "")),
        ("/nothing/here", (404, "NOT_FOUND", "HTTP_404", "")),
        (SPEAK, (405, "UNIMPLEMENTED", "HTTP_405", "")),
    ],
)
def test_what_is_not_there(http: httpx.Client, path: str, expected: tuple[int, str, str, str]) -> None:
    assert fault(http.get(path)) == expected


@pytest.mark.parametrize(
    "path",
    ["/../pyproject.toml", "/..%2fsettings.py", "/%2e%2e/settings.py", "/..\\settings.py", "//etc/passwd", "/%00"],
)
def test_no_path_leads_out_of_the_page(stack: Stack, path: str) -> None:
    # By hand: clients tidy such paths up.
    with connected(stack.service) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        answer = b""
        while part := connection.recv(65536):
            answer += part
    assert answer.startswith(b"HTTP/1.1 404 ")


def test_the_page_and_all_its_files_are_served(http: httpx.Client) -> None:
    # A script or style of another type is not run, for nosniff.
    kinds = {".html": "html", ".js": "javascript", ".css": "css", ".svg": "svg+xml", ".wav": "wav"}
    files = [path for path in PAGE.rglob("*") if path.is_file()]
    assert PAGE / "index.html" in files
    for path in files:
        response = http.get(f"/{path.relative_to(PAGE)}")
        assert response.content == path.read_bytes()
        assert response.headers["Content-Type"].partition(";")[0].endswith(kinds[path.suffix])
        assert response.headers["Cache-Control"] == "no-cache"
        assert (
            http.get(f"/{path.relative_to(PAGE)}", headers={"If-None-Match": response.headers["ETag"]}).content == b""
        )
    assert http.get("/").content == (PAGE / "index.html").read_bytes()


@pytest.mark.parametrize("path", ["/", "/healthz", "/nothing", "/v1/tenants/plain/frames/0.jpg", "/v1/tenants/X"])
def test_every_answer_has_the_security_headers(http: httpx.Client, path: str) -> None:
    headers = http.get(path).headers
    assert headers["Content-Security-Policy"].startswith("default-src 'self';")
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert "Server" not in headers


def test_metrics_and_stats(http: httpx.Client) -> None:
    assert "# TYPE lipsync_sessions gauge" in http.get("/metrics").text
    until(lambda: http.get("/stats").json()["sessions"] == [])


def test_stats_and_metrics_tell_of_triton_and_its_models(http: httpx.Client, stack: Stack) -> None:
    assert http.post("/v1/tenants/plain/speak", content=HELLO.read_bytes()).status_code == 200

    def plain() -> dict[str, Any]:
        return next((model for model in http.get("/stats").json()["models"] if model["name"] == "plain"), {})

    until(lambda: plain().get("uses", 0) > 0)
    model = plain()
    assert (model["endpoint"], model["state"], model["device"]) == (stack.triton.grpc, "ready", "default")
    assert model["bytes"] > 10_000_000
    assert model["last_use_s"] > 1e9

    def is_known() -> bool:
        (endpoint,) = http.get("/stats").json()["endpoints"]
        return bool(endpoint["up"] and endpoint["devices"])

    until(is_known)
    (endpoint,) = http.get("/stats").json()["endpoints"]
    assert endpoint["endpoint"] == stack.triton.grpc
    assert endpoint["counts"]["hits"] > 0
    (device,) = endpoint["devices"]
    assert device["models"] >= 1
    assert device["most_models"] == 40
    assert device["bytes"] > 10_000_000
    exposed = http.get("/metrics").text
    assert f'lipsync_triton_up{{triton="{stack.triton.grpc}"}} 1.0' in exposed
    assert f'lipsync_models_limit{{device="default",triton="{stack.triton.grpc}"}} 40.0' in exposed


def parts(response: httpx.Response) -> list[tuple[dict[str, str], bytes]]:
    """Headers and body of each part of a multipart answer."""
    boundary = response.headers["Content-Type"].partition("boundary=")[2].encode()
    pieces = response.content.split(b"--" + boundary)
    assert (pieces[0], pieces[-1]) == (b"", b"--")
    found = []
    for piece in pieces[1:-1]:
        head, _, body = piece.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        headers = dict(BytesParser().parsebytes(head).items())
        found.append((headers, body[: int(headers["Content-Length"])]))
    return found


@pytest.mark.parametrize("how", [{"params": {"format": "mjpeg"}}, {"headers": {"Accept": "*/*"}}, {}])
def test_speech_becomes_frames(http: httpx.Client, how: dict[str, Any]) -> None:
    response = http.post(SPEAK, content=WAV, **how)
    assert response.headers["Content-Type"].startswith("multipart/x-mixed-replace; ")
    frames = parts(response)
    assert [int(headers["X-Pts"]) for headers, _ in frames] == [640 * number for number in range(len(frames))]
    assert [int(headers["X-Number"]) for headers, _ in frames][:12] == [0, 1, 2, 3, 4, 5, 4, 3, 2, 1, 0, 1]
    with av.open(io.BytesIO(response.content), format="mpjpeg") as container:
        pictures = [picture.to_ndarray(format="bgr24") for picture in container.decode(video=0)]
    assert len(pictures) == len(frames)
    assert pictures[0].shape == (360, 640, 3)


@pytest.mark.parametrize(
    "how", [{"params": {"format": "mp4"}}, {"headers": {"Accept": "video/mp4"}}, {"headers": {"Accept": "video/*"}}]
)
def test_speech_becomes_a_video_with_sound(http: httpx.Client, how: dict[str, Any]) -> None:
    response = http.post(SPEAK, content=WAV, **how)
    assert response.headers["Content-Type"] == "video/mp4"
    with av.open(io.BytesIO(response.content)) as container:
        video, sound = container.streams.video[0], container.streams.audio[0]
        assert (video.codec_context.name, sound.codec_context.name) == ("h264", "aac")
        assert video.average_rate == 25
        frames = video.frames
    assert frames == len(parts(http.post(SPEAK, content=WAV)))


def test_rate_start_and_quality_can_be_chosen(http: httpx.Client) -> None:
    frames = parts(http.post(SPEAK, content=WAV, params={"fps": "10", "start": "3", "quality": "20"}))
    assert [int(headers["X-Pts"]) for headers, _ in frames][:3] == [0, 1600, 3200]
    assert [int(headers["X-Number"]) for headers, _ in frames][:4] == [3, 4, 5, 4]
    assert len(frames[0][1]) < len(http.get("/v1/tenants/avatar/frames/3.jpg").content)


@pytest.mark.parametrize(
    ("how", "code", "field"),
    [
        ({"content": b""}, 400, "audio"),
        ({"content": b"no wav"}, 400, "audio"),
        ({"content": WAV, "params": {"format": "avi"}}, 400, "format"),
        ({"content": WAV, "params": {"fps": "61"}}, 400, "fps"),
        ({"content": WAV, "params": {"fps": "-1"}}, 400, "fps"),
        ({"content": WAV, "params": {"start": "many"}}, 400, "start"),
        ({"content": WAV, "params": {"quality": "101"}}, 400, "output.quality"),
        ({"content": WAV, "headers": {"Accept": "text/html"}}, 406, ""),
    ],
)
def test_bad_requests(http: httpx.Client, how: dict[str, Any], code: int, field: str) -> None:
    response = http.post(SPEAK, **how)
    assert fault(response)[0] == code
    assert fault(response)[3] == field


def test_a_tenant_that_is_not_there_does_not_speak(http: httpx.Client) -> None:
    assert fault(http.post("/v1/tenants/nobody/speak", content=WAV))[:2] == (404, "NOT_FOUND")


def test_mp4_without_its_extra_says_how_to_mend_it(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "compositor.video", raising=False)
    monkeypatch.setitem(sys.modules, "av", None)
    response = http.post(SPEAK, content=WAV, params={"format": "mp4"})
    assert fault(response) == (501, "UNIMPLEMENTED", "EXTRA_MISSING", "format")
    assert "pip install 'triton-lipsync[video]'" in response.json()["error"]["message"]


def test_the_service_starts_without_the_extra() -> None:
    code = "import compositor.server, sys; assert 'av' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_wav_that_is_too_large_is_refused(narrow: ServiceThread) -> None:
    with client_of(narrow) as http:
        response = http.post(SPEAK, content=bytes(2 << 20))
        assert fault(response)[0] == 413


def test_a_wav_that_never_ends_is_not_waited_for(stack: Stack) -> None:
    head = f"POST {SPEAK} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 100\r\n\r\n"
    with service_with(stack, {"timeout_s": 0.2}) as service, connected(service) as slow:
        slow.sendall(head.encode() + b"RIFF")
        answer = b"".join(iter(lambda: slow.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"] == {
        "status": "DEADLINE_EXCEEDED",
        "reason": "REQUEST_TIMEOUT",
        "message": "the WAV did not come within 0.2 s",
        "field": "",
        "retry_after_s": None,
    }


def test_a_video_that_cannot_be_written_is_not_the_callers_fault(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "film"
    (folder / "speech.part.mp4").mkdir(parents=True)
    monkeypatch.setattr(tempfile, "mkdtemp", lambda *_, **__: str(folder))
    response = http.post(SPEAK, content=WAV, params={"format": "mp4"})
    assert fault(response)[:2] == (500, "INTERNAL")
    assert "speech.part" not in response.text
    assert not folder.exists()


@pytest.mark.parametrize("kind", ["mjpeg", "mp4"])
def test_a_client_that_goes_away_stops_the_work(
    stack: Stack, kind: str, tone: Callable[[float, int], np.ndarray[Any, Any]]
) -> None:
    body = pcm16_wav(tone(400, 16_000))  # its 24,000 frames take longer than is waited below
    head = f"POST {SPEAK}?format={kind}&fps=60 HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with service_with(stack, {"max_calls": 1}, max_message_mb=16) as narrow, client_of(narrow) as http:
        with connected(narrow) as gone:
            gone.sendall(head.encode() + body)
            if kind == "mjpeg":
                assert gone.recv(16).startswith(b"HTTP/1.1 200")
            else:
                until(lambda: http.post(SPEAK, content=WAV).status_code == 429)
        # The one call that this service takes at a time is free again.
        until(lambda: http.post(SPEAK, content=WAV).status_code == 200)


def pcm16_wav(samples: np.ndarray[Any, Any]) -> bytes:
    data = (samples * 32767).astype("<i2").tobytes()
    size = len(data).to_bytes(4, "little")
    form = bytes.fromhex("1000000001000100803e0000007d000002001000")
    return b"RIFF" + (len(data) + 36).to_bytes(4, "little") + b"WAVEfmt " + form + b"data" + size + data


PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-request-id"}


def test_pages_of_others_may_not_read_answers(http: httpx.Client) -> None:
    origin = {"Origin": "https://shop.example.org"}
    answers = [http.get("/v1/tenants", headers=origin), http.options(SPEAK, headers={**origin, **PREFLIGHT})]
    assert [answer.status_code for answer in answers] == [200, 405]
    assert not [name for answer in answers for name in answer.headers if name.startswith("access-control-")]


@pytest.mark.parametrize(("allowed", "told"), [("https://shop.example.org", "https://shop.example.org"), ("*", "*")])
def test_pages_that_the_settings_name_may_read_answers(stack: Stack, allowed: str, told: str) -> None:
    with service_with(stack, {}, allowed_origins=allowed) as service, client_of(service) as http:
        origin = {"Origin": "https://shop.example.org"}
        asked = http.options(SPEAK, headers={**origin, **PREFLIGHT})
        spoken = http.post(SPEAK, content=WAV, headers={**origin, "x-request-id": "mine"})
        missing = http.get("/v1/tenants/nobody", headers=origin)
        assert [answer.status_code for answer in (asked, spoken, missing)] == [200, 200, 404]
        assert {answer.headers["Access-Control-Allow-Origin"] for answer in (asked, spoken, missing)} == {told}
        assert "POST" in asked.headers["Access-Control-Allow-Methods"]
        assert "x-request-id" in asked.headers["Access-Control-Allow-Headers"].lower()
        assert "x-request-id" in spoken.headers["Access-Control-Expose-Headers"].lower()
        assert spoken.headers["x-request-id"] == "mine"
        other = http.get("/v1/tenants", headers={"Origin": "https://evil.example"})
        assert other.headers.get("Access-Control-Allow-Origin") == ("*" if allowed == "*" else None)
        # What caches keep for all must not lack what one of them needs.
        if allowed != "*":
            assert "Origin" in http.get("/v1/tenants").headers["Vary"]


@pytest.mark.parametrize("origin", ["https://shop.example.org", "null", "http://127.0.0.1:1"])
def test_pages_of_others_may_not_have_speech_made(
    http: httpx.Client, origin: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As fetch sends it with the mode no-cors: no preflight goes before."""
    headers = {"Origin": origin, "Content-Type": "text/plain;charset=UTF-8", "Sec-Fetch-Mode": "no-cors"}
    with caplog.at_level("INFO"):
        refused = http.post(f"{SPEAK}?format=neither", content=WAV, headers=headers)
        until(lambda: f"HTTP speak failed: PERMISSION_DENIED: pages of '{origin}'" in caplog.text)
    # Before all else that is wrong.
    assert fault(refused) == (403, "PERMISSION_DENIED", "ORIGIN_REFUSED", "origin")
    assert "http.allowed_origins" in refused.json()["error"]["message"]


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_the_services_own_page_and_programs_may(stack: Stack, http: httpx.Client, scheme: str) -> None:
    own = {"Origin": f"{scheme}://{stack.service.http_address}"}
    assert [http.post(SPEAK, content=WAV, headers=headers).status_code for headers in (own, {})] == [200, 200]


def test_pages_that_the_settings_name_may_have_speech_made_and_no_others(stack: Stack) -> None:
    shop = "https://shop.example.org"
    with service_with(stack, {}, allowed_origins=[shop]) as service, client_of(service) as http:
        codes = [http.post(SPEAK, content=WAV, headers={"Origin": each}).status_code for each in (shop, f"{shop}.evil")]
    assert codes == [200, 403]


def test_calls_beyond_the_limit_are_told_when_to_come_back(narrow: ServiceThread) -> None:
    with connected(narrow) as slow:
        slow.sendall(f"POST {SPEAK} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n".encode())
        with client_of(narrow) as http:
            refused: list[httpx.Response] = []

            def busy() -> bool:
                refused.append(http.post(SPEAK, content=b"x"))
                return refused[-1].status_code == 429

            until(busy)
            assert fault(refused[-1]) == (429, "RESOURCE_EXHAUSTED", "OVERLOADED", "")
            assert refused[-1].headers["Retry-After"] == "1"


def test_a_speech_in_work_is_finished_when_the_service_stops(narrow: ServiceThread) -> None:
    """The stop comes after the first part, and the last part still follows."""

    async def speak() -> bytes:
        async with httpx.AsyncClient(base_url=f"http://{narrow.http_address}", timeout=60) as http:
            async with http.stream("POST", SPEAK, content=WAV) as response:
                stream = response.aiter_raw()
                body = await anext(stream)
                stopping = asyncio.get_running_loop().run_in_executor(None, narrow.stop)
                async for part in stream:
                    body += part
            await stopping
            return body

    assert asyncio.run(speak()).endswith(b"\r\n--frame--")


def test_json_is_json(http: httpx.Client) -> None:
    for path in ("/stats", "/v1/tenants", "/v1/tenants/plain", "/nothing"):
        response = http.get(path)
        assert response.headers["Content-Type"] == "application/json"
        json.loads(response.content)
