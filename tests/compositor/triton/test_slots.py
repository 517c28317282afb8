"""Leave to send requests, and the memory that goes with it."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from compositor.deadline import Deadline
from compositor.errors import Overloaded, TritonUnavailable
from compositor.triton.shared_memory import Region
from compositor.triton.slots import MOST_REGIONS, Lease, Slots


class Registry:
    """Where regions are registered; `fault` is raised instead. It keeps those in `written` when told to end them."""

    def __init__(self) -> None:
        self.regions: list[Region] = []
        self.written: list[Region] = []
        self.ended: list[Region] = []
        self.takes = True
        self.fault: Exception | None = None

    async def end(self, regions: Sequence[Region]) -> list[Region]:
        await asyncio.sleep(0)
        gone = [region for region in regions if region not in self.written]
        self.ended += gone
        return gone

    async def register(self, region: Region) -> bool:
        await asyncio.sleep(0)
        if self.fault:
            raise self.fault
        self.regions.append(region)
        return self.takes


@pytest.fixture
def registry() -> Registry:
    return Registry()


@pytest.fixture
def slots(registry: Registry) -> Slots:
    return Slots(3, 4096, registry.register, registry.end, shared_memory=True)


def soon() -> Deadline:
    return Deadline.after(60)


class Near(Deadline):
    """Always about to pass."""

    def remaining_s(self) -> float:
        return 0.01


async def test_each_lease_has_a_slot_of_its_own(slots: Slots, registry: Registry) -> None:
    leases = await asyncio.gather(*(slots.lease(soon()) for _ in range(3)))
    assert sorted(lease.slot for lease in leases) == [0, 1, 2]
    assert {lease.region for lease in leases} == set(registry.regions)
    with pytest.raises(Overloaded):
        await slots.lease(Near(0))
    slots.release(leases[1])
    assert (await slots.lease(soon())).slot == leases[1].slot


async def test_an_abandoned_slot_is_never_given_out_again(slots: Slots, registry: Registry) -> None:
    doubtful = await slots.lease(soon())
    slots.abandon(doubtful)
    for _ in range(10):
        leases = [await slots.lease(soon()) for _ in range(3)]
        assert all((lease.region, lease.slot) != (doubtful.region, doubtful.slot) for lease in leases)
        for lease in leases:
            slots.release(lease)
    assert len(registry.regions) == 2


async def hang(slots: Slots) -> None:
    """All that are in flight are given up."""
    for lease in [await slots.lease(soon()) for _ in range(3)]:
        assert lease.region
        slots.abandon(lease)


async def test_however_often_triton_hangs_there_is_memory_once_it_goes_on(slots: Slots, registry: Registry) -> None:
    for _ in range(3 * MOST_REGIONS):
        await hang(slots)
    assert registry.ended == registry.regions[:-1]
    assert slots.mapped == registry.regions[-1:]


async def test_regions_that_are_still_written_into_are_kept_and_bounded(
    slots: Slots, registry: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    registry.written = registry.regions
    for _ in range(MOST_REGIONS):
        await hang(slots)
    for _ in range(3):
        tensors = await slots.lease(soon())
        assert tensors.region is None
        slots.release(tensors)
    assert caplog.messages == ["no shared memory (too many answers never came): mouths come as tensors for 30 s"]
    assert len(registry.regions) == len(slots.mapped) == MOST_REGIONS
    assert not registry.ended
    registry.written = registry.regions[1:]
    monkeypatch.setattr(slots, "_not_before_s", 0.0)
    assert (await slots.lease(soon())).region is registry.regions[-1]
    assert registry.ended == registry.regions[:1]
    assert slots.mapped == registry.regions[1:]


async def test_regions_whose_answers_are_read_or_awaited_are_not_ended(slots: Slots, registry: Registry) -> None:
    held, other, doubtful = [await slots.lease(soon()) for _ in range(3)]
    slots.abandon(doubtful)
    newer = await slots.lease(soon())
    assert newer.region is not held.region
    slots.release(other)
    for _ in range(2):
        slots.abandon(newer)
        newer = await slots.lease(soon())
    assert held.region not in registry.ended
    slots.release(held)
    for _ in range(3):
        slots.abandon(newer)
        newer = await slots.lease(soon())
    assert registry.ended[0] is held.region


async def test_a_restart_gives_memory_again(slots: Slots, registry: Registry) -> None:
    registry.written = registry.regions
    for _ in range(MOST_REGIONS):
        await hang(slots)
    slots.abandon(await slots.lease(soon()))
    slots.lost(None)
    assert slots.mapped == []
    assert (await slots.lease(soon())).region is registry.regions[-1]
    assert len(registry.regions) == MOST_REGIONS + 1


class Late:
    """Requests come and go; each answer is written when it comes, and those whose requests were given up come late."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._held: list[tuple[Lease, int]] = []
        self._late: list[NDArray[np.uint8]] = []
        self._marks = itertools.count(1)

    async def ask(self) -> None:
        if len(self._held) < 3:
            lease, mark = await self._slots.lease(soon()), next(self._marks) % 200 + 1
            if lease.region is not None:
                memory_of(lease)[:] = mark
            self._held.append((lease, mark))

    def give_up(self, number: int) -> None:
        if self._held:
            lease, _ = self._held.pop(number % len(self._held))
            if lease.region is not None:
                self._late.append(memory_of(lease))
            self._slots.abandon(lease)

    def read(self, number: int) -> None:
        if self._held:
            lease, _ = self._held.pop(number % len(self._held))
            self._slots.release(lease)

    def answer_late(self, number: int) -> None:
        if self._late:
            self._late.pop(number % len(self._late))[:] = 255

    def check(self) -> None:
        for lease, mark in self._held:
            assert lease.region is None or (memory_of(lease) == mark).all()


