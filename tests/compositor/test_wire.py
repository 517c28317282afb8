"""The WebSocket's messages: every event and command goes through, and what is none is refused by name."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from compositor.errors import InvalidInput, LipsyncError, Overloaded
from compositor.geometry import Box
from compositor.rendering import Output
from compositor.sessions.events import (
    Ack,
    Audio,
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
from compositor.transports.wire import Wire, write_error

U16, U32, U64 = (st.integers(0, 2**bits - 1) for bits in (16, 32, 64))
PATCHES = st.builds(Box, U16, U16, U16, U16)


def shown(patch: st.SearchStrategy[Box | None], data: st.SearchStrategy[bytes]) -> st.SearchStrategy[Shown]:
    return st.builds(Shown, U64, U32, U32, st.booleans(), data, patch, U32)


FRAMES = shown(st.none(), st.binary(min_size=1))
PICTURES = st.one_of(FRAMES, shown(PATCHES, st.binary()))


def header(message: bytes) -> tuple[int, ...]:
    """Version, kind, flags, epoch, pts, length; as the page says it, not as the module does."""
    return struct.unpack("<BBHIQI", message[:20])


def audio(data: bytes, **wrong: int) -> bytes:
    fields = {"version": 1, "kind": 1, "flags": 0, "epoch": 0, "pts": 0, "length": len(data), **wrong}
    return struct.pack("<BBHIQI", *fields.values()) + data


def read(message: str | bytes) -> Any:
    return Wire("anna").read(message)


@pytest.mark.parametrize(
    ("message", "command"),
    [
        ('{"type":"start"}', Start("anna")),
        (
            '{"type":"start","sample_rate":48000,"encoding":"float32","fps":30,"start":7,"flow":"plain",'
            '"picture":"patches","output":{"quality":60},"audio":false}',
            Start("anna", 48000, "float32", 30, 7, "plain", "patches", Output(quality=60), False),
        ),
        ('{"type":"segment_end"}', SegmentEnd()),
        ('{"type":"interrupt"}', Interrupt()),
        ('{"type":"ack","pts":18446744073709551615}', Ack(2**64 - 1)),
        ('{"type":"switch","tenant":"bert"}', Switch("bert")),
        ('{"type":"audio","data":"AAEC"}', Audio(b"\0\1\2")),
        ('{"type":"audio","data":""}', Audio(b"")),
        (audio(b"\1\2"), Audio(b"\1\2")),
        (audio(b""), Audio(b"")),
    ],
)
def test_commands(message: str | bytes, command: object) -> None:
    assert read(message) == command


@given(st.binary())
def test_any_speech_goes_through_both_ways(data: bytes) -> None:
    text = json.dumps({"type": "audio", "data": base64.b64encode(data).decode()})
    assert read(text) == read(audio(data)) == Audio(data)


@pytest.mark.parametrize(
    ("message", "field", "words"),
    [
        ('{"type":"dance"}', "", "dance"),
        ('{"pts":1}', "", "type"),
        ("[]", "", "should be an object"),
        ("", "", "JSON"),
        ("hello", "", "JSON"),
        ('{"type":"ack"}', "ack.pts", "required"),
        ('{"type":"ack","pts":-1}', "ack.pts", "greater than or equal to 0"),
        ('{"type":"ack","pts":18446744073709551616}', "ack.pts", "less than or equal"),
        ('{"type":"ack","pts":"1"}', "ack.pts", "integer"),
        ('{"type":"ack","pts":1,"epoch":0}', "ack.epoch", "not permitted"),
        ('{"type":"start","tenant":"bert"}', "start.tenant", "not permitted"),
        ('{"type":"start","sample_rate":24000.5}', "start.sample_rate", "integer"),
        ('{"type":"start","audio":1}', "start.audio", "boolean"),
        ('{"type":"start","encoding":"mp3"}', "start.encoding", "pcm16"),
        ('{"type":"start","output":{"raw":true}}', "start.output.raw", "not permitted"),
        ('{"type":"start","output":{"quality":101}}', "output.quality", "out of range"),
        ('{"type":"audio","data":"?"}', "audio.data", "base64"),
        ('{"type":"audio","data":"\u00e4AAA"}', "audio.data", "base64"),
        (b"", "message", "shorter than its header"),
        (audio(b"")[:-1], "message", "19 bytes is shorter than its header of 20"),
        (audio(b"", version=2), "version", "version 2"),
        (audio(b"", kind=2), "kind", "kind 2"),
        (audio(b"ab", length=3), "length", "says 3 bytes of audio, and 2 follow"),
        (audio(b"ab", length=1), "length", "says 1 bytes"),
        (audio(b"ab", flags=1), "audio", "must be 0"),
        (audio(b"ab", pts=1), "audio", "must be 0"),
        (audio(b"ab", epoch=1), "audio", "must be 0"),
    ],
)
def test_what_is_no_command_is_refused_by_name(message: str | bytes, field: str, words: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        read(message)
    assert caught.value.field == field
    assert words in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("message", ['{"type":"start","%s":1}', '{"type":"%s"}'])
def test_a_refusal_quotes_little_of_much(message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        read(message % ("x" * 1_000_000))
    assert len(write_error(caught.value)) < 1_000


@given(st.one_of(st.text(), st.binary(), st.recursive(st.none() | st.text(), st.lists).map(json.dumps)))
@example("[" * 100_000)
@example('{"type":"start","type":"ack","pts":1e999}')
@example('"\\ud800"')
def test_whatever_comes_is_a_command_or_refused(message: str | bytes) -> None:
    try:
        read(message)
    except InvalidInput as error:
        json.loads(write_error(error))


@given(PICTURES)
def test_binary_pictures(event: Shown) -> None:
    message = Wire("anna").write(event)
    assert isinstance(message, bytes)
    version, kind, flags, epoch, pts, length = header(message)
    assert (version, flags, epoch, pts, length) == (1, int(event.speaking), event.epoch, event.pts, len(message) - 20)
    assert struct.unpack("<II", message[20:28]) == (event.number, event.dropped)
    if event.patch is None:
        assert (kind, message[28:]) == (2, event.data)
    else:
        assert (kind, message[36:]) == (3, event.data)
        assert Box(*struct.unpack("<HHHH", message[28:36])) == event.patch


def test_a_prepared_frame_shown_as_it_is_is_a_patch_of_nothing() -> None:
    message = Wire("anna").write(Shown(1, 0, 5, False, b""))
    assert isinstance(message, bytes)
    assert header(message) == (1, 3, 0, 0, 1, 16)
    assert struct.unpack("<IIHHHH", message[20:]) == (5, 0, 0, 0, 0, 0)


@given(U64, U32, st.binary())
def test_binary_speech(pts: int, epoch: int, data: bytes) -> None:
    message = Wire("anna").write(Heard(pts, epoch, data))
    assert isinstance(message, bytes)
    assert header(message) == (1, 1, 0, epoch, pts, len(data))
    assert message[20:] == data


@given(PICTURES)
def test_json_pictures(event: Shown) -> None:
    fields = written(event, binary=False)
    assert base64.b64decode(fields.pop("data")) == event.data
    assert fields.pop("patch", None) == (None if event.patch is None else list(event.patch))
    expected = {**vars(event), "type": "frame"}
    del expected["data"], expected["patch"]
    assert fields == expected


def written(event: Event, *, binary: bool) -> dict[str, Any]:
    wire = Wire("anna")
    wire.read(json.dumps({"type": "start", "binary": binary}))
    message = wire.write(event)
    assert isinstance(message, str)
    fields: dict[str, Any] = json.loads(message)
    return fields


@pytest.mark.parametrize("binary", [True, False])
def test_control_events_are_json_always(binary: bool) -> None:
    assert written(Started("s", "anna", 0, 24000, 25, 640, 360, 6, 465), binary=binary) == {
        "type": "started",
        "session": "s",
        "tenant": "anna",
        "epoch": 0,
        "sample_rate": 24000,
        "fps": 25,
        "width": 640,
        "height": 360,
        "frames": 6,
        "lookahead_ms": 465,
    }
    assert written(PlaybackStarted(5, 1), binary=binary) == {"type": "playback_started", "pts": 5, "epoch": 1}
    assert written(PlaybackFinished(9, 1, 4, True), binary=binary) == {
        "type": "playback_finished",
        "pts": 9,
        "epoch": 1,
        "position": 4,
        "interrupted": True,
    }
    error = {"status": "RESOURCE_EXHAUSTED", "reason": "OVERLOADED", "message": "full", "field": "", "retry_after_s": 2}
    assert written(Failed(3, 1, Overloaded("full", retry_after_s=2)), binary=binary) == {
        "type": "failed",
        "pts": 3,
        "epoch": 1,
        "error": error,
    }
    assert json.loads(write_error(Overloaded("full", retry_after_s=2))) == {"type": "error", "error": error}


def test_json_speech() -> None:
    assert written(Heard(3, 1, b"\0\1"), binary=False) == {"type": "audio", "pts": 3, "epoch": 1, "data": "AAE="}


def test_errors_say_when_trying_again_does_not_help() -> None:
    assert json.loads(write_error(LipsyncError("x")))["error"]["retry_after_s"] is None
