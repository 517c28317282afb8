"""The HTTP server's bounds, over real sockets: each ends with a code or a closed connection, and leaves nothing."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, ConnectionClosedError

from compositor.errors import SettingsInvalid
from compositor.settings import HttpSettings
from compositor.transports.connections import MOST_FRAGMENTS, Patience
from compositor.transports.web import UNSENT_BYTES, Server, bind, serving

LONG_S, SHORT_S = 60.0, 0.05
BIG = 64 << 20
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


class App:
    """Answers `/` with a word, `/big` with 64 MiB, `/slow` when told or cut off, `/half` in part; a WebSocket with what
    it received."""

    def __init__(self) -> None:
        self.tasks: set[asyncio.Task[None] | None] = set()
        self.go = asyncio.Event()
        self.begun = asyncio.Event()
        self.codes: list[int] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.current_task()
        self.tasks.add(task)
        try:
            await (self.socket if scope["type"] == "websocket" else self.page)(scope, receive, send)
        finally:
            self.tasks.discard(task)

    async def page(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.begun.set()
        try:
            if scope["path"] == "/slow":
                await self.go.wait()
        except asyncio.CancelledError:
            await send({"type": "http.response.start", "status": 503, "headers": []})
            await send({"type": "http.response.body", "body": b"cut off"})
            raise
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if scope["path"] == "/half":
            await send({"type": "http.response.body", "body": b"half", "more_body": True})
            await self.go.wait()
        for _ in range(BIG >> 20 if scope["path"] == "/big" else 0):
            await send({"type": "http.response.body", "body": bytes(1 << 20), "more_body": True})
        await send({"type": "http.response.body", "body": b"word"})

    async def socket(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        self.begun.set()
        if scope["path"] == "/flood":
            with contextlib.suppress(OSError):
                while True:
                    await send({"type": "websocket.send", "bytes": bytes(1 << 20)})
                    # Writes that need not wait would keep the loop from hearing that the client has gone.
                    await asyncio.sleep(0)
        if scope["path"] == "/leave":
            await send({"type": "websocket.send", "bytes": bytes(BIG)})
            return
        while (message := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "text": str(len(message.get("bytes") or b""))})
        self.codes.append(message["code"])


class Served:
    def __init__(self, app: App, server: Server, port: int) -> None:
        self.app, self.server, self.port = app, server, port
        self.url = f"ws://127.0.0.1:{port}"

    async def open(self, sent: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection; what is sent is there before the server's patience with it begins."""
        client = socket.create_connection(("127.0.0.1", self.port))
        client.sendall(sent)
        client.setblocking(False)
        return await asyncio.open_connection(sock=client)

    async def upgrade(self, path: str = "/") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A WebSocket by hand, past its handshake."""
        key = base64.b64encode(os.urandom(16)).decode()
        lines = [f"GET {path} HTTP/1.1", "Host: x", "Connection: Upgrade", "Upgrade: websocket"]
        lines += ["Sec-WebSocket-Version: 13", f"Sec-WebSocket-Key: {key}", "", ""]
        reader, writer = await self.open("\r\n".join(lines).encode())
        assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
        return reader, writer


@contextlib.asynccontextmanager
async def served(
    patience: Patience | None = None, drain_s: float = 1, settings: HttpSettings | None = None
) -> AsyncIterator[Served]:
    """The server; leaving the block checks that no task of it is left."""
    settings = settings or HttpSettings(port=0, max_message_mb=1)
    before = asyncio.all_tasks()
    app, listening = App(), bind(settings)
    patience = patience or Patience(LONG_S, LONG_S, LONG_S, LONG_S)
    async with serving(app, listening, settings, patience) as server:
        yield Served(app, server, listening.getsockname()[1])
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(server.drain(), drain_s)
    assert not app.tasks
    assert listening.fileno() == -1
    await becomes(lambda: asyncio.all_tasks() == before)


async def becomes(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < give_up
        await asyncio.sleep(0.005)


async def ends(reader: asyncio.StreamReader) -> bytes:
    """What still comes until the server closes the connection."""
    with contextlib.suppress(ConnectionResetError):
        return await asyncio.wait_for(reader.read(), 30)
    return b""


async def closes(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


def frame(opcode: int, payload: bytes, *, final: bool = True, length: int | None = None) -> bytes:
    """A client's WebSocket frame, masked with zeros; `length` lies about it."""
    size = len(payload) if length is None else length
    head = struct.pack("!BBQ", opcode | (0x80 if final else 0), 0x80 | 127, size)
    return head + bytes(4) + payload


