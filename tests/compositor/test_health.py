from __future__ import annotations

import logging

import pytest

from compositor.errors import DiskFull, LipsyncError, Stopping, TritonUnavailable
from compositor.health import Health


class Watched:
    """A health whose check gives what it is told to, and what it told others."""

    def __init__(self) -> None:
        self.fault: LipsyncError | Exception | None = None
        self.told: list[bool] = []
        self.health = Health(self._check, self._changed)

    async def _check(self) -> LipsyncError | None:
        if self.fault is not None and not isinstance(self.fault, LipsyncError):
            raise self.fault
        return self.fault

    async def _changed(self, serving: bool) -> None:
        self.told.append(serving)

    async def update(self, fault: LipsyncError | Exception | None) -> bool:
        self.fault = fault
        await self.health.update()
        return self.health.serving


async def test_only_changes_are_told() -> None:
    watched = Watched()
    gone = TritonUnavailable("Triton does not answer")
    assert [await watched.update(fault) for fault in (gone, None, None, gone, None)] == [
        False,
        True,
        True,
        False,
        True,
    ]
    assert watched.told == [True, False, True]


async def test_the_reason_is_kept_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "compositor.health")
    watched = Watched()
    assert watched.health.fault is not None, "nothing was checked yet"
    for _ in range(2):
        await watched.update(None)
        for _ in range(2):
            await watched.update(DiskFull("/tmp: full"))
    await watched.update(TritonUnavailable("Triton does not answer"))
    assert caplog.messages == ["ready to serve", "not ready: /tmp: full"] * 2 + ["not ready: Triton does not answer"]
    assert watched.told == [True, False, True, False]


async def test_a_check_that_fails_is_a_fault() -> None:
    watched = Watched()
    await watched.update(None)
    assert not await watched.update(ValueError("unforeseen"))
    assert watched.health.fault is not None
    assert "the health check itself failed" in watched.health.fault.message


@pytest.mark.parametrize("serving", [True, False])
async def test_a_service_that_stops_stays_so(serving: bool) -> None:
    watched = Watched()
    await watched.update(None if serving else DiskFull("/tmp: full"))
    await watched.health.stop()
    assert isinstance(watched.health.fault, Stopping)
    assert not await watched.update(None)
    assert watched.told == ([True, False] if serving else [])
