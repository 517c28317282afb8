"""WebSocket against the whole system: a conversation with everything in it, and everything that goes wrong. No test
leaves a task, a socket or a session behind."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.typing import Origin, Subprotocol

from compositor.settings import Settings
from lipsync.sentences import HELLO
from tests.conftest import ServiceThread, Stack
from tests.integration.waiting import until

SPEECH = HELLO.read_bytes()[44:]
RATE = 16_000
START = json.dumps({"type": "start", "sample_rate": RATE})
SEGMENT_END = '{"type":"segment_end"}'
V1 = Subprotocol("lipsync.v1")


def binary(data: bytes, version: int = 1, kind: int = 1, length: int | None = None) -> bytes:
    size = len(data) if length is None else length
    return struct.pack("<BBHIQI", version, kind, 0, 0, 0, size) + data


@contextlib.contextmanager
def service_with(stack: Stack, http: dict[str, object] | None = None, **live: object) -> Iterator[ServiceThread]:
    """A service of its own on the same Triton. live: settings of that section."""
    settings = Settings.model_validate(
        {
            "model_repository": stack.repository,
            "server": {"port": 0},
            "http": {"port": 0, **(http or {})},
            "triton": {"endpoints": stack.triton.grpc},
            "live": {"max_late": 1, **live},
        }
    )
    service = ServiceThread(settings)
    service.start()
    try:
        yield service
    finally:
        service.stop()


def left(service: ServiceThread) -> tuple[int, int, int]:
    """Sessions, tasks of the event loop, open sockets of the process; a tenant's files stay open on purpose."""
    response = asked(service, "/stats")
    done = asyncio.run_coroutine_threadsafe(tasks(), service.loop)
    return len(response.json()["sessions"]), done.result(30), sum(map(is_socket, Path("/proc/self/fd").iterdir()))


def asked(service: ServiceThread, path: str) -> httpx.Response:
    """An answer whose connection ends with it."""
    return httpx.get(f"http://{service.http_address}{path}", headers={"Connection": "close"}, timeout=60)


