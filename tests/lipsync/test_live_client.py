"""The live client against a service of the test's own: what it sends, acknowledges, records and tells."""

from __future__ import annotations

import io
import re
import time
import wave
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import cv2
import grpc
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from compositor import jpeg
from compositor.errors import LipsyncError
from compositor.pcm import read_wav
from compositor.proto import lipsync_v1_pb2 as pb
from compositor.proto import lipsync_v1_pb2_grpc as pb_grpc
from lipsync.app import build
from lipsync.client import ServiceFailed
from lipsync.live_client import Account, Recording, pcm16
from lipsync.sentences import HELLO

SPEECH = HELLO
SAMPLES, RATE = read_wav(SPEECH.read_bytes())
FRAME = RATE // 25
Reply = pb.SpeakResponse


def picture(level: int) -> bytes:
    _, data = cv2.imencode(".jpg", np.full((48, 64, 3), level, np.uint8))
    return data.tobytes()


class Session:
    """One call of the service: 4 idle frames, then the speech at 25 fps with one frame missing, then idle ones until
    the client closes. Reads on until each frame is acknowledged."""

    def __init__(self, requests: Iterator[pb.SpeakRequest]) -> None:
        self._requests = requests
        self.heard = b""
        self.arrived = list[tuple[int, float]]()  # samples heard, when
        self.interrupted = self.ended = self.closed = False
        self.start = next(requests).start
        self.epoch = 0

    def read(self) -> pb.SpeakRequest | None:
        request = next(self._requests, None)
        self.closed = request is None
        if request is not None:
            self.heard += request.audio.data
            self.arrived.append((len(self.heard) // 2, time.monotonic()))
            self.interrupted |= request.HasField("interrupt")
            self.ended |= request.HasField("segment_end")
        return request

    def frame(self, number: int, speaking: bool, dropped: int = 0) -> Iterator[pb.SpeakResponse]:
        pts = number * FRAME
        yield Reply(
            frame=Reply.Frame(
                pts=pts,
                epoch=self.epoch,
                number=number,
                speaking=speaking,
                data=picture(200 if speaking else 50),
                dropped=dropped,
            )
        )
        while not self.closed and (request := self.read()) is not None:
            if request.HasField("ack") and request.ack.pts == pts:
                return

    def begin(self) -> Iterator[pb.SpeakResponse]:
        yield Reply(started=Reply.Started(tenant=self.start.tenant, sample_rate=self.start.sample_rate, fps=25))
        for number in range(4):
            yield from self.frame(number, speaking=False)

    def speak(self, frames: int, missing: int) -> Iterator[pb.SpeakResponse]:
        """The speech's frames from number 4 on, until interrupted."""
        yield Reply(playback_started=Reply.PlaybackStarted(pts=4 * FRAME))
        for step in range(frames):
            piece = self.heard[2 * step * FRAME : 2 * (step + 1) * FRAME]
            yield Reply(audio=Reply.Audio(pts=(4 + step) * FRAME, data=piece))
            if step != missing:
                yield from self.frame(4 + step, speaking=True, dropped=int(step > missing))
            if self.interrupted:
                return

    def finish(self, position: int) -> Iterator[pb.SpeakResponse]:
        """The end of the speech, and idle frames after it, one of them of before an interruption."""
        number = 4 + position // FRAME
        self.epoch = int(self.interrupted)
        yield Reply(
            playback_finished=Reply.PlaybackFinished(
                pts=number * FRAME, epoch=self.epoch, position=position, interrupted=self.interrupted
            )
        )
        self.epoch = 0
        while not self.closed:
            yield from self.frame(number, speaking=False, dropped=1)
            self.epoch = int(self.interrupted)
            number += 1


class Service(pb_grpc.LipsyncServicer):
    """Behaves as the tenant's name has it: `good`, `broken`, or `failing` in a segment."""

    def __init__(self) -> None:
        self.sessions: list[Session] = []

    def Speak(self, requests: Iterator[pb.SpeakRequest], context: Any) -> Iterator[pb.SpeakResponse]:  # noqa: N802
        session = Session(requests)
        self.sessions.append(session)
        if session.start.tenant == "broken":
            context.abort(grpc.StatusCode.INTERNAL, "it broke")
        yield from session.begin()
        if session.start.tenant == "failing":
            yield Reply(error=Reply.Error(status="UNAVAILABLE", message="Triton is gone"))
            yield from session.finish(0)
            return
        while not session.ended:
            session.read()
        yield from session.speak(-(-len(session.heard) // 2 // FRAME), missing=5)
        yield from session.finish(10 * FRAME if session.interrupted else len(session.heard) // 2)


@pytest.fixture
def service() -> Iterator[tuple[str, Service]]:
    with ThreadPoolExecutor(2) as pool:
        server, servicer = grpc.server(pool), Service()
        pb_grpc.add_LipsyncServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield f"127.0.0.1:{port}", servicer
        server.stop(None).wait()


def talk(address: str, output: Path | str, *options: str, tenant: str = "good") -> Result:
    return CliRunner().invoke(build(), ["talk", tenant, str(SPEECH), "-o", str(output), "--server", address, *options])


def test_all_of_the_speech_is_sent_and_every_frame_acknowledged(service: tuple[str, Service], tmp_path: Path) -> None:
    address, servicer = service
    done = talk(address, f"{tmp_path}/frames/", "--burst")
    assert done.exit_code == 0, done.output
    (session,) = servicer.sessions
    assert session.start.sample_rate == RATE
    assert session.heard == pcm16(SAMPLES)
    assert session.closed
    assert not session.interrupted


def test_the_recording_goes_by_pts(service: tuple[str, Service], tmp_path: Path) -> None:
    done = talk(service[0], f"{tmp_path}/frames/", "--burst")
    assert done.exit_code == 0, done.output
    speaking = -(-len(SAMPLES) // FRAME)
    pictures = sorted((tmp_path / "frames").glob("frame_*.jpg"))
    levels = [int(jpeg.decode(path.read_bytes()).mean()) for path in pictures]
    assert levels[:4] == [50] * 4
    assert levels[4 : 4 + speaking] == [200] * speaking  # the missing one repeats the one before
    assert set(levels[4 + speaking :]) == {50}
    samples, rate = read_wav((tmp_path / "frames" / "speech.wav").read_bytes())
    assert rate == RATE
    assert len(samples) == len(levels) * FRAME
    np.testing.assert_allclose(samples[4 * FRAME : 4 * FRAME + len(SAMPLES)], SAMPLES, atol=1e-4)
    assert not samples[: 4 * FRAME].any()
    assert not samples[4 * FRAME + len(SAMPLES) :].any()
    assert "1 dropped" in done.output
    assert f"{len(levels) - 1} frames" in done.output


def test_a_video_holds_both(service: tuple[str, Service], tmp_path: Path) -> None:
    output = tmp_path / "out.mp4"
    assert talk(service[0], output, "--burst").exit_code == 0
    with av.open(output) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert video.frames >= 4 + -(-len(SAMPLES) // FRAME)
        assert float((audio.duration or 0) * (audio.time_base or 0)) == pytest.approx(video.frames / 25, abs=0.1)
    assert list(tmp_path.iterdir()) == [output]


def test_an_interruption_stops_the_speech(service: tuple[str, Service], tmp_path: Path) -> None:
    address, servicer = service
    done = talk(address, f"{tmp_path}/frames/", "--burst", "--interrupt-after", "0.4")
    assert done.exit_code == 0, done.output
    assert servicer.sessions[0].interrupted
    assert f"interrupted after {10 * FRAME / RATE:.2f} s of speech: first new frame" in done.output
    assert "1 old ones after" in done.output


def test_speech_is_sent_as_fast_as_it_is_spoken(service: tuple[str, Service], tmp_path: Path) -> None:
    address, servicer = service
    begin_s = time.monotonic()
    done = talk(address, f"{tmp_path}/frames/")
    assert done.exit_code == 0, done.output
    (session,) = servicer.sessions
    assert session.heard == pcm16(SAMPLES)
    # However late a piece comes, it never comes before it has been spoken.
    assert all(samples / RATE <= at_s - begin_s for samples, at_s in session.arrived if samples)
    assert re.search(r"^first speaking frame \d+\.\d\d s after the first speech was sent$", done.output, re.MULTILINE)


@pytest.mark.parametrize(
    ("tenant", "fault"), [("broken", "INTERNAL: it broke"), ("failing", "UNAVAILABLE: Triton is gone")]
)
def test_failures_are_told_and_leave_no_file(
    service: tuple[str, Service], tmp_path: Path, tenant: str, fault: str
) -> None:
    done = talk(service[0], tmp_path / "out.mp4", "--burst", tenant=tenant)
    assert isinstance(done.exception, ServiceFailed)
    assert done.exception.message == fault
    assert list(tmp_path.iterdir()) == []


def test_no_service_is_told(tmp_path: Path) -> None:
    done = talk("127.0.0.1:1", tmp_path / "out.mp4")
    assert isinstance(done.exception, LipsyncError)
    assert "no compositor answers at 127.0.0.1:1" in done.exception.message


def test_lateness_is_told_against_the_most_punctual_frame() -> None:
    account = Account(pb.SpeakResponse.Started(sample_rate=1000), [(0, 5.02), (40, 5.04), (80, 5.09)])
    np.testing.assert_allclose(account.lateness_ms(), [20, 0, 10], atol=1e-6)
    assert Account().lateness_ms().size == 0


def test_sound_from_before_the_first_frame_is_left_out() -> None:
    recording = Recording(io.BytesIO())
    recording.start(pb.SpeakResponse.Started(sample_rate=8_000, fps=25))
    recording.hear(160, pcm16(np.full(320, 0.5, np.float32)))
    recording.show(320, b"jpeg")
    with wave.open(io.BytesIO(recording.wav())) as file:
        assert file.getframerate() == 8_000
        sound = np.frombuffer(file.readframes(1_000), "<i2")
    assert len(sound) == 320
    assert (sound[:160] > 16_000).all()
    assert not sound[160:].any()


def test_pcm16_is_clipped() -> None:
    samples = np.array([0, 1, -1, 2, -2], np.float32)
    assert np.frombuffer(pcm16(samples), "<i2").tolist() == [0, 32767, -32767, 32767, -32767]
