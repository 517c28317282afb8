"""The client's side of a live session, cheap: commands become messages, and of messages pictures are told apart.

gRPC's `Speak` and the WebSocket behind one interface. A message is made or read once and never copied without need, for
whoever measures a service on its own machine takes its CPU.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import grpc
from websockets.asyncio.client import connect
from websockets.typing import Subprotocol

from compositor.proto import lipsync_v1_pb2 as pb
from compositor.transports import wire as binary

Way: TypeAlias = Literal["grpc", "websocket"]
PictureMode: TypeAlias = Literal["frames", "patches"]
Message: TypeAlias = bytes | str
_PICTURES = (binary.Kind.FRAME, binary.Kind.PATCH)
_FRAME = struct.Struct("<II")  # number, dropped
_PATCH = struct.Struct("<IIHHHH")  # the same, and the rectangle


@dataclass(frozen=True)
class Picture:
    """What a message says of its picture. moving: the mouth is not the prepared frame's. size: bytes of its JPEG."""

    pts: int
    epoch: int
    moving: bool
    dropped: int
    size: int


class Wire(Protocol):
    """How one transport talks."""

    def start(self, tenant: str, picture: PictureMode) -> Message:
        """The message that opens a session."""

    def audio(self, data: bytes) -> Message: ...

    def ack(self, pts: int) -> Message: ...

    def interrupt(self) -> Message: ...

    def read(self, message: Any) -> Picture | None:
        """The picture of a message, if it carries one."""

    def connect(
        self, tenant: str, outgoing: asyncio.Queue[Message]
    ) -> contextlib.AbstractAsyncContextManager[AsyncIterator[Any]]:
        """A connection of its own that sends what the queue holds; gives the messages that come."""


class Grpc:
    """`lipsync.v1.Lipsync/Speak` at host:port."""

    def __init__(self, address: str) -> None:
        self._address = address

    def start(self, tenant: str, picture: PictureMode) -> Message:
        kind = pb.SpeakRequest.PATCHES if picture == "patches" else pb.SpeakRequest.FRAMES
        return pb.SpeakRequest(start=pb.SpeakRequest.Start(tenant=tenant, picture=kind)).SerializeToString()

    def audio(self, data: bytes) -> Message:
        return pb.SpeakRequest(audio=pb.SpeakRequest.Audio(data=data)).SerializeToString()

    def ack(self, pts: int) -> Message:
        return pb.SpeakRequest(ack=pb.SpeakRequest.Ack(pts=pts)).SerializeToString()

    def interrupt(self) -> Message:
        return pb.SpeakRequest(interrupt=pb.SpeakRequest.Interrupt()).SerializeToString()

    def read(self, message: pb.SpeakResponse) -> Picture | None:
        if message.WhichOneof("event") != "frame":
            return None
        frame = message.frame
        return Picture(frame.pts, frame.epoch, frame.speaking, frame.dropped, len(frame.data))

    @contextlib.asynccontextmanager
    async def connect(
        self, tenant: str, outgoing: asyncio.Queue[Message]
    ) -> AsyncGenerator[AsyncIterator[pb.SpeakResponse], None]:
        # Without a pool of its own all sessions would share one connection.
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
        async with grpc.aio.insecure_channel(self._address, options=options) as channel:
            speak = channel.stream_stream(
                "/lipsync.v1.Lipsync/Speak", response_deserializer=pb.SpeakResponse.FromString
            )
            call = speak()
            # Not an iterator of requests: a call that the service ends would leave the task behind that reads it.
            sending = asyncio.create_task(_send(call.write, outgoing))
            try:
                yield aiter(call)
            finally:
                call.cancel()
                await _stop(sending)


class WebSocket:
    """`/ws/{tenant}` at host:port."""

    def __init__(self, address: str) -> None:
        self._address = address

    def start(self, tenant: str, picture: PictureMode) -> Message:
        return json.dumps({"type": "start", "picture": picture})

    def audio(self, data: bytes) -> Message:
        return binary.HEADER.pack(binary.VERSION, binary.Kind.AUDIO, 0, 0, 0, len(data)) + data

    def ack(self, pts: int) -> Message:
        return json.dumps({"type": "ack", "pts": pts})

    def interrupt(self) -> Message:
        return json.dumps({"type": "interrupt"})

    def read(self, message: Message) -> Picture | None:
        if isinstance(message, str):
            return None
        _, kind, flags, epoch, pts, length = binary.HEADER.unpack_from(message)
        if kind not in _PICTURES:
            return None
        head = _FRAME if kind == binary.Kind.FRAME else _PATCH
        _, dropped, *_ = head.unpack_from(message, binary.HEADER.size)
        return Picture(pts, epoch, bool(flags & binary.SPEAKING), dropped, length - head.size)

    @contextlib.asynccontextmanager
    async def connect(
        self, tenant: str, outgoing: asyncio.Queue[Message]
    ) -> AsyncGenerator[AsyncIterator[Message], None]:
        uri, spoken = f"ws://{self._address}/ws/{tenant}", [Subprotocol(binary.SUBPROTOCOL)]
        async with connect(uri, subprotocols=spoken, max_size=None, compression=None) as socket:
            sending = asyncio.create_task(_send(socket.send, outgoing))
            try:
                yield aiter(socket)
            finally:
                await _stop(sending)


async def _send(write: Callable[[Message], Awaitable[None]], outgoing: asyncio.Queue[Message]) -> None:
    """Until it is cancelled, or the connection ends: whoever reads learns why."""
    while True:
        await write(await outgoing.get())


async def _stop(sending: asyncio.Task[None]) -> None:
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)
