"""Leave to send requests, and the memory that goes with it."""

from __future__ import annotations

import asyncio
import errno
import os

import pytest

from compositor.deadline import Deadline
from compositor.errors import Overloaded, TritonUnavailable
from compositor.triton.shared_memory import Region
from compositor.triton.slots import MOST_REGIONS, Slots


class Registry:
    """Where regions are registered; `fault` is raised instead."""

    def __init__(self) -> None:
        self.regions: list[Region] = []
        self.takes = True
        self.fault: Exception | None = None

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
    return Slots(3, 4096, registry.register, shared_memory=True)


def soon() -> Deadline:
    return Deadline.after(5)


async def test_each_lease_has_a_slot_of_its_own(slots: Slots, registry: Registry) -> None:
    leases = await asyncio.gather(*(slots.lease(soon()) for _ in range(3)))
    assert sorted(lease.slot for lease in leases) == [0, 1, 2]
    assert {lease.region for lease in leases} == set(registry.regions)
    with pytest.raises(Overloaded):
        await slots.lease(Deadline.after(0.01))
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


async def test_regions_are_bounded_until_triton_is_restarted(slots: Slots, registry: Registry) -> None:
    for _ in range(3 * MOST_REGIONS):
        slots.abandon(await slots.lease(soon()))
    assert len(registry.regions) == MOST_REGIONS
    assert (await slots.lease(soon())).region is None
    slots.lost(None)
    assert (await slots.lease(soon())).region is registry.regions[-1]
    assert len(registry.regions) == MOST_REGIONS + 1


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
    assert (await Slots(1, 4096, registry.register, shared_memory=False).lease(soon())).region is None
    assert registry.regions == []
