"""The HTTP server: uvicorn in the service's own event loop, with bounds on what a client may take and how long.

The only importer of uvicorn. Knows nothing of what is served.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
from asyncio import TimerHandle
from collections.abc import AsyncIterator, Callable, Generator
from dataclasses import dataclass
from typing import Any, Final, cast

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame

from ..errors import SettingsInvalid
from ..settings import HttpSettings

UNSENT_BYTES: Final = 128 << 10
"""Most that the kernel holds unsent of a connection, where it can be told: what waits there cannot be taken back."""
MOST_FRAGMENTS: Final = 4096
FAREWELL_S: Final = 1.0
"""How long the last bytes to a client may take when the server stops."""
_BACKLOG = 128
_LOOK_S = 0.02
"""Period of the look at what is still open, while the server stops."""
_CLOSE = b"connection", b"close"


@dataclass(frozen=True)
class Patience:
    """How long a client may take, in seconds.

    request_s: to send a request's or a handshake's header, and to answer a close. stalled_s: to take what was sent to
    it. ping_s: between pings to a WebSocket; pong_s: for its answer.
    """

    request_s: float = 10
    stalled_s: float = 30
    ping_s: float = 20
    pong_s: float = 20


class _Http(H11Protocol):
    """A connection until it becomes a WebSocket, if it does. uvicorn itself waits for a header without end, and for a
    reader too."""

    def __init__(self, patience: Patience, most: int, **options: Any) -> None:
        super().__init__(**options)
        self._patience = patience
        self._most = most
        self._requesting: TimerHandle | None = None
        self._stalled: TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._most:
            transport.abort()
        else:
            self._expect_request()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.transport.get_protocol() is not self or (self.cycle and not self.cycle.response_complete):
            _stop(self._requesting)
            self._requesting = None
        elif self._requesting is None:
            self._expect_request()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(self._patience.stalled_s, self.transport.abort)

    def resume_writing(self) -> None:
        _stop(self._stalled)
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        _stop(self._requesting)
        _stop(self._stalled)
        super().connection_lost(exc)

    def retire(self) -> None:
        """Closes the connection, if it is idle; what has begun to come, a header say, is heard and answered first."""
        if not self.conn.trailing_data[0]:
            self.shutdown()

    def cut(self) -> None:
        """Ends the connection once what was written is taken; an answer under way ends here."""
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.transport.close()
        else:
            self.shutdown()

    def _expect_request(self) -> None:
        self._requesting = self.loop.call_later(self._patience.request_s, self.transport.abort)


class _WebSocket(WebSocketsSansIOProtocol):
    """A WebSocket. uvicorn itself answers a client's pings however many wait, waits for a stalled reader to read a
    close, and resets the connection before a client that still sends has read why it was refused."""

    def __init__(self, patience: Patience, **options: Any) -> None:
        super().__init__(**options)
        self._patience = patience
        self.close_timeout = patience.request_s
        self._refused = False
        self._ending: TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        if not self._refused:
            super().data_received(data)

    def handle_ping(self) -> None:
        if self.writable.is_set():
            super().handle_ping()
        else:
            self.conn.data_to_send()  # the pong; RFC 6455 5.5.3 lets all but the last be left out

    def handle_cont(self, event: Frame) -> None:
        super().handle_cont(event)
        if len(self.frames) > MOST_FRAGMENTS:
            self.frames = []
            self.conn.fail(1009, "too many fragments")
            self.handle_parser_exception()

    def handle_parser_exception(self) -> None:
        assert self.conn.close_sent is not None
        self._refused = self.close_sent = True
        self.stop_keepalive()
        code, reason = self.conn.close_sent.code, self.conn.close_sent.reason
        self.queue.put_nowait({"type": "websocket.disconnect", "code": code, "reason": reason})
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.transport.write_eof()
        self.transport.resume_reading()
        self.close_timer = self.loop.call_later(self._patience.request_s, self.transport.abort)

    async def send(self, message: Any) -> None:
        await self.writable.wait()
        if self._refused:
            raise ClientDisconnected
        await super().send(message)
        if message["type"] == "websocket.http.response.body":
            self.handshake_complete = True  # by a refusal, which uvicorn logs as an error

    def keepalive_timeout(self) -> None:
        self._refused = True
        super().keepalive_timeout()
        self.transport.abort()

    def cut(self) -> None:
        """Closes with 1012, unless the application has said goodbye, once what was written is taken."""
        if not self.transport.is_closing():
            self.shutdown()

    def on_task_complete(self, task: asyncio.Task[None]) -> None:
        super().on_task_complete(task)
        if not self.disconnected:
            # Once uvicorn has given up to wait, it waits for what was sent to be taken.
            self._ending = self.loop.call_later(2 * self._patience.request_s, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        _stop(self._ending)
        super().connection_lost(exc)


def _stop(timer: TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


class _App:
    """An application whose requests may be cut off: one that was not answered yet is told 503, without a complaint."""

    def __init__(self, app: Callable[..., Any]) -> None:
        self._app = app
        self.parting = False
        """Whether each answer is the last of its connection, and says so."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        begun = scope["type"] != "http"

        async def noted(message: Any) -> None:
            nonlocal begun
            begun = True
            if self.parting and message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), _CLOSE]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except asyncio.CancelledError:
            if not begun:
                headers = [(b"content-type", b"text/plain"), (b"retry-after", b"1"), _CLOSE]
                await send({"type": "http.response.start", "status": 503, "headers": headers})
                await send({"type": "http.response.body", "body": b"the service stops\n"})


