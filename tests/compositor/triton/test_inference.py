"""Slots, deadlines and strange answers; the wire itself is tested against the real Triton in tests/integration."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from tritonclient.grpc.service_pb2 import ModelInferResponse, SystemSharedMemoryStatusResponse
from tritonclient.utils import InferenceServerException

from compositor.deadline import Deadline
from compositor.errors import DeadlinePassed, InferenceFailed, LipsyncError, Overloaded, TenantBroken, TritonUnavailable
from compositor.settings import TritonSettings
from compositor.triton.inference import Triton
from compositor.triton.shared_memory import Region
from compositor.triton.slots import MOST_REGIONS

InferOutputTensor = ModelInferResponse.InferOutputTensor


class Answer:
    """What Triton answered."""

    def __init__(self, **tensors: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> None:
        self._tensors = tensors

    def as_numpy(self, name: str) -> object:
        return self._tensors.get(name)

    def get_output(self, name: str) -> object:
        """What is said of a tensor, which may itself be in shared memory."""
        values = self._tensors.get(name)
        if values is None:
            return None
        datatype = {"uint8": "UINT8", "float32": "FP32"}[values.dtype.name]
        return InferOutputTensor(name=name, datatype=datatype, shape=values.shape)


class Wire:
    """Stands for the connection to Triton: each infer gives the next answer, when it is let go."""

    def __init__(self, *answers: Answer | InferenceServerException) -> None:
        self._answers = iter(answers)
        self.regions: list[str] = []
        self.known = set[str]()
        self.in_use = set[str]()
        self.asked = asyncio.Queue[None]()
        self.go = asyncio.Event()
        self.go.set()

    async def register_system_shared_memory(self, name: str, *_: object, **__: object) -> None:
        self.regions.append(name)
        self.known.add(name)

    async def get_system_shared_memory_status(self, **_: object) -> SystemSharedMemoryStatusResponse:
        answer = SystemSharedMemoryStatusResponse()
        for name in self.known:
            answer.regions[name].name = name
        return answer

    async def unregister_system_shared_memory(self, name: str, **_: object) -> None:
        if name in self.in_use:
            raise InferenceServerException("it is in use", "StatusCode.INTERNAL")
        self.known.remove(name)

    async def infer(self, *_: object, **__: object) -> Answer:
        self.asked.put_nowait(None)
        await self.go.wait()
        answer = next(self._answers)
        if isinstance(answer, InferenceServerException):
            raise answer
        return answer

    async def close(self) -> None:
        """There is no connection."""


MOUTH = np.zeros((1, 3, 328, 328), np.uint8)
GOOD = Answer(finite=np.array([[True]]), mouth=MOUTH)
AUDIO = np.zeros((1, 32, 16, 16), np.float32)
FRAMES = np.zeros(1, np.int32)


def triton_with(monkeypatch: pytest.MonkeyPatch, wire: Wire, **settings: object) -> Triton:
    monkeypatch.setattr("tritonclient.grpc.aio.InferenceServerClient", lambda *_, **__: wire)
    return Triton(TritonSettings.model_validate({"slots": 2, "slot_frames": 1, **settings}), "triton:8001")


async def test_a_slot_serves_again_after_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = triton_with(monkeypatch, Wire(*[GOOD] * 20))
    for _ in range(20):
        mouths = await triton.mouths("t", FRAMES, AUDIO, Deadline.after(60))
        assert mouths.crops.shape == (1, 3, 328, 328)
        mouths.release()


async def test_all_slots_taken_is_overload(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = triton_with(monkeypatch, Wire(*[GOOD] * 3))
    held = [await triton.mouths("t", FRAMES, AUDIO, Deadline.after(60)) for _ in range(2)]
    with pytest.raises((Overloaded, DeadlinePassed)):
        await triton.mouths("t", FRAMES, AUDIO, Deadline.after(0.05))
    held[0].release()
    await triton.mouths("t", FRAMES, AUDIO, Deadline.after(60))


async def test_a_caller_that_goes_away_frees_its_slot_only_after_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = Wire(*[GOOD] * 4)
    triton = triton_with(monkeypatch, wire)
    wire.go.clear()
    for _ in range(2):
        with pytest.raises(DeadlinePassed):
            await triton.mouths("t", FRAMES, AUDIO, Deadline.after(0.02))
    with pytest.raises((Overloaded, DeadlinePassed)):
        await triton.mouths("t", FRAMES, AUDIO, Deadline.after(0.02))
    wire.go.set()
    for _ in range(2):
        (await triton.mouths("t", FRAMES, AUDIO, Deadline.after(60))).release()


async def test_so_does_one_that_waits_for_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = Wire(*[Answer(audio_features=np.zeros((1, 512), np.float32))] * 3)
    triton = triton_with(monkeypatch, wire)
    windows = np.zeros((1, 1, 80, 16), np.float32)
    wire.go.clear()
    for _ in range(2):
        with pytest.raises(DeadlinePassed):
            await triton.embeddings("e", windows, Deadline.after(0.02))
    with pytest.raises((Overloaded, DeadlinePassed)):
        await triton.embeddings("e", windows, Deadline.after(0.02))
    wire.go.set()
    await triton.embeddings("e", windows, Deadline.after(60))


@pytest.mark.parametrize("tensors", [False, True])
async def test_a_caller_that_is_gone_takes_its_turn_from_others_only_so_long(
    monkeypatch: pytest.MonkeyPatch, tensors: bool
) -> None:
    """However much later its deadline is."""
    wire = Wire()
    triton = triton_with(monkeypatch, wire, slots=1, timeout_s=0.05)
    wire.go.clear()
    windows, deadline = np.zeros((1, 1, 80, 16), np.float32), Deadline.after(600)

    async def ask() -> None:
        if tensors:
            await triton.embeddings("e", windows, deadline)
        else:
            await triton.mouths("t", FRAMES, AUDIO, deadline)

    for _ in range(5):
        asking = asyncio.create_task(ask())
        await wire.asked.get()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking


LOST = InferenceServerException("Unable to find shared memory region: 'x'", "StatusCode.INVALID_ARGUMENT")
GONE = InferenceServerException("failed to connect", "StatusCode.UNAVAILABLE")
LATE = InferenceServerException("Request timeout expired", "StatusCode.UNAVAILABLE")
SILENT = InferenceServerException("Deadline Exceeded", "StatusCode.DEADLINE_EXCEEDED")


@pytest.mark.parametrize("answer", [LOST, GONE])
async def test_a_restarted_triton_maps_one_new_region_however_many_ask(
    monkeypatch: pytest.MonkeyPatch, answer: InferenceServerException
) -> None:
    wire = Wire(*[GOOD] * 4, *[answer] * 4, *[GOOD] * 4)
    triton = triton_with(monkeypatch, wire, slots=4)

    async def ask() -> None:
        (await triton.mouths("t", FRAMES, AUDIO, Deadline.after(60))).release()

    for _ in range(4):
        await ask()
    results = await asyncio.gather(*(ask() for _ in range(4)), return_exceptions=True)
    assert all(isinstance(result, TritonUnavailable) for result in results)
    await asyncio.gather(*(ask() for _ in range(4)))
    assert len(wire.regions) == 2


async def test_whoever_waits_for_a_slot_goes_on_when_triton_is_restarted(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = Wire(GONE, GONE, *[GOOD] * 6)
    triton = triton_with(monkeypatch, wire)
    wire.go.clear()

    async def ask() -> bool:
        try:
            (await triton.mouths("t", FRAMES, AUDIO, Deadline.after(60))).release()
        except TritonUnavailable:
            return False
        return True

    asking = [asyncio.create_task(ask()) for _ in range(8)]
    await asyncio.sleep(0)
    wire.go.set()
    assert sorted(await asyncio.gather(*asking)) == [False] * 2 + [True] * 6


async def test_requests_that_triton_refused_cost_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = Wire(*[LATE] * 40, GOOD)
    triton = triton_with(monkeypatch, wire)
    for _ in range(40):
        with pytest.raises(Overloaded):
            await triton.mouths("t", FRAMES, AUDIO, Deadline.after(60))
    await triton.mouths("t", FRAMES, AUDIO, Deadline.after(60))
    assert len(wire.regions) == 1


async def test_answers_that_never_come_cost_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = Wire(*[SILENT] * 40, *[GOOD] * 3, GONE, GOOD)
    wire.in_use = wire.known  # Triton still works on them
    triton = triton_with(monkeypatch, wire)
    for _ in range(40):
        with pytest.raises(DeadlinePassed):
            await triton.mouths("t", FRAMES, AUDIO, Deadline.after(60))
    assert len(wire.regions) == MOST_REGIONS
    for _ in range(3):
        (await triton.mouths("t", FRAMES, AUDIO, Deadline.after(60))).release()
    with pytest.raises(TritonUnavailable):
        await triton.mouths("t", FRAMES, AUDIO, Deadline.after(60))
    await triton.mouths("t", FRAMES, AUDIO, Deadline.after(60))
    assert len(wire.regions) == MOST_REGIONS + 1


async def test_regions_of_answers_that_never_came_end_once_triton_is_done_with_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wire = Wire(*[SILENT] * 40, GOOD)
    triton = triton_with(monkeypatch, wire)
    for _ in range(40):
        with pytest.raises(DeadlinePassed):
            await triton.mouths("t", FRAMES, AUDIO, Deadline.after(60))
        assert wire.known == set(wire.regions[-1:])
    (await triton.mouths("t", FRAMES, AUDIO, Deadline.after(60))).release()
    assert len(wire.regions) == 21


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (Answer(finite=np.array([[False]])), TenantBroken),
        (Answer(finite=np.array([[True], [True]])), InferenceFailed),
        (Answer(), InferenceFailed),
        (Answer(finite=np.array([[True]])), InferenceFailed),
        (Answer(finite=np.array([[True]]), mouth=MOUTH[:, :, :320, :320]), InferenceFailed),
        (Answer(finite=np.array([[True]]), mouth=MOUTH.astype(np.float32)), InferenceFailed),
        (InferenceServerException("boom", "StatusCode.INTERNAL"), InferenceFailed),
    ],
)
async def test_a_bad_answer_gives_its_slot_back(
    monkeypatch: pytest.MonkeyPatch, answer: Answer | InferenceServerException, kind: type[LipsyncError]
) -> None:
    triton = triton_with(monkeypatch, Wire(*[answer] * 6, GOOD))
    for _ in range(6):
        with pytest.raises(kind):
            await triton.mouths("t", FRAMES, AUDIO, Deadline.after(60))
    assert (triton.inferred, triton.inferences) == (6, 0)
    await triton.mouths("t", FRAMES, AUDIO, Deadline.after(60))
    assert (triton.inferred, triton.inferences) == (7, 1)


async def test_each_kind_of_inference_that_works_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings, output = np.zeros((1, 512), np.float32), np.zeros((1, 3, 320, 320), np.float32)
    wire = Wire(*[Answer(audio_features=embeddings)] * 2, *[Answer(output=output), Answer(output=output + np.nan)])
    triton = triton_with(monkeypatch, wire)
    for count in (1, 2):
        await triton.embeddings("e", np.zeros((1, 1, 80, 16), np.float32), Deadline.after(60))
        assert triton.inferences == count
    visual = np.zeros((1, 6, 320, 320), np.float32)
    await triton.predictions("t.raw", visual, AUDIO, Deadline.after(60))
    with pytest.raises(TenantBroken):
        await triton.predictions("t.raw", visual, AUDIO, Deadline.after(60))
    assert triton.inferences == 3


async def test_an_answer_that_never_came_keeps_its_slot_out_of_use(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = Wire(SILENT, *[GOOD] * 3)
    triton = triton_with(monkeypatch, wire, slots=4)
    with pytest.raises(DeadlinePassed):
        await triton.mouths("t", FRAMES, AUDIO, Deadline.after(60))
    held = [await triton.mouths("t", FRAMES, AUDIO, Deadline.after(60)) for _ in range(3)]
    addresses = {mouths.crops.__array_interface__["data"][0] for mouths in held}
    assert len(addresses) == 3
    assert len(wire.regions) == 1


@pytest.mark.parametrize(
    "embeddings",
    [
        np.zeros((2, 512), np.float32),
        np.zeros((1, 500), np.float32),
        np.full((1, 512), np.nan, np.float32),
        np.zeros((1, 512), np.uint8),
    ],
)
async def test_strange_embeddings_are_refused(
    monkeypatch: pytest.MonkeyPatch, embeddings: np.ndarray[tuple[int, ...], np.dtype[np.generic]]
) -> None:
    triton = triton_with(monkeypatch, Wire(Answer(audio_features=embeddings)))
    with pytest.raises(InferenceFailed):
        await triton.embeddings("e", np.zeros((1, 1, 80, 16), np.float32), Deadline.after(60))


async def test_its_regions_end_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = Wire(GOOD)
    triton = triton_with(monkeypatch, wire)
    (await triton.mouths("t", FRAMES, AUDIO, Deadline.after(60))).release()
    assert wire.known == set(wire.regions)
    await triton.close()
    assert not wire.known


async def test_they_end_after_what_triton_still_writes_into_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class Busy(Wire):
        async def infer(self, *_: object, **__: object) -> Answer:
            self.in_use = set(self.known)
            answer = await super().infer()
            self.in_use.clear()
            return answer

    wire = Busy(GOOD)
    triton = triton_with(monkeypatch, wire)
    wire.go.clear()
    asking = asyncio.create_task(triton.mouths("t", FRAMES, AUDIO, Deadline.after(60)))
    await wire.asked.get()
    asking.cancel()
    closing = asyncio.create_task(triton.close())
    await asyncio.wait((closing,), timeout=0.05)
    wire.go.set()
    await closing
    assert not wire.known


async def test_regions_that_the_dead_left_are_ended_and_those_of_others_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """One is still in use; then the next one who comes ends it."""
    living, dead = Region(1, 4096), Region(1, 4096)
    strangers = {"lipsync-region-of-somebody", "triton_shm"}
    try:
        dead.let_go()
        gone = "lipsync-region-0123456789abcdef"
        wire = Wire(GOOD, GOOD)
        wire.known = {living.name, dead.name, gone, *strangers}
        wire.in_use = {gone}
        for stays in ({gone}, set[str]()):
            triton = triton_with(monkeypatch, wire)
            (await triton.mouths("t", FRAMES, AUDIO, Deadline.after(60))).release()
            await triton.close()
            assert wire.known == {living.name, *strangers, *stays}
            wire.in_use = set()
    finally:
        living.let_go()
        for region in (living, dead):
            region.forget_name()
