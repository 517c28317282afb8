"""A process of its own that keeps calls to the compositor in flight, one turn a line of stdin, and says what came.

`python -m lipsync.bench.caller grpc ADDRESS` calls a service; `... inside REPOSITORY TRITON` opens the compositor in
its own process and calls it there, without a wire.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

import grpc
import numpy as np

from compositor.audio import SAMPLE_RATE
from compositor.call import Call, Stages
from compositor.catalogue import Catalogue
from compositor.errors import LipsyncError
from compositor.pipeline import FEATURE_SHAPE, Compositor
from compositor.proto import lipsync_v1_pb2 as pb
from compositor.proto import lipsync_v1_pb2_grpc as pb_grpc
from compositor.rendering import Output
from compositor.settings import Settings
from compositor.threads import keep_libraries_single_threaded
from compositor.triton.fleet import open_fleet

from .service import following, pin, stop
from .turns import cpu_s, pause, until

Way: TypeAlias = Literal["composite", "generate"]
_LONGEST_S = 60.0


@dataclass(frozen=True)
class Turn:
    """What to call for how long: `calls` at once of `frames` each. watched: pids by name, whose CPU is read."""

    tenant: str
    way: Way
    calls: int
    frames: int
    seconds: float
    watched: Mapping[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Yield:
    """What a turn gave. cpu_s: CPU seconds of the watched processes and, as `caller`, of the calling one."""

    frames: int
    wall_s: float
    cpu_s: Mapping[str, float]

    @property
    def fps(self) -> float:
        return self.frames / self.wall_s

    def cpu_ms(self, name: str) -> float:
        """CPU milliseconds a frame of one of the watched. Raises LipsyncError where no frame came."""
        if not self.frames:
            raise LipsyncError(f"no frame came within {self.wall_s:.1f} s")
        return self.cpu_s[name] / self.frames * 1e3


class Side(Protocol):
    """Where calls go: each is one call of so many frames, and gives the number of frames as they come."""

    def composite(self, tenant: str, frames: int) -> AsyncGenerator[int, None]: ...

    def generate(self, tenant: str, frames: int) -> AsyncGenerator[int, None]: ...


class Remote:
    """A service behind gRPC. Answers to `Generate` are counted, but not parsed: the client's work is not the matter."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._composite = pb_grpc.LipsyncStub(channel).Composite  # type: ignore[no-untyped-call]
        self._generate = channel.unary_stream(
            "/lipsync.v1.Lipsync/Generate", request_serializer=pb.GenerateRequest.SerializeToString
        )

    async def composite(self, tenant: str, frames: int) -> AsyncGenerator[int, None]:
        request = pb.CompositeRequest(tenant=tenant, features=_features(frames).tobytes())
        yield len((await self._composite(request)).frames)

    async def generate(self, tenant: str, frames: int) -> AsyncGenerator[int, None]:
        pcm16 = (_speech(frames) * 32767).astype("<i2").tobytes()
        request = pb.GenerateRequest(tenant=tenant, speech=pb.Speech(data=pcm16, encoding=pb.Speech.PCM16))
        left = frames
        async for _ in self._generate(request):
            # The last message is the summary.
            if left:
                left -= 1
                yield 1


class Inside:
    """The compositor in this process."""

    def __init__(self, compositor: Compositor) -> None:
        self._compositor = compositor

    async def composite(self, tenant: str, frames: int) -> AsyncGenerator[int, None]:
        call = await self._call(tenant)
        numbers = [number % call.tenant.frames for number in range(frames)]
        yield len(await self._compositor.composite(call, numbers, _features(frames)))

    async def generate(self, tenant: str, frames: int) -> AsyncGenerator[int, None]:
        async with contextlib.aclosing(
            self._compositor.generate(await self._call(tenant), _speech(frames), SAMPLE_RATE)
        ) as made:
            async for _ in made:
                yield 1

    async def _call(self, tenant: str) -> Call:
        stages = Stages()
        return Call(await self._compositor.open(tenant, stages), Output(), stages)


