"""Who is asked when a request failed, and who is at fault."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from tritonclient.utils import InferenceServerException

from compositor.errors import DeadlinePassed, InferenceFailed, LipsyncError, Overloaded, TenantBroken, TritonUnavailable
from compositor.triton.connection import NoAnswer, translate
from compositor.triton.endpoint import Endpoint
from compositor.triton.opinions import BROKEN_S, Opinions
from compositor.triton.placement import Placement, ranked

from .fleet_fakes import Servers

HERE, WITNESS, THIRD = ranked("t", "abc")
BOOM = InferenceFailed("CUDA failure 999")


def said(status: str) -> LipsyncError:
    """What a connection makes of this status of an inference."""
    error = InferenceServerException("no", f"StatusCode.{status}")
    fault = translate(error)
    fault.__cause__ = error
    return fault


class Scene:
    """Three servers, all up, and a tenant at home on the first."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.servers = Servers()
        self.placement = Placement(self.servers.endpoints, 4)
        self.left: list[tuple[str, str]] = []
        self.opinions = Opinions(
            self.placement, lambda endpoint, model: self.left.append((endpoint.name, model)), lambda: self.now_s
        )
        self.asked: list[str] = []
        self.faults: dict[str, BaseException] = {}
        self.infers = True
        """Whether the requests ask for an inference."""

    async def begin(self) -> None:
        await self.servers.check()
        self.placement.find("t", "t", [])
        self.servers.residency[HERE].models.add("t")
        for triton in self.servers.triton.values():
            triton.inferences += 1

    @property
    def here(self) -> Endpoint:
        return self.servers[HERE]

    async def ask(self, endpoint: Endpoint) -> str:
        self.asked.append(endpoint.name)
        if fault := self.faults.get(endpoint.name):
            raise fault
        self.servers.triton[endpoint.name].inferences += self.infers
        return endpoint.name

    async def second(self, fault: LipsyncError = BOOM, model: str = "t") -> str:
        if isinstance(fault, DeadlinePassed):
            self.opinions.gave_up(self.here, "t", model)
            raise fault
        if not self.opinions.doubts(fault, self.here, model):
            raise fault
        return await self.opinions.second(fault, self.here, "t", model, self.ask)


@pytest.fixture
async def scene() -> Scene:
    scene = Scene()
    await scene.begin()
    return scene


async def test_what_works_elsewhere_speaks_against_the_server_and_the_tenant_goes_on_there(scene: Scene) -> None:
    assert await scene.second() == WITNESS
    assert scene.here.breaker.known_to_work("t")
    assert scene.placement.at("t") is scene.servers[WITNESS]
    assert scene.left == []


async def test_what_fails_elsewhere_too_is_broken_itself(scene: Scene) -> None:
    scene.faults[WITNESS] = TenantBroken("NaN")
    with pytest.raises(InferenceFailed, match="CUDA failure 999"):
        await scene.second()
    assert scene.here.breaker.suspects == []
    assert scene.placement.at("t") is scene.here
    assert scene.left == [(WITNESS, "t")]
    scene.now_s += BROKEN_S - 1
    with pytest.raises(InferenceFailed):
        await scene.second()
    assert scene.asked == [WITNESS]
    assert scene.here.breaker.suspects == []
    scene.now_s += 2
    scene.faults.clear()
    assert await scene.second() == WITNESS


async def test_a_witness_where_nothing_ever_worked_convicts_nobody(scene: Scene) -> None:
    scene.faults[WITNESS] = BOOM
    scene.servers[WITNESS].breaker.proved = lambda: False  # type: ignore[method-assign]
    for _ in range(2):
        with pytest.raises(InferenceFailed):
            await scene.second()
    assert scene.asked == [WITNESS] * 2
    assert [scene.servers[name].breaker.suspects for name in (HERE, WITNESS)] == [["t"], ["t"]]


async def test_what_is_convicted_still_speaks_against_a_server_where_nothing_worked_since(scene: Scene) -> None:
    scene.faults[WITNESS] = BOOM
    for _ in range(2):
        with pytest.raises(InferenceFailed):
            await scene.second()
    assert scene.here.breaker.suspects == []
    scene.here.breaker.proved = lambda: False  # type: ignore[method-assign]
    with pytest.raises(InferenceFailed):
        await scene.second()
    assert scene.asked == [WITNESS]
    assert scene.here.breaker.suspects == ["t"]


@pytest.mark.parametrize("broken", [HERE, WITNESS])
async def test_a_server_that_is_found_to_be_broken_has_convicted_nobody(scene: Scene, broken: str) -> None:
    scene.faults[WITNESS] = BOOM
    for _ in range(2):
        with pytest.raises(InferenceFailed):
            await scene.second()
    assert scene.asked == [WITNESS]
    scene.faults.clear()
    scene.servers.break_(broken)
    assert await scene.second() == (THIRD if broken == WITNESS else WITNESS)


async def test_a_copy_that_was_there_before_is_not_left_behind(scene: Scene) -> None:
    scene.servers.residency[THIRD].models.add("t")
    scene.faults[THIRD] = TenantBroken("NaN")
    with pytest.raises(InferenceFailed):
        await scene.second()
    assert (scene.asked, scene.left) == ([THIRD], [])


async def test_a_copy_is_left_behind_where_the_caller_went_away_meanwhile(scene: Scene) -> None:
    scene.faults[WITNESS] = asyncio.CancelledError()
    with pytest.raises(asyncio.CancelledError):
        await scene.second()
    assert scene.left == [(WITNESS, "t")]
    assert scene.here.breaker.suspects == ["t"]


