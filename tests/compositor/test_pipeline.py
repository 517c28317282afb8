"""The pipeline with a Triton that can be told to misbehave; the true one is met in tests/integration."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from compositor.call import Call, Frame, Stages
from compositor.catalogue import Catalogue
from compositor.deadline import Deadline
from compositor.errors import (
    DeadlinePassed,
    EncoderMissing,
    InvalidInput,
    TenantBroken,
    TenantNotFound,
    TenantReplaced,
    TritonUnavailable,
)
from compositor.manifest import MANIFEST
from compositor.metrics import STAGES
from compositor.pipeline import BATCHES_AHEAD, Compositor
from compositor.rendering import Output
from compositor.residency.host_lock import HostLock
from compositor.residency.models import Device, Unobserved, Use
from compositor.residency.residency import Residency
from compositor.settings import Settings
from compositor.tenant import Tenant
from compositor.triton.connection import ModelNotLoaded
from compositor.triton.endpoint import Endpoint
from compositor.triton.fleet import Fleet
from compositor.triton.inference import Mouths

SPEECH = np.random.default_rng(0).normal(0, 0.1, 16_000 * 3).astype(np.float32)


class FakeTriton:
    """Answers with the tenant's own crops. `before` runs ahead of each answer and may wait or raise."""

    def __init__(self, repository: Path) -> None:
        self.endpoint = "triton:8001"
        self.answers = 0
        self.inferences = 0
        self.slowest_s = 0.0
        self.loaded: dict[str, str] = {}
        self.tenants = {name: Tenant(repository, name) for name in ("plain", "sent")}
        self.loads: list[str] = []
        self.unloads: list[str] = []
        self.batches: list[int] = []
        self.held = 0
        self.most_held = 0
        self.before: Callable[[], Awaitable[None]] = self._nothing
        self.load_failures: dict[str, Exception] = {}

    async def _nothing(self) -> None:
        await asyncio.sleep(0)

    def silent_s(self) -> float:
        return 0.0

    async def load(self, model: str, gpu: int | None = None) -> None:
        self.loads.append(model)
        if model in self.load_failures:
            raise self.load_failures[model]
        self.loaded[model] = "READY"

    async def unload(self, model: str) -> None:
        self.unloads.append(model)
        self.loaded.pop(model, None)

    async def warm(self, model: str) -> None:
        """Nobody asks when it was used last."""

    async def states(self) -> dict[str, str]:
        return self.loaded

    async def uses(self) -> dict[str, Use]:
        return {model: Use(0, 0.0) for model in self.loaded}

    async def placed(self, model: str) -> int | None:
        return None

    async def ping(self, wait_s: float) -> bool:
        return True

    async def close(self) -> None:
        """There is no connection."""

    async def embeddings(self, encoder: str, windows: NDArray[np.float32], deadline: Deadline) -> NDArray[np.float32]:
        return np.zeros((len(windows), 512), np.float32)

    async def mouths(
        self, model: str, subject: NDArray[np.generic], audio: NDArray[np.float32], deadline: Deadline
    ) -> Mouths:
        self.held += 1
        self.most_held = max(self.most_held, self.held)
        try:
            await self.before()
        except BaseException:
            self.held -= 1
            raise
        self.batches.append(len(audio))
        tenant = self.tenants[model]
        crops = np.stack([tenant.crop_planes(int(n)) for n in subject]) if subject.dtype == np.int32 else subject.copy()
        return Mouths(np.asarray(crops, np.uint8), self._release)

    def _release(self) -> None:
        self.held -= 1


@pytest.fixture
def triton(repository: Path) -> FakeTriton:
    return FakeTriton(repository)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


Open = Callable[[Settings], Compositor]


@pytest.fixture
async def opened(triton: FakeTriton, pool: ThreadPoolExecutor, tmp_path: Path) -> AsyncIterator[Open]:
    """Opens compositors with that Triton, whose fleets are watched while the test lasts."""
    fleets: list[Fleet] = []
    watching: list[asyncio.Task[None]] = []

    def make(settings: Settings) -> Compositor:
        facts = Catalogue(settings.model_repository).facts
        residency = Residency(
            triton,
            settings.residency,
            facts,
            [Device("cpu", None)],
            Unobserved(),
            "least_loaded",
            lock=HostLock(triton.endpoint, tmp_path),
        )
        fleets.append(Fleet([Endpoint(triton, residency)], settings, facts))  # type: ignore[arg-type]
        watching.append(asyncio.create_task(fleets[-1].watch(), name="watch"))
        return Compositor(settings, fleets[-1], pool)

    yield make
    for task in watching:
        task.cancel()
    await asyncio.gather(*watching, return_exceptions=True)
    for fleet in fleets:
        await fleet.close()


