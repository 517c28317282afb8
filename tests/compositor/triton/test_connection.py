"""Triton's errors become ours, and a Triton that hangs holds nobody; by a real wire."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path

import grpc
import pytest
from tritonclient.grpc import InferResult
from tritonclient.utils import InferenceServerException

from compositor.errors import (
    InferenceFailed,
    LipsyncError,
    Overloaded,
    SettingsInvalid,
    TenantBroken,
    TritonUnavailable,
)
from compositor.triton.channel import Client
from compositor.triton.connection import (
    Connection,
    GivenUp,
    KeyRefused,
    ModelNotLoaded,
    NoAnswer,
    RegionLost,
    blames_server,
    read_key,
    translate,
)

from .kserve import Kserve, Tensors


@pytest.mark.parametrize(
    ("status", "message", "kind"),
    [
        ("NOT_FOUND", "Request for unknown model: 'x' is not found", ModelNotLoaded),
        ("NOT_FOUND", "Request for unknown model: 'x' has no available versions", ModelNotLoaded),
        ("UNAVAILABLE", "Request for unknown model: 'x' version 1 is not at ready state", ModelNotLoaded),
        ("UNAVAILABLE", "Exceeds maximum queue size", Overloaded),
        ("UNAVAILABLE", "Request timeout expired", Overloaded),
        ("UNAVAILABLE", "failed to connect to all addresses", TritonUnavailable),
        ("UNAVAILABLE", "This protocol is restricted, expecting header 'x'", KeyRefused),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", NoAnswer),
        ("CANCELLED", "Locally cancelled by application!", NoAnswer),
        ("CANCELLED", "CANCELLED", TritonUnavailable),
        ("INTERNAL", "use the --shm-size flag to control the shared memory region size", InferenceFailed),
        ("INVALID_ARGUMENT", "Unable to find shared memory region: 'lipsync-1'", RegionLost),
        ("INTERNAL", "onnxruntime execute failure", InferenceFailed),
    ],
)
def test_the_table_of_tritons_errors(status: str, message: str, kind: type[LipsyncError]) -> None:
    assert type(translate(InferenceServerException(message, f"StatusCode.{status}"))) is kind


def test_a_key_is_read_without_its_line_end(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("0123abcd\n")
    assert read_key(tmp_path / "key") == "0123abcd"


@pytest.mark.parametrize(("content", "words"), [(None, "No such file"), (b" \n", "is empty"), (b"\xff", "plain text")])
def test_a_key_that_cannot_be_used_is_named(tmp_path: Path, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / "key").write_bytes(content)
    with pytest.raises(SettingsInvalid, match=f"triton.key_file: {tmp_path}/key .*{words}"):
        read_key(tmp_path / "key")


@pytest.fixture
async def connection(kserve: Kserve) -> AsyncIterator[Connection]:
    connection = Connection(kserve.endpoint)
    yield connection
    await connection.close()


def load(client: Client) -> Awaitable[None]:
    answer: Awaitable[None] = client.load_model("m", client_timeout=30)
    return answer


async def test_what_is_answered_is_counted(connection: Connection, kserve: Kserve) -> None:
    await connection.ask(load)
    assert await connection.ping(30)
    assert connection.answers == 2
    with pytest.raises(InferenceFailed):
        await connection.ask(lambda client: client.get_trace_settings())  # it has none
    assert connection.answers == 3
    kserve.go.clear()
    with pytest.raises(NoAnswer):
        await connection.ping(0.01)
    assert connection.answers == 3


@pytest.mark.parametrize(
    ("status", "blamed"),
    [
        ("INTERNAL", True),
        ("UNKNOWN", True),
        ("INVALID_ARGUMENT", False),
        ("UNIMPLEMENTED", False),
        ("FAILED_PRECONDITION", False),
        ("NOT_FOUND", False),
        ("UNAVAILABLE", False),
        ("DEADLINE_EXCEEDED", False),
    ],
)
def test_only_what_a_broken_server_says_speaks_against_it(status: str, blamed: bool) -> None:
    error = InferenceServerException("no", f"StatusCode.{status}")
    fault = translate(error)
    fault.__cause__ = error
    assert blames_server(fault) is blamed


@pytest.mark.parametrize(
    ("fault", "blamed"),
    [
        (InferenceFailed("mouths of the wrong shape"), True),
        (TenantBroken("NaN"), True),
        (Overloaded("full"), False),
        (TritonUnavailable("gone"), False),
        (NoAnswer("late"), False),
    ],
)
def test_so_do_answers_that_are_something_else(fault: LipsyncError, blamed: bool) -> None:
    assert blames_server(fault) is blamed


def test_a_model_that_does_not_load_speaks_against_no_server() -> None:
    fault = TenantBroken("'x' does not load into Triton")
    fault.__cause__ = InferenceFailed("Triton failed: failed to load")
    assert not blames_server(fault)


class Clock:
    """Stands for the module `time`."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("compositor.triton.connection.time", clock)
    return clock