async def close_code(reader: asyncio.StreamReader) -> int:
    """Of the close frame that ends what the server sends."""
    data = await ends(reader)
    # Small unmasked frames only.
    while data:
        opcode, size = data[0] & 0x0F, data[1]
        if opcode == 8:
            return int(struct.unpack("!H", data[2:4])[0])
        data = data[2 + size :]
    raise AssertionError("no close frame")


async def test_it_answers_and_keeps_connections() -> None:
    async with served() as server:
        server.server.config.timeout_keep_alive = round(LONG_S)
        reader, writer = await server.open()
        for _ in range(3):
            writer.write(GET)
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
            while await reader.readuntil(b"\r\n") != b"0\r\n":
                pass
            await reader.readuntil(b"\r\n")
        await closes(writer)


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost:", GET + b"GET / HT"])
async def test_who_never_ends_a_header_is_cut_off(sent: bytes) -> None:
    async with served(Patience(SHORT_S, LONG_S, LONG_S, LONG_S)) as server:
        reader, writer = await server.open(sent)
        answers = await ends(reader)
        assert answers.count(b"200 OK") == sent.count(GET)
        await closes(writer)


async def test_a_header_byte_by_byte_buys_no_time() -> None:
    async with served(Patience(SHORT_S, LONG_S, LONG_S, LONG_S)) as server:
        reader, writer = await server.open()

        async def drip() -> None:
            while True:
                writer.write(b"x")
                await writer.drain()
                await asyncio.sleep(SHORT_S / 10)

        dripping = asyncio.create_task(drip())
        await ends(reader)
        dripping.cancel()
        await asyncio.gather(dripping, return_exceptions=True)
        await closes(writer)


async def test_a_request_that_takes_long_is_not_cut_off() -> None:
    async with served(Patience(SHORT_S, LONG_S, LONG_S, LONG_S)) as server:
        reader, writer = await server.open(GET.replace(b"/ ", b"/slow ", 1))
        await server.app.begun.wait()
        await asyncio.sleep(3 * SHORT_S)
        server.app.go.set()
        assert b"200 OK" in await reader.readuntil(b"word")
        await closes(writer)


async def test_an_endless_header_is_refused() -> None:
    async with served() as server:
        reader, writer = await server.open()
        writer.write(b"GET / HTTP/1.1\r\nX: " + b"x" * (1 << 20))
        await ends(reader)
        await closes(writer)
        assert not server.app.begun.is_set()


async def test_who_does_not_read_an_answer_is_cut_off() -> None:
    async with served(Patience(LONG_S, SHORT_S, LONG_S, LONG_S)) as server:
        reader, writer = await server.open()
        writer.write(GET.replace(b"/ ", b"/big ", 1))
        await server.app.begun.wait()
        # asyncio reads up to its limit only, the kernel somewhat more, and nothing takes it from there.
        await becomes(lambda: not server.app.tasks)
        assert len(await ends(reader)) < BIG
        await closes(writer)


async def test_too_many_connections_are_closed() -> None:
    settings = HttpSettings(port=0, max_connections=2)
    async with served(settings=settings) as server:
        kept = [await server.upgrade() for _ in range(2)]
        reader, writer = await server.open()
        assert await ends(reader) == b""
        await closes(writer)
        for _, each in kept:
            await closes(each)
        await becomes(lambda: not server.app.tasks)
        reader, writer = await server.upgrade()
        await closes(writer)


async def test_a_message_that_is_too_large_is_refused_before_it_came() -> None:
    async with served() as server:
        reader, writer = await server.upgrade()
        writer.write(frame(2, b"", length=100 << 20))
        sending = asyncio.create_task(send_zeros(writer, 100))
        assert await close_code(reader) == 1009
        await closes(writer)
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        await becomes(lambda: server.app.codes == [1009])


async def send_zeros(writer: asyncio.StreamWriter, mebibytes: int) -> None:
    with contextlib.suppress(OSError):
        for _ in range(mebibytes):
            writer.write(bytes(1 << 20))
            await writer.drain()


