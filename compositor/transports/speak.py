"""gRPC's live sessions: converts a client's requests to commands, and the session's events to responses."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterable
from typing import Any, Literal, TypeAlias

from google.protobuf.message import DecodeError

from ..errors import InvalidInput
from ..proto import lipsync_v1_pb2 as pb
from ..rendering import Output
from ..sessions.conversation import converse
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
from ..sessions.live import Live
from ..tracing import Span
from .ledger import Ledger
from .status import Context, reporting, write
from .stopping import Stoppable

_Reply: TypeAlias = pb.SpeakResponse
_GONE_S = 0.05
"""How much later than the end of a call's requests gRPC may tell that the client is gone."""


class Calls:
    """All Speak calls."""

    def __init__(self, live: Live, ledger: Ledger) -> None:
        self._live, self._ledger = live, ledger
        self._stoppable = Stoppable()

    async def serve(self, requests: AsyncIterable[pb.SpeakRequest], context: Context) -> None:
        """One call, to its end. A client that vanishes, or whose deadline passes, cancels it."""
        async with reporting(context, self._ledger, "Speak") as entry, self._stoppable.told():
            await _talk(self._live, requests, context, entry.span)
            # Who seems to have said all may be gone: this is cancelled then.
            await asyncio.sleep(_GONE_S)

    def stop(self) -> None:
        """Ends every call with UNAVAILABLE, and refuses new ones: live sessions would outlast any patience."""
        self._stoppable.stop()


async def _talk(live: Live, requests: AsyncIterable[pb.SpeakRequest], context: Context, span: Span | None) -> None:
    said = commands(requests)
    async with contextlib.aclosing(said), contextlib.aclosing(converse(live, said, span)) as events:
        async for event in events:
            await write(context, response_of(event))


def output_of(output: pb.Output) -> Output:
    """How frames are wanted. Raises InvalidInput for an unknown format or quality."""
    if output.format not in pb.Output.Format.values():
        raise InvalidInput(f"format {output.format} is unknown: use JPEG or BGR24", field="output.format")
    return Output(raw=output.format == pb.Output.BGR24, quality=output.quality)


async def commands(requests: AsyncIterable[pb.SpeakRequest]) -> AsyncGenerator[Command, None]:
    """A call's requests as commands, each as it comes; ends when the client closes its side. Raises InvalidInput."""
    try:
        async for request in requests:
            yield command_of(request)
    except DecodeError as error:
        raise InvalidInput("a message that is no SpeakRequest") from error


def command_of(request: pb.SpeakRequest) -> Command:
    """A request as a command. Raises InvalidInput where it holds none, or one with an unknown choice."""
    kind = request.WhichOneof("command")
    if kind == "start":
        return _start(request.start)
    if kind == "audio":
        return Audio(request.audio.data)
    if kind == "segment_end":
        return SegmentEnd()
    if kind == "interrupt":
        return Interrupt()
    if kind == "ack":
        return Ack(request.ack.pts)
    if kind == "switch":
        return Switch(request.switch.tenant)
    raise InvalidInput(
        "no command: give start, audio, segment_end, interrupt, ack or switch; this version knows no other",
        field="command",
    )


def _start(start: pb.SpeakRequest.Start) -> Start:
    return Start(
        tenant=start.tenant,
        sample_rate=start.sample_rate or SAMPLE_RATE_DEFAULT,
        encoding=_encoding(start.encoding),
        fps=start.fps,
        start=start.start,
        flow=_flow(start.flow),
        picture=_picture(start.picture),
        output=output_of(start.output),
        audio=start.audio if start.HasField("audio") else True,
    )


def _encoding(value: int) -> Literal["pcm16", "float32"]:
    if value in (pb.Speech.ENCODING_UNSPECIFIED, pb.Speech.PCM16):
        return "pcm16"
    if value == pb.Speech.FLOAT32:
        return "float32"
    raise InvalidInput(f"encoding {value} cannot be spoken live: use PCM16 or FLOAT32", field="start.encoding")


def _flow(value: int) -> Literal["credit", "plain"]:
    if value in (pb.SpeakRequest.FLOW_UNSPECIFIED, pb.SpeakRequest.CREDIT):
        return "credit"
    if value == pb.SpeakRequest.PLAIN:
        return "plain"
    raise InvalidInput(f"flow {value} is unknown: use CREDIT or PLAIN", field="start.flow")


def _picture(value: int) -> Literal["frames", "patches"]:
    if value in (pb.SpeakRequest.PICTURE_UNSPECIFIED, pb.SpeakRequest.FRAMES):
        return "frames"
    if value == pb.SpeakRequest.PATCHES:
        return "patches"
    raise InvalidInput(f"picture {value} is unknown: use FRAMES or PATCHES", field="start.picture")


def response_of(event: Event) -> pb.SpeakResponse:
    """An event as it goes over the wire."""
    # Parts as mappings: one that is a message would be copied, picture and all, by way of its serialised form.
    if isinstance(event, Shown):
        return _Reply(frame=_frame(event))
    if isinstance(event, Heard):
        return _Reply(audio=vars(event))
    if isinstance(event, Started):
        return _Reply(started=vars(event))
    if isinstance(event, PlaybackStarted):
        return _Reply(playback_started=vars(event))
    if isinstance(event, PlaybackFinished):
        return _Reply(playback_finished=vars(event))
    return _Reply(error=_error(event))


def _frame(shown: Shown) -> dict[str, Any]:
    return {**vars(shown), "patch": None if shown.patch is None else shown.patch._asdict()}


def _error(failed: Failed) -> pb.SpeakResponse.Error:
    error = failed.error
    return _Reply.Error(
        pts=failed.pts,
        epoch=failed.epoch,
        status=error.status.value,
        reason=error.reason,
        message=error.message,
        field=error.field,
        retry_after_s=error.retry_after_s or 0,
    )
