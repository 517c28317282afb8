"""The live client: a speech goes to a compositor as if it were spoken now; frames come back when their time has come,
and an account of how well that went."""

from __future__ import annotations

import contextlib
import io
import queue
import time
import wave
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO

import grpc
import numpy as np
from numpy.typing import NDArray

from compositor.proto import lipsync_v1_pb2 as pb
from compositor.proto import lipsync_v1_pb2_grpc as pb_grpc

from .client import Sink, failure_of

CHUNK_S = 0.02
"""Speech in one message, as a browser's microphone sends it."""
TAIL_S = 0.4
"""How long it goes on watching after the speech: the mouth comes to rest."""


@dataclass(frozen=True)
class Speech:
    """What is said, and how. samples: mono in [-1, 1] at `rate` Hz. burst: all at once, not as fast as it is spoken.

    interrupt_after_s: after so much of it was shown, the rest is neither sent nor wanted any more.
    """

    samples: NDArray[np.float32]
    rate: int
    fps: int = 0
    burst: bool = False
    interrupt_after_s: float | None = None


@dataclass
class Account:
    """What came back, and when: seconds of a monotonic clock, and pts in samples."""

    started: pb.SpeakResponse.Started = field(default_factory=pb.SpeakResponse.Started)
    arrivals: list[tuple[int, float]] = field(default_factory=list)
    """(pts, when) of each frame."""
    speaking: int = 0
    dropped: int = 0
    bytes: int = 0
    first_audio_s: float = 0.0
    first_speaking_s: float = 0.0
    interrupted_s: float = 0.0
    first_new_s: float = 0.0
    """When the first frame came that belongs to what follows the interruption."""
    late_old: int = 0
    """Frames of before the interruption that came after its answer."""
    finished: pb.SpeakResponse.PlaybackFinished | None = None
    failures: list[str] = field(default_factory=list)

    def lateness_ms(self) -> NDArray[np.float64]:
        """How much later each frame came than the most punctual one, by its pts."""
        pts, when = np.array(self.arrivals, np.float64).reshape(-1, 2).T
        delay = when - pts / max(self.started.sample_rate, 1)
        lateness: NDArray[np.float64] = (delay - delay.min(initial=np.inf)) * 1000
        return lateness


def talk(address: str, tenant: str, speech: Speech, recording: Recording, arrived: Callable[[int], None]) -> Account:
    """One live session, from its first frame until the speech was shown or interrupted.

    arrived: called with the pts of each frame. Raises ServiceFailed or TritonUnavailable.
    """
    conversation = _Conversation(tenant, speech, recording, arrived)
    with grpc.insecure_channel(address, options=[("grpc.max_receive_message_length", -1)]) as channel:
        call = pb_grpc.LipsyncStub(channel).Speak(conversation.requests())  # type: ignore[no-untyped-call]
        try:
            for response in call:
                conversation.take(response)
        except grpc.RpcError as error:
            raise failure_of(address, error) from error
        finally:
            conversation.close()
            call.cancel()
    return conversation.account