async def begun(connection: Connection, kserve: Kserve, wait_s: float = 30) -> asyncio.Task[InferResult]:
    """An inference that has come to the server."""
    asking = asyncio.create_task(connection.infer("m", [], [], wait_s))
    assert await kserve.requests.get() == "infer"
    return asking


async def test_a_server_is_silent_from_when_it_owes_an_answer(
    connection: Connection, kserve: Kserve, clock: Clock
) -> None:
    clock.now_s += 60
    assert connection.silent_s() == 0
    kserve.go.clear()
    first = await begun(connection, kserve)
    clock.now_s += 3
    assert connection.silent_s() == 3
    second = await begun(connection, kserve)
    clock.now_s += 2
    assert connection.silent_s() == 5
    first.cancel()
    await asyncio.wait([first])
    clock.now_s += 1
    assert connection.silent_s() == 6
    kserve.go.set()
    await second
    assert connection.silent_s() == 0
    await connection.settle()
    assert (connection.inferred, connection.slowest_s) == (2, 3)


async def test_who_got_no_answer_is_owed_one_until_another_comes(
    connection: Connection, kserve: Kserve, clock: Clock
) -> None:
    kserve.deaf.add("infer")
    with pytest.raises(NoAnswer):
        await connection.infer("m", [], [], 0.05)
    assert await kserve.requests.get() == "infer"
    clock.now_s += 7
    assert connection.silent_s() == 7
    assert await connection.ping(30)
    assert connection.silent_s() == 7
    kserve.deaf.clear()
    await connection.infer("m", [], [], 30)
    assert connection.silent_s() == 0


async def test_an_error_is_an_answer(connection: Connection, kserve: Kserve, clock: Clock) -> None:
    def fail(request: object) -> Tensors:
        raise RuntimeError("CUDA failure 999")

    kserve.answer = fail
    with pytest.raises(InferenceFailed) as caught:
        await connection.infer("m", [], [], 30)
    assert blames_server(caught.value)
    assert (connection.inferred, connection.silent_s()) == (1, 0)


@pytest.mark.parametrize(
    ("status", "message", "kind"),
    [
        ("NOT_FOUND", "Request for unknown model: 'x' is not found", ModelNotLoaded),
        ("UNAVAILABLE", "Exceeds maximum queue size", Overloaded),
        ("UNAVAILABLE", "Request timeout expired", Overloaded),
        ("UNAVAILABLE", "This protocol is restricted, expecting header 'x'", KeyRefused),
        ("INVALID_ARGUMENT", "Unable to find shared memory region: 'lipsync-1'", RegionLost),
    ],
)
async def test_a_refusal_is_no_inference(
    connection: Connection, kserve: Kserve, clock: Clock, status: str, message: str, kind: type[LipsyncError]
) -> None:
    kserve.go.clear()
    with pytest.raises(NoAnswer):
        await connection.infer("m", [], [], 0.05)
    kserve.go.set()
    kserve.refusal = (grpc.StatusCode[status], message)
    clock.now_s += 7
    with pytest.raises(kind):
        await connection.infer("m", [], [], 30)
    assert (connection.inferred, connection.slowest_s, connection.silent_s()) == (0, 0, 7)
    kserve.refusal = None
    await connection.infer("m", [], [], 30)
    assert (connection.inferred, connection.silent_s()) == (1, 0)


async def test_what_is_not_measured_is_an_answer_and_no_measure(
    connection: Connection, kserve: Kserve, clock: Clock
) -> None:
    kserve.go.clear()
    building = asyncio.create_task(connection.infer("m", [], [], 600, measured=False))
    assert await kserve.requests.get() == "infer"
    clock.now_s += 300
    assert connection.silent_s() == 300
    kserve.go.set()
    await building
    assert (connection.inferred, connection.slowest_s, connection.silent_s()) == (1, 0, 0)


async def test_the_slowest_answer_is_forgotten_by_and_by(connection: Connection, kserve: Kserve, clock: Clock) -> None:
    kserve.go.clear()
    slow = await begun(connection, kserve)
    clock.now_s += 20
    kserve.go.set()
    await slow
    assert connection.slowest_s == 20
    for _ in range(150):
        await connection.infer("m", [], [], 30)
    assert 0 < connection.slowest_s < 1


async def test_requests_that_are_let_go_of_fail_at_once_and_others_go_on(
    connection: Connection, kserve: Kserve, clock: Clock
) -> None:
    kserve.go.clear()
    waiting = [await begun(connection, kserve) for _ in range(8)]
    clock.now_s += 5
    connection.let_go()
    assert {type(fault) for fault in await asyncio.gather(*waiting, return_exceptions=True)} == {GivenUp}
    assert connection.silent_s() == 5
    kserve.go.set()
    await connection.infer("m", [], [], 30)
    assert connection.silent_s() == 0


