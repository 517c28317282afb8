"""Sessions while those under way are late: refused on every transport, in the statistics and the metrics, and no longer
than that lasts. Whether a tick is late the tests say, and time passes with the ticks, so nothing here depends on how
fast the machine is."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Hashable, Iterator
from typing import Any

import grpc
import httpx
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from compositor.proto import lipsync_v1_pb2_grpc as pb_grpc
from compositor.sessions.pressure import Pressure, Refusal
from compositor.settings import Settings

from .. import conftest
from ..conftest import ServiceThread, Stack
from .processes import RATE, SPEECH
from .test_speak import Talk, of_kind
from .waiting import until

pytestmark = pytest.mark.triton

TICK_S = 0.02
"""Two sessions have so much time between their ticks, on average."""


class Told(Pressure):
    """Takes from a test which ticks are late, and from nobody else. A machine that stands still shows none, and would
    not be overloaded any more: its time is that of the ticks."""

    late = False
    passed_s = 0.0

    def tick(self, now_s: float, *, late: bool) -> bool:
        self.passed_s += TICK_S
        return super().tick(self.passed_s, late=Told.late)

    def picture(self, now_s: float, tenant: Hashable, *, late: bool) -> None: ...

    def look(self, now_s: float) -> bool:
        return super().look(self.passed_s)

    def refusal(self, now_s: float, tenant: Hashable, sessions: int, *, speaking: bool) -> Refusal | None:
        return super().refusal(self.passed_s, tenant, sessions, speaking=speaking)

    def begun(self, now_s: float, sessions: int) -> None:
        super().begun(self.passed_s, sessions)


@pytest.fixture
def service(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServiceThread]:
    """One that refuses as by default, on the shared Triton."""
    monkeypatch.setattr("compositor.sessions.live.Pressure", Told)
    monkeypatch.setattr(Told, "late", False)
    values = stack.service.settings.model_dump()
    values["live"] = {}
    service = ServiceThread(Settings.model_validate(values))
    service.start()
    try:
        yield service
    finally:
        service.stop()


@pytest.fixture
def stub(service: ServiceThread) -> Iterator[pb_grpc.LipsyncStub]:
    yield from conftest.connect(service.address)


def stats(service: ServiceThread) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"http://{service.http_address}/stats", timeout=60).json()
    return found


def begun(stub: pb_grpc.LipsyncStub) -> Talk:
    """A session. Raises grpc.RpcError where it is refused."""
    talk = Talk(stub)
    talk.start("avatar", sample_rate=RATE)
    talk.until("frame")
    return talk


def refused(stub: pb_grpc.LipsyncStub) -> tuple[str, str, float]:
    """(status, words, when to come back in seconds) of a session that may not begin."""
    with pytest.raises(grpc.RpcError) as caught:
        begun(stub)
    error: Any = caught.value
    status, retry = rpc_status.from_call(error), error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in status.details)
    return error.code().name, error.details(), retry.retry_delay.ToTimedelta().total_seconds()


def refused_by_websocket(service: ServiceThread) -> tuple[int | None, dict[str, Any]]:
    """(close code, error) of the same."""
    with connect(f"ws://{service.http_address}/ws/avatar") as socket:
        socket.send(json.dumps({"type": "start"}))
        error: dict[str, Any] = json.loads(socket.recv())["error"]
        with pytest.raises(ConnectionClosed):
            socket.recv()
        return socket.close_code, error


def test_while_sessions_are_late_others_are_told_to_come_back(
    service: ServiceThread, stub: pb_grpc.LipsyncStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = begun(stub), begun(stub)
    monkeypatch.setattr(Told, "late", True)
    until(lambda: bool(first.frames(1)) and stats(service)["late_share"] == 1)

    code, words, retry_s = refused(stub)
    assert (code, words) == ("RESOURCE_EXHAUSTED", "busy: one more session would make others late")
    assert 3 <= retry_s <= 45
    close_code, error = refused_by_websocket(service)
    assert (close_code, error["reason"], error["message"]) == (4429, "OVERLOADED", words)
    assert error["retry_after_s"] >= 3
    assert stats(service)["refused"] == {"max_sessions": 0, "late": 2, "burst": 0}
    metrics = httpx.get(f"http://{service.http_address}/metrics", timeout=60).text
    assert 'lipsync_sessions_refused_total{reason="late"} 2.0' in metrics
    assert "lipsync_late_share 1.0" in metrics

    first.say(SPEECH)
    first.send(segment_end={})
    spoken = of_kind(first.until("playback_finished"), "audio")
    assert sum(len(piece.data) for piece in spoken) == len(SPEECH), "those under way go on"

    monkeypatch.setattr(Told, "late", False)
    until(lambda: bool(first.frames(1)) and stats(service)["late_share"] == 0)
    third: list[Talk] = []

    def let_in() -> bool:
        with contextlib.suppress(grpc.RpcError):
            third.append(begun(stub))
        return bool(third)

    until(let_in)
    for talk in (first, second, *third):
        talk.call.cancel()


def test_who_comes_when_all_others_have_left_is_let_in(
    service: ServiceThread, stub: pb_grpc.LipsyncStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Told, "late", True)
    for _ in range(2):
        talk = begun(stub)
        until(lambda talk=talk: bool(talk.frames(1)) and stats(service)["late_share"] == 1)  # type: ignore[misc]
        talk.call.cancel()
        until(lambda: not stats(service)["sessions"])