@pytest.fixture
async def compositor(repository: Path, opened: Open) -> Compositor:
    return opened(Settings.model_validate({"model_repository": repository, "triton": {"restart_wait_s": 60}}))


def at_work() -> list[str]:
    """The pipeline's tasks."""
    names = [str(getattr(task.get_coro(), "__qualname__", "")) for task in asyncio.all_tasks()]
    return [name for name in names if name.startswith(Compositor.__name__)]


async def call(compositor: Compositor, tenant: str = "plain", seconds: float = 30) -> Call:
    stages = Stages()
    return Call(await compositor.open(tenant, stages), Output(), stages, Deadline.after(seconds))


def features(count: int) -> NDArray[np.float32]:
    return np.zeros((count, 32, 16, 16), np.float32)


async def test_frames_come_in_order_whatever_order_triton_answers_in(
    compositor: Compositor, triton: FakeTriton
) -> None:
    waits = iter([0.03, 0.0, 0.02, 0.0, 0.01] * 10)

    async def wait() -> None:
        await asyncio.sleep(next(waits))

    triton.before = wait
    request = await call(compositor)
    streamed = [frame async for frame in compositor.generate(request, SPEECH, 16_000, start=3)]
    assert [frame.pts_samples for frame in streamed] == [640 * number for number in range(75)]
    assert all(frame.data == request.tenant.frame(frame.number).jpeg() for frame in streamed)
    wanted = [5, 1, 4, 0, 0, 7, 2, 6, 3]
    frames = await compositor.composite(request, wanted, features(9))
    assert [frame.number for frame in frames] == wanted
    assert all(frame.data == request.tenant.frame(frame.number).jpeg() for frame in frames)
    assert triton.held == 0


async def test_requests_are_split_to_the_tenants_batch_size(compositor: Compositor, triton: FakeTriton) -> None:
    request = await call(compositor)
    await compositor.composite(request, [0] * 50, features(50))
    assert sorted(triton.batches) == [2] + [4] * 12