async def test_requests_to_a_server_that_is_given_up_fail_at_once(connection: Connection, kserve: Kserve) -> None:
    kserve.go.clear()
    waiting = [asyncio.create_task(connection.ask(load)) for _ in range(8)]
    for _ in waiting:
        await kserve.requests.get()
    connection.give_up()
    assert {type(fault) for fault in await asyncio.gather(*waiting, return_exceptions=True)} == {GivenUp}
    with pytest.raises(GivenUp):
        await connection.ask(load)
    with pytest.raises(NoAnswer):
        await connection.ping(0.05)
    kserve.go.set()
    assert await connection.ping(30)
    await connection.ask(load)


async def test_who_goes_away_is_not_kept_by_giving_up(connection: Connection, kserve: Kserve) -> None:
    kserve.go.clear()
    going, gone = (asyncio.create_task(connection.ask(load)) for _ in range(2))
    for _ in range(2):
        await kserve.requests.get()
    gone.cancel()
    connection.give_up()
    results = await asyncio.gather(going, gone, return_exceptions=True)
    assert [type(result) for result in results] == [GivenUp, asyncio.CancelledError]


async def test_closing_cancels_what_is_under_way(kserve: Kserve) -> None:
    connection = Connection(kserve.endpoint)
    kserve.go.clear()
    asking = asyncio.create_task(connection.ask(load))
    await kserve.requests.get()
    await connection.close()
    with pytest.raises(asyncio.CancelledError):
        await asking


async def test_triton_goes_on_with_an_inference_that_nobody_waits_for_any_more(
    connection: Connection, kserve: Kserve
) -> None:
    kserve.go.clear()
    gone = await begun(connection, kserve)
    gone.cancel()
    with pytest.raises(NoAnswer):
        await connection.infer("m", [], [], 0.05)
    assert await kserve.requests.get() == "infer"
    assert min(kserve.given_s) > 30
    connection.give_up()
    kserve.go.set()
    for _ in range(2):
        assert await kserve.ends.get() == ("infer", "to be answered")
    assert await connection.ping(60)


async def test_late_answers_show_that_it_works(connection: Connection, kserve: Kserve, clock: Clock) -> None:
    kserve.go.clear()
    with pytest.raises(NoAnswer):
        await connection.infer("m", [], [], 0.05)
    assert await kserve.requests.get() == "infer"
    clock.now_s += 7
    assert (connection.answers, connection.inferred, connection.silent_s()) == (0, 0, 7)
    kserve.go.set()
    await connection.settle()
    assert (connection.answers, connection.inferred, connection.silent_s()) == (1, 1, 0)
    assert connection.slowest_s == 0


async def test_late_refusals_do_not(connection: Connection, kserve: Kserve, clock: Clock) -> None:
    kserve.go.clear()
    kserve.refusal = (grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size")
    with pytest.raises(NoAnswer):
        await connection.infer("m", [], [], 0.05)
    clock.now_s += 7
    kserve.go.set()
    await connection.settle()
    assert (connection.answers, connection.inferred, connection.silent_s()) == (0, 0, 7)


async def test_it_owes_no_more_than_so_many(kserve: Kserve) -> None:
    connection = Connection(kserve.endpoint, most_owed=3)
    kserve.go.clear()
    for number in range(3):
        (await begun(connection, kserve)).cancel()
        if number == 1:
            connection.let_go()  # what is owed on the channel before counts, too
    with pytest.raises(Overloaded, match="owes too many answers"):
        await connection.infer("m", [], [], 30)
    kserve.go.set()
    await connection.settle()
    await connection.infer("m", [], [], 30)
    await connection.close()


@pytest.mark.parametrize("abandoned", [False, True])
async def test_a_farewell_waits_a_moment_for_what_is_owed(
    connection: Connection, kserve: Kserve, monkeypatch: pytest.MonkeyPatch, abandoned: bool
) -> None:
    kserve.go.clear()
    (await begun(connection, kserve)).cancel()
    if abandoned:
        connection.let_go()
    monkeypatch.setattr("compositor.triton.connection.FAREWELL_S", 0.01)
    await connection.settle()
    monkeypatch.setattr("compositor.triton.connection.FAREWELL_S", 60)
    farewell = asyncio.create_task(connection.settle())
    await asyncio.wait((farewell,), timeout=0.05)
    assert not farewell.done()
    kserve.go.set()
    await farewell
    assert await kserve.ends.get() == ("infer", "to be answered")
    assert kserve.loaded["m"] == 1


async def test_and_not_where_triton_hangs(
    connection: Connection, kserve: Kserve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compositor.triton.connection.FAREWELL_S", 600)
    kserve.go.clear()
    (await begun(connection, kserve)).cancel()
    connection.give_up()
    await asyncio.wait_for(connection.settle(), 60)
    await connection.close()
    assert await kserve.ends.get() == ("infer", "cancelled")


async def test_nobody_there_is_unavailable() -> None:
    connection = Connection("127.0.0.1:1")
    with pytest.raises(TritonUnavailable):
        await connection.infer("m", [], [], 30)
    assert connection.silent_s() == 0  # that is no silence
    with pytest.raises(TritonUnavailable):
        await connection.ping(30)
    await connection.close()
