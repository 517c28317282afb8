"""Requests of a live gRPC session as commands, and its events as responses: nothing lost, nothing guessed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from compositor.errors import InvalidInput, Overloaded, TritonUnavailable
from compositor.geometry import Box
from compositor.proto import lipsync_v1_pb2 as pb
from compositor.rendering import Output
from compositor.sessions.events import (
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
from compositor.transports.speak import command_of, commands, response_of

Request = pb.SpeakRequest
Reply = pb.SpeakResponse

COMMANDS: list[tuple[pb.SpeakRequest, Command]] = [
    (Request(start=Request.Start(tenant="a")), Start("a")),
    (
        Request(
            start=Request.Start(
                tenant="b",
                sample_rate=48_000,
                encoding=pb.Speech.FLOAT32,
                fps=30,
                start=7,
                flow=Request.PLAIN,
                picture=Request.PATCHES,
                output=pb.Output(format=pb.Output.JPEG, quality=60),
                audio=False,
            )
        ),
        Start("b", 48_000, "float32", 30, 7, "plain", "patches", Output(quality=60), audio=False),
    ),
    (
        Request(
            start=Request.Start(
                tenant="c", encoding=pb.Speech.PCM16, flow=Request.CREDIT, picture=Request.FRAMES, audio=True
            )
        ),
        Start("c"),
    ),
    (Request(start=Request.Start(output=pb.Output(format=pb.Output.BGR24))), Start("", output=Output(raw=True))),
    (Request(audio=Request.Audio(data=b"\1\2")), Audio(b"\1\2")),
    (Request(audio=Request.Audio()), Audio(b"")),
    (Request(segment_end=Request.SegmentEnd()), SegmentEnd()),
    (Request(interrupt=Request.Interrupt()), Interrupt()),
    (Request(ack=Request.Ack(pts=1 << 40)), Ack(1 << 40)),
    (Request(switch=Request.Switch(tenant="d")), Switch("d")),
]


@pytest.mark.parametrize(("request_", "command"), COMMANDS, ids=[type(command).__name__ for _, command in COMMANDS])
def test_every_request_is_a_command(request_: pb.SpeakRequest, command: Command) -> None:
    assert command_of(pb.SpeakRequest.FromString(request_.SerializeToString())) == command


def test_every_command_has_its_request() -> None:
    fields = {field.name for field in pb.SpeakRequest.DESCRIPTOR.oneofs_by_name["command"].fields}
    assert {request_.WhichOneof("command") for request_, _ in COMMANDS} == fields


@pytest.mark.parametrize(
    ("request_", "field", "words"),
    [
        (Request(), "command", "no command"),
        # Field 15, as a later version might have it.
        (Request.FromString(b"\x7a\x00"), "command", "this version knows no other"),
        (Request(start=Request.Start(encoding=pb.Speech.WAV)), "start.encoding", "encoding 3 cannot be spoken live"),
        (Request(start=Request.Start(encoding=9)), "start.encoding", "encoding 9"),  # type: ignore[arg-type]
        (Request(start=Request.Start(flow=9)), "start.flow", "flow 9 is unknown"),  # type: ignore[arg-type]
        (Request(start=Request.Start(picture=9)), "start.picture", "picture 9"),  # type: ignore[arg-type]
        (Request(start=Request.Start(output=pb.Output(quality=101))), "output.quality", "quality 101"),
        (Request(start=Request.Start(output=pb.Output(format=9))), "output.format", "format 9"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_command_is_refused(request_: pb.SpeakRequest, field: str, words: str) -> None:
    with pytest.raises(InvalidInput, match=words) as caught:
        command_of(request_)
    assert caught.value.field == field


async def test_commands_come_in_order_and_end_with_the_requests() -> None:
    async def requests() -> AsyncIterator[pb.SpeakRequest]:
        for request_, _ in COMMANDS:
            yield request_

    assert [command async for command in commands(requests())] == [command for _, command in COMMANDS]


EVENTS: list[tuple[Event, pb.SpeakResponse]] = [
    (
        Started("s1", "a", 2, 24_000, 25, 1280, 720, 300, 453),
        Reply(
            started=Reply.Started(
                session="s1",
                tenant="a",
                epoch=2,
                sample_rate=24_000,
                fps=25,
                width=1280,
                height=720,
                frames=300,
                lookahead_ms=453,
            )
        ),
    ),
    (
        Shown(1 << 40, 3, 7, True, b"jpeg", None, 12),
        Reply(frame=Reply.Frame(pts=1 << 40, epoch=3, number=7, speaking=True, data=b"jpeg", dropped=12)),
    ),
    (
        Shown(960, 0, 7, True, b"jpeg", Box(16, 32, 240, 192)),
        Reply(
            frame=Reply.Frame(
                pts=960, number=7, speaking=True, data=b"jpeg", patch=Reply.Box(x=16, y=32, width=240, height=192)
            )
        ),
    ),
    (Shown(0, 0, 0, False, b""), Reply(frame=Reply.Frame())),
    (Heard(960, 1, b"\1\2"), Reply(audio=Reply.Audio(pts=960, epoch=1, data=b"\1\2"))),
    (PlaybackStarted(960, 1), Reply(playback_started=Reply.PlaybackStarted(pts=960, epoch=1))),
    (
        PlaybackFinished(1920, 2, 960, True),
        Reply(playback_finished=Reply.PlaybackFinished(pts=1920, epoch=2, position=960, interrupted=True)),
    ),
    (
        Failed(960, 1, TritonUnavailable("gone", retry_after_s=1.5)),
        Reply(
            error=Reply.Error(
                pts=960,
                epoch=1,
                status="UNAVAILABLE",
                reason="TRITON_UNAVAILABLE",
                message="gone",
                retry_after_s=1.5,
            )
        ),
    ),
    (
        Failed(0, 0, Overloaded("full", field="audio")),
        Reply(error=Reply.Error(status="RESOURCE_EXHAUSTED", reason="OVERLOADED", message="full", field="audio")),
    ),
]


@pytest.mark.parametrize(("event", "response"), EVENTS, ids=[type(event).__name__ for event, _ in EVENTS])
def test_every_event_is_a_response(event: Event, response: pb.SpeakResponse) -> None:
    made: Any = response_of(event)
    assert made == response
    assert made.frame.HasField("patch") == response.frame.HasField("patch")


def test_every_event_has_its_response() -> None:
    fields = {field.name for field in pb.SpeakResponse.DESCRIPTOR.oneofs_by_name["event"].fields}
    assert {response_of(event).WhichOneof("event") for event, _ in EVENTS} == fields
