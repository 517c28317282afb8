"""A process of its own that holds a crowd: more viewers than the service sustains, who come one after another, speak at
once and without a pause, and come again when they are told to. One crowd a line of stdin, what it met a line back.

`python -m lipsync.bench.live_crowd GRPC_ADDRESS`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from compositor.errors import LipsyncError

from .child import Child, announce
from .live_viewers import Viewer, speech
from .live_wires import Grpc, Message

_FPS = 25
_LEAST_RETRY_S = 0.5
_SPEAKING_S = 1.5
"""After so long a session that keeps up has begun to move: the lookahead, and the margins."""


@dataclass(frozen=True)
class Crowd:
    """A viewer for each of `tenants`, who come over `arrive_s`. They are watched for `seconds`, `settle_s` later."""

    tenants: Sequence[str]
    arrive_s: float
    settle_s: float
    seconds: float


@dataclass(frozen=True)
class Met:
    """What a crowd met. refused: how often somebody was. admitted: sessions that were there for all of the watched
    time; the rest is theirs, and of this time: how late their pictures came, which part of the moving ones that were
    due did not come (all, where nobody was there), and how many never moved."""

    refused: int
    admitted: int
    lateness_ms: Sequence[float]
    missing: float
    never_moved: int


class Visitor:
    """Somebody who wants a session, and asks again until there is one."""

    def __init__(self, wire: Grpc, tenant: str, speech: Sequence[Message], wait_s: float) -> None:
        self._wire, self._tenant, self._speech, self._wait_s = wire, tenant, speech, wait_s
        self.refused = 0
        self.viewer: Viewer | None = None
        self._leaving = False

    async def visit(self) -> None:
        """Watches until it is cancelled. Raises what ends a session otherwise."""
        wait_s = self._wait_s
        while not self._leaving:
            self.viewer = Viewer(self._wire, self._tenant, "frames", itertools.cycle(self._speech), wait_s)
            try:
                await self.viewer.watch()
            except grpc.RpcError as error:
                if error.code() != grpc.StatusCode.RESOURCE_EXHAUSTED or self.viewer.spoke_s:
                    raise
                self.refused += 1
                wait_s = retry_of(error)

    def leave(self, visit: asyncio.Task[None]) -> None:
        """Ends the visit, even where a channel that is being closed swallows the cancellation."""
        self._leaving = True
        visit.cancel()

    @property
    def begun_s(self) -> float:
        """When its session began; 0 where it has none."""
        return self.viewer.spoke_s if self.viewer is not None else 0.0


def retry_of(error: grpc.RpcError) -> float:
    """When a refused call may be made again, as the service says (google.rpc.RetryInfo), seconds from now."""
    status, hint = rpc_status.from_call(error), error_details_pb2.RetryInfo()
    hints = [hint.retry_delay.ToTimedelta().total_seconds() for each in status.details if each.Unpack(hint)]
    return max(_LEAST_RETRY_S, *hints) if hints else _LEAST_RETRY_S


async def meet(wire: Grpc, crowd: Crowd) -> Met:
    """One crowd, from its first viewer to the end of the watched time."""
    chunks, count = [wire.audio(chunk) for chunk in speech()], len(crowd.tenants)
    visitors = []
    for number, tenant in enumerate(crowd.tenants):
        begin = number * len(chunks) // count
        said = chunks[begin:] + chunks[:begin]
        visitors.append(Visitor(wire, tenant, said, crowd.arrive_s * number / count))
    tasks = [asyncio.create_task(visitor.visit()) for visitor in visitors]
    try:
        await _wait(tasks, crowd.arrive_s + crowd.settle_s)
        begin_s = time.perf_counter()
        await _wait(tasks, crowd.seconds)
        end_s = time.perf_counter()
    finally:
        for visitor, task in zip(visitors, tasks, strict=True):
            visitor.leave(task)
        await asyncio.gather(*tasks, return_exceptions=True)
    return met(visitors, begin_s, end_s)


def met(visitors: Sequence[Visitor], begin_s: float, end_s: float) -> Met:
    """What visitors met from `begin_s` to `end_s`."""
    admitted = [
        visitor.viewer
        for visitor in visitors
        if visitor.viewer is not None and 0 < visitor.begun_s <= begin_s - _SPEAKING_S
    ]
    moving = sum(picture.moving for viewer in admitted for picture in viewer.sight.between(begin_s, end_s))
    due = _FPS * (end_s - begin_s) * len(admitted)
    return Met(
        sum(visitor.refused for visitor in visitors),
        len(admitted),
        [late for viewer in admitted if viewer.sight.arrivals for late in viewer.sight.lateness_ms(begin_s, end_s)],
        max(0.0, 1 - moving / due) if due else 1.0,
        sum(viewer.moved_s is None for viewer in admitted),
    )


async def _wait(tasks: list[asyncio.Task[None]], seconds: float) -> None:
    """Lets the viewers come and watch; raises what one of them raises."""
    done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    for task in done:
        await task


async def _serve(address: str) -> None:
    announce("ready")
    while line := await asyncio.to_thread(sys.stdin.readline):
        answer: dict[str, Any]
        try:
            answer = asdict(await meet(Grpc(address), Crowd(**json.loads(line))))
        except LipsyncError as error:
            answer = {"failure": error.message}
        except grpc.RpcError as error:
            answer = {"failure": f"{error.code().name}: {error.details()}"}
        announce(json.dumps(answer))


def gather(child: Child, crowd: Crowd) -> Met:
    """One crowd from begin to end, in that process. Raises LipsyncError."""
    child.say(json.dumps(asdict(crowd)))
    answer = json.loads(child.hear())
    if "failure" in answer:
        raise LipsyncError(f"a session of a crowd failed: {answer['failure']}")
    return Met(**answer)


if __name__ == "__main__":
    asyncio.run(_serve(*sys.argv[1:]))