async def test_a_client_that_sends_too_much_reads_why() -> None:
    async with served() as server:
        client = await connect(server.url, compression=None)
        with contextlib.suppress(ConnectionClosed):
            await client.send(bytes(100 << 20))
        with pytest.raises(ConnectionClosedError) as caught:
            await client.recv()
        await client.wait_closed()
        assert caught.value.rcvd is not None
        assert caught.value.rcvd.code == 1009


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (frame(0x0B, b""), 1002),  # an opcode that is none
        (frame(0, b"x"), 1002),  # goes on with what never began
        (frame(9, b"x" * 126), 1002),  # a ping may have 125 bytes
        (b"\x82\x01x", 1002),  # not masked
        (frame(1, b"\xff"), 1007),  # no UTF-8
        (frame(2, b"", final=False) + frame(0, b"", final=False) * (MOST_FRAGMENTS + 1), 1009),
    ],
)
async def test_what_is_no_websocket_is_closed_with_a_code(sent: bytes, code: int) -> None:
    async with served() as server:
        reader, writer = await server.upgrade()
        writer.write(sent)
        writer.write_eof()
        assert await close_code(reader) == code
        await closes(writer)
        await becomes(lambda: len(server.app.codes) == 1)


@pytest.mark.parametrize("sent", [frame(2, b"half", length=8), b"\x82", b""])
async def test_a_socket_that_vanishes_ends_its_conversation(sent: bytes) -> None:
    async with served() as server:
        _, writer = await server.upgrade()
        writer.write(sent)
        await writer.drain()
        writer.transport.abort()
        await becomes(lambda: not server.app.tasks and len(server.app.codes) == 1)


async def test_who_does_not_answer_a_ping_is_gone() -> None:
    async with served(Patience(LONG_S, LONG_S, SHORT_S, SHORT_S)) as server:
        reader, writer = await server.upgrade()
        assert await close_code(reader) == 1011
        await becomes(lambda: not server.app.tasks)
        await closes(writer)


async def test_who_answers_pings_stays() -> None:
    async with served(Patience(LONG_S, LONG_S, SHORT_S, LONG_S)) as server, connect(server.url) as client:
        for _ in range(5):
            await asyncio.sleep(SHORT_S)
            await client.send(b"abc")
            assert await client.recv() == "3"


async def test_who_reads_nothing_is_gone_after_the_ping() -> None:
    async with served(Patience(LONG_S, LONG_S, SHORT_S, SHORT_S)) as server:
        _, writer = await server.upgrade("/flood")
        await becomes(lambda: not server.app.tasks)
        await closes(writer)


async def test_who_reads_nothing_does_not_keep_its_socket() -> None:
    async with served(Patience(SHORT_S, LONG_S, LONG_S, LONG_S)) as server:
        _, writer = await server.upgrade("/leave")
        await becomes(lambda: not server.app.tasks)
        await becomes(lambda: ends_held(server.port) == 1)  # the client's
        await closes(writer)


