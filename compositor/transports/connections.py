"""A client's connection, over HTTP and then perhaps WebSocket: bounds on what it may take, and how long, that uvicorn
has not. Builds on uvicorn's internals; knows nothing of what is served."""

from __future__ import annotations

import asyncio
from asyncio import TimerHandle
from dataclasses import dataclass
from typing import Any, Final

from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame

MOST_FRAGMENTS: Final = 4096


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


class HttpConnection(H11Protocol):
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


class WebSocketConnection(WebSocketsSansIOProtocol):
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
