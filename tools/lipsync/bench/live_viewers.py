"""A process of its own that holds live sessions and watches them: one turn a line of stdin, what was seen a line back.

`python -m lipsync.bench.live_viewers GRPC_ADDRESS HTTP_ADDRESS`. Every viewer has a connection of its own, speaks in
real time without a pause, acknowledges each picture as it comes, and in the end interrupts. All of them live in one
event loop, whose CPU is told with the rest: beyond most of a core it is itself what is late.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import grpc
import numpy as np
import soxr
from websockets.exceptions import WebSocketException

from compositor.errors import LipsyncError
from compositor.pcm import read_wav
from compositor.sessions.events import SAMPLE_RATE_DEFAULT
from lipsync.sentences import HELLO

from .child import Child, announce
from .live_wires import Grpc, Message, Picture, PictureMode, Way, WebSocket, Wire
from .turns import cpu_s, pause, until

RATE = SAMPLE_RATE_DEFAULT
CHUNK_S = 0.02
# Louder than what the service takes for silence: the pauses of the sentence are spoken, too.
_NOISE = 10 ** (-40 / 20)
_LONGEST_S = 30.0


@dataclass(frozen=True)
class Turn:
    """A session for each of `tenants`, watched for `seconds`, and until each has shown a picture. settle_s: over how
    long the viewers arrive, and how long they watch before that counts. watched: pids by name, whose CPU is read
    meanwhile."""

    tenants: Sequence[str]
    seconds: float
    settle_s: float = 0.5
    way: Way = "grpc"
    picture: PictureMode = "frames"
    watched: Mapping[str, Sequence[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Seen:
    """What a turn showed, in its watched seconds except for the delays.

    lateness_ms: of every picture. size: bytes of all JPEGs. cpu_s: of the watched and, as `clients`, of the viewers'
    process. first_moving_ms, interrupt_ms: one delay a viewer, before and after these seconds. outdated: most pictures
    of interrupted speech that one viewer still got.
    """

    wall_s: float
    cpu_s: Mapping[str, float]
    lateness_ms: Sequence[float]
    moving: int
    dropped: int
    size: int
    first_moving_ms: Sequence[float]
    interrupt_ms: Sequence[float]
    outdated: int


class Sight:
    """The pictures of one session, with the time of their arrival in seconds."""

    def __init__(self, rate: int = RATE) -> None:
        self._rate = rate
        self.arrivals: list[tuple[float, Picture]] = []

    def between(self, begin_s: float, end_s: float) -> list[Picture]:
        return [picture for at_s, picture in self.arrivals if begin_s <= at_s < end_s]

    def lateness_ms(self, begin_s: float, end_s: float) -> list[float]:
        """How much later each picture came than its pts says, counted from the session's most punctual picture.

        Not from the first one: it may be late itself, and then all others would look early.
        """
        origin = min(at_s - picture.pts / self._rate for at_s, picture in self.arrivals)
        return [
            1000 * (at_s - picture.pts / self._rate - origin)
            for at_s, picture in self.arrivals
            if begin_s <= at_s < end_s
        ]

    def first(self, wanted: Callable[[Picture], bool]) -> float | None:
        """When the first such picture came."""
        return next((at_s for at_s, picture in self.arrivals if wanted(picture)), None)

    def dropped(self, begin_s: float, end_s: float) -> int:
        counts = [picture.dropped for picture in self.between(begin_s, end_s)]
        return counts[-1] - counts[0] if counts else 0


class Viewer:
    """One session, from its start to its cancellation."""

    def __init__(self, wire: Wire, tenant: str, picture: PictureMode, speech: Iterable[Message], wait_s: float) -> None:
        self.sight = Sight()
        self.spoke_s = 0.0
        self.interrupted_s = 0.0
        self._epoch = 0
        self._wire, self._tenant, self._speech, self._wait_s = wire, tenant, speech, wait_s
        self._outgoing: asyncio.Queue[Message] = asyncio.Queue()
        self._outgoing.put_nowait(wire.start(tenant, picture))

    async def watch(self) -> None:
        """Talks and watches until it is cancelled. Raises LipsyncError where the service ends the session."""
        await asyncio.sleep(self._wait_s)
        async with self._wire.connect(self._tenant, self._outgoing) as messages:
            talking: asyncio.Task[None] | None = None
            try:
                async for message in messages:
                    # The first one says that the session runs.
                    talking = talking or asyncio.create_task(self._talk())
                    if picture := self._wire.read(message):
                        self.sight.arrivals.append((time.perf_counter(), picture))
                        self._outgoing.put_nowait(self._wire.ack(picture.pts))
            finally:
                if talking is not None:
                    talking.cancel()
                    await asyncio.gather(talking, return_exceptions=True)
        raise LipsyncError("the service ended a session")

    async def _talk(self) -> None:
        self.spoke_s = time.perf_counter()
        for number, chunk in enumerate(self._speech):
            await asyncio.sleep(max(0.0, self.spoke_s + number * CHUNK_S - time.perf_counter()))
            self._outgoing.put_nowait(chunk)

    def interrupt(self) -> None:
        self._epoch = self.sight.arrivals[-1][1].epoch
        self.interrupted_s = time.perf_counter()
        self._outgoing.put_nowait(self._wire.interrupt())

    @property
    def seen_s(self) -> float:
        """When the last picture came, of those that have come."""
        return self.sight.arrivals[-1][0]

    @property
    def moved_s(self) -> float | None:
        """When the first moving picture came."""
        return self.sight.first(lambda picture: picture.moving)

    @property
    def answered_s(self) -> float | None:
        """When the first picture came that knows of the interruption."""
        return self.sight.first(lambda picture: self.interrupted_s > 0 and picture.epoch > self._epoch)

    @property
    def outdated(self) -> int:
        """Pictures that came after the interruption and did not know of it."""
        return sum(
            at_s > self.interrupted_s and picture.epoch == self._epoch and picture.moving
            for at_s, picture in self.sight.arrivals
        )


def speech(rate: int = RATE) -> list[bytes]:
    """A bundled sentence as PCM16 in chunks of 20 ms, with a noise that leaves no frame silent."""
    samples, own_rate = read_wav(HELLO.read_bytes())
    resampled = soxr.resample(samples, own_rate, rate)
    noise = np.random.default_rng(0).standard_normal(len(resampled)).astype(np.float32) * np.float32(_NOISE)
    data = (np.clip(resampled + noise, -1, 1) * 32767).astype("<i2").tobytes()
    size = round(rate * CHUNK_S) * 2
    return [data[begin : begin + size] for begin in range(0, len(data) - size + 1, size)]


async def take(wire: Wire, turn: Turn) -> Seen:
    """One turn: the viewers arrive, each sees a mouth move, they watch, they interrupt, they leave."""
    chunks, count = [wire.audio(chunk) for chunk in speech()], len(turn.tenants)
    viewers = []
    for number, tenant in enumerate(turn.tenants):
        # Each is somewhere else in the sentence.
        begin = number * len(chunks) // count
        said = itertools.cycle(chunks[begin:] + chunks[:begin])
        viewers.append(Viewer(wire, tenant, turn.picture, said, turn.settle_s * number / count))
    tasks = [asyncio.create_task(viewer.watch()) for viewer in viewers]
    try:
        await until(tasks, lambda: all(viewer.moved_s for viewer in viewers), _LONGEST_S, "no mouth moved")
        await pause(tasks, turn.settle_s)
        before, begin_s = cpu_s(turn.watched, "clients"), time.perf_counter()
        await pause(tasks, turn.seconds)
        await until(tasks, lambda: all(viewer.seen_s >= begin_s for viewer in viewers), _LONGEST_S, "no picture came")
        after, end_s = cpu_s(turn.watched, "clients"), time.perf_counter()
        for viewer in viewers:
            await pause(tasks, 0.01)
            viewer.interrupt()
        await until(
            tasks, lambda: all(viewer.answered_s for viewer in viewers), _LONGEST_S, "no interruption was answered"
        )
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return seen(viewers, begin_s, end_s, {name: after[name] - before[name] for name in after})


def seen(viewers: Sequence[Viewer], begin_s: float, end_s: float, cpu_s: Mapping[str, float]) -> Seen:
    """What viewers saw from `begin_s` to `end_s`."""
    pictures = [picture for viewer in viewers for picture in viewer.sight.between(begin_s, end_s)]
    return Seen(
        end_s - begin_s,
        cpu_s,
        [late for viewer in viewers for late in viewer.sight.lateness_ms(begin_s, end_s)],
        sum(picture.moving for picture in pictures),
        sum(viewer.sight.dropped(begin_s, end_s) for viewer in viewers),
        sum(picture.size for picture in pictures),
        [1000 * (at_s - viewer.spoke_s) for viewer in viewers if (at_s := viewer.moved_s)],
        [1000 * (at_s - viewer.interrupted_s) for viewer in viewers if (at_s := viewer.answered_s)],
        max(viewer.outdated for viewer in viewers),
    )


async def _serve(grpc_address: str, http_address: str) -> None:
    wires: dict[Way, Wire] = {"grpc": Grpc(grpc_address), "websocket": WebSocket(http_address)}
    announce("ready")
    while line := await asyncio.to_thread(sys.stdin.readline):
        turn = Turn(**json.loads(line))
        answer: dict[str, Any]
        try:
            answer = asdict(await take(wires[turn.way], turn))
        except LipsyncError as error:
            answer = {"failure": error.message}
        except grpc.RpcError as error:
            answer = {"failure": f"{error.code().name}: {error.details()}"}
        except (OSError, WebSocketException) as error:
            answer = {"failure": str(error)}
        announce(json.dumps(answer))


class Viewers:
    """The process, seen from the benchmark."""

    def __init__(self, child: Child) -> None:
        self._child = child

    def take(self, turn: Turn) -> Seen:
        """One turn from begin to end. Raises LipsyncError."""
        self._child.say(json.dumps(asdict(turn)))
        answer = json.loads(self._child.hear())
        if "failure" in answer:
            raise LipsyncError(f"a live session failed: {answer['failure']}")
        return Seen(**answer)


if __name__ == "__main__":
    asyncio.run(_serve(*sys.argv[1:]))
