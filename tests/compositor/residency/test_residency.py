"""Residency against a server with Triton's semantics, in time that passes only when everybody waits."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import pytest

from compositor.deadline import Deadline
from compositor.errors import (
    DeadlinePassed,
    Overloaded,
    Stopping,
    TenantBroken,
    TritonUnavailable,
)
from compositor.residency.host_lock import HostLock
from compositor.residency.models import Device, OutOfMemory, Server, State, Unobserved
from compositor.residency.residency import Residency
from compositor.settings import ResidencySettings
from compositor.triton.connection import ModelNotLoaded, NoAnswer

from ..triton.model_server import Files, ModelServer, VirtualLoop

CPU = Device("cpu", None)
GPUS = (Device("gpu0", 0), Device("gpu1", 1))
NAMES = [f"t{number}" for number in range(8)]
SIZE = 50_000_000
PLAIN: dict[str, Any] = {"max_models": 3, "headroom": 0, "min_resident_s": 0, "failed_s": 10, "sweep_s": 1}


class Counts(Unobserved):
    """An observer that counts."""

    def __init__(self) -> None:
        self.hits = self.misses = self.failed = self.lost = 0
        self.waits_s: list[float] = []
        self.ages_s: list[float] = []
        self.occupancy: dict[str, tuple[int, int]] = {}

    def hit(self) -> None:
        self.hits += 1

    def miss(self) -> None:
        self.misses += 1

    def loaded(self, seconds: float, waited_s: float) -> None:
        self.waits_s.append(waited_s)

    def load_failed(self) -> None:
        self.failed += 1

    def evicted(self, age_s: float) -> None:
        self.ages_s.append(age_s)

    def lost_race(self) -> None:
        self.lost += 1

    def occupied(self, device: str, models: int, size: int) -> None:
        self.occupancy[device] = (models, size)


class World:
    """One server and its compositors, of which `residency` is the first."""

    def __init__(self, folder: Path, devices: Sequence[Device] = (CPU,), **settings: Any) -> None:
        self._folder, self._devices = folder, devices
        self.placement: Any = settings.pop("placement", "least_loaded")
        self.settings = ResidencySettings.model_validate({**PLAIN, **settings})
        self.files = Files(dict.fromkeys(NAMES, SIZE) | {"encoder": SIZE}, frozenset({"encoder"}))
        self.server = ModelServer(self.files)
        self.counts: list[Counts] = []
        self.compositors: list[Residency] = []
        self.residency = self.another()
        self.server.watch = self.within_budget

    def another(self, server: Server | None = None) -> Residency:
        """A compositor of the same host. server: as it sees it."""
        counts = Counts()
        lock = HostLock("server:8001", self._folder)
        compositor = Residency(
            *(server or self.server, self.settings, self.files.facts, self._devices, counts, self.placement),
            lock=lock,
            clock=self.server.clock_s,
        )
        self.counts.append(counts)
        self.compositors.append(compositor)
        return compositor

    def within_budget(self) -> None:
        for device in self._devices:
            assert self.server.models_on(device) <= self.settings.max_models, device
            if self.settings.max_mb:
                assert self.server.bytes_on(device) <= self.settings.max_mb * 1_000_000, device

    async def use(self, name: str, seconds: float = 0.01, residency: Residency | None = None) -> int:
        """A request, repeated where its model was gone; the stamp of the files that answered."""
        residency = residency or self.residency
        while True:
            with contextlib.suppress(ModelNotLoaded):
                async with residency.lease(name, Deadline.after(60)):
                    return await self.server.infer(name, seconds)
            residency.forget(name, lost=True)

    def state(self, name: str, residency: Residency | None = None) -> State:
        reports = (residency or self.residency).report()
        return next((each.state for each in reports if each.name == name), State.ABSENT)


Scene = Callable[[World], Coroutine[Any, Any, None]]


class Play(Protocol):
    """Plays a scene in a world of these settings, in virtual time, and sees that nothing is left behind."""

    def __call__(self, scene: Scene, devices: Sequence[Device] = (CPU,), **settings: Any) -> None: ...


@pytest.fixture
def play(tmp_path: Path) -> Iterator[Play]:
    loop = VirtualLoop()

    async def whole(scene: Scene, devices: Sequence[Device], settings: dict[str, Any]) -> None:
        world = World(tmp_path, devices, **settings)
        await scene(world)
        for residency in world.compositors:
            await residency.close()
            assert residency.load == 0
        await asyncio.sleep(10)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    def run(scene: Scene, devices: Sequence[Device] = (CPU,), **settings: Any) -> None:
        loop.run_until_complete(whole(scene, devices, settings))

    yield run
    loop.close()


def now_s() -> float:
    return asyncio.get_running_loop().time()


async def patiently(world: World, name: str, residency: Residency, tries: int = 20) -> None:
    """A request that comes back when it is told to."""
    try:
        await world.use(name, residency=residency)
    except Overloaded as error:
        await asyncio.sleep(error.retry_after_s or 0)
        assert tries, f"no room for {name} for ever"
        await patiently(world, name, residency, tries - 1)


def go(work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    return asyncio.create_task(work)


def test_a_hundred_misses_make_one_load(play: Play) -> None:
    async def scene(world: World) -> None:
        await asyncio.gather(*(world.use("t0") for _ in range(100)))
        assert world.server.loads == ["t0"]
        assert world.counts[0].misses == 100
        await world.use("t0")
        assert world.counts[0].hits == 1
        assert "t0" in world.residency

    play(scene)


def test_a_load_ends_with_an_inference(play: Play) -> None:
    async def scene(world: World) -> None:
        await world.residency.ensure("t0", Deadline.after(60))
        assert (await world.server.uses())["t0"].last_s > 0

    play(scene)


def test_the_least_often_used_of_late_leaves_first(play: Play) -> None:
    async def scene(world: World) -> None:
        for name, times in (("t0", 5), ("t1", 2), ("t2", 9)):
            for _ in range(times):
                await world.use(name)
        await world.use("t3")
        assert world.server.unloads == ["t1"]
        assert world.server.ready() == {"t0", "t2", "t3"}

    play(scene)


def test_use_by_others_counts(play: Play) -> None:
    async def scene(world: World) -> None:
        for name in ("t0", "t1", "t2"):
            await world.use(name)
        for name in ("t0", "t2"):
            for _ in range(5):
                await world.server.infer(name, 0.01)
        await world.use("t3")
        assert world.server.unloads == ["t1"]

    play(scene)


def test_a_favourite_of_yesterday_leaves_before_one_of_today(play: Play) -> None:
    async def scene(world: World) -> None:
        for _ in range(40):
            await world.use("t0")
        await world.another().ensure("t0", Deadline.after(60))
        watching = go(world.residency.watch())
        await asyncio.sleep(3600)
        for name in ("t1", "t2"):
            for _ in range(4):
                await world.use(name)
        await world.use("t3")
        assert world.server.unloads == ["t0"]
        watching.cancel()

    play(scene, half_life_s=600)


def test_by_last_use_the_longest_unused_leaves_first(play: Play) -> None:
    async def scene(world: World) -> None:
        for name in ("t0", "t0", "t0", "t1", "t2", "t1"):
            await world.use(name)
        await world.use("t3")
        await world.use("t4")
        assert world.server.unloads == ["t0", "t2"]

    play(scene, policy="lru")


def test_a_place_is_free_only_when_the_server_says_that_its_model_is_gone(play: Play) -> None:
    async def scene(world: World) -> None:
        for name in ("t0", "t1", "t2"):
            await world.use(name)
        begin_s = now_s()
        await world.use("t3")
        assert now_s() - begin_s > world.server.unload_s
        assert world.server.unload_s < world.counts[0].waits_s[-1] < now_s() - begin_s

    play(scene)


def test_who_is_leased_stays_and_who_finds_no_room_is_told_when_to_come_back(play: Play) -> None:
    async def scene(world: World) -> None:
        long = [go(world.use(name, 30)) for name in ("t0", "t1", "t2")]
        await asyncio.sleep(5)
        assert not world.residency.room()
        with pytest.raises(Overloaded) as refused:
            await world.use("t3")
        assert refused.value.retry_after_s
        assert not world.server.unloads
        await asyncio.gather(*long)
        assert world.residency.room()
        await world.use("t3")

    play(scene)


def test_who_was_used_of_late_stays(play: Play) -> None:
    async def scene(world: World) -> None:
        for name in ("t0", "t1", "t2"):
            await world.use(name)
        with pytest.raises(Overloaded) as refused:
            await world.use("t3")
        assert refused.value.retry_after_s is not None
        assert 8 < refused.value.retry_after_s <= 10
        await asyncio.sleep(refused.value.retry_after_s)
        await world.use("t3")
        assert world.server.unloads == ["t0"]
        assert world.counts[0].ages_s[0] >= 10

    play(scene, min_resident_s=10)


def test_several_who_wait_for_room_each_get_theirs(play: Play) -> None:
    async def scene(world: World) -> None:
        for name in ("t0", "t1", "t2"):
            await world.use(name)
        begin_s = now_s()
        await asyncio.gather(*(world.use(name) for name in ("t3", "t4", "t5")))
        assert sorted(world.server.unloads) == ["t0", "t1", "t2"]
        # They left side by side.
        assert now_s() - begin_s < 2 * world.server.unload_s

    play(scene)


def test_places_are_kept_free_ahead(play: Play) -> None:
    async def scene(world: World) -> None:
        watching = go(world.residency.watch())
        for name in ("t0", "t1", "t2"):
            await world.use(name)
        await asyncio.sleep(10)
        assert len(world.server.copies) == 2
        begin_s = now_s()
        await world.use("t3")
        assert now_s() - begin_s < world.server.unload_s
        watching.cancel()

    play(scene, headroom=1)
    play(scene, headroom=None)


def test_what_fits_stays_though_places_are_kept_free(play: Play) -> None:
    """Who left for a newcomer, and is the one who comes, does so once."""

    async def scene(world: World) -> None:
        watching = go(world.residency.watch())
        for turn in range(20):
            for name in NAMES[:6]:
                await world.use(name)
                await asyncio.sleep(1)
            if turn == 10:
                settled = world.counts[0].misses
        assert world.counts[0].misses == settled <= 6 + 3
        assert len(world.server.ready()) == 6
        watching.cancel()

    play(scene, max_models=6, headroom=3)
    play(scene, max_models=6, headroom=None)


def test_the_idle_leave(play: Play) -> None:
    async def scene(world: World) -> None:
        watching = go(world.residency.watch())
        await asyncio.gather(*(world.use(name) for name in ("t0", "t1", "encoder")))
        for _ in range(10):
            await asyncio.sleep(10)
            await world.use("t1")
        assert world.server.ready() == {"t1", "encoder"}
        watching.cancel()

    play(scene, idle_s=30)


def test_the_removed_leave_once_nobody_uses_them(play: Play) -> None:
    async def scene(world: World) -> None:
        watching = go(world.residency.watch())
        await asyncio.gather(*(world.use(name) for name in ("t0", "t1", "encoder")))
        world.server.files.removed |= {"t0", "t1", "encoder"}
        for _ in range(10):
            await world.use("t1")
            await asyncio.sleep(1)
        assert world.server.ready() == {"t1", "encoder"}, "who speaks still does to the end, and encoders stay"
        await asyncio.sleep(10)
        assert world.server.ready() == {"encoder"}
        watching.cancel()

    play(scene, min_resident_s=5)


def test_pinned_and_preloaded_models_are_loaded_at_the_start_and_the_pinned_stay(play: Play) -> None:
    async def scene(world: World) -> None:
        watching = go(world.residency.watch())
        await asyncio.sleep(5)
        assert world.server.ready() == {"t0", "t1"}
        for name in ("t2", "t3", "t4"):
            await world.use(name)
        assert "t0" in world.server.ready()
        assert "t1" not in world.server.ready()
        await world.residency.drop("t0")
        assert "t0" in world.server.ready()
        world.server.restart()
        world.residency.forget_all()
        await asyncio.sleep(5)
        assert world.server.ready() == {"t0"}
        assert [each.name for each in world.residency.report() if each.pinned] == ["t0"]
        watching.cancel()

    play(scene, pinned=("t0",), preload=("t1",))


def test_what_is_preloaded_is_so_when_the_server_is_there_once(play: Play) -> None:
    async def scene(world: World) -> None:
        world.server.down = True
        watching = go(world.residency.watch())
        await asyncio.sleep(5)
        world.server.down = False
        await asyncio.sleep(5)
        assert world.server.ready() == {"t0", "t1"}
        await world.server.unload("t1")
        await asyncio.sleep(5)
        assert world.server.ready() == {"t0"}
        watching.cancel()

    play(scene, preload=("t0", "missing", "t1"))


def test_the_encoder_of_a_tenant_of_the_start_is_loaded_before_it(play: Play) -> None:
    async def scene(world: World) -> None:
        world.files.sizes["other"] = SIZE
        world.files.encoders |= {"other"}
        world.files.encoder_of = {"t0": "encoder", "t1": "encoder", "t2": "other", "t3": "missing"}
        watching = go(world.residency.watch())
        await asyncio.sleep(10)
        assert world.server.loads == ["encoder", "t0", "t1", "other", "t2", "missing", "t3"]
        world.server.restart()
        world.residency.forget_all()
        await asyncio.sleep(5)
        assert world.server.ready() == {"encoder", "t0"}
        watching.cancel()

    play(scene, pinned=("t0",), preload=("t1", "t2", "t3"), max_models=6)


def test_an_encoder_that_could_not_be_loaded_for_want_of_a_server_is_so_later(play: Play) -> None:
    async def scene(world: World) -> None:
        world.files.encoder_of = {"t0": "encoder"}
        world.server.failures = [TritonUnavailable("restarting")]
        watching = go(world.residency.watch())
        await asyncio.sleep(10)
        assert "encoder" in world.residency
        assert "t0" in world.residency
        watching.cancel()

    play(scene, preload=("t0",))


def test_a_pinned_model_that_does_not_load_stops_nothing(play: Play) -> None:
    async def scene(world: World) -> None:
        watching = go(world.residency.watch())
        await asyncio.sleep(5)
        await world.use("t1")
        world.files.sizes["late"] = SIZE
        world.files.replace("late")
        await asyncio.sleep(5)
        assert "late" in world.server.ready()
        watching.cancel()

    play(scene, pinned=("late",))


def test_the_budget_in_bytes(play: Play) -> None:
    async def scene(world: World) -> None:
        world.files.sizes |= {"big": 110_000_000, "bigger": 210_000_000}
        for name in ("t0", "t1", "t2", "t3"):
            await world.use(name)
        await world.use("big")
        assert sorted(world.server.unloads) == ["t0", "t1", "t2"]
        assert world.server.bytes_on(CPU) <= 200_000_000
        with pytest.raises(Overloaded, match="takes 210 MB: more than") as refused:
            await world.use("bigger")
        assert refused.value.retry_after_s is None, "it will never fit"
        assert len(world.server.unloads) == 3, "nobody leaves for one that will never fit"

    play(scene, max_models=20, max_mb=200)


def test_a_model_of_unknown_size_counts_as_the_others_do(play: Play) -> None:
    async def scene(world: World) -> None:
        world.files.sizes["unknown"] = 0
        for name in ("t0", "t1", "unknown", "t2"):
            await world.use(name)
        assert len(world.server.unloads) == 1

    play(scene, max_models=20, max_mb=150)


def test_encoders_take_bytes_but_no_place_and_stay(play: Play) -> None:
    async def scene(world: World) -> None:
        for name in ("encoder", "t0", "t1", "t2"):
            await world.use(name)
        assert not world.server.unloads
        for name in ("t3", "t4"):
            await world.use(name)
        assert "encoder" in world.server.ready()
        assert world.counts[0].occupancy["cpu"] == (3, 4 * SIZE)

    play(scene)


def test_an_encoder_that_is_there_is_not_dropped(play: Play) -> None:
    async def scene(world: World) -> None:
        await world.use("encoder")
        await world.residency.drop("encoder")
        assert world.server.ready() == {"encoder"}
        del world.files.sizes["encoder"]
        await world.residency.drop("encoder")
        assert world.server.unloads == ["encoder"]

    play(scene)


def test_out_of_memory_evicts_one_and_tries_once_more(play: Play) -> None:
    async def scene(world: World) -> None:
        for name in ("t0", "t1"):
            await world.use(name)
        world.server.failures = [OutOfMemory("no memory")]
        await world.use("t2")
        assert world.server.unloads == ["t0"]
        assert world.server.loads[-2:] == ["t2", "t2"]
        world.server.failures = [OutOfMemory("no memory"), OutOfMemory("no memory")]
        with pytest.raises(Overloaded) as refused:
            await world.use("t3")
        assert refused.value.retry_after_s
        assert world.server.loads[-2:] == ["t3", "t3"]
        await world.use("t3")

    play(scene)


def test_out_of_memory_with_nobody_to_leave(play: Play) -> None:
    async def scene(world: World) -> None:
        world.server.failures = [OutOfMemory("no memory")]
        with pytest.raises(Overloaded) as refused:
            await world.use("t3")
        assert refused.value.retry_after_s
        assert world.server.loads == ["t3"]

    play(scene)


def test_a_failed_load_is_remembered_until_the_files_are_mended(play: Play) -> None:
    async def scene(world: World) -> None:
        world.server.failures = [TenantBroken("does not load")]
        outcomes = await asyncio.gather(*(world.use("t0") for _ in range(3)), return_exceptions=True)
        assert all(isinstance(outcome, TenantBroken) for outcome in outcomes)
        with pytest.raises(TenantBroken):
            await world.use("t0")
        assert world.server.loads == ["t0"]
        assert world.counts[0].failed == 1
        world.files.replace("t0")
        await world.use("t0")
        assert world.server.loads == ["t0", "t0"]

    play(scene)


def test_a_failed_load_is_tried_again_after_a_while(play: Play) -> None:
    async def scene(world: World) -> None:
        world.server.failures = [TenantBroken("does not load")]
        for pause_s in (0, 9):
            await asyncio.sleep(pause_s)
            with pytest.raises(TenantBroken):
                await world.use("t0")
        await asyncio.sleep(1)
        await world.use("t0")
        assert world.server.loads == ["t0", "t0"]

    play(scene)


def test_a_caller_that_goes_away_does_not_stop_the_load(play: Play) -> None:
    async def scene(world: World) -> None:
        first, second = go(world.use("t0")), go(world.use("t0"))
        await asyncio.sleep(0.1)
        first.cancel()
        await second
        assert world.server.loads == ["t0"]
        assert first.cancelled()

    play(scene)


def test_what_nobody_waits_for_any_more_is_not_begun(play: Play) -> None:
    async def scene(world: World) -> None:
        long = [go(world.use(name)) for name in ("t0", "t1", "t2")]
        await asyncio.sleep(0.01)
        waiting = go(world.use("t3"))
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.gather(*long)
        await asyncio.sleep(5)
        assert world.server.loads == ["t0", "t1", "t2"]
        assert world.state("t3") is State.ABSENT

    play(scene, max_models=4, concurrent_loads=1)


def test_a_load_that_has_begun_goes_on_without_anybody(play: Play) -> None:
    async def scene(world: World) -> None:
        waiting = go(world.use("t0"))
        await asyncio.sleep(0.1)
        waiting.cancel()
        await asyncio.sleep(1)
        assert world.state("t0") is State.READY

    play(scene)


def test_a_deadline_ends_the_wait(play: Play) -> None:
    async def scene(world: World) -> None:
        world.server.load_s = 1000
        with pytest.raises(DeadlinePassed):
            await world.residency.ensure("t0", Deadline.after(60))
        others = [go(world.residency.ensure(name, Deadline.after(6000))) for name in ("t1", "t2")]
        await asyncio.sleep(1)
        with pytest.raises(Overloaded):
            await world.residency.ensure("t3", Deadline.after(60))
        await asyncio.gather(*others)

    play(scene)


def test_loads_at_once_are_bounded_and_their_wait_is_measured(play: Play) -> None:
    async def scene(world: World) -> None:
        await asyncio.gather(*(world.use(name) for name in NAMES))
        assert world.server.most_loading == 2
        first, later = world.counts[0].waits_s[:2], world.counts[0].waits_s[2:4]
        assert max(first) < world.server.load_s <= min(later)
        assert len(world.counts[0].waits_s) == len(NAMES)

    play(scene, max_models=20, concurrent_loads=2)


def test_what_is_forgotten_is_loaded_again(play: Play) -> None:
    async def scene(world: World) -> None:
        await world.use("t0")
        world.residency.forget("t0")
        world.residency.forget("never loaded")
        assert "t0" not in world.residency
        await world.use("t0")
        assert world.server.loads == ["t0", "t0"]
        assert not world.counts[0].lost

    play(scene)


def test_only_files_that_are_others_are_loaded_again(play: Play) -> None:
    async def scene(world: World) -> None:
        assert await world.use("t0") == 0
        world.residency.replaced("t0")
        assert await world.use("t0") == 0
        assert (world.counts[0].hits, world.counts[0].misses) == (1, 1)
        world.files.replace("t0")
        world.residency.replaced("t0")
        assert await world.use("t0") == 1
        world.residency.replaced("never")

    play(scene)


def test_files_that_are_replaced_are_loaded_also_where_that_happens_during_a_load(play: Play) -> None:
    async def scene(world: World) -> None:
        old = go(world.use("t0"))
        await asyncio.sleep(0.1)
        world.files.replace("t0")
        world.residency.forget("t0")
        new = go(world.use("t0"))
        assert (await old, await new) == (1, 1)
        world.files.replace("t0")
        world.residency.forget("t0")
        assert await world.use("t0") == 2

    play(scene)


def test_a_model_that_is_lost_is_loaded_again_and_counted(play: Play) -> None:
    async def scene(world: World) -> None:
        await world.use("t0")
        await world.server.unload("t0")
        await world.use("t0")
        assert world.counts[0].lost == 1
        assert world.server.loads == ["t0", "t0"]

    play(scene)


def test_requests_that_fail_together_lose_one_race(play: Play) -> None:
    async def scene(world: World) -> None:
        await world.use("t0")
        await world.server.unload("t0")
        await asyncio.gather(*(world.use("t0") for _ in range(20)))
        assert world.counts[0].lost == 1
        assert world.server.loads == ["t0", "t0"]

    play(scene)


def test_dropping_waits_for_the_requests_under_way(play: Play) -> None:
    async def scene(world: World) -> None:
        long = go(world.use("t0", 5))
        await asyncio.sleep(1)
        del world.files.sizes["t0"]
        await world.residency.drop("t0")
        assert world.state("t0") is State.DRAINING
        assert not world.server.unloads
        await long
        await asyncio.sleep(0.1)
        assert world.state("t0") is State.UNLOADING
        await asyncio.sleep(5)
        assert world.state("t0") is State.ABSENT
        assert not world.server.copies
        await world.residency.drop("t0")
        await world.residency.drop("t1")
        assert world.server.unloads == ["t0"]

    play(scene)


def test_who_is_wanted_again_while_it_drains_stays(play: Play) -> None:
    async def scene(world: World) -> None:
        long = go(world.use("t0", 5))
        await asyncio.sleep(1)
        await world.residency.drop("t0")
        await world.use("t0")
        await long
        await asyncio.sleep(5)
        assert not world.server.unloads
        assert world.server.loads == ["t0"]

    play(scene)


def test_new_files_of_a_tenant_that_drains_are_loaded(play: Play) -> None:
    async def scene(world: World) -> None:
        long = go(world.use("t0", 5))
        await asyncio.sleep(1)
        await world.residency.drop("t0")
        world.files.replace("t0")
        assert await world.use("t0") == 1
        assert await long == 0
        await asyncio.sleep(5)
        assert world.state("t0") is State.READY

    play(scene)


def test_a_model_that_is_dropped_while_it_loads_is_unloaded(play: Play) -> None:
    async def scene(world: World) -> None:
        waiting = go(world.use("t0", 2))
        await asyncio.sleep(0.1)
        await world.residency.drop("t0")
        await waiting
        await asyncio.sleep(5)
        assert not world.server.copies

    play(scene)


def test_after_a_restart_everything_is_loaded_again(play: Play) -> None:
    async def scene(world: World) -> None:
        await asyncio.gather(*(world.use(name) for name in ("t0", "t1", "t2")))
        world.server.restart()
        world.residency.forget_all()
        assert "t0" not in world.residency
        await asyncio.gather(*(world.use(name) for name in ("t0", "t1", "t2")))
        assert world.counts[0].lost == 0

    play(scene)


def test_a_load_without_an_answer_counts_until_the_server_is_done_with_it(play: Play) -> None:
    async def scene(world: World) -> None:
        world.server.load_s = 3
        world.server.failures = [NoAnswer("no answer")]
        with pytest.raises(NoAnswer):
            await world.use("t0")
        assert world.state("t0") is State.UNLOADING
        await asyncio.gather(*(world.use(name) for name in ("t1", "t2", "t3")))
        assert len(world.server.unloads) == 1

    play(scene)


def test_who_waits_for_a_server_that_is_down_is_told_at_once(play: Play) -> None:
    async def scene(world: World) -> None:
        world.server.down = True
        with pytest.raises(TritonUnavailable):
            await world.use("t0")
        world.server.down = False
        await world.use("t0")
        for name in ("t1", "t2"):
            await world.use(name)
        waiting = go(world.use("t3"))
        await asyncio.sleep(0.5)
        world.server.down = True
        with pytest.raises(TritonUnavailable):
            await waiting
        world.server.down = False
        await world.use("t3")

    play(scene)


def test_closing_ends_what_is_under_way(play: Play) -> None:
    async def scene(world: World) -> None:
        loading, queued = go(world.use("t0")), go(world.use("t1"))
        await asyncio.sleep(0.1)
        await world.residency.close()
        for each in (loading, queued):
            with pytest.raises(Stopping):
                await each
        with pytest.raises(Stopping):
            await world.use("t0")

    play(scene, concurrent_loads=1)


def test_the_index_is_read_only_while_something_leaves(play: Play) -> None:
    async def scene(world: World) -> None:
        watching = go(world.residency.watch())
        for name in ("t0", "t1", "t2"):
            await world.use(name)
        before = world.server.polls
        assert before == 1
        await asyncio.sleep(100)
        assert world.server.polls == before
        await world.use("t3")
        after = world.server.polls
        assert before < after <= before + 12
        await asyncio.sleep(100)
        assert world.server.polls == after
        watching.cancel()

    play(scene)


# Several compositors.


def test_what_others_loaded_takes_room_and_may_leave(play: Play) -> None:
    async def scene(world: World) -> None:
        other = world.another()
        for name in ("t0", "t1", "t2"):
            await world.use(name, residency=other)
        await world.use("t3")
        assert world.server.unloads == ["t0"]
        await world.use("t0", residency=other)
        assert world.counts[1].lost == 1

    play(scene)


def test_an_idle_model_that_another_compositor_unloaded_is_no_lost_race(play: Play) -> None:
    async def scene(world: World) -> None:
        await world.use("t0")
        watching = go(world.residency.watch())
        await world.server.unload("t0")
        await asyncio.sleep(5)
        assert "t0" not in world.residency
        assert world.counts[0].lost == 0
        watching.cancel()

    play(scene)


def test_what_is_being_dropped_is_there_only_for_the_same_files(play: Play) -> None:
    async def scene(world: World) -> None:
        long = go(world.use("t0", 30))
        await asyncio.sleep(1)
        await world.residency.drop("t0")
        assert world.state("t0") is State.DRAINING
        assert "t0" in world.residency
        world.files.replace("t0")
        assert "t0" not in world.residency, "its requests would wait for a load"
        await long

    play(scene)


def test_what_another_compositor_uses_stays(play: Play) -> None:
    async def scene(world: World) -> None:
        other = world.another()
        for name in ("t0", "t1", "t2"):
            await world.use(name, residency=other)
        await asyncio.sleep(11)
        for name in ("t0", "t2"):
            await world.use(name, residency=other)
        await world.use("t3")
        assert world.server.unloads == ["t1"]
        with pytest.raises(Overloaded):
            await world.use("t4")
        assert world.counts[1].lost == 0

    play(scene, min_resident_s=10)


def test_models_that_another_compositor_unloads_take_room_until_they_are_gone(play: Play) -> None:
    async def scene(world: World) -> None:
        other = world.another()
        world.server.unload_s = 5
        for name in ("t0", "t1"):
            await world.use(name)
        await world.use("t2", residency=other)
        await other.drop("t2")
        begin_s = now_s()
        await world.use("t3")
        assert world.server.unloads == ["t2"], "there is no need for another to leave"
        assert now_s() - begin_s > 4

    play(scene)


def test_a_compositor_that_starts_sees_what_is_leaving(play: Play) -> None:
    async def scene(world: World) -> None:
        world.server.unload_s = 5
        for name in ("t0", "t1", "t2"):
            await world.use(name)
        await world.residency.drop("t2")
        other = world.another()
        begin_s = now_s()
        await world.use("t3", residency=other)
        assert world.server.unloads == ["t2"]
        assert now_s() - begin_s > 4

    play(scene)


def test_a_load_of_another_compositor_that_nobody_awaits_any_more_takes_room(play: Play) -> None:
    async def scene(world: World) -> None:
        other = world.another()
        await other.ensure("t1", Deadline.after(60))
        world.server.load_s = 5
        world.server.failures = [NoAnswer("no answer")]
        with pytest.raises(NoAnswer):
            await world.use("t0")
        await asyncio.gather(*(world.use(name, residency=other) for name in ("t2", "t3")))
        assert len(world.server.unloads) == 1

    play(scene)


def test_a_load_is_noted_before_it_begins(play: Play, tmp_path: Path) -> None:
    lock = HostLock("server:8001", tmp_path).path

    async def scene(world: World) -> None:
        loading = go(world.use("t0"))
        await asyncio.sleep(0.1)
        assert "t0" in json.loads(lock.read_text())
        await loading

    play(scene)


def test_two_compositors_at_the_edge_keep_to_the_budget(play: Play) -> None:
    async def scene(world: World) -> None:
        both = [world.residency, world.another()]
        watching = [go(residency.watch()) for residency in both]

        async def churn(residency: Residency, order: Sequence[str]) -> None:
            for name in order:
                await patiently(world, name, residency)

        await asyncio.gather(churn(both[0], NAMES * 4), churn(both[1], NAMES[::-1] * 4))
        for each in watching:
            each.cancel()

    play(scene, min_resident_s=0.5, headroom=1)


# Several GPUs.


@pytest.mark.parametrize("placement", ["least_loaded", "round_robin"])
def test_models_are_spread_over_the_gpus(play: Play, placement: str) -> None:
    async def scene(world: World) -> None:
        for name in NAMES[:6]:
            await world.use(name)
        assert [world.server.models_on(device) for device in GPUS] == [3, 3]
        assert {each.device for each in world.residency.report()} == {"gpu0", "gpu1"}
        for name in NAMES[6:]:
            await world.use(name)
        assert len(world.server.unloads) == 2

    play(scene, GPUS, placement=placement)


def test_least_loaded_fills_the_gap_and_round_robin_goes_on(play: Play) -> None:
    async def scene(world: World) -> None:
        for name in ("t0", "t1", "t2", "t3"):
            await world.use(name)
        for name in ("t0", "t2"):
            await world.residency.drop(name)
        await asyncio.sleep(5)
        for name in ("t4", "t5"):
            await world.use(name)
        expected = [2, 2] if world.placement == "least_loaded" else [1, 3]
        assert [world.server.models_on(device) for device in GPUS] == expected

    play(scene, GPUS, placement="least_loaded", max_models=10)
    play(scene, GPUS, placement="round_robin", max_models=10)


def test_a_model_on_a_gpu_is_not_loaded_again_by_the_next_compositor(play: Play) -> None:
    async def scene(world: World) -> None:
        other = world.another()
        for name in ("t0", "t1"):
            await world.use(name)
        for name in ("t0", "t1"):
            await world.use(name, residency=other)
        assert world.server.loads == ["t0", "t1"]
        assert [each.device for each in other.report()] == ["gpu0", "gpu1"]
        world.files.replace("t1")
        other.forget("t1")
        assert await world.use("t1", residency=other) == 1
        assert [copy.gpu for copy in world.server.copies if copy.name == "t1"] == [1]
        assert world.server.loads == ["t0", "t1", "t1"]

    play(scene, GPUS)


def test_a_model_on_every_gpu_takes_room_on_each(play: Play) -> None:
    async def scene(world: World) -> None:
        for name in ("t0", "t1", "t2"):
            await world.server.load(name)
        with pytest.raises(Overloaded):
            await world.use("t3")
        assert await world.use("t0") == 0

    play(scene, GPUS, min_resident_s=10)
