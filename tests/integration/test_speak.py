"""Live sessions over real gRPC: frames in order and in time, interruption, credit, and every way a call can end."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import queue
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from numpy.typing import NDArray
from typer.testing import CliRunner

from compositor import jpeg
from compositor.geometry import Box, ping_pong
from compositor.pcm import read_wav
from compositor.proto import lipsync_v1_pb2 as pb
from compositor.proto import lipsync_v1_pb2_grpc as pb_grpc
from compositor.tenant import Tenant
from lipsync.app import build
from lipsync.sentences import NUMBERS

from ..conftest import ServiceThread, Stack
from .waiting import until

pytestmark = pytest.mark.triton

Tone = Callable[[float, int], NDArray[np.float32]]
Request = pb.SpeakRequest
RATE = 24_000
FRAME = RATE // 25
SPEECH = NUMBERS
LOUD = bytes([0, 64, 0, 192]) * (RATE // 5)
"""0.4 s."""


class Talk:
    """One call: requests go in one by one, responses come as they do; frames are acknowledged unless told not to."""

    def __init__(self, stub: pb_grpc.LipsyncStub, acknowledge: bool = True, timeout: float = 60) -> None:
        self._requests = queue.SimpleQueue[pb.SpeakRequest | None]()
        self._acknowledge = acknowledge
        self.call: Any = stub.Speak(iter(self._requests.get, None), timeout=timeout)

    def send(self, **command: Any) -> None:
        self._requests.put(Request(**command))

    def start(self, tenant: str = "plain", **fields: Any) -> None:
        self.send(start=Request.Start(tenant=tenant, **fields))

    def say(self, speech: bytes, size: int = 4_800) -> None:
        for begin in range(0, len(speech), size):
            self.send(audio=Request.Audio(data=speech[begin : begin + size]))

    def close(self) -> None:
        self._requests.put(None)

    def __iter__(self) -> Iterator[pb.SpeakResponse]:
        for response in self.call:
            if self._acknowledge and response.HasField("frame"):
                self.send(ack=Request.Ack(pts=response.frame.pts))
            yield response

    def speak(self, speech: bytes) -> list[pb.SpeakResponse]:
        """Says a segment; the responses to its end."""
        self.say(speech)
        self.send(segment_end=Request.SegmentEnd())
        return self.until("playback_finished")

    def speak_in_time(self, speech: bytes) -> list[pb.SpeakResponse]:
        """The same, once more where the machine stood still for so long that no mouth moved."""
        responses: list[pb.SpeakResponse] = []
        while not any(response.frame.speaking for response in responses):
            responses = self.speak(speech)
        return responses

    def until(self, event: str) -> list[pb.SpeakResponse]:
        """The responses up to and with the first one of a kind."""
        found = []
        for response in self:
            found.append(response)
            if response.WhichOneof("event") == event:
                return found
        raise AssertionError(f"the call ended without {event}")

    def frames(self, count: int) -> list[pb.SpeakResponse.Frame]:
        """The next frames."""
        answers = (response.frame for response in self if response.HasField("frame"))
        return list(itertools.islice(answers, count))


@pytest.fixture(autouse=True)
def nothing_unforeseen(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """The service, which runs in this process, logs what nobody foresaw; so do gRPC and asyncio."""
    yield
    records = [*caplog.get_records("call"), *caplog.records]
    assert not [record.getMessage() for record in records if record.levelno >= logging.ERROR]


@pytest.fixture
def talk(stub: pb_grpc.LipsyncStub) -> Iterator[Talk]:
    """A call to the shared service, ended at the end."""
    talking = Talk(stub)
    yield talking
    talking.close()
    talking.call.cancel()


def pcm16(samples: NDArray[np.float32]) -> bytes:
    return (samples * 32767).astype("<i2").tobytes()


def of_kind(responses: Iterable[pb.SpeakResponse], event: str) -> list[Any]:
    return [getattr(response, event) for response in responses if response.WhichOneof("event") == event]


def refusal(talking: Talk) -> tuple[str, str, str]:
    """(status, details, field) that a call ends with."""
    with pytest.raises(grpc.RpcError) as caught:
        for _ in talking:
            pass
    error: Any = caught.value
    status = rpc_status.from_call(error)
    bad = error_details_pb2.BadRequest()
    for detail in status.details if status is not None else ():
        detail.Unpack(bad)
    field = bad.field_violations[0].field if bad.field_violations else ""
    return error.code().name, error.details(), field


@contextlib.contextmanager
def nothing_left(stack: Stack, stub: pb_grpc.LipsyncStub) -> Iterator[None]:
    """Sees that the block leaves no task in the service and no file descriptor in this process, in which both run."""
    warm = Talk(stub)
    warm.start("avatar")
    warm.speak_in_time(LOUD)
    warm.call.cancel()
    warm.close()
    until(lambda: not sessions(stack))
    tasks, files = tasks_of(stack), open_files()
    yield
    until(lambda: tasks_of(stack) <= tasks)
    until(lambda: open_files() <= files)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def tasks_of(stack: Stack) -> Counter[str]:
    """The tasks of the service's event loop, by what they run."""
    tasks = asyncio.all_tasks(stack.service.loop)
    return Counter(getattr(task.get_coro(), "__qualname__", "?") for task in tasks)


