"""WebSocket: `/ws/{tenant}` is one conversation. Messages are read and written by `wire`; errors become an error event
and a close code."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Collection
from typing import Final

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.websockets import WebSocket, WebSocketDisconnect

from ..errors import InvalidInput, LipsyncError, Stopping
from ..sessions.conversation import converse
from ..sessions.events import Command
from ..sessions.live import Live
from ..tracing import Span
from .faults import CLOSE_CODES, error_fields, http_code
from .ledger import CANCELLED, REQUEST_ID, Entry, Ledger
from .origins import check_origin
from .wire import SUBPROTOCOL, Wire, write_error

log = logging.getLogger(__name__)

GOING_AWAY: Final = 1001
_FAREWELLS = (1000, 1001, 1005)
"""Close codes of clients that end a conversation as they should: done, the page left, no reason given."""
_LOST = 1006
_FAREWELL_S = 5.0
"""How long the last messages may take; a viewer that reads nothing is not waited for."""


class Conversations:
    """All conversations over WebSockets."""

    def __init__(self, live: Live, ledger: Ledger, origins: Collection[str] = ()) -> None:
        """origins: whose pages may connect, beside the service's own."""
        self._live, self._ledger, self._origins = live, ledger, origins
        self._tasks: set[asyncio.Task[None]] = set()
        self._talking: set[asyncio.Task[None]] = set()  # those of them that nobody parts from yet
        self._stopping = False

    async def serve(self, socket: WebSocket) -> None:
        """One connection, from its handshake to its close."""
        with self._ledger.entry("WebSocket", dict(socket.headers)) as entry:
            try:
                await self._welcome(socket, entry)
            except WebSocketDisconnect as left:
                if left.code not in _FAREWELLS:
                    entry.status = CANCELLED
            except OSError:  # during the handshake
                entry.status = CANCELLED

    async def _welcome(self, socket: WebSocket, entry: Entry) -> None:
        offered = socket.scope["subprotocols"]
        try:
            self._check(socket.headers, offered)
        except LipsyncError as refusal:
            entry.fail(refusal)
            headers = {REQUEST_ID: entry.request}
            answer = JSONResponse({"error": error_fields(refusal)}, http_code(refusal), headers)
            await socket.send_denial_response(answer)
            return
        named = [(REQUEST_ID.encode(), entry.request.encode())]
        await socket.accept(subprotocol=SUBPROTOCOL if offered else None, headers=named)
        await self._converse(socket, entry)

    async def stop(self) -> None:
        """Closes every connection as going away, and refuses new ones."""
        self._stopping = True
        for task in self._talking:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _check(self, headers: Headers, offered: list[str]) -> None:
        """Raises LipsyncError for a handshake that is refused."""
        if self._stopping:
            raise Stopping("the service stops", retry_after_s=1)
        check_origin(headers.get("origin"), headers.get("host"), self._origins)
        if offered and SUBPROTOCOL not in offered:
            raise InvalidInput(
                f"this service speaks {SUBPROTOCOL}: offer it as subprotocol, or none", field="subprotocol"
            )

    async def _converse(self, socket: WebSocket, entry: Entry) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._talking.add(task)
        if self._stopping:  # since its handshake began
            task.cancel()
        try:
            try:
                await _talk(self._live, socket, entry.span)
            finally:
                self._talking.discard(task)
        except Stopping as error:
            entry.fail(error)
            await _part(socket, GOING_AWAY)
        except LipsyncError as error:
            entry.fail(error)
            await _part(socket, CLOSE_CODES[error.status], error)
        except asyncio.CancelledError:
            if not self._stopping:
                raise
            entry.fail(Stopping("the service stops"))
            await _part(socket, GOING_AWAY)
        except WebSocketDisconnect:
            raise
        except Exception:
            log.exception("a conversation failed in a way that nobody foresaw")
            unforeseen = LipsyncError("internal error; the service's log has the details")
            entry.fail(unforeseen)
            await _part(socket, CLOSE_CODES[unforeseen.status], unforeseen)
        finally:
            self._tasks.discard(task)


async def _talk(live: Live, socket: WebSocket, span: Span | None) -> None:
    """Sends events until the client leaves, which raises WebSocketDisconnect."""
    wire = Wire(socket.path_params["tenant"])
    said = _commands(socket, wire)
    async with contextlib.aclosing(said), contextlib.aclosing(converse(live, said, span)) as events:
        async for event in events:
            message = wire.write(event)
            if isinstance(message, bytes):
                await socket.send_bytes(message)
            else:
                await socket.send_text(message)


async def _commands(socket: WebSocket, wire: Wire) -> AsyncGenerator[Command, None]:
    """The client's messages as commands. Raises InvalidInput, and WebSocketDisconnect when the client leaves."""
    while True:
        message = await socket.receive()
        if message["type"] == "websocket.disconnect":
            # uvicorn says 1005, no status, of a connection that was lost, too; but only a close has a reason, if empty.
            raise WebSocketDisconnect(message["code"] if "reason" in message else _LOST, message.get("reason"))
        data = message.get("bytes")
        yield wire.read(message["text"] if data is None else data)


async def _part(socket: WebSocket, code: int, error: LipsyncError | None = None) -> None:
    """Says why, if there is a reason, and closes."""

    async def say() -> None:
        if error is not None:
            await socket.send_text(write_error(error))
        await socket.close(code, error.reason if error is not None else "the service stops")

    # RuntimeError: the connection was closed meanwhile, by the client or for a message that the library refused.
    with contextlib.suppress(WebSocketDisconnect, asyncio.TimeoutError, RuntimeError):
        await asyncio.wait_for(say(), _FAREWELL_S)
