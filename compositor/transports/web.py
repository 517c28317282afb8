"""The HTTP server: uvicorn in the service's own event loop, which stops in order. Knows nothing of what is served."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
from collections.abc import AsyncIterator, Callable, Generator
from typing import Any, Final, cast

import uvicorn

from ..errors import SettingsInvalid
from ..settings import HttpSettings
from .connections import HttpConnection, Patience, WebSocketConnection

UNSENT_BYTES: Final = 128 << 10
"""Most that the kernel holds unsent of a connection, where it can be told: what waits there cannot be taken back."""
FAREWELL_S: Final = 1.0
"""How long the last bytes to a client may take when the server stops."""
_BACKLOG = 128
_LOOK_S = 0.02
"""Period of the look at what is still open, while the server stops."""
_CLOSE = b"connection", b"close"


class _App:
    """An application whose requests may be cut off, of which no complaint is made: it tells its callers itself."""

    def __init__(self, app: Callable[..., Any]) -> None:
        self._app = app
        self.parting = False
        """Whether each answer is the last of its connection, and says so."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def last(message: Any) -> None:
            if self.parting and message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), _CLOSE]
            await send(message)

        with contextlib.suppress(asyncio.CancelledError):
            await self._app(scope, receive, last)


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
        # For requests that are on their way through this machine.
        await asyncio.sleep(_LOOK_S)
        for connection in list(self.server_state.connections):
            if isinstance(connection, HttpConnection):
                connection.retire()
        await self._empty()

    async def cut(self) -> int:
        """Ends what is left, and tells those who listen; how many connections that were."""
        self._refuse()
        left = list(self.server_state.connections)
        for connection in left:
            cast(HttpConnection | WebSocketConnection, connection).cut()
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
        self._app.parting = True
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
        http=cast(Any, functools.partial(HttpConnection, patience, settings.max_connections)),
        ws=cast(Any, functools.partial(WebSocketConnection, patience)),
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