def sessions(stack: Stack) -> list[str]:
    return [name for name in tasks_of(stack) if name.startswith(("Session.", "LipsyncService.", "_listen"))]


def test_speech_is_played_with_its_sound_in_order(talk: Talk, tone: Tone, stack: Stack) -> None:
    speech = pcm16(tone(1.6, RATE))
    talk.start("avatar", start=2)
    before = talk.until("frame")
    responses = talk.speak_in_time(speech)
    started = before[0].started
    assert (started.tenant, started.epoch, started.sample_rate, started.fps) == ("avatar", 0, RATE, 25)
    tenant = Tenant(stack.repository, "avatar")
    assert (started.width, started.height, started.frames) == (640, 360, tenant.frames)
    frames = of_kind([*before, *responses], "frame")
    pts = [frame.pts for frame in frames]
    assert pts == sorted(set(pts))
    assert all(value % FRAME == 0 for value in pts)
    assert [frame.number for frame in frames] == [ping_pong(2 + value // FRAME, tenant.frames) for value in pts]
    heard = of_kind(responses, "audio")
    assert b"".join(piece.data for piece in heard) == speech
    begin, end = of_kind(responses, "playback_started")[0].pts, responses[-1].playback_finished
    assert heard[0].pts == begin
    assert (end.position, end.interrupted) == (len(speech) // 2, False)
    assert end.pts - begin >= len(speech) // 2  # more where the machine could not keep up
    speaking = [frame for frame in frames if frame.speaking]
    idle = [frame for frame in frames if not frame.speaking]
    assert idle
    assert all(begin <= frame.pts for frame in speaking)
    for frame in idle:
        assert frame.data == tenant.frame(frame.number).jpeg()
    for frame in speaking:
        assert jpeg.decode(frame.data).shape == (360, 640, 3)


def test_live_frames_are_those_of_generate(talk: Talk, stub: pb_grpc.LipsyncStub, stack: Stack, tone: Tone) -> None:
    speech = pcm16(tone(1.6, RATE))
    talk.start("avatar")
    (session,) = of_kind(talk.until("started"), "started")
    same: list[int] = []
    while not same:  # where the machine stood still all the time
        late = late_pictures(stack, session.session)
        same, others = compared(stub, speech, talk.speak(speech))
        # A mouth that was not there in time fades instead.
        assert len(others) <= late_pictures(stack, session.session) - late


def compared(
    stub: pb_grpc.LipsyncStub, speech: bytes, responses: Sequence[pb.SpeakResponse]
) -> tuple[list[int], list[int]]:
    """Of the middle of a speech, the frames that are those of `Generate`, and those that are not."""
    begin = of_kind(responses, "playback_started")[0].pts // FRAME
    shown = {frame.pts // FRAME - begin: frame for frame in of_kind(responses, "frame")}
    # Where the machine could not keep up, the speech goes on later, on another background.
    heard = {piece.pts // FRAME - begin: piece.data for piece in of_kind(responses, "audio")}
    wanted = pb.GenerateRequest(tenant="avatar", speech=pb.Speech(data=speech, sample_rate=RATE), start=begin)
    generated = [answer.frame for answer in stub.Generate(wanted, timeout=60) if answer.HasField("frame")]
    assert len(generated) == 40
    size = 2 * FRAME
    punctual = [number for number in heard if heard[number] == speech[number * size : (number + 1) * size]]
    found: tuple[list[int], list[int]] = [], []
    for number in punctual:
        if 5 <= number < 35 and number in shown and shown[number].speaking:
            assert shown[number].number == generated[number].number
            live, clip = (jpeg.decode(frame.data).astype(int) for frame in (shown[number], generated[number]))
            found[bool(np.abs(live - clip).mean() >= 0.02)].append(number)
    return found


def late_pictures(stack: Stack, session: str) -> int:
    """Pictures of a session that were not there in time."""
    stats = httpx.get(f"http://{stack.service.http_address}/stats", timeout=60).json()
    return sum(each["pictures"]["late"] for each in stats["sessions"] if each["session"] == session)


def test_it_rests_again_after_the_speech(talk: Talk, tone: Tone) -> None:
    talk.start()
    talk.speak(pcm16(tone(0.4, RATE)))
    assert not talk.frames(25)[-1].speaking


@pytest.mark.parametrize("flow", [Request.CREDIT, Request.PLAIN])
def test_a_client_that_closes_its_side_sees_the_speech_to_its_end(
    stub: pb_grpc.LipsyncStub, tone: Tone, flow: pb.SpeakRequest.Flow
) -> None:
    speech = pcm16(tone(0.6, RATE))

    def mouths() -> int:
        talk = Talk(stub)
        talk.start(flow=flow)
        talk.say(speech)
        talk.close()
        responses = list(talk)
        assert b"".join(piece.data for piece in of_kind(responses, "audio")) == speech
        assert [finished.interrupted for finished in of_kind(responses, "playback_finished")] == [False]
        assert talk.call.code() is grpc.StatusCode.OK
        return sum(frame.speaking for frame in of_kind(responses, "frame"))

    until(lambda: mouths() > 5)  # at once, unless the machine stands still


def test_floats_and_other_rates(talk: Talk, tone: Tone) -> None:
    speech = tone(0.6, 48_000).astype("<f4").tobytes()
    talk.start(sample_rate=48_000, encoding=pb.Speech.FLOAT32, fps=30)
    talk.say(speech, 4_000)
    talk.send(segment_end=Request.SegmentEnd())
    responses = talk.until("playback_finished")
    assert responses[0].started.fps == 30
    assert b"".join(piece.data for piece in of_kind(responses, "audio")) == speech
    assert all(frame.pts % 1600 == 0 for frame in of_kind(responses, "frame"))


def test_no_sound_where_none_is_wanted(talk: Talk, tone: Tone) -> None:
    talk.start(audio=False)
    talk.say(pcm16(tone(0.4, RATE)))
    talk.send(segment_end=Request.SegmentEnd())
    assert not of_kind(talk.until("playback_finished"), "audio")


def test_an_interruption_raises_the_epoch_and_little_old_follows(talk: Talk, tone: Tone) -> None:
    talk.start("avatar")
    talk.say(pcm16(tone(5.0, RATE)))
    talk.until("playback_started")
    responses = [*itertools.islice(talk, 20)]
    talk.send(interrupt=Request.Interrupt())
    responses += talk.until("playback_finished")
    finished = responses[-1].playback_finished
    assert finished.interrupted
    assert finished.epoch == 1
    heard = sum(len(piece.data) // 2 for piece in of_kind(responses, "audio"))
    assert 0 < heard < 5 * RATE
    assert abs(finished.position - heard) <= FRAME
    frames = talk.frames(12)
    assert [frame.epoch for frame in frames if frame.epoch == 0] in ([], [0])
    assert not frames[-1].speaking
    talk.say(pcm16(tone(0.4, RATE)))
    talk.send(segment_end=Request.SegmentEnd())
    again = talk.until("playback_finished")
    assert all(heard.epoch == 1 for heard in of_kind(again, "audio"))
    assert not again[-1].playback_finished.interrupted


def test_a_switch_goes_on_with_another_tenant(talk: Talk, tone: Tone, stack: Stack) -> None:
    talk.start("avatar")
    talk.say(pcm16(tone(5.0, RATE)))
    talk.until("playback_started")
    talk.send(switch=Request.Switch(tenant="plain"))
    switched = talk.until("started")
    assert of_kind(switched, "playback_finished")[-1].interrupted
    assert (switched[-1].started.tenant, switched[-1].started.epoch) == ("plain", 1)
    frames = [frame for frame in talk.frames(5) if frame.epoch == 1]
    tenant = Tenant(stack.repository, "plain")
    assert frames[-1].data == tenant.frame(frames[-1].number).jpeg()


def test_patches_are_the_mouth_alone(talk: Talk, tone: Tone, stack: Stack) -> None:
    talk.start("avatar", picture=Request.PATCHES)
    frames = of_kind(talk.speak_in_time(pcm16(tone(1.0, RATE))), "frame")
    tenant = Tenant(stack.repository, "avatar")
    for frame in frames:
        patch, box = tenant.frame(frame.number).patch, frame.patch
        if frame.speaking:
            assert Box(box.x, box.y, box.width, box.height) == patch
            assert jpeg.decode(frame.data).shape == (patch.height, patch.width, 3)
            assert b"compositeWithTrainedAlgorithmicMedia" in frame.data
        else:
            assert not frame.data
            assert not frame.HasField("patch")


def test_a_viewer_without_acknowledgements_gets_two_frames(stub: pb_grpc.LipsyncStub) -> None:
    talking = Talk(stub, acknowledge=False)
    talking.start()
    first = talking.frames(2)
    other = Talk(stub)
    other.start()
    other.frames(25)  # a second goes by
    talking.send(ack=Request.Ack(pts=first[-1].pts))
    (newest,) = talking.frames(1)
    assert newest.dropped >= 20
    assert newest.pts == (newest.dropped + 2) * FRAME
    for each in (talking, other):
        each.close()
        each.call.cancel()


BAD: list[tuple[str, list[dict[str, Any]], str, str, str]] = [
    ("nothing", [], "INVALID_ARGUMENT", "send start first", "start"),
    ("no command", [{}], "INVALID_ARGUMENT", "no command", "command"),
    ("audio first", [{"audio": Request.Audio(data=b"\0\0")}], "INVALID_ARGUMENT", "audio before start", "audio"),
    ("ack first", [{"ack": Request.Ack()}], "INVALID_ARGUMENT", "ack before start", "ack"),
    (
        "start twice",
        [{"start": Request.Start(tenant="plain")}] * 2,
        "INVALID_ARGUMENT",
        "start twice",
        "start",
    ),
    (
        "a strange rate",
        [{"start": Request.Start(tenant="plain", sample_rate=7)}],
        "INVALID_ARGUMENT",
        "sample rate 7 Hz",
        "sample_rate",
    ),
    ("61 fps", [{"start": Request.Start(tenant="plain", fps=61)}], "INVALID_ARGUMENT", "fps 61", "fps"),
    (
        "an unknown tenant",
        [{"start": Request.Start(tenant="nobody")}],
        "NOT_FOUND",
        "no tenant named 'nobody'",
        "tenant",
    ),
    ("a path as tenant", [{"start": Request.Start(tenant="../plain")}], "INVALID_ARGUMENT", "no tenant name", "tenant"),
    (
        "raw frames",
        [{"start": Request.Start(tenant="plain", output=pb.Output(format=pb.Output.BGR24))}],
        "INVALID_ARGUMENT",
        "BGR24",
        "output.format",
    ),
    (
        "WAV",
        [{"start": Request.Start(tenant="plain", encoding=pb.Speech.WAV)}],
        "INVALID_ARGUMENT",
        "encoding 3",
        "start.encoding",
    ),
    (
        "half a sample at the end",
        [
            {"start": Request.Start(tenant="plain")},
            {"audio": Request.Audio(data=bytes(961))},
            {"segment_end": Request.SegmentEnd()},
        ],
        "INVALID_ARGUMENT",
        "sample",
        "audio",
    ),
    (
        "a switch to nobody",
        [{"start": Request.Start(tenant="plain")}, {"switch": Request.Switch(tenant="nobody")}],
        "NOT_FOUND",
        "nobody",
        "tenant",
    ),
    (
        "100 MB of speech at once",
        [{"start": Request.Start(tenant="plain")}, {"audio": Request.Audio(data=bytes(100 << 20))}],
        "RESOURCE_EXHAUSTED",
        "",
        "",
    ),
    (
        "a message beyond the limit",
        [{"start": Request.Start(tenant="plain")}, {"audio": Request.Audio(data=bytes(161 << 20))}],
        "RESOURCE_EXHAUSTED",
        "",
        "",
    ),
]


@pytest.mark.parametrize(
    ("requests", "status", "words", "field"), [case[1:] for case in BAD], ids=[case[0] for case in BAD]
)
def test_what_cannot_be_done_ends_the_call_and_leaves_nothing(
    stub: pb_grpc.LipsyncStub, stack: Stack, requests: list[dict[str, Any]], status: str, words: str, field: str
) -> None:
    with nothing_left(stack, stub):
        talking = Talk(stub)
        for request in requests:
            talking.send(**request)
        if not requests:
            talking.close()
        code, details, named = refusal(talking)
        talking.close()
        assert code == status
        assert words in details
        assert named == field


def test_bytes_that_are_no_message_end_the_call(stack: Stack, stub: pb_grpc.LipsyncStub) -> None:
    with nothing_left(stack, stub), grpc.insecure_channel(stack.service.address) as channel:
        start = Request(start=Request.Start(tenant="plain")).SerializeToString()
        call: Any = channel.stream_stream("/lipsync.v1.Lipsync/Speak")(iter([start, b"\xff\xff hello"]))
        with pytest.raises(grpc.RpcError):
            list(call)
        assert call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "no SpeakRequest" in call.details()


def test_a_viewer_that_reads_nothing_misses_frames_and_nothing_queues(stack: Stack, stub: pb_grpc.LipsyncStub) -> None:
    # The client's own window, 64 KiB here and up to megabytes by default, is all that lies between it and now.
    small_window = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_535)]
    with grpc.insecure_channel(stack.service.address, options=small_window) as channel:
        stalled = Talk(pb_grpc.LipsyncStub(channel), acknowledge=False)  # type: ignore[no-untyped-call]
        watching = Talk(stub)
        stalled.start("avatar", flow=Request.PLAIN)
        watching.start()
        watching.frames(60)
        frames = stalled.frames(60)
        gap = next(number for number, frame in enumerate(frames) if frame.dropped)
        assert [frame.pts for frame in frames[:gap]] == [number * FRAME for number in range(gap)]
        assert frames[gap].pts == (gap + frames[gap].dropped) * FRAME
        for talking in (stalled, watching):
            talking.close()
            talking.call.cancel()


def test_a_deadline_ends_the_session(stub: pb_grpc.LipsyncStub, stack: Stack) -> None:
    with nothing_left(stack, stub):
        talking = Talk(stub, timeout=0.5)
        talking.start()
        assert refusal(talking)[0] == "DEADLINE_EXCEEDED"
        talking.close()


def test_calls_that_are_cancelled_leave_nothing(stub: pb_grpc.LipsyncStub, stack: Stack, tone: Tone) -> None:
    speech = pcm16(tone(5.0, RATE))
    with nothing_left(stack, stub):
        for event, acknowledge in itertools.product(("started", "frame", "playback_started", "audio"), (True, False)):
            talking = Talk(stub, acknowledge)
            talking.start("avatar", flow=Request.PLAIN)
            talking.say(speech)
            talking.until(event)
            talking.call.cancel()
            talking.close()


VANISHING = """
import itertools, os, sys
import grpc
from compositor.proto import lipsync_v1_pb2 as pb, lipsync_v1_pb2_grpc as pb_grpc

Request = pb.SpeakRequest
requests = [Request(start=Request.Start(tenant="avatar", flow=Request.PLAIN))]
requests += [Request(audio=Request.Audio(data=bytes([0, 64, 0, 192]) * 1200))] * 50
stub = pb_grpc.LipsyncStub(grpc.insecure_channel(sys.argv[1]))
calls = [stub.Speak(itertools.chain(requests, iter(lambda: os.read(0, 1), b""))) for _ in range(4)]
for event, call in zip(("started", "frame", "playback_started", "audio"), calls):
    next(answer for answer in call if answer.WhichOneof("event") == event)
os._exit(7)
"""


def test_a_client_that_vanishes_leaves_nothing(stub: pb_grpc.LipsyncStub, stack: Stack) -> None:
    with nothing_left(stack, stub):
        command = [sys.executable, "-c", VANISHING, stack.service.address]
        with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
            assert process.wait(60) == 7


def test_the_command_records_what_a_viewer_sees_and_hears(stack: Stack, tmp_path: Path) -> None:
    until(lambda: recorded(stack, tmp_path) > 0.1, 240)  # at once, unless the machine stands still


def recorded(stack: Stack, folder: Path) -> float:
    """How much the mouth moves in what the command records, mean grey levels."""
    shutil.rmtree(folder)
    arguments = ["talk", "avatar", str(SPEECH), "-o", f"{folder}/", "--server", stack.service.address]
    done = CliRunner().invoke(build(), [*arguments, "--burst"])
    assert done.exit_code == 0, done.output
    sound, rate = read_wav((folder / "speech.wav").read_bytes())
    pictures = [path.read_bytes() for path in sorted(folder.glob("frame_*.jpg"))]
    assert len(pictures) * rate == len(sound) * 25
    samples, own_rate = read_wav(SPEECH.read_bytes())
    assert rate == own_rate
    begin = int(np.flatnonzero(sound)[0] - np.flatnonzero(samples)[0])
    assert begin % (rate // 25) == 0
    check_sound(sound[begin:], samples, rate // 25)
    tenant = Tenant(stack.repository, "avatar")
    change = np.zeros(len(pictures))
    for number, picture in enumerate(pictures):
        if number and picture == pictures[number - 1]:  # one that the viewer was too slow for
            change[number] = change[number - 1]
        else:
            rest = jpeg.decode(tenant.frame(ping_pong(number, tenant.frames)).jpeg())
            change[number] = np.abs(jpeg.decode(picture).astype(int) - rest).mean()
    assert change[: begin * 25 // rate].max() == change[-3:].max() == 0
    return float(change.max())


def check_sound(sound: NDArray[np.float32], samples: NDArray[np.float32], frame: int) -> None:
    """Sees that all samples are heard in their order, with nothing but silence after them, and between frames where the
    machine could not keep up."""
    heard = 0
    for begin in range(0, len(sound), frame):
        piece = samples[heard : heard + frame]
        if len(piece) and np.allclose(sound[begin : begin + len(piece)], piece, atol=1e-4):
            heard += len(piece)
        else:
            assert not sound[begin : begin + frame].any()
    assert heard == len(samples)


def test_a_silent_session_keeps_its_models_in_use(stack: Stack) -> None:
    """By Triton's own statistics, so that no other compositor takes them for unused."""
    told = stack.service.settings
    residency = told.residency.model_copy(update={"min_resident_s": 3})
    service = ServiceThread(told.model_copy(update={"residency": residency}))
    service.start()
    try:
        with (
            grpc.insecure_channel(service.address) as channel,
            triton.InferenceServerClient(stack.triton.grpc) as client,
        ):
            talking = Talk(pb_grpc.LipsyncStub(channel))  # type: ignore[no-untyped-call]
            talking.start()

            def uses() -> list[int]:
                counts = {it.name: it.inference_count for it in client.get_inference_statistics().model_stats}
                return [counts.get(model, 0) for model in ("plain", "audio_encoder")]

            talking.frames(2)
            before = uses()
            while not all(now >= then + 3 for now, then in zip(uses(), before, strict=True)):
                assert not any(frame.speaking for frame in talking.frames(10))
            talking.close()
            talking.call.cancel()
    finally:
        service.stop()


def test_the_service_stops_although_sessions_are_live(stack: Stack) -> None:
    service = ServiceThread(stack.service.settings)
    service.start()
    with grpc.insecure_channel(service.address) as channel:
        talking = Talk(pb_grpc.LipsyncStub(channel))  # type: ignore[no-untyped-call]
        talking.start()
        talking.frames(2)
        stopping = threading.Thread(target=service.stop)
        stopping.start()
        code, details, _ = refusal(talking)
        assert (code, details) == ("UNAVAILABLE", "the service stops")
        talking.close()
        stopping.join(30)