class _Conversation:
    """Both sides of a session: `requests` is drawn from by one thread, `take` is called by another."""

    def __init__(self, tenant: str, speech: Speech, recording: Recording, arrived: Callable[[int], None]) -> None:
        self.account = Account()
        self._tenant = tenant
        self._speech = speech
        self._recording = recording
        self._arrived = arrived
        self._replies = queue.SimpleQueue[pb.SpeakRequest | None]()
        self._begin_pts: int | None = None
        self._epoch = 0

    def requests(self) -> Iterator[pb.SpeakRequest]:
        """The speech when it is due, replies at once; ends with `close`."""
        begin_s = time.monotonic()
        speech = self._due()
        request: pb.SpeakRequest | None
        due_s, request = next(speech)
        while True:
            wait_s = None if request is None else max(0.0, begin_s + due_s - time.monotonic())
            try:
                reply = self._replies.get(timeout=wait_s)
            except queue.Empty:
                assert request is not None
                if request.HasField("audio"):
                    self.account.first_audio_s = self.account.first_audio_s or time.monotonic()
                yield request
                due_s, request = next(speech, (0.0, None))
                continue
            if reply is None:
                return
            if reply.HasField("interrupt"):
                request = None
            yield reply

    def close(self) -> None:
        """Nothing more is said: the session ends."""
        self._replies.put(None)

    def take(self, response: pb.SpeakResponse) -> None:
        """Takes a response in, and replies to it."""
        event = response.WhichOneof("event")
        if event == "started":
            self.account.started = response.started
            self._recording.start(response.started)
        elif event == "frame":
            self._take_frame(response.frame)
        elif event == "audio":
            self._recording.hear(response.audio.pts, response.audio.data)
        elif event == "playback_started":
            self._begin_pts = response.playback_started.pts
        elif event == "playback_finished":
            self.account.finished = response.playback_finished
            self._epoch = response.playback_finished.epoch
        elif event == "error":
            self.account.failures.append(f"{response.error.status}: {response.error.message}")

    def _due(self) -> Iterator[tuple[float, pb.SpeakRequest]]:
        """When each request of the speech is due, in seconds since the first."""
        speech = self._speech
        yield (
            0.0,
            pb.SpeakRequest(start=pb.SpeakRequest.Start(tenant=self._tenant, sample_rate=speech.rate, fps=speech.fps)),
        )
        data = pcm16(speech.samples)
        size = max(1, round(CHUNK_S * speech.rate)) * 2
        for begin in range(0, len(data), size):
            # A piece is there to be sent once it is spoken.
            due_s = 0.0 if speech.burst else (begin + size) / 2 / speech.rate
            yield due_s, pb.SpeakRequest(audio=pb.SpeakRequest.Audio(data=data[begin : begin + size]))
        yield 0.0, pb.SpeakRequest(segment_end=pb.SpeakRequest.SegmentEnd())

    def _take_frame(self, frame: pb.SpeakResponse.Frame) -> None:
        account, now_s = self.account, time.monotonic()
        self._replies.put(pb.SpeakRequest(ack=pb.SpeakRequest.Ack(pts=frame.pts)))
        account.arrivals.append((frame.pts, now_s))
        account.speaking += frame.speaking
        account.dropped = frame.dropped
        account.bytes += len(frame.data)
        account.late_old += frame.epoch < self._epoch
        if frame.speaking:
            account.first_speaking_s = account.first_speaking_s or now_s
        if account.interrupted_s and frame.epoch > 0:
            account.first_new_s = account.first_new_s or now_s
        self._recording.show(frame.pts, frame.data)
        self._arrived(frame.pts)
        self._interrupt_when_due(frame.pts, now_s)
        if account.finished and frame.pts >= account.finished.pts + TAIL_S * account.started.sample_rate:
            self.close()

    def _interrupt_when_due(self, pts: int, now_s: float) -> None:
        after_s, account = self._speech.interrupt_after_s, self.account
        if after_s is None or account.interrupted_s or self._begin_pts is None:
            return
        if pts >= self._begin_pts + after_s * self._speech.rate:
            account.interrupted_s = now_s
            self._replies.put(pb.SpeakRequest(interrupt=pb.SpeakRequest.Interrupt()))


def pcm16(samples: NDArray[np.float32]) -> bytes:
    """Mono samples in [-1, 1] as little-endian 16-bit integers."""
    return np.round(samples.clip(-1, 1) * 32767).astype("<i2").tobytes()


class Recording:
    """What a viewer saw and heard, by pts: a frame that was dropped repeats the one before, and silence fills gaps.

    Frames wait in `file`, a temporary one: what a sink needs of the sound is known only at the end.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._frames: list[tuple[int, int]] = []  # frame index, size
        self._heard: list[tuple[int, bytes]] = []
        self._rate = self._fps = 1

    def start(self, started: pb.SpeakResponse.Started) -> None:
        """The session's clock: pts are in samples of its rate."""
        self._rate, self._fps = started.sample_rate, started.fps

    def show(self, pts: int, data: bytes) -> None:
        """A frame, a JPEG."""
        self._file.write(data)
        self._frames.append((-(-pts * self._fps // self._rate), len(data)))

    def hear(self, pts: int, data: bytes) -> None:
        """Speech, PCM16."""
        self._heard.append((pts, data))

    def wav(self) -> bytes:
        """The sound from the first frame to the end of the last one, or of the speech, as a WAV file."""
        first, last = (self._frames[0][0], self._frames[-1][0] + 1) if self._frames else (0, 0)
        begin = first * self._rate // self._fps
        ends = [pts + len(data) // 2 for pts, data in self._heard]
        sound = bytearray(2 * (max([last * self._rate // self._fps, *ends]) - begin))
        for pts, data in self._heard:
            at = 2 * (pts - begin)
            sound[max(0, at) : at + len(data)] = data[max(0, -at) :]
        file = io.BytesIO()
        with wave.open(file, "wb") as writer:
            writer.setparams((1, 2, self._rate, 0, "NONE", ""))
            writer.writeframes(sound)
        return file.getvalue()

    def write(self, sink_for: Callable[[bytes, int], Sink]) -> None:
        """Hands everything to a sink, which `sink_for` makes of the sound and the frame rate."""
        self._file.seek(0)
        sink = sink_for(self.wav(), self._fps)
        try:
            for (index, size), (following, _) in zip(self._frames, [*self._frames[1:], (0, 0)], strict=True):
                data = self._file.read(size)
                for _ in range(max(1, following - index)):
                    sink.put(data)
            sink.close()
        except BaseException:
            with contextlib.suppress(OSError):
                sink.discard()
            raise
