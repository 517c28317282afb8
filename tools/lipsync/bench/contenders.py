"""Who makes the same frames in the part `baselines`, each called in one way: the predecessor, the plain loop, and ours.

What a client of each does happens here, in the measuring process; the services are processes of their own.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import grpc
import numpy as np
from numpy.typing import NDArray

from compositor.errors import InferenceFailed
from compositor.proto import lipsync_v1_pb2 as pb
from compositor.proto import lipsync_v1_pb2_grpc as pb_grpc

from . import predecessor
from .child import Child
from .plain_loop import DONE, FIRST, Order


@dataclass(frozen=True)
class Task:
    """The batch that everyone makes: backgrounds 0 to n of `tenant`, its audio as speech (WAV) and as the features
    float32 (n, 32, 16, 16) of that speech, and the model's pictures float32 (n, 6, 320, 320)."""

    tenant: str
    wav: bytes
    features: NDArray[np.float32]
    visual: NDArray[np.float32]

    @property
    def frames(self) -> int:
        return len(self.features)


class Contender(Protocol):
    """Makes the batch of a task. pid: the process that holds the tenant."""

    pid: int
    asks_triton: bool

    def run(self, clients: int) -> Sequence[float]:
        """Makes the batch for each of `clients` at once; how many wall seconds after its call each saw a frame."""

    def jpegs(self, scratch: Path) -> Sequence[bytes]:
        """The frames of one batch, to look at. scratch: an existing folder."""


class PlainLoop:
    """The loop, which knows no clients: what they want is made batch after batch."""

    asks_triton = False

    def __init__(self, child: Child, task: Task, batch: int) -> None:
        self._child, self._frames, self._batch = child, task.frames, batch
        self.pid = child.pid

    def run(self, clients: int) -> Sequence[float]:
        called_s = time.perf_counter()
        return [self._make(Order(self._frames, self._batch)) - called_s for _ in range(clients)]

    def jpegs(self, scratch: Path) -> Sequence[bytes]:
        self._make(Order(self._frames, self._batch, str(scratch)))
        return [(scratch / f"{number}.jpg").read_bytes() for number in range(self._frames)]

    def _make(self, order: Order) -> float:
        """Makes one batch; when its first frame was there."""
        self._child.say(order.as_line())
        first_s = self._expect(FIRST)
        self._expect(DONE)
        return first_s

    def _expect(self, line: str) -> float:
        if (heard := self._child.hear()) != line:
            raise InferenceFailed(f"the plain loop said {heard!r} instead of {line!r}")
        return time.perf_counter()


class Remote:
    """A service that is called by gRPC, from a thread and over a connection for each client."""

    asks_triton = True

    def __init__(self, address: str, pid: int, task: Task) -> None:
        self.pid = pid
        self._address, self._task = address, task
        self._channels: list[grpc.Channel] = []
        self._pool = ThreadPoolExecutor()

    def run(self, clients: int) -> Sequence[float]:
        while len(self._channels) < clients:
            options = [*predecessor.CHANNEL, ("grpc.use_local_subchannel_pool", 1)]
            self._channels.append(grpc.insecure_channel(self._address, options=options))
        return list(self._pool.map(self._called, self._channels[:clients]))

    def jpegs(self, scratch: Path) -> Sequence[bytes]:
        with grpc.insecure_channel(self._address, options=predecessor.CHANNEL) as channel:
            return list(self._taken(channel))

    def frames(self, channel: grpc.Channel) -> Iterator[bytes]:
        """One batch, its frames as they come."""
        raise NotImplementedError

    def close(self) -> None:
        """Ends the connections."""
        self._pool.shutdown()
        for channel in self._channels:
            channel.close()

    def _called(self, channel: grpc.Channel) -> float:
        """Makes one batch; how many seconds its first frame took."""
        begin = time.perf_counter()
        moments = [time.perf_counter() - begin for _ in self._taken(channel)]
        if len(moments) != self._task.frames:
            raise InferenceFailed(f"{self._address} sent {len(moments)} frames instead of {self._task.frames}")
        return moments[0]

    def _taken(self, channel: grpc.Channel) -> Iterator[bytes]:
        try:
            yield from self.frames(channel)
        except grpc.RpcError as error:
            raise InferenceFailed(f"{self._address}: {error.code().name}: {error.details()}") from error


class Predecessor(Remote):
    """The predecessor's client: its request, the model's pictures in it, lies ready, serialized."""

    def __init__(self, address: str, pid: int, task: Task) -> None:
        super().__init__(address, pid, task)
        self._request: bytes = predecessor.Request(
            model_id=task.tenant,
            visual_frames=task.visual.tobytes(),
            audio_features=task.features.tobytes(),
            batch_size=task.frames,
        ).SerializeToString()

    def frames(self, channel: grpc.Channel) -> Iterator[bytes]:
        call = channel.unary_unary(
            f"/{predecessor.SERVICE}/{predecessor.METHOD}", response_deserializer=predecessor.Response.FromString
        )
        answer: Any = call(self._request)
        if not answer.success:
            raise InferenceFailed(f"the predecessor's service failed: {answer.error}")
        yield from answer.composited_frames


class Composite(Remote):
    """Our `Composite`: features in, one list of frames out."""

    def frames(self, channel: grpc.Channel) -> Iterator[bytes]:
        stub = pb_grpc.LipsyncStub(channel)  # type: ignore[no-untyped-call]
        request = pb.CompositeRequest(tenant=self._task.tenant, start=0, features=self._task.features.tobytes())
        yield from (frame.data for frame in stub.Composite(request).frames)


class Generate(Remote):
    """Our `Generate`: speech in, a stream of frames out. It makes the features itself, which the others are given."""

    def frames(self, channel: grpc.Channel) -> Iterator[bytes]:
        stub = pb_grpc.LipsyncStub(channel)  # type: ignore[no-untyped-call]
        speech = pb.Speech(data=self._task.wav, encoding=pb.Speech.WAV)
        for answer in stub.Generate(pb.GenerateRequest(tenant=self._task.tenant, speech=speech)):
            if answer.WhichOneof("event") == "frame":
                yield answer.frame.data


def fastest_batch(child: Child, task: Task, candidates: Sequence[int]) -> int:
    """The batch size at which the plain loop is fastest, as its author would find out: the better of two runs each."""

    def wall_s(batch: int) -> float:
        loop, moments = PlainLoop(child, task, batch), [time.perf_counter()]
        for _ in range(2):
            loop.run(1)
            moments.append(time.perf_counter())
        return min(end - begin for begin, end in itertools.pairwise(moments))

    return min(candidates, key=wall_s)