# Drawn once: the caller in the compositor's process must add nothing to its CPU.
@functools.cache
def _features(frames: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.random.default_rng(0).standard_normal((frames, *FEATURE_SHAPE), np.float32)


@functools.cache
def _speech(frames: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """Noise as long as `frames` frames at 25 fps."""
    samples = np.random.default_rng(0).standard_normal(frames * SAMPLE_RATE // 25, np.float32)
    return np.asarray(0.1 * samples.clip(-3, 3), np.float32)


async def take(side: Side, turn: Turn) -> Yield:
    """One turn: the calls begin, and once each has given something the time runs, to the next frame at least."""
    came, over, nothing = [0] * turn.calls, asyncio.Event(), f"no frame came of {turn.tenant}"
    call = side.composite if turn.way == "composite" else side.generate

    async def caller(number: int) -> None:
        # Cancellation alone is not enough: before Python 3.12 asyncio.wait_for may swallow it.
        while not over.is_set():
            async with contextlib.aclosing(call(turn.tenant, turn.frames)) as made:
                async for frames in made:
                    came[number] += frames
                    if over.is_set():
                        break

    tasks = [asyncio.create_task(caller(number)) for number in range(turn.calls)]
    try:
        await until(tasks, lambda: all(came), _LONGEST_S, nothing)
        before, frames, begin = cpu_s(turn.watched, "caller"), sum(came), time.perf_counter()
        await pause(tasks, turn.seconds)
        await until(tasks, lambda: sum(came) > frames, _LONGEST_S, nothing)
        wall_s, after = time.perf_counter() - begin, cpu_s(turn.watched, "caller")
        return Yield(sum(came) - frames, wall_s, {name: after[name] - before[name] for name in after})
    finally:
        over.set()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def _remote(address: str) -> AsyncIterator[Side]:
    async with grpc.aio.insecure_channel(address, options=[("grpc.max_receive_message_length", -1)]) as channel:
        yield Remote(channel)


@contextlib.asynccontextmanager
async def _inside(repository: str, triton: str) -> AsyncIterator[Side]:
    # As `compositor.server.running` does, without its gRPC server.
    keep_libraries_single_threaded()
    settings = Settings(model_repository=Path(repository)).with_triton(triton)
    fleet = open_fleet(settings, Catalogue(settings.model_repository).facts)
    with ThreadPoolExecutor(1, thread_name_prefix="render") as pool:
        watching = asyncio.create_task(fleet.watch())
        try:
            yield Inside(Compositor(settings, fleet, pool))
        finally:
            watching.cancel()
            await asyncio.wait([watching])
            await fleet.close()


async def _serve(kind: str, *arguments: str) -> None:
    opened = _remote(*arguments) if kind == "grpc" else _inside(*arguments)
    async with opened as side:
        while line := await asyncio.to_thread(sys.stdin.readline):
            try:
                answer = asdict(await take(side, Turn(**json.loads(line))))
            except LipsyncError as error:
                answer = {"failure": error.message}
            except grpc.RpcError as error:
                answer = {"failure": str(error.details())}
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()


class Caller:
    """The process, seen from the benchmark."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.pid = process.pid

    def begin(self, turn: Turn) -> None:
        """Starts a turn; `end` waits for it."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(turn)).encode() + b"\n")
        self._process.stdin.flush()

    def end(self) -> Yield:
        """What the turn gave. Raises LipsyncError."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise LipsyncError("the process that calls the compositor ended; its words are above")
        answer = json.loads(line)
        if "failure" in answer:
            raise LipsyncError(f"a call to the compositor failed: {answer['failure']}")
        return Yield(**answer)

    def take(self, turn: Turn) -> Yield:
        """One turn from begin to end."""
        self.begin(turn)
        return self.end()


@contextlib.contextmanager
def calling(kind: Literal["grpc", "inside"], *arguments: str, cores: Iterable[int] | None = None) -> Iterator[Caller]:
    """A caller on these cores; leaving the block ends it."""
    process = subprocess.Popen(
        following("lipsync.bench.caller", kind, *arguments), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        if cores is not None:
            pin([process.pid], cores)
        yield Caller(process)
    finally:
        stop(process)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the benchmark's, which ends this process
    asyncio.run(_serve(*sys.argv[1:]))
