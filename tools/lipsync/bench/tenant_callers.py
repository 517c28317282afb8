"""Several callers of many tenants, a process of its own: each line of stdin is a turn, its answer says how each call
went.

`python -m lipsync.bench.tenant_callers ADDRESS`. A call is one batch of frames, by `Composite` or `Generate`, so that
it asks for its tenant's model once.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from random import Random
from typing import Protocol

import grpc
import numpy as np

from compositor.audio import SAMPLE_RATE
from compositor.pipeline import FEATURE_SHAPE
from compositor.proto import lipsync_v1_pb2 as pb
from compositor.proto import lipsync_v1_pb2_grpc as pb_grpc

from .child import Child, announce
from .watching import zipf_weights

FRAMES = 4
"""Of a call: one request to Triton."""
_PERIOD = SAMPLE_RATE // 25


@dataclass(frozen=True)
class Turn:
    """What to call until `seconds` have passed or `calls` were made: what is under way then goes on to its end."""

    tenants: Sequence[str]
    """The most wanted first."""
    callers: int
    seconds: float
    calls: int
    zipf: float | None = None
    """Exponent of the tenants' popularity; None: one after the other, all alike, on from `first`."""
    first: int = 0
    pause_s: float = 0.0
    """Mean time (exponentially distributed) between a caller's answer and its next call."""
    timeout_s: float = 30.0
    seed: int = 0


@dataclass(frozen=True)
class Answers:
    """How calls went, each in seconds: those whose model was loaded, and those that waited for it to be, as the service
    says; `waits_s`: how long the latter waited for that. failures: how often, by status and words."""

    hits_s: list[float] = field(default_factory=list)
    misses_s: list[float] = field(default_factory=list)
    waits_s: list[float] = field(default_factory=list)
    failures: dict[str, int] = field(default_factory=dict)
    tenants: int = 0
    """Different ones that were called."""
    wall_s: float = 0.0

    @property
    def calls(self) -> int:
        return len(self.hits_s) + len(self.misses_s) + self.failed

    @property
    def failed(self) -> int:
        return sum(self.failures.values())

    @property
    def hit_rate(self) -> float:
        """Of the calls that went well."""
        return len(self.hits_s) / max(1, len(self.hits_s) + len(self.misses_s))


class Side(Protocol):
    """Who is called: each call gives the seconds that it waited for a model's load, 0.0 where that was loaded."""

    async def composite(self, tenant: str, timeout_s: float) -> float: ...

    async def generate(self, tenant: str, timeout_s: float) -> float: ...


class Remote:
    """A service behind gRPC."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = pb_grpc.LipsyncStub(channel)  # type: ignore[no-untyped-call]
        random = np.random.default_rng(0)
        self._features = random.standard_normal((FRAMES, *FEATURE_SHAPE), np.float32).tobytes()
        noise = random.uniform(-0.1, 0.1, FRAMES * _PERIOD)
        self._speech = pb.Speech(data=(noise * 32767).astype("<i2").tobytes(), encoding=pb.Speech.PCM16)

    async def composite(self, tenant: str, timeout_s: float) -> float:
        request = pb.CompositeRequest(tenant=tenant, features=self._features)
        answer: pb.CompositeResponse = await self._stub.Composite(request, timeout=timeout_s)
        _check(len(answer.frames))
        return answer.stages.load_s

    async def generate(self, tenant: str, timeout_s: float) -> float:
        came, load_s = 0, 0.0
        request = pb.GenerateRequest(tenant=tenant, speech=self._speech)
        async for answer in self._stub.Generate(request, timeout=timeout_s):
            if answer.WhichOneof("event") == "summary":
                load_s = answer.summary.stages.load_s
            else:
                came += 1
        _check(came)
        return load_s


def _check(came: int) -> None:
    if came != FRAMES:
        raise ValueError(f"{came} frames came of {FRAMES}")


async def take(side: Side, turn: Turn) -> Answers:
    """One turn."""
    answers, called, wanted = Answers(), set[str](), itertools.islice(_wanted(turn), turn.calls)
    begin = time.perf_counter()

    async def caller(number: int) -> None:
        random = Random(turn.seed * 1000 + number)
        await asyncio.sleep(random.random() * turn.pause_s)
        while time.perf_counter() - begin < turn.seconds and (next_one := next(wanted, None)):
            position, tenant = next_one
            called.add(tenant)
            way = side.generate if position % 2 else side.composite
            asked = time.perf_counter()
            try:
                load_s = await way(tenant, turn.timeout_s)
            except (grpc.RpcError, ValueError) as error:
                words = words_of(error).replace(tenant, "...")
                answers.failures[words] = answers.failures.get(words, 0) + 1
            else:
                (answers.misses_s if load_s else answers.hits_s).append(time.perf_counter() - asked)
                answers.waits_s.extend([load_s] if load_s else [])
            if turn.pause_s:
                await asyncio.sleep(random.expovariate(1 / turn.pause_s))

    await asyncio.gather(*(caller(number) for number in range(turn.callers)))
    return Answers(**{**vars(answers), "tenants": len(called), "wall_s": time.perf_counter() - begin})


def words_of(error: grpc.RpcError | ValueError) -> str:
    """What went wrong with a call, for people."""
    return f"{error.code().name}: {error.details()}" if isinstance(error, grpc.RpcError) else str(error)


def _wanted(turn: Turn) -> Iterator[tuple[int, str]]:
    """Which tenants are called, with the number of the call."""
    weights = None if turn.zipf is None else zipf_weights(len(turn.tenants), turn.zipf)
    bounds, random = list(itertools.accumulate(weights or ())), Random(turn.seed)
    for position in itertools.count(turn.first):
        in_turn = turn.tenants[position % len(turn.tenants)]
        yield position, random.choices(turn.tenants, cum_weights=bounds)[0] if bounds else in_turn


class Callers:
    """The process, seen from the benchmark."""

    def __init__(self, child: Child) -> None:
        self._child = child

    def take(self, turn: Turn) -> Answers:
        """One turn, from begin to end. Raises LipsyncError where the process ends."""
        self._child.say(json.dumps(asdict(turn)))
        return Answers(**json.loads(self._child.hear()))


async def _serve(address: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        side = Remote(channel)
        announce("ready")
        while line := await asyncio.to_thread(sys.stdin.readline):
            announce(json.dumps(asdict(await take(side, Turn(**json.loads(line))))))


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1]))