async def test_other_files_may_work(scene: Scene) -> None:
    scene.faults[WITNESS] = BOOM
    with pytest.raises(InferenceFailed):
        await scene.second()
    scene.opinions.forget("t")
    scene.faults.clear()
    assert await scene.second() == WITNESS


@pytest.mark.parametrize("fault", [Overloaded("full"), TritonUnavailable("gone"), NoAnswer("late"), said("NOT_FOUND")])
async def test_a_witness_who_does_not_come_to_it_convicts_nobody(scene: Scene, fault: LipsyncError) -> None:
    scene.faults[WITNESS] = fault
    for _ in range(2):
        with pytest.raises(InferenceFailed, match="CUDA failure 999"):
            await scene.second()
    assert scene.asked == [WITNESS] * 2
    assert scene.here.breaker.suspects == ["t"]
    assert not scene.here.breaker.known_to_work("t")


@pytest.mark.parametrize("status", ["INVALID_ARGUMENT", "UNIMPLEMENTED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION"])
async def test_a_request_that_does_not_suit_the_model_is_made_once(scene: Scene, status: str) -> None:
    fault = said(status)
    with pytest.raises(InferenceFailed):
        await scene.second(fault)
    assert (scene.asked, scene.here.breaker.suspects) == ([], [])


@pytest.mark.parametrize("fault", [said("INTERNAL"), said("UNKNOWN"), InferenceFailed("shape"), TenantBroken("NaN")])
async def test_what_a_broken_server_may_say_is_asked_elsewhere(scene: Scene, fault: LipsyncError) -> None:
    assert await scene.second(fault) == WITNESS


async def test_an_encoder_that_fails_moves_its_tenant(scene: Scene) -> None:
    assert await scene.second(model="encoder") == WITNESS
    assert scene.placement.at("t") is scene.servers[WITNESS]
    assert scene.here.breaker.known_to_work("encoder")


async def break_(scene: Scene) -> None:
    scene.servers.break_(WITNESS)


async def fall(scene: Scene) -> None:
    scene.servers[WITNESS].failed(0)


async def fill(scene: Scene) -> None:
    scene.servers.residency[WITNESS].roomy = False


@pytest.mark.parametrize("prevent", [break_, fall, fill])
async def test_nobody_is_asked_who_is_down_or_broken_or_has_no_room(
    scene: Scene, prevent: Callable[[Scene], Awaitable[None]]
) -> None:
    await prevent(scene)
    assert await scene.second() == THIRD
    scene.servers.residency[THIRD].models.add("t")
    scene.servers.residency[THIRD].roomy = False
    assert await scene.second() == THIRD  # what has the model needs no room
    scene.servers[THIRD].failed(0)
    with pytest.raises(InferenceFailed):
        await scene.second()


async def test_a_tenant_that_was_moved_meanwhile_is_left_where_it_is(scene: Scene) -> None:
    scene.placement.settle("t", scene.servers[THIRD])
    assert await scene.second() == WITNESS
    assert scene.placement.at("t") is scene.servers[THIRD]


async def give_up(scene: Scene, silence_s: float) -> None:
    scene.servers.triton[HERE].silence_s = silence_s
    with pytest.raises(NoAnswer):
        await scene.second(NoAnswer("late"))


async def test_a_deadline_that_passes_at_a_server_that_answers_others_says_nothing(scene: Scene) -> None:
    await give_up(scene, silence_s=3.9)
    assert (scene.opinions.unanswered, scene.asked, scene.here.breaker.suspects) == ({}, [], [])


async def test_a_server_is_silent_by_the_measure_of_its_slowest_answers(scene: Scene) -> None:
    scene.servers.triton[HERE].slowest_s = 20.0
    await give_up(scene, silence_s=59)
    assert not scene.opinions.unanswered
    await give_up(scene, silence_s=60)
    assert scene.opinions.unanswered


async def test_the_request_after_one_that_was_never_answered_goes_elsewhere(scene: Scene) -> None:
    await give_up(scene, silence_s=5)
    assert await scene.opinions.first("t", "t", scene.ask) == (WITNESS,)
    assert scene.here.breaker.known_to_work("t")
    assert scene.placement.at("t") is scene.servers[WITNESS]
    assert not scene.opinions.unanswered


async def test_a_request_that_asks_for_no_inference_moves_its_tenant_and_says_nothing(scene: Scene) -> None:
    await give_up(scene, silence_s=5)
    scene.infers = False
    assert await scene.opinions.first("t", "t", scene.ask) == (WITNESS,)
    assert scene.placement.at("t") is scene.servers[WITNESS]
    assert not scene.here.breaker.known_to_work("t")


async def test_where_that_is_of_no_use_it_is_made_as_any_other(scene: Scene) -> None:
    await give_up(scene, silence_s=5)
    scene.faults[WITNESS] = NoAnswer("late")
    scene.servers.triton[WITNESS].silence_s = 5
    assert await scene.opinions.first("t", "t", scene.ask) is None
    assert scene.placement.at("t") is scene.here
    await give_up(scene, silence_s=9)  # the model hangs, wherever it is
    assert not scene.opinions.unanswered


async def test_a_server_that_answers_again_is_not_left(scene: Scene) -> None:
    await give_up(scene, silence_s=5)
    scene.servers.triton[HERE].silence_s = 0
    assert await scene.opinions.first("t", "t", scene.ask) is None
    assert scene.asked == []


async def test_many_at_once_are_all_answered(scene: Scene) -> None:
    assert await asyncio.gather(*(scene.second() for _ in range(8))) == [WITNESS] * 8
    assert scene.here.works
