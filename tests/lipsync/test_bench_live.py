"""Live sessions under watch: how late a picture is, when a number of sessions holds, and the part against Triton."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from compositor.errors import LipsyncError
from compositor.geometry import Box
from compositor.pcm import pcm16
from compositor.proto import lipsync_v1_pb2 as pb
from compositor.sessions.events import Ack, Audio, Interrupt, Shown, Start
from compositor.sessions.speech import Loudness
from compositor.settings import LiveSettings
from compositor.transports import speak
from compositor.transports.wire import Wire as Transport
from lipsync.bench import live, live_levels, live_viewers, service
from lipsync.bench.child import Child
from lipsync.bench.figures import Figure
from lipsync.bench.live import Sizes
from lipsync.bench.live_levels import CLIENTS, COMPOSITOR, TRITON, Counted, Level
from lipsync.bench.live_viewers import RATE, Seen, Sight, Turn, Viewer, Viewers, seen
from lipsync.bench.live_wires import Grpc, Message, Picture, PictureMode, WebSocket, Wire
from lipsync.bench.part import Run, carry_out

FRAME = RATE // 25
SHOWN = Shown(pts=FRAME, epoch=1, number=7, speaking=True, data=b"jpeg", dropped=3)
PATCH = Shown(pts=FRAME, epoch=1, number=7, speaking=True, data=b"patch", patch=Box(8, 16, 24, 32), dropped=3)
IDLE_PATCH = Shown(pts=FRAME, epoch=0, number=7, speaking=False, data=b"")


def picture(number: int, *, epoch: int = 0, moving: bool = True, dropped: int = 0) -> Picture:
    return Picture(number * FRAME, epoch, moving, dropped, 1000)


def sight(*arrivals: tuple[float, Picture]) -> Sight:
    seen_of = Sight()
    seen_of.arrivals += arrivals
    return seen_of


def test_lateness_counts_from_the_most_punctual_picture() -> None:
    late_at_first = sight((10.05, picture(0)), (10.04, picture(1)), (10.09, picture(2)), (10.12, picture(3)))
    assert late_at_first.lateness_ms(0, 99) == pytest.approx([50, 0, 10, 0])
    assert late_at_first.lateness_ms(10.09, 10.12) == pytest.approx([10])


def test_lateness_knows_of_pictures_that_are_missing() -> None:
    assert sight((0.0, picture(0)), (0.2, picture(5))).lateness_ms(0, 1) == pytest.approx([0, 0])


def test_drops_are_those_of_the_time_watched() -> None:
    watched = sight((1, picture(0, dropped=2)), (2, picture(1, dropped=2)), (3, picture(2, dropped=5)))
    assert watched.dropped(0, 9) == 3
    assert watched.dropped(0, 2.5) == 0
    assert watched.dropped(8, 9) == 0


@pytest.mark.parametrize("event", [SHOWN, PATCH, IDLE_PATCH])
def test_pictures_are_read_from_both_wires(event: Shown) -> None:
    expected = Picture(event.pts, event.epoch, event.speaking, event.dropped, len(event.data))
    assert Grpc("").read(speak.response_of(event)) == expected
    assert WebSocket("").read(Transport("anna").write(event)) == expected


def test_other_messages_are_no_pictures() -> None:
    started = pb.SpeakResponse(started=pb.SpeakResponse.Started(tenant="anna"))
    assert Grpc("").read(started) is None
    assert WebSocket("").read('{"type":"started"}') is None


@pytest.mark.parametrize("mode", ["frames", "patches"])
def test_both_wires_say_the_same(mode: PictureMode) -> None:
    grpc_wire, socket_wire, transport = Grpc(""), WebSocket(""), Transport("anna")
    said = [
        (grpc_wire.start("anna", mode), socket_wire.start("anna", mode), Start("anna", picture=mode)),
        (grpc_wire.audio(b"ab"), socket_wire.audio(b"ab"), Audio(b"ab")),
        (grpc_wire.ack(640), socket_wire.ack(640), Ack(640)),
        (grpc_wire.interrupt(), socket_wire.interrupt(), Interrupt()),
    ]
    for request, message, command in said:
        assert isinstance(request, bytes)
        assert speak.command_of(pb.SpeakRequest.FromString(request)) == command
        assert transport.read(message) == command


@pytest.fixture
def refusing() -> Iterator[str]:
    """The address of a service that answers the first message of a session, and then ends the session."""

    def speak(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        start = pb.SpeakRequest.FromString(next(requests)).start
        yield pb.SpeakResponse(started=pb.SpeakResponse.Started(tenant=start.tenant)).SerializeToString()
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "busy")

    handlers = {"Speak": grpc.stream_stream_rpc_method_handler(speak)}
    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool)
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("lipsync.v1.Lipsync", handlers)])
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield f"127.0.0.1:{port}"
        server.stop(None).wait()


async def watch(wire: Grpc, outgoing: asyncio.Queue[Message]) -> None:
    async with wire.connect("anna", outgoing) as messages:
        assert (await anext(messages)).started.tenant == "anna"
        await anext(messages)


async def test_a_session_that_the_service_ends_leaves_nothing_running(refusing: str) -> None:
    complaints = list[str]()
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context["message"]))
    before = asyncio.all_tasks()
    for _ in range(3):
        wire, outgoing = Grpc(refusing), asyncio.Queue[Message]()
        outgoing.put_nowait(wire.start("anna", "frames"))
        with pytest.raises(grpc.RpcError) as refused:
            await watch(wire, outgoing)
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert asyncio.all_tasks() == before
    gc.collect()
    assert not complaints


def test_the_speech_is_never_silent() -> None:
    chunks = live_viewers.speech()
    assert {len(chunk) for chunk in chunks} == {round(RATE * live_viewers.CHUNK_S) * 2}
    settings = LiveSettings()
    loudness = Loudness(RATE, 25, settings.silence_dbfs, settings.lookahead_ms)
    for chunk in chunks:
        loudness.push(pcm16(chunk))
    frames = int(len(chunks) * live_viewers.CHUNK_S * 25)
    assert not any(loudness.silent(frame) for frame in range(frames))


class Line:
    """A wire without a service: plays pictures and keeps what is sent."""

    def __init__(self, pictures: Sequence[Picture]) -> None:
        self._pictures = pictures
        self.sent: list[Message] = []
        self.all_sent = asyncio.Event()

    def start(self, tenant: str, picture: PictureMode) -> Message:
        return f"start {tenant} {picture}"

    def audio(self, data: bytes) -> Message:
        return data

    def ack(self, pts: int) -> Message:
        return f"ack {pts}"

    def interrupt(self) -> Message:
        return "interrupt"

    def read(self, message: Any) -> Picture | None:
        return message if isinstance(message, Picture) else None

    @contextlib.asynccontextmanager
    async def connect(self, tenant: str, outgoing: asyncio.Queue[Message]) -> AsyncGenerator[AsyncIterator[Any], None]:
        yield self._play()
        while not outgoing.empty():
            self.sent.append(outgoing.get_nowait())

    async def _play(self) -> AsyncGenerator[Any, None]:
        yield "started"
        for shown in self._pictures:
            yield shown


async def test_a_viewer_acknowledges_every_picture_and_says_when_the_service_ends_it() -> None:
    line = Line([picture(0, moving=False), picture(1)])
    wire: Wire = line
    viewer = Viewer(wire, "anna", "frames", itertools.repeat(b"speech"), 0)
    with pytest.raises(LipsyncError, match="the service ended a session"):
        await viewer.watch()
    assert [said for said in line.sent if said != b"speech"] == ["start anna frames", "ack 0", f"ack {FRAME}"]
    assert [shown.moving for _, shown in viewer.sight.arrivals] == [False, True]
    assert viewer.moved_s == viewer.sight.arrivals[1][0]


def test_delays_count_from_speech_and_from_interruption() -> None:
    viewer = Viewer(Grpc(""), "anna", "frames", [], 0)
    viewer.sight.arrivals += [(1.0, picture(0, moving=False)), (1.6, picture(15)), (2.0, picture(25))]
    viewer.spoke_s = 1.1
    assert viewer.answered_s is None
    viewer.interrupt()
    viewer.interrupted_s = 2.01
    viewer.sight.arrivals += [(2.04, picture(26)), (2.08, picture(27, epoch=1)), (2.12, picture(28, epoch=1))]
    found = seen([viewer], 1.5, 2.06, {CLIENTS: 0.1})
    assert found.first_moving_ms == pytest.approx([500])
    assert found.interrupt_ms == pytest.approx([70])
    assert (found.outdated, found.moving, found.size) == (1, 3, 3000)
    assert len(found.lateness_ms) == 3


def level(
    sessions: int = 4, *, late_ms: float = 1.0, dropped: int = 0, cores: float = 0.1, late_mouths: int = 0
) -> Level:
    shares = {COMPOSITOR: 0.5, TRITON: 0.3, CLIENTS: 0.2}
    cpu_s = {name: 2 * cores * share for name, share in shares.items()}
    found = Seen(2.0, cpu_s, [0.0] * 90 + [late_ms] * 10, 100, dropped, 1000, [500], [30], 1)
    return Level(sessions, found, Counted(10, 30, late_mouths, 100))


def test_a_level_tells_its_cpu_and_its_batches() -> None:
    found = level(cores=0.4)
    assert found.cores == pytest.approx(0.4)
    assert found.cpu_ms(COMPOSITOR) == pytest.approx(50)
    assert found.cpu_ms(COMPOSITOR, TRITON) == pytest.approx(80)
    assert found.counted.per_execution == 3
    assert found.fault == ""


@pytest.mark.parametrize(
    ("found", "fault"),
    [
        (level(late_ms=40), "lateness p99 40 ms"),
        (level(dropped=2), "2 pictures dropped"),
        (level(late_mouths=2), "2% of the mouths"),
        (level(cores=1000), "1000.00 cores busy"),
    ],
)
def test_a_level_that_does_not_hold_says_why(found: Level, fault: str) -> None:
    assert found.fault.startswith(fault)


def test_counts_are_those_of_the_turn() -> None:
    before = Counted(10, 20, 1, 100, {"1.0": 5, "+Inf": 10})
    after = Counted(15, 40, 3, 200, {"1.0": 6, "+Inf": 15})
    assert after.since(before) == Counted(5, 20, 2, 100, {"1.0": 1, "+Inf": 5})
    assert Counted(0, 0, 0, 0).per_execution == 0


def test_a_histogram_is_told_by_what_lies_between_its_bounds() -> None:
    assert live_levels.histogram({"1.0": 3, "2.0": 3, "4.0": 8, "+Inf": 9}) == "1: 3, 4: 5, more: 1"


class Scripted:
    """A bench on which so many sessions hold."""

    def __init__(self, hold: int) -> None:
        self._hold = hold
        self.asked: list[int] = []

    def level(self, turn: Turn) -> Level:
        self.asked.append(len(turn.tenants))
        return level(len(turn.tenants), dropped=int(len(turn.tenants) > self._hold))


@pytest.mark.parametrize(
    ("hold", "least", "most", "asked"),
    [
        (0, 1, 8, [1, 1]),
        (1, 1, 8, [1, 2, 2]),
        (2, 1, 8, [1, 2, 4, 4, 3]),
        (6, 1, 8, [1, 2, 4, 8, 8, 6]),
        (9, 1, 8, [1, 2, 4, 8]),
        (0, 4, 8, [1, 1, 2, 2, 4, 4, 3]),
    ],
)
def test_sessions_double_until_they_do_not_hold(
    hold: int, least: int, most: int, asked: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bench = Scripted(hold)
    told: list[tuple[str, int, int]] = []
    run = Run(tmp_path, lambda *progress: told.append(progress))
    levels = list(live.climb(run, bench, Sizes(least=least, most=most), live_levels.ONE, ["anna"] * most, []))
    assert bench.asked == asked
    assert [found.sessions for found in levels] == list(dict.fromkeys(asked))
    assert told[-1] == (live_levels.ONE, most, most)


class Collapsing(Scripted):
    """A service under which viewers see nothing any more from so many sessions on."""

    def level(self, turn: Turn) -> Level:
        if len(turn.tenants) >= self._hold:
            raise LipsyncError("a live session failed: no mouth moved within 30 s")
        return super().level(turn)


def test_too_many_sessions_to_be_watched_end_the_climb(tmp_path: Path) -> None:
    run, notes = Run(tmp_path, lambda *_: None), list[str]()
    levels = list(live.climb(run, Collapsing(4), Sizes(least=2, most=8), live_levels.ONE, ["anna"] * 8, notes))
    assert [found.sessions for found in levels] == [1, 2, 3]
    assert len(notes) == 1
    assert "no mouth moved" in notes[0]
    with pytest.raises(LipsyncError):
        list(live.climb(run, Collapsing(2), Sizes(least=2, most=8), live_levels.ONE, ["anna"] * 8, notes))


def test_a_session_that_fails_is_a_failure_of_the_turn(tmp_path: Path) -> None:
    with (
        service.running(tmp_path, "127.0.0.1:1", tmp_path) as served,
        Child(live_viewers.__name__, [served.address, served.http]) as child,
    ):
        for way in ("grpc", "websocket"):
            with pytest.raises(LipsyncError, match="a live session failed: "):
                Viewers(child).take(Turn(["nobody"], 0.1, way=way))


@pytest.mark.triton
def test_the_part_measures_against_triton(triton_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, int, int]] = []
    sizes: list[float] = []

    def noting(case: str, level: Level) -> Iterator[Figure]:
        sizes.append(level.seen.size / len(level.seen.lateness_ms))
        return live_levels.wire_figures_of(case, level)

    monkeypatch.setattr(live, "wire_figures_of", noting)
    found = carry_out(live.PART, Run(tmp_path, lambda *progress: told.append(progress), quick=True))
    assert found.failure == ""
    assert len(found.targets) >= 2
    assert {figure.quantity for figure in found.figures} >= {found.plotted}
    figures = {(figure.case, figure.subject, figure.quantity): figure.spread.median for figure in found.figures}
    for name in (COMPOSITOR, TRITON, CLIENTS):
        assert any(figures[case, name, "CPU a session and second"] > 0 for case, *_ in figures if "session, " in case)
    assert figures["1 session, a tenant each", TRITON, "frames an execution"] >= 1
    for case in ("gRPC, frames", "gRPC, patches", "WebSocket, frames"):
        assert figures[f"1 session, {case}", "pictures", "bytes a session and second"] > 0
    assert np.argmin(sizes) == 1, "a patch takes fewer bytes than a frame, however many come"
    assert told[-1][1] == told[-1][2]