async def test_mouths_of_a_tenant_replaced_meanwhile_are_thrown_away(
    compositor: Compositor, triton: FakeTriton
) -> None:
    request = await call(compositor)
    manifest = request.tenant.directory / MANIFEST
    before = manifest.stat()

    async def replace() -> None:
        os.utime(manifest, ns=(before.st_atime_ns, before.st_mtime_ns + 1))

    triton.before = replace
    try:
        with pytest.raises(TenantReplaced):
            await compositor.composite(request, [0], features(1))
    finally:
        os.utime(manifest, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert triton.held == 0


async def test_a_stream_works_ahead_but_not_far(compositor: Compositor, triton: FakeTriton) -> None:
    stream = compositor.generate(await call(compositor), SPEECH, 16_000)
    await anext(stream)
    for _ in range(50):
        await asyncio.sleep(0)
    assert 1 <= sum(triton.batches) <= 4 * (BATCHES_AHEAD + 1)
    await stream.aclose()
    assert triton.held == 0
    assert triton.most_held <= BATCHES_AHEAD


async def test_a_consumer_that_leaves_stops_the_work(compositor: Compositor, triton: FakeTriton) -> None:
    forever = asyncio.Event()

    async def wait() -> None:
        if len(triton.batches) >= 2:
            await forever.wait()

    triton.before = wait
    stream = compositor.generate(await call(compositor), SPEECH, 16_000)
    await anext(stream)
    await stream.aclose()
    assert triton.held == 0
    assert not at_work()


async def test_a_model_that_triton_lost_is_loaded_again(compositor: Compositor, triton: FakeTriton) -> None:
    failures = iter([ModelNotLoaded("gone"), TritonUnavailable("restarting"), None, None])

    async def fail() -> None:
        if failure := next(failures):
            triton.loaded.clear()
            raise failure

    triton.before = fail
    frames = await compositor.composite(await call(compositor), [0], features(1))
    assert len(frames) == 1
    assert triton.loads == ["plain"] * 3


async def test_an_unreachable_triton_is_given_up_after_a_while(
    repository: Path, triton: FakeTriton, opened: Open
) -> None:
    compositor = opened(Settings.model_validate({"model_repository": repository, "triton": {"restart_wait_s": 0.5}}))

    async def fail() -> None:
        raise TritonUnavailable("gone")

    triton.before = fail
    with pytest.raises(TritonUnavailable):
        await compositor.composite(await call(compositor), [0], features(1))


async def test_one_failed_batch_ends_its_call_and_all_its_work(compositor: Compositor, triton: FakeTriton) -> None:
    async def fail() -> None:
        await asyncio.sleep(0)
        if len(triton.batches) == 3:
            raise TenantBroken("NaN")

    triton.before = fail
    with pytest.raises(TenantBroken):
        await compositor.composite(await call(compositor), [0] * 50, features(50))
    with pytest.raises(TenantBroken):
        [frame async for frame in compositor.generate(await call(compositor), SPEECH, 16_000)]
    await asyncio.sleep(0)
    assert not at_work()
    assert triton.held == 0


async def test_the_deadline_bounds_the_wait_for_a_load(compositor: Compositor, triton: FakeTriton) -> None:
    async def never(model: str, gpu: int | None = None) -> None:
        await asyncio.Event().wait()

    triton.load = never  # type: ignore[method-assign]
    with pytest.raises(DeadlinePassed):
        await compositor.composite(await call(compositor, seconds=0.05), [0], features(1))


async def test_an_encoder_that_does_not_load_is_told_apart(compositor: Compositor, triton: FakeTriton) -> None:
    triton.load_failures["audio_encoder"] = TenantBroken("failed to poll")
    with pytest.raises(EncoderMissing, match="audio_encoder"):
        await anext(compositor.generate(await call(compositor), SPEECH, 16_000))


@pytest.mark.parametrize(
    ("numbers", "count", "words"),
    [
        ([], 0, "0 frames"),
        ([0] * 51, 51, "51 frames"),
        ([0], 2, "audio for 2"),
        ([8], 1, "0 to 7"),
        ([-1], 1, "0 to 7"),
    ],
)
async def test_bad_requests_are_refused_before_any_work(
    compositor: Compositor, triton: FakeTriton, numbers: list[int], count: int, words: str
) -> None:
    with pytest.raises(InvalidInput, match=words):
        await compositor.composite(await call(compositor), numbers, features(count))
    assert triton.loads == []


async def test_raw_frames_beyond_the_message_limit_are_refused_before_any_work(
    repository: Path, triton: FakeTriton, opened: Open
) -> None:
    settings = Settings.model_validate({"model_repository": repository, "server": {"max_message_mb": 1}})
    compositor = opened(settings)
    tenant = await compositor.open("plain", Stages())
    raw = Call(tenant, Output(raw=True), Stages())
    assert len(await compositor.composite(raw, [0] * 4, features(4))) == 4
    triton.batches.clear()
    with pytest.raises(InvalidInput, match="5 raw frames of 320x240 are more than 1 MiB"):
        await compositor.composite(raw, [0] * 5, features(5))
    assert triton.batches == []


async def test_a_removed_tenant_is_unloaded(tmp_path: Path, repository: Path, triton: FakeTriton, opened: Open) -> None:
    shutil.copytree(repository / "plain", tmp_path / "plain")
    settings = Settings.model_validate({"model_repository": tmp_path})
    compositor = opened(settings)
    await compositor.composite(Call(await compositor.open("plain", Stages()), Output(), Stages()), [0], features(1))
    shutil.rmtree(tmp_path / "plain")
    for _ in range(2):
        with pytest.raises(TenantNotFound):
            await compositor.open("plain", Stages())
    assert triton.unloads == ["plain"]


async def test_crops_are_sent_for_tenants_that_want_it(compositor: Compositor) -> None:
    resident, sent = [
        await compositor.composite(await call(compositor, tenant), [0, 3, 7], features(3))
        for tenant in ("plain", "sent")
    ]
    assert [frame.data for frame in resident] == [frame.data for frame in sent]


async def test_stages_are_accounted_for(compositor: Compositor) -> None:
    request = await call(compositor)
    frames: list[Frame] = [frame async for frame in compositor.generate(request, SPEECH, 16_000)]
    assert len(frames) == 75
    stages = request.stages
    assert min(stages.features_s, stages.inference_s, stages.blend_s, stages.encode_s, stages.load_s) > 0


async def test_every_stage_that_is_passed_is_told(compositor: Compositor) -> None:
    told: list[tuple[str, float]] = []
    observed = Compositor(
        compositor.settings, compositor.fleet, compositor.pool, lambda stage, seconds: told.append((stage, seconds))
    )
    frames = [frame async for frame in observed.generate(await call(observed), SPEECH, 16_000)]
    count = Counter(stage for stage, _ in told)
    assert count.keys() == {"features", "load", "inference", "pool", "blend", "encode"} < set(STAGES)
    assert count["blend"] == count["encode"] == len(frames) == 75
    assert count["inference"] == count["pool"] == 19
    assert all(seconds >= 0 for _, seconds in told)


async def test_a_load_is_timed_where_there_was_one(compositor: Compositor) -> None:
    told: list[str] = []
    observed = Compositor(
        compositor.settings, compositor.fleet, compositor.pool, lambda stage, seconds: told.append(stage)
    )
    await observed.load(await call(observed))
    assert told == ["load", "load"]  # the encoder, and the tenant
    await observed.load(await call(observed))
    assert told == ["load", "load"]
