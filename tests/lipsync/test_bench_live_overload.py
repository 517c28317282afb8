"""Crowds: who was let in and what they saw, and visitors who come again when they are told to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from lipsync.bench import live_crowd, live_overload
from lipsync.bench.live_crowd import Crowd, Met, Visitor, meet, met, retry_of
from lipsync.bench.live_overload import WITH, WITHOUT, Overload
from lipsync.bench.live_viewers import RATE, Viewer
from lipsync.bench.live_wires import Grpc, Picture

FRAME = RATE // 25


class Refusal(grpc.RpcError):  # type: ignore[misc]
    """A call that ends with RESOURCE_EXHAUSTED, and says when to come back, if it does."""

    def __init__(self, retry_s: float | None, code: grpc.StatusCode = grpc.StatusCode.RESOURCE_EXHAUSTED) -> None:
        status = status_pb2.Status(code=code_pb2.RESOURCE_EXHAUSTED, message="busy")
        if retry_s is not None:
            detail, delay = any_pb2.Any(), duration_pb2.Duration(nanos=round(1e9 * retry_s))
            detail.Pack(error_details_pb2.RetryInfo(retry_delay=delay))
            status.details.append(detail)
        self._code, self._metadata = code, rpc_status.to_status(status).trailing_metadata

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return "busy"

    def trailing_metadata(self) -> Any:
        return self._metadata


class Door(Grpc):
    """A service that refuses the first ones, and shows one moving picture to each that it lets in.

    full: so many have seen it, and have spoken.
    """

    def __init__(self, *refusals: Exception, room: int = 1) -> None:
        super().__init__("")
        self._refusals, self._room = list(refusals), room
        self.full = asyncio.Event()

    @asynccontextmanager
    async def connect(self, tenant: str, outgoing: Any) -> AsyncIterator[AsyncIterator[Any]]:
        async def messages() -> AsyncIterator[Any]:
            if self._refusals:
                raise self._refusals.pop(0)
            yield "started"
            yield Picture(0, 0, True, 0, 100)
            for _ in ("start", "ack", "speech"):
                await outgoing.get()
            self._room -= 1
            if not self._room:
                self.full.set()
            await outgoing.join()

        yield messages()

    def read(self, message: Any) -> Picture | None:
        return message if isinstance(message, Picture) else None


@pytest.mark.parametrize(("told_s", "wait_s"), [(0.75, 0.75), (0.1, 0.5), (None, 0.5)])
def test_who_is_refused_comes_again_when_told_to(told_s: float | None, wait_s: float) -> None:
    assert retry_of(Refusal(told_s)) == wait_s


async def test_a_crowd_comes_in_after_all(monkeypatch: pytest.MonkeyPatch) -> None:
    door = Door(Refusal(None), Refusal(None), room=3)

    async def wait(tasks: list[asyncio.Task[None]], seconds: float) -> None:
        await door.full.wait()

    monkeypatch.setattr(live_crowd, "_wait", wait)
    monkeypatch.setattr(live_crowd, "_LEAST_RETRY_S", 0.0)
    monkeypatch.setattr(live_crowd, "_SPEAKING_S", 0.0)
    found = await meet(door, Crowd(["anna"] * 3, 0, 0, 0))
    assert (found.refused, found.admitted, found.never_moved) == (2, 3, 0)
    assert found.missing == 1, "no picture came while they were watched"


async def test_what_ends_a_session_is_raised() -> None:
    with pytest.raises(Refusal):
        await meet(Door(Refusal(None, grpc.StatusCode.INTERNAL)), Crowd(["anna"], 0, 60, 60))


def visitor(begun_s: float, arrivals: list[tuple[float, Picture]]) -> Visitor:
    found = Visitor(Grpc(""), "anna", [], 0)
    if begun_s:
        found.viewer = Viewer(Grpc(""), "anna", "frames", [], 0)
        found.viewer.spoke_s = begun_s
        found.viewer.sight.arrivals += arrivals
    return found


def pictures(moving: int, still: int) -> list[tuple[float, Picture]]:
    """In the second after 10 s, each 10 ms later than the first."""
    kinds = [True] * moving + [False] * still
    return [
        (10 + number / 25 + 0.01 * bool(number), Picture(number * FRAME, 0, kind, 0, 100))
        for number, kind in enumerate(kinds)
    ]


def test_only_those_count_that_were_there_in_time() -> None:
    crowd = [visitor(1, pictures(20, 5)), visitor(2, pictures(0, 25)), visitor(9, pictures(25, 0)), visitor(0, [])]
    crowd[3].refused = 4
    found = met(crowd, 10, 11)
    assert (found.refused, found.admitted, found.never_moved) == (4, 2, 1)
    assert found.missing == pytest.approx(0.6)
    assert max(found.lateness_ms) == pytest.approx(10)
    assert met([visitor(0, [])], 10, 11) == Met(0, 0, [], 1.0, 0), "nobody saw anything"


def test_the_report_sets_both_side_by_side() -> None:
    overload = Overload(4, {WITHOUT: Met(0, 12, [90.0] * 10, 0.9, 2), WITH: Met(30, 4, [], 0.02, 0)})
    figures = {(figure.case, figure.quantity): figure.spread.median for figure in live_overload.figures_of(overload)}
    without, measured = (f"12 viewers for 4 sessions, {way}" for way in (WITHOUT, WITH))
    assert figures[without, "let in"] == 12
    assert figures[measured, "let in"] == 4
    assert figures[without, "p99"] == 90
    assert (measured, "p99") not in figures, "nothing came"
    assert figures[without, "of speech that did not come in time"] == pytest.approx(90)


@pytest.mark.parametrize(
    ("admitted", "missing", "reached"),
    [
        (4, 0.02, [True, True]),
        (3, 0.02, [True, True]),
        (2, 0.02, [True, False]),
        (4, 0.06, [False, True]),
        (0, 1.0, [False, False]),
    ],
)
def test_targets_want_that_enough_are_let_in_and_that_those_see_a_mouth_move(
    admitted: int, missing: float, reached: list[bool]
) -> None:
    overload = Overload(4, {WITHOUT: Met(0, 12, [], 0.9, 2), WITH: Met(30, admitted, [], missing, 0)})
    targets = list(live_overload.targets_of(overload))
    assert [target.met for target in targets] == reached
    assert all("12 viewers for 4 sessions, as by default" in target.what for target in targets)
    assert targets[1].limit == pytest.approx(2.8)