class Server(uvicorn.Server):
    """uvicorn's server, which would take the process's signals for itself, and whose own shutdown closes WebSockets at
    once and reports an error where it was given no time and needed none."""

    def __init__(self, config: uvicorn.Config, app: _App) -> None:
        super().__init__(config)
        self.servers = []
        self._app = app

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Nothing: `drain` and `cut` are in its place."""

    async def drain(self) -> None:
        """Takes no new connections, closes idle ones, and returns when all have ended. WebSockets end by themselves, or
        by their application."""
        self._refuse()
        self._app.parting = True
        # For requests that are on their way through this machine.
        await asyncio.sleep(_LOOK_S)
        for connection in list(self.server_state.connections):
            if isinstance(connection, _Http):
                connection.retire()
        await self._empty()

    async def cut(self) -> int:
        """Ends what is left, and tells those who listen; how many connections that were."""
        self._refuse()
        left = list(self.server_state.connections)
        for connection in left:
            cast(_Http | _WebSocket, connection).cut()
        for task in list(self.server_state.tasks):
            task.cancel()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._empty(), FAREWELL_S)
        # Who reads nothing.
        tasks = list(self.server_state.tasks)
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        await asyncio.gather(*tasks, return_exceptions=True)
        return len(left)

    def _refuse(self) -> None:
        for server in self.servers:
            server.close()

    async def _empty(self) -> None:
        # uvicorn keeps sets, and tells nobody of their changes.
        while self.server_state.connections or self.server_state.tasks:  # noqa: ASYNC110
            await asyncio.sleep(_LOOK_S)


def bind(settings: HttpSettings, share: bool = False) -> socket.socket:
    """A listening socket on `settings.host` and `settings.port`, which others may share. Raises SettingsInvalid."""
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, share)
            _tune(listening)
            listening.bind(address)
            listening.listen(_BACKLOG)
        except BaseException:
            listening.close()
            raise
    except OSError as error:
        raise SettingsInvalid(
            f"http.port: {settings.host}:{settings.port} cannot be bound ({error.strerror}); is another service on it?"
            " choose another, or 0 for a free one",
            field="http.port",
        ) from error
    return listening


def _tune(listening: socket.socket) -> None:
    """Options that each accepted connection takes over."""
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)


@contextlib.asynccontextmanager
async def serving(
    app: Callable[..., Any], listening: socket.socket, settings: HttpSettings, patience: Patience | None = None
) -> AsyncIterator[Server]:
    """Serves an ASGI app on a listening socket, which it closes in the end. Leaving the block cuts off what was not
    drained before."""
    patience = patience or Patience()
    whole = _App(app)
    config = uvicorn.Config(
        whole,
        http=cast(Any, functools.partial(_Http, patience, settings.max_connections)),
        ws=cast(Any, functools.partial(_WebSocket, patience)),
        ws_max_size=settings.max_message_mb << 20,
        ws_ping_interval=patience.ping_s,
        ws_ping_timeout=patience.pong_s,
        ws_per_message_deflate=False,  # pictures are compressed already
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=_BACKLOG,
    )
    server = Server(config, whole)
    running = asyncio.create_task(server.serve([listening]), name="http")
    try:
        yield server
    finally:
        server.should_exit = True
        await running
        await server.cut()
        listening.close()