def is_socket(path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return str(path.readlink()).startswith("socket:")
    return False


async def tasks() -> int:
    return len(asyncio.all_tasks())


@contextlib.asynccontextmanager
async def nothing_left(service: ServiceThread) -> AsyncIterator[None]:
    """Checks that as much is there after the block as before."""
    # Its connection to Triton is there to stay.
    await asyncio.to_thread(until, lambda: asked(service, "/readyz").status_code == 200)
    left(service)
    before = left(service)
    yield
    # In a thread: the client's own sockets are closed by this loop.
    await asyncio.to_thread(until, lambda: all(now <= then for now, then in zip(left(service), before, strict=True)))


@contextlib.asynccontextmanager
async def opened(service: ServiceThread, tenant: str = "avatar") -> AsyncIterator[ClientConnection]:
    url = f"ws://{service.http_address}/ws/{tenant}"
    async with connect(url, subprotocols=[V1], compression=None, max_size=None) as client:
        assert client.subprotocol == V1
        yield client


async def events_until(client: ClientConnection, last: str, *, acknowledge: bool = True) -> list[dict[str, Any]]:
    """Events, pictures and sound included, up to one of type `last`."""
    events: list[dict[str, Any]] = []
    async for message in client:
        event = json.loads(message) if isinstance(message, str) else unpacked(message)
        events.append(event)
        if event["type"] == "frame" and acknowledge:
            await client.send(json.dumps({"type": "ack", "pts": event["pts"]}))
        if event["type"] == last:
            return events
    raise AssertionError(f"no {last}")


def unpacked(message: bytes) -> dict[str, Any]:
    version, kind, flags, epoch, pts, length = struct.unpack_from("<BBHIQI", message)
    assert (version, length) == (1, len(message) - 20)
    head = {"pts": pts, "epoch": epoch}
    if kind == 1:
        return {"type": "audio", **head, "data": message[20:]}
    number, dropped = struct.unpack_from("<II", message, 20)
    fields = {"type": "frame", **head, "speaking": flags == 1, "number": number, "dropped": dropped}
    if kind == 2:
        return {**fields, "data": message[28:]}
    return {**fields, "patch": list(struct.unpack_from("<HHHH", message, 28)), "data": message[36:]}


async def refused(client: ClientConnection) -> tuple[int, dict[str, Any]]:
    """The close code, and the error that was told before."""
    error: dict[str, Any] = {}
    with contextlib.suppress(ConnectionClosed):
        while True:
            message = await client.recv()
            if isinstance(message, str) and json.loads(message)["type"] == "error":
                error = json.loads(message)["error"]
    assert client.close_code is not None
    assert not error or client.close_reason == error["reason"]
    return client.close_code, error


def of(events: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [event for event in events if event["type"] == kind]


async def spoken(client: ClientConnection) -> list[dict[str, Any]]:
    """The events of the sentence, once more where the machine stood still for so long that no mouth moved."""
    for _ in range(20):
        for begin in range(0, len(SPEECH), 1280):
            await client.send(binary(SPEECH[begin : begin + 1280]))
        await client.send(SEGMENT_END)
        events = await events_until(client, "playback_finished")
        if any(event["speaking"] for event in of(events, "frame")):
            return events
    raise AssertionError("no mouth moved")


async def test_speech_is_seen_and_heard(stack: Stack) -> None:
    async with nothing_left(stack.service), opened(stack.service) as client:
        await client.send(START)
        started = json.loads(await client.recv())
        events = await spoken(client)
    assert (started["type"], started["tenant"], started["sample_rate"]) == ("started", "avatar", RATE)
    assert (started["fps"], started["epoch"]) == (25, 0)
    assert not of(events, "started")
    assert b"".join(event["data"] for event in of(events, "audio")) == SPEECH
    frames = {event["pts"]: event for event in of(events, "frame")}
    speaking = [pts for pts, event in frames.items() if event["speaking"]]
    assert all(event["data"].startswith(b"\xff\xd8") for event in frames.values())
    assert of(events, "playback_started")[0]["pts"] <= min(speaking)
    assert events[-1]["position"] == len(SPEECH) // 2
    assert not events[-1]["interrupted"]


async def test_json_alone_says_the_same(stack: Stack) -> None:
    async with nothing_left(stack.service), opened(stack.service) as client:
        await client.send(json.dumps({"type": "start", "sample_rate": RATE, "binary": False}))
        await client.send(json.dumps({"type": "audio", "data": base64.b64encode(SPEECH[:32000]).decode()}))
        await client.send(SEGMENT_END)
        events = await events_until(client, "playback_finished")
    assert b"".join(base64.b64decode(event["data"]) for event in of(events, "audio")) == SPEECH[:32000]
    assert base64.b64decode(of(events, "frame")[0]["data"]).startswith(b"\xff\xd8")


async def test_patches_have_their_places(stack: Stack) -> None:
    async with nothing_left(stack.service), opened(stack.service) as client:
        await client.send(json.dumps({"type": "start", "sample_rate": RATE, "picture": "patches", "audio": False}))
        (idle,) = of(await events_until(client, "frame"), "frame")
        events = await spoken(client)
    assert not of(events, "audio")
    assert idle["data"] == b""
    mouths = [event for event in of(events, "frame") if event["data"]]
    assert mouths
    for event in mouths:
        x, y, width, height = event["patch"]
        assert 0 <= x < x + width <= 640
        assert 0 <= y < y + height <= 360
        assert event["data"].startswith(b"\xff\xd8")


async def test_an_interrupt_raises_the_epoch(stack: Stack) -> None:
    async with nothing_left(stack.service), opened(stack.service) as client:
        await client.send(START)
        await client.send(binary(SPEECH))
        await events_until(client, "playback_started")
        await client.send('{"type":"interrupt"}')
        events = await events_until(client, "playback_finished")
        assert (events[-1]["epoch"], events[-1]["interrupted"]) == (1, True)
        assert events[-1]["position"] < len(SPEECH) // 2
        late = [event["epoch"] for event in await frames(client, 5)]
        assert late[1:] == [1] * 4


async def frames(client: ClientConnection, count: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    while len(found) < count:
        found += of(await events_until(client, "frame"), "frame")
    return found


async def test_another_tenant_goes_on_in_the_same_session(stack: Stack) -> None:
    async with nothing_left(stack.service), opened(stack.service) as client:
        await client.send(START)
        first = await events_until(client, "frame")
        await client.send('{"type":"switch","tenant":"plain"}')
        second = await events_until(client, "started")
        assert second[-1]["tenant"] == "plain"
        assert second[-1]["session"] == first[0]["session"]
        assert second[-1]["epoch"] == 1


async def test_a_client_that_acknowledges_nothing_gets_two_frames(stack: Stack) -> None:
    async with nothing_left(stack.service), opened(stack.service) as client:
        await client.send(START)
        await client.send(binary(SPEECH[:32000]))
        await client.send(SEGMENT_END)
        events = await events_until(client, "playback_finished", acknowledge=False)
        assert len(of(events, "frame")) == 2
        await client.send(json.dumps({"type": "ack", "pts": of(events, "frame")[-1]["pts"]}))
        (now,) = await frames(client, 1)
        assert now["dropped"] > 20
        assert now["pts"] >= events[-1]["pts"] - RATE // 25


async def test_plain_flow_waits_for_no_acknowledgement(stack: Stack) -> None:
    async with nothing_left(stack.service), opened(stack.service) as client:
        await client.send(json.dumps({"type": "start", "flow": "plain"}))
        for _ in range(5):
            await events_until(client, "frame", acknowledge=False)


async def test_no_subprotocol_is_the_first(stack: Stack) -> None:
    async with connect(f"ws://{stack.service.http_address}/ws/avatar") as client:
        assert client.subprotocol is None
        await client.send(START)
        assert json.loads(await client.recv())["type"] == "started"


@pytest.mark.parametrize("offered", [["lipsync.v2"], ["chat", "lipsync"]])
async def test_another_subprotocol_is_refused_in_the_handshake(stack: Stack, offered: list[str]) -> None:
    async with nothing_left(stack.service):
        subprotocols = [Subprotocol(name) for name in offered]
        with pytest.raises(InvalidStatus) as caught:
            await connect(f"ws://{stack.service.http_address}/ws/avatar", subprotocols=subprotocols)
        assert caught.value.response.status_code == 400
        error = json.loads(caught.value.response.body)["error"]
        assert (error["reason"], error["field"]) == ("INVALID_INPUT", "subprotocol")


@pytest.mark.parametrize("path", ["/", "/ws", "/ws/a/b", "/stats", "/ws/../etc"])
async def test_a_websocket_elsewhere_is_refused(stack: Stack, path: str) -> None:
    async with nothing_left(stack.service):
        with pytest.raises(InvalidStatus) as caught:
            await connect(f"ws://{stack.service.http_address}{path}")
    assert caught.value.response.status_code in (403, 404)


BAD: list[tuple[list[str | bytes], int, str]] = [
    (['{"type":"dance"}'], 4400, ""),
    (["no JSON"], 4400, ""),
    ([b"text"], 4400, "message"),
    ([START.encode()], 4400, "version"),
    ([binary(b"12")], 4400, "audio"),
    ([SEGMENT_END], 4400, "segment_end"),
    (['{"type":"ack","pts":0}'], 4400, "ack"),
    ([START, START], 4400, "start"),
    ([START, '{"type":"dance"}'], 4400, ""),
    ([START, SPEECH[:100].hex()], 4400, ""),
    ([START, b""], 4400, "message"),
    ([START, binary(b"")[:19]], 4400, "message"),
    ([START, binary(b"12", version=2)], 4400, "version"),
    ([START, binary(b"12", kind=2)], 4400, "kind"),
    ([START, binary(b"12", length=3)], 4400, "length"),
    ([START, binary(b"12", length=2**32 - 1)], 4400, "length"),
    ([START, binary(b"123"), SEGMENT_END], 4400, "audio"),
    ([START, '{"type":"switch","tenant":"nobody"}'], 4404, "tenant"),
    ([START, '{"type":"switch","tenant":"../x"}'], 4400, "tenant"),
    (['{"type":"start","sample_rate":7999}'], 4400, "sample_rate"),
    (['{"type":"start","fps":61}'], 4400, "fps"),
    (['{"type":"start","output":{"quality":101}}'], 4400, "output.quality"),
]


@pytest.mark.parametrize(("messages", "code", "field"), BAD)
async def test_bad_messages_end_with_an_error_and_its_code(
    stack: Stack, messages: list[str | bytes], code: int, field: str
) -> None:
    async with nothing_left(stack.service), opened(stack.service) as client:
        for message in messages:
            await client.send(message)
        closed, error = await refused(client)
    assert closed == code
    assert error["field"] == field
    assert error["message"]


@pytest.mark.parametrize(("tenant", "code"), [("nobody", 4404), ("Nobody", 4400)])
async def test_a_tenant_that_is_not_there(stack: Stack, tenant: str, code: int) -> None:
    async with nothing_left(stack.service), opened(stack.service, tenant) as client:
        await client.send(START)
        assert (await refused(client))[0] == code


async def test_a_message_of_100_mb(stack: Stack) -> None:
    async with nothing_left(stack.service):
        client = await connect(f"ws://{stack.service.http_address}/ws/avatar", compression=None)
        await client.send(START)
        with contextlib.suppress(ConnectionClosed):
            await client.send(bytes(100 << 20))
        assert (await refused(client))[0] == 1009
        await client.wait_closed()


async def test_who_never_starts_is_sent_away(stack: Stack) -> None:
    with service_with(stack, start_timeout_s=0.2) as service:
        async with nothing_left(service), opened(service) as client:
            code, error = await refused(client)
    assert (code, error["status"]) == (4408, "DEADLINE_EXCEEDED")


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1"])
async def test_pages_of_others_do_not_connect(stack: Stack, origin: str, caplog: pytest.LogCaptureFixture) -> None:
    url = f"ws://{stack.service.http_address}/ws/avatar"
    with caplog.at_level("INFO"):
        with pytest.raises(InvalidStatus) as caught:
            await connect(url, origin=Origin(origin))
        answer = caught.value.response
        error = json.loads(answer.body or b"")["error"]
        logged = f"WebSocket failed: PERMISSION_DENIED: {error['message']}"
        await asyncio.to_thread(until, lambda: logged in caplog.text)
    assert (answer.status_code, error["status"], error["reason"]) == (403, "PERMISSION_DENIED", "ORIGIN_REFUSED")
    assert origin in error["message"]
    assert "http.allowed_origins" in error["message"]
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_the_services_own_page_connects(stack: Stack, scheme: str) -> None:
    address = stack.service.http_address
    async with connect(f"ws://{address}/ws/avatar", origin=Origin(f"{scheme}://{address}")) as client:
        await client.send(START)
        assert json.loads(await client.recv())["type"] == "started"


@pytest.mark.parametrize("allowed", [["https://shop.example.org"], ["*"]])
async def test_pages_that_the_settings_name_connect_and_read(stack: Stack, allowed: list[str]) -> None:
    with service_with(stack, http={"allowed_origins": allowed}) as service:
        url = f"ws://{service.http_address}/ws/avatar"
        async with connect(url, origin=Origin("https://shop.example.org")) as client:
            await client.send(START)
            assert json.loads(await client.recv())["type"] == "started"
        if allowed != ["*"]:
            with pytest.raises(InvalidStatus):
                await connect(url, origin=Origin("https://shop.example.org.evil.example"))


async def test_too_many_sessions(stack: Stack) -> None:
    with service_with(stack, max_sessions=1) as service:
        async with nothing_left(service), opened(service) as first, opened(service) as second:
            await first.send(START)
            await events_until(first, "frame")
            await second.send(START)
            code, error = await refused(second)
            await events_until(first, "frame")
    assert code == 4429
    assert 5 <= error["retry_after_s"] <= 7.5, "not all at the same time"


async def test_too_much_speech(stack: Stack) -> None:
    with service_with(stack, buffer_s=1) as service:
        async with nothing_left(service), opened(service) as client:
            await client.send(START)
            await client.send(binary(bytes(4 * RATE)))
            assert (await refused(client))[0] == 4429


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"\x82",
        b"\x82\xfe\x40\x00" + bytes(4) + binary(b"half")[:20],
        b"\x02\x94" + bytes(4) + binary(b""),
    ],
)
async def test_a_socket_that_vanishes(stack: Stack, sent: bytes) -> None:
    """In a header, in a message, between fragments; while the service sends."""
    async with nothing_left(stack.service):
        connection = upgraded(stack.service)
        start = START.encode()
        connection.sendall(bytes([0x81, 0x80 | len(start)]) + bytes(4) + start + sent)
        assert connection.recv(2)[0] == 0x81
        # With a reset, not with a goodbye.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()


def upgraded(service: ServiceThread) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", service.http_port), 30)
    key = base64.b64encode(os.urandom(16)).decode()
    lines = ["GET /ws/avatar HTTP/1.1", "Host: x", "Connection: Upgrade", "Upgrade: websocket"]
    lines += ["Sec-WebSocket-Version: 13", f"Sec-WebSocket-Key: {key}", "", ""]
    connection.sendall("\r\n".join(lines).encode())
    answer = b""
    while not answer.endswith(b"\r\n\r\n"):
        answer += connection.recv(1)
    assert b" 101 " in answer
    return connection


async def test_fifty_viewers_that_read_nothing_take_little_memory(stack: Stack) -> None:
    """In plain flow, where nothing but the connection holds them back. One that reads goes on beside them."""
    start = b'{"type":"start","flow":"plain"}'
    async with nothing_left(stack.service), opened(stack.service) as watching:
        await watching.send(START)
        session = json.loads(await watching.recv())["session"]
        await frames(watching, 25)
        before = resident_bytes()
        with contextlib.ExitStack() as stalled:
            for _ in range(50):
                connection = stalled.enter_context(upgraded(stack.service))
                connection.sendall(bytes([0x81, 0x80 | len(start)]) + bytes(4) + start)
            missed: list[int] = []
            while len(missed) < 50 or min(missed) < 25:
                await frames(watching, 1)
                missed = await asyncio.to_thread(dropped, stack.service, session)
            await frames(watching, 25)
            assert resident_bytes() - before < 50_000_000


def resident_bytes() -> int:
    """Of this process, in which the service runs."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def dropped(service: ServiceThread, but: str) -> list[int]:
    """Pictures that each session missed, but for one."""
    sessions = asked(service, "/stats").json()["sessions"]
    return [session["dropped"] for session in sessions if session["session"] != but]


@pytest.mark.parametrize("lines", [["Sec-WebSocket-Version: 12"], [], ["Sec-WebSocket-Version: 13"]])
async def test_half_a_handshake_is_refused(stack: Stack, lines: list[str]) -> None:
    address = ("127.0.0.1", stack.service.http_port)
    async with nothing_left(stack.service):
        head = ["GET /ws/avatar HTTP/1.1", "Host: x", "Connection: Upgrade", "Upgrade: websocket", *lines, "", ""]
        with socket.create_connection(address, 30) as client:
            client.sendall("\r\n".join(head).encode())
            answer = b""
            while part := client.recv(4096):
                answer += part
        assert answer.startswith(b"HTTP/1.1 4")


@pytest.mark.parametrize("goodbye", ["close", "abort"])
async def test_who_leaves_while_speaking_leaves_nothing(stack: Stack, goodbye: str) -> None:
    async with nothing_left(stack.service), opened(stack.service) as client:
        await client.send(START)
        await client.send(binary(SPEECH))
        await events_until(client, "playback_started")
        if goodbye == "abort":
            client.transport.abort()


async def test_many_come_and_go(stack: Stack) -> None:
    async def visit(number: int) -> None:
        async with opened(stack.service, "plain") as client:
            if number % 3:
                await client.send(START)
            if number % 3 == 2:
                await client.recv()
            client.transport.abort()

    async with nothing_left(stack.service):
        for begin in range(0, 60, 20):
            await asyncio.gather(*(visit(begin + number) for number in range(20)))


async def test_the_stop_says_going_away(stack: Stack) -> None:
    with contextlib.ExitStack() as services:
        # However long a busy machine takes to the stop, the silent one is there until then.
        service = services.enter_context(service_with(stack, start_timeout_s=600))
        async with opened(service) as idle, opened(service) as speaking, opened(service) as silent:
            for client in (idle, speaking):
                await client.send(START)
                await client.recv()
            await speaking.send(binary(SPEECH[:RATE]))
            await speaking.send(SEGMENT_END)
            stopping = asyncio.get_running_loop().run_in_executor(None, service.stop)
            for client in (idle, speaking, silent):
                assert await refused(client) == (1001, {})
            await stopping