def memory_of(lease: Lease) -> NDArray[np.uint8]:
    """The slot, writable as it is for Triton."""
    assert lease.region
    view = lease.region.view(lease.slot, 4096)
    view.flags.writeable = True
    return view


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["ask", "ask", "give_up", "read", "answer_late"]), st.integers(0, 9))))
def test_no_late_answer_is_written_into_memory_that_another_request_has(steps: list[tuple[str, int]]) -> None:
    async def main() -> None:
        registry = Registry()
        late = Late(Slots(3, 4096, registry.register, registry.end, shared_memory=True))
        for step, number in steps:
            if step == "ask":
                await late.ask()
            else:
                getattr(late, step)(number)
            late.check()

    asyncio.run(main())


async def test_an_old_region_that_is_reported_lost_again_changes_nothing(slots: Slots, registry: Registry) -> None:
    old, other = [await slots.lease(soon()) for _ in range(2)]
    slots.abandon(old)
    slots.lost(old.region)
    new = await slots.lease(soon())
    slots.abandon(other)
    slots.lost(other.region)
    slots.release(new)
    assert (await slots.lease(soon())).region is new.region
    assert len(registry.regions) == 2


async def test_where_it_cannot_be_mapped_tensors_have_to_do(slots: Slots, registry: Registry) -> None:
    registry.takes = False
    for _ in range(5):
        lease = await slots.lease(soon())
        assert lease.region is None
        slots.release(lease)
    assert len(registry.regions) == 1


@pytest.mark.parametrize("again", [False, True])
async def test_memory_that_is_full_is_asked_for_again_after_a_while(
    slots: Slots, registry: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, again: bool
) -> None:
    if again:
        monkeypatch.setattr("compositor.triton.slots.AGAIN_S", 0)
    with monkeypatch.context() as patch:
        patch.setattr("os.posix_fallocate", full)
        for _ in range(3):
            lease = await slots.lease(soon())
            assert lease.region is None
            slots.release(lease)
    words = f"no shared memory (No space left on device): mouths come as tensors for {0 if again else 30} s"
    assert caplog.messages == [words] * (3 if again else 1)
    assert ((await slots.lease(soon())).region is not None) == again
    assert len(registry.regions) == again


def full(*arguments: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


async def test_a_registration_that_fails_costs_no_leave(slots: Slots, registry: Registry) -> None:
    registry.fault = TritonUnavailable("gone")
    for _ in range(10):
        with pytest.raises(TritonUnavailable):
            await slots.lease(soon())
    registry.fault = None
    leases = [await slots.lease(soon()) for _ in range(3)]
    assert all(lease.region is registry.regions[-1] for lease in leases)


async def test_who_waits_and_goes_away_costs_no_leave(slots: Slots) -> None:
    leases = [await slots.lease(soon()) for _ in range(3)]
    waiting = [asyncio.create_task(slots.lease(soon())) for _ in range(5)]
    await asyncio.sleep(0)
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)
    for lease in leases:
        slots.release(lease)
    assert len(await asyncio.gather(*(slots.lease(soon()) for _ in range(3)))) == 3


async def test_without_memory_there_is_none(slots: Slots, registry: Registry) -> None:
    assert (await slots.lease(soon(), memory=False)).region is None
    assert (await Slots(1, 4096, registry.register, registry.end, shared_memory=False).lease(soon())).region is None
    assert registry.regions == []