def ends_held(port: int) -> int:
    """Ends of a port's connections that somebody has open; who listens is none. proc_net_tcp(5): others have no
    inode."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    ports = [[int(address.rpartition(":")[2], 16) for address in row[1:3]] for row in rows]
    return sum(port in both and row[3] != "0A" and row[9] != "0" for row, both in zip(rows, ports, strict=True))


async def test_unread_pongs_are_not_kept() -> None:
    async with served() as server:
        reader, writer = await server.upgrade("/flood")
        ping = frame(9, b"x" * 125)
        for _ in range(16):
            writer.write(ping * 4096)
            await writer.drain()
        # 9 MB of pongs were asked for; what comes is pictures, and a few pongs between them.
        seen = await reader.readexactly(4 << 20)
        assert seen.count(b"\x8a\x7d" + b"x" * 125) < 4096
        writer.transport.abort()
        await becomes(lambda: not server.app.tasks)


async def test_running_requests_finish_when_it_stops() -> None:
    answers: list[bytes] = []

    async def ask(server: Served) -> None:
        reader, writer = await server.open()
        writer.write(GET.replace(b"/ ", b"/slow ", 1))
        answers.append(await reader.readuntil(b"word"))
        await closes(writer)

    async with served(drain_s=30) as server:
        asking = asyncio.create_task(ask(server))
        await server.app.begun.wait()
        asyncio.get_running_loop().call_later(SHORT_S, server.app.go.set)
    await asking
    assert b"200 OK" in answers[0]


async def test_what_is_cut_off_can_still_be_answered_and_is_no_complaint(caplog: pytest.LogCaptureFixture) -> None:
    async with served(drain_s=0) as server:
        reader, writer = await server.open()
        writer.write(GET.replace(b"/ ", b"/slow ", 1))
        await server.app.begun.wait()
    answer = await ends(reader)
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"connection: close\r\n" in answer
    assert answer.endswith(b"\r\n\r\n7\r\ncut off\r\n0\r\n\r\n")
    await closes(writer)
    assert not caplog.records


async def test_an_answer_that_is_cut_off_does_not_look_whole(caplog: pytest.LogCaptureFixture) -> None:
    async with served(drain_s=0) as server:
        reader, writer = await server.open()
        writer.write(GET.replace(b"/ ", b"/half ", 1))
        await reader.readuntil(b"half")
    assert await ends(reader) == b"\r\n", "no last chunk"
    await closes(writer)
    assert not caplog.records


async def test_nothing_is_said_where_there_is_nothing_to_wait_for(caplog: pytest.LogCaptureFixture) -> None:
    async with served(drain_s=0):
        pass
    assert not caplog.records


async def test_sockets_talk_on_while_it_drains() -> None:
    async with served(drain_s=30) as server:
        client = await connect(server.url)
        idle_reader, idle_writer = await server.open()
        idle_writer.write(GET)
        await idle_reader.readuntil(b"0\r\n\r\n")
        draining = asyncio.create_task(server.server.drain())
        assert await ends(idle_reader) == b"", "idle connections are closed"
        await closes(idle_writer)
        await client.send(b"abc")
        assert await client.recv() == "3"
        assert not draining.done()
        with pytest.raises(ConnectionRefusedError):
            await server.open()
        await client.close()
        await draining
    assert server.app.codes == [1000]


async def test_a_request_that_has_begun_to_come_is_answered() -> None:
    async with served(drain_s=30) as server:
        reader, writer = await server.open()
        writer.write(GET[:9])
        await becomes(lambda: any(each.conn.trailing_data[0] for each in connections(server)))
        idle_reader, idle_writer = await server.open()
        await becomes(lambda: len(connections(server)) == 2)
        draining = asyncio.create_task(server.server.drain())
        assert await ends(idle_reader) == b"", "idle connections are closed meanwhile"
        await closes(idle_writer)
        writer.write(GET[9:])
        answer = await ends(reader)
        await draining
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"connection: close\r\n" in answer
    await closes(writer)


def connections(server: Served) -> list[Any]:
    """Those that are open."""
    return list(server.server.server_state.connections)


async def test_the_last_answer_of_a_connection_says_so() -> None:
    """A client that has sent another request already knows by that to send it elsewhere."""
    async with served(drain_s=30) as server:
        reader, writer = await server.open()
        writer.write(GET.replace(b"/ ", b"/slow ", 1) + GET)
        await server.app.begun.wait()
        draining = asyncio.create_task(server.server.drain())
        await becomes(lambda: not server.server.servers[0].is_serving())
        server.app.go.set()
        answer = await ends(reader)
        await draining
    assert answer.count(b"HTTP/1.1 ") == answer.count(b"connection: close\r\n") == 1
    await closes(writer)


async def test_sockets_that_are_cut_off_get_a_code() -> None:
    async with served(drain_s=0) as server:
        client = await connect(server.url)
    with pytest.raises(ConnectionClosed):
        await client.recv()
    assert client.close_code == 1012


async def test_new_connections_are_refused_after_the_stop() -> None:
    async with served() as server:
        pass
    with pytest.raises(ConnectionRefusedError):
        await server.open()


async def test_a_normal_goodbye() -> None:
    async with served() as server:
        async with connect(server.url) as client:
            await client.close()
        await becomes(lambda: server.app.codes == [1000])


async def test_nothing_is_compressed() -> None:
    async with served() as server, connect(server.url) as client:
        assert client.response is not None
        assert "Sec-WebSocket-Extensions" not in client.response.headers


def test_a_port_in_use_stops_the_start() -> None:
    with bind(HttpSettings(port=0)) as first:
        port = first.getsockname()[1]
        with pytest.raises(SettingsInvalid, match=rf"http\.port: 127\.0\.0\.1:{port} cannot be bound \(.*in use\)"):
            bind(HttpSettings(port=port))
    with pytest.raises(SettingsInvalid, match=r"http\.port: no\.such\.host\.invalid:0 cannot be bound"):
        bind(HttpSettings(host="no.such.host.invalid", port=0))


def test_connections_take_over_the_socket_options() -> None:
    with bind(HttpSettings(port=0)) as listening, socket.create_connection(listening.getsockname()) as client:
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            if hasattr(socket, "TCP_NOTSENT_LOWAT"):
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) == UNSENT_BYTES
        assert client.recv(1) == b""
