"""The WebSocket's wire, version 1: messages become commands, events become messages. Pure: knows no network.

Control is JSON text; speech and pictures are binary with a header of 20 bytes, or JSON with base64 for those who cannot
read that. Described byte by byte in docs/websocket.md.
"""

from __future__ import annotations

import base64
import binascii
import json
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ..errors import InvalidInput, LipsyncError
from ..rendering import Output
from ..sessions.events import (
    SAMPLE_RATE_DEFAULT,
    Ack,
    Audio,
    Command,
    Event,
    Failed,
    Heard,
    Interrupt,
    PlaybackFinished,
    PlaybackStarted,
    SegmentEnd,
    Shown,
    Start,
    Started,
    Switch,
)
from .faults import error_fields

SUBPROTOCOL: Final = "lipsync.v1"
VERSION: Final = 1
HEADER: Final = struct.Struct("<BBHIQI")
"""version, kind, flags, epoch, pts, length of what follows."""
SPEAKING: Final = 1
"""The flag of a picture with speech in it."""
_PICTURE = struct.Struct("<II")  # number, dropped
_PATCH = struct.Struct("<IIHHHH")  # the same, and x, y, width, height
_U32, _U64 = 2**32 - 1, 2**64 - 1
_MOST_QUOTED = 200  # characters

Message: TypeAlias = str | bytes
_Count: TypeAlias = Annotated[int, Field(ge=0, le=_U32)]


class Kind(IntEnum):
    """What a binary message carries."""

    AUDIO = 1
    FRAME = 2
    PATCH = 3


class _Control(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Output(_Control):
    quality: _Count = 0


class _Start(_Control):
    type: Literal["start"]
    sample_rate: _Count = SAMPLE_RATE_DEFAULT
    encoding: Literal["pcm16", "float32"] = "pcm16"
    fps: _Count = 0
    start: _Count = 0
    flow: Literal["credit", "plain"] = "credit"
    picture: Literal["frames", "patches"] = "frames"
    output: _Output = _Output()
    audio: bool = True
    binary: bool = True


class _Audio(_Control):
    type: Literal["audio"]
    data: str


class _SegmentEnd(_Control):
    type: Literal["segment_end"]


class _Interrupt(_Control):
    type: Literal["interrupt"]


class _Ack(_Control):
    type: Literal["ack"]
    pts: Annotated[int, Field(ge=0, le=_U64)]


class _Switch(_Control):
    type: Literal["switch"]
    tenant: str


_CONTROL: TypeAdapter[_Start | _Audio | _SegmentEnd | _Interrupt | _Ack | _Switch] = TypeAdapter(
    Annotated[_Start | _Audio | _SegmentEnd | _Interrupt | _Ack | _Switch, Field(discriminator="type")]
)


@dataclass
class Wire:
    """One connection's. tenant: whom its path names. binary: how events are written; the client's start says it."""

    tenant: str
    binary: bool = True

    def read(self, message: Message) -> Command:
        """A client's message as a command. Raises InvalidInput for what is none."""
        if isinstance(message, bytes):
            return _read_binary(message)
        control = _read_control(message)
        if isinstance(control, _Start):
            self.binary = control.binary
            fields = control.model_dump(exclude={"type", "binary", "output"})
            return Start(self.tenant, output=Output(quality=control.output.quality), **fields)
        if isinstance(control, _Audio):
            return Audio(_decode(control.data))
        if isinstance(control, _SegmentEnd):
            return SegmentEnd()
        if isinstance(control, _Interrupt):
            return Interrupt()
        if isinstance(control, _Ack):
            return Ack(control.pts)
        return Switch(control.tenant)

    def write(self, event: Event) -> Message:
        """An event as a message to the client."""
        if isinstance(event, Shown):
            return _binary_picture(event) if self.binary else _json_picture(event)
        if isinstance(event, Heard):
            if self.binary:
                return _binary(Kind.AUDIO, 0, event.epoch, event.pts, event.data)
            return _json("audio", pts=event.pts, epoch=event.epoch, data=_encode(event.data))
        if isinstance(event, Failed):
            return _json("failed", pts=event.pts, epoch=event.epoch, error=error_fields(event.error))
        return _json(_TYPES[type(event)], **vars(event))


_TYPES: dict[type, str] = {
    Started: "started",
    PlaybackStarted: "playback_started",
    PlaybackFinished: "playback_finished",
}


def write_error(error: LipsyncError) -> str:
    """The last message of a session that an error ends; the close code follows."""
    return _json("error", error=error_fields(error))


def _read_binary(message: bytes) -> Command:
    if len(message) < HEADER.size:
        raise _fault(f"a binary message of {len(message)} bytes is shorter than its header of {HEADER.size}")
    version, kind, flags, epoch, pts, length = HEADER.unpack_from(message)
    if version != VERSION:
        raise _fault(f"version {version} of binary messages is unknown: this is version {VERSION}", "version")
    if kind != Kind.AUDIO:
        raise _fault(f"kind {kind} is unknown: a client sends audio, kind {Kind.AUDIO:d}", "kind")
    if flags or epoch or pts:
        raise _fault("flags, epoch and pts of a client's audio must be 0: it is spoken as it comes", "audio")
    if length != len(message) - HEADER.size:
        raise _fault(f"the header says {length} bytes of audio, and {len(message) - HEADER.size} follow", "length")
    return Audio(message[HEADER.size :])


def _read_control(message: str) -> _Start | _Audio | _SegmentEnd | _Interrupt | _Ack | _Switch:
    try:
        return _CONTROL.validate_json(message)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
        # The first part of the path is the message's type. Both may quote the client, who may have sent megabytes.
        field = ".".join(map(str, fault["loc"]))[:_MOST_QUOTED]
        raise _fault(f"not a message of {SUBPROTOCOL}: {fault['msg'][:_MOST_QUOTED]}", field) from error


def _decode(data: str) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _fault("the audio is not base64", "audio.data") from error


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _binary(kind: Kind, flags: int, epoch: int, pts: int, *payload: bytes) -> bytes:
    header = HEADER.pack(VERSION, kind, flags, epoch, pts, sum(map(len, payload)))
    return b"".join((header, *payload))


def _binary_picture(shown: Shown) -> bytes:
    flags = SPEAKING if shown.speaking else 0
    if shown.patch is None and shown.data:
        head, kind = _PICTURE.pack(shown.number, shown.dropped), Kind.FRAME
    else:
        head, kind = _PATCH.pack(shown.number, shown.dropped, *(shown.patch or (0, 0, 0, 0))), Kind.PATCH
    return _binary(kind, flags, shown.epoch, shown.pts, head, shown.data)


def _json_picture(shown: Shown) -> str:
    fields = {**vars(shown), "data": _encode(shown.data)}
    if shown.patch is None:
        del fields["patch"]
    return _json("frame", **fields)


def _json(kind: str, **fields: Any) -> str:
    return json.dumps({"type": kind, **fields}, separators=(",", ":"))


def _fault(message: str, field: str = "message") -> InvalidInput:
    return InvalidInput(message, field=field)
