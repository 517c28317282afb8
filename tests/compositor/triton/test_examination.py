"""Which models of a server in doubt are asked, and what is made of their answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from compositor.errors import DeadlinePassed, InferenceFailed, TenantBroken, TritonUnavailable
from compositor.residency.models import Facts, ModelReport, State
from compositor.triton.breaker import SILENT_S, Circuit
from compositor.triton.examination import MOST_MODELS, PERIOD_S, Examiner

from .fleet_fakes import FakeTriton, Servers
from .model_server import VirtualLoop

BOOM = InferenceFailed("CUDA failure 999")
Play = Callable[[Coroutine[Any, Any, None]], None]


class Files:
    """What the files say: all models are installed but those `removed`; `encoder` is an audio encoder."""

    def __init__(self) -> None:
        self.removed = set[str]()

    def facts(self, model: str) -> Facts:
        removed = model in self.removed
        return Facts(0, model != "encoder", None if removed else (1,), removed)


@pytest.fixture
def files() -> Files:
    return Files()


@pytest.fixture
def servers() -> Servers:
    servers = Servers("ab")
    servers.residency["a"].models.update("xyz")
    return servers


@pytest.fixture
def examiner(servers: Servers, files: Files) -> Examiner:
    return Examiner(servers.endpoints, 60, files.facts)


@pytest.fixture
def triton(servers: Servers) -> FakeTriton:
    return servers.triton["a"]


@pytest.fixture
def play() -> Iterator[Play]:
    loop = VirtualLoop()
    yield loop.run_until_complete
    loop.close()


async def test_others_than_the_one_that_failed_are_asked(
    servers: Servers, examiner: Examiner, triton: FakeTriton
) -> None:
    triton.broken = {"x": BOOM}
    servers["a"].breaker.failed("x")
    await examiner.examine(servers["a"])
    assert sorted(triton.warmed) == ["y", "z"]
    assert servers["a"].breaker.suspects == []


async def test_a_server_of_which_all_models_fail_is_avoided_until_one_works(
    servers: Servers, examiner: Examiner, triton: FakeTriton
) -> None:
    triton.broken = BOOM
    servers["a"].breaker.failed("x")
    await examiner.examine(servers["a"])
    assert not servers["a"].works
    await examiner.examine(servers["a"])
    assert not servers["a"].works
    triton.broken = {"x": BOOM, "y": BOOM}
    await examiner.examine(servers["a"])
    assert servers["a"].works
    assert servers.triton["b"].warmed == []


async def test_few_are_asked_and_not_only_those_that_failed(
    servers: Servers, examiner: Examiner, triton: FakeTriton
) -> None:
    servers.residency["a"].models.update("stuvw")
    servers.break_("a")
    triton.broken = {"x": BOOM, "y": BOOM}
    await examiner.examine(servers["a"])
    assert len(triton.warmed) == MOST_MODELS
    assert triton.warmed[:2] == ["x", "y"]
    assert servers["a"].works


async def test_what_works_elsewhere_is_loaded_to_be_tried_where_nothing_is(
    servers: Servers, examiner: Examiner, triton: FakeTriton
) -> None:
    servers.break_("a")
    servers.residency["a"].models.clear()
    triton.broken = BOOM
    await examiner.examine(servers["a"])
    assert (triton.loads, servers["a"].works) == (["x", "y"], False)
    triton.broken = None
    await examiner.examine(servers["a"])
    assert servers["a"].works


async def test_others_are_tried_in_turn_where_what_failed_does_not_load_any_more(
    servers: Servers, examiner: Examiner, triton: FakeTriton
) -> None:
    breaker = servers["a"].breaker
    for model in ("x", "y", "z", "u", "v"):
        breaker.failed(model)
        breaker.contradicted(model)
    servers.residency["a"].models.clear()
    servers.residency["a"].failures = dict.fromkeys(["x", "y", "z"], TenantBroken("failed to poll"))
    await examiner.examine(servers["a"])
    assert (triton.loads, servers["a"].works) == ([], False)
    await examiner.examine(servers["a"])
    assert (triton.loads, servers["a"].works) == (["u", "v"], True)


async def test_what_was_removed_speaks_against_no_server(
    servers: Servers, examiner: Examiner, triton: FakeTriton, files: Files
) -> None:
    servers.break_("a")
    servers.residency["a"].models.clear()
    files.removed.update("xy")
    await examiner.examine(servers["a"])
    assert (triton.loads, servers["a"].breaker.suspects, servers["a"].works) == ([], [], True)


async def test_encoders_and_what_is_in_use_are_asked_first(
    servers: Servers, examiner: Examiner, triton: FakeTriton
) -> None:
    uses_s = {"busy": (1000, 10.0), "now": (3, 30.0), "lately": (5, 20.0), "encoder": (7, 5.0)}
    servers.residency["a"].report = lambda: [  # type: ignore[method-assign]
        ModelReport(name, State.READY, "default", 0, 0, count, last_s, False)
        for name, (count, last_s) in uses_s.items()
    ]
    servers.residency["a"].models.update(uses_s)
    await examiner.examine(servers["a"])
    assert triton.warmed == ["encoder", "now", "lately"]


def test_a_server_that_hangs_is_left_with_the_requests_under_way(
    play: Play, servers: Servers, examiner: Examiner, triton: FakeTriton
) -> None:
    async def scene() -> None:
        triton.hung = set("xyz")
        await examiner.examine(servers["a"])
        assert servers["a"].breaker.circuit is Circuit.OPEN
        assert triton.let_go_of == 1
        assert servers["a"].falls == 1
        assert servers["a"].up
        triton.hung = set("xy")
        await examiner.examine(servers["a"])
        assert servers["a"].works

    play(scene())


def test_one_that_hangs_after_it_failed_is_left_with_the_requests_under_way(
    play: Play, servers: Servers, examiner: Examiner, triton: FakeTriton
) -> None:
    async def scene() -> None:
        servers.break_("a")
        triton.hung = set("xyz")
        await examiner.examine(servers["a"])
        assert (triton.let_go_of, servers["a"].works) == (1, False)

    play(scene())


def test_requests_wait_where_no_other_server_works(
    play: Play, servers: Servers, examiner: Examiner, triton: FakeTriton
) -> None:
    async def scene() -> None:
        triton.hung = set("xyz")
        servers["b"].failed(0)
        await examiner.examine(servers["a"])
        assert servers["a"].breaker.circuit is Circuit.OPEN
        assert triton.let_go_of == 0

    play(scene())


def test_a_server_that_answers_anything_does_not_hang(
    play: Play, servers: Servers, examiner: Examiner, triton: FakeTriton
) -> None:
    async def answer() -> None:
        await asyncio.sleep(SILENT_S / 2)
        triton.inferred += 1

    async def scene() -> None:
        triton.hung = set("xyz")
        await asyncio.gather(examiner.examine(servers["a"]), answer())
        assert servers["a"].works

    play(scene())


def test_what_is_slow_is_waited_for(play: Play, servers: Servers, examiner: Examiner, triton: FakeTriton) -> None:
    async def infer(model: str) -> None:
        await asyncio.sleep(25)

    async def scene() -> None:
        triton.slowest_s = 10.0
        triton.infer = infer  # type: ignore[method-assign]
        await examiner.examine(servers["a"])
        assert servers["a"].works

    play(scene())


@pytest.mark.parametrize("fault", [TritonUnavailable("gone"), DeadlinePassed("late")])
async def test_who_cannot_be_asked_is_not_judged(
    servers: Servers, examiner: Examiner, triton: FakeTriton, fault: TritonUnavailable
) -> None:
    async def warm(model: str) -> None:
        triton.inferred += 1  # another one's
        raise fault

    triton.warm = warm  # type: ignore[method-assign]
    await examiner.examine(servers["a"])
    assert servers["a"].works
    servers.break_("a")
    await examiner.examine(servers["a"])
    assert not servers["a"].works


def test_each_server_is_examined_when_it_is_due_and_alone(play: Play, servers: Servers, examiner: Examiner) -> None:
    begun: list[str] = []

    async def examine(endpoint: Any) -> None:
        begun.append(endpoint.name)
        await asyncio.sleep(3.2 * PERIOD_S)
        raise RuntimeError("a fault of our own")

    async def scene() -> None:
        examiner.examine = examine  # type: ignore[method-assign]
        watching = asyncio.create_task(examiner.watch())
        await asyncio.sleep(1.5 * PERIOD_S)
        assert begun == []
        servers.triton["a"].silence_s = servers.triton["b"].silence_s = SILENT_S
        servers["b"].failed(0)
        await asyncio.sleep(4 * PERIOD_S)
        assert begun == ["a"]
        await asyncio.sleep(2 * PERIOD_S)
        assert begun == ["a", "a"]
        watching.cancel()
        await asyncio.wait([watching])
        assert asyncio.all_tasks() == {asyncio.current_task()}

    play(scene())
