"""Brings tenants back to their home, which was down or had no room: one at a time, loaded there while it is still
served elsewhere."""

from __future__ import annotations

import asyncio
import logging
import time

from ..deadline import Deadline
from ..errors import LipsyncError, Overloaded, TenantBroken
from .endpoint import Endpoint
from .placement import Placement, models_of, tenant_of

log = logging.getLogger(__name__)

PERIOD_S = 1.0
"""At most one tenant returns in so long: its server has others to serve, and the loads cost them time."""


class Homecoming:
    """The way back of tenants that are elsewhere, and the end of the copies that they leave behind."""

    def __init__(self, placement: Placement, load_timeout_s: float, min_resident_s: float) -> None:
        """min_resident_s: a copy left behind goes when nobody, another compositor included, used it for so long."""
        self._placement = placement
        self._load_timeout_s = load_timeout_s
        self._min_resident_s = min_resident_s
        self.encoders = set[str]()
        """Models that requests of any tenant may need: they are at home before it is."""
        self._left: dict[tuple[str, Endpoint], tuple[int, float]] = {}

    async def watch(self) -> None:
        """Runs until it is cancelled."""
        while True:
            await asyncio.sleep(PERIOD_S)
            try:
                await self.step()
            except Exception:
                log.exception("bringing a tenant home failed")

    async def step(self) -> None:
        """Brings one tenant home, and ends what those before it left behind."""
        self._placement.look()
        found = self._placement.displaced() or self._placement.spilled()
        if found is not None:
            await self._bring(*found)
        for (model, endpoint), seen in list(self._left.items()):
            await self._end(model, endpoint, *seen)

    async def _bring(self, tenant: str, here: Endpoint, home: Endpoint) -> None:
        deadline = Deadline.after(self._load_timeout_s)
        own = [model for model in models_of(tenant) if model in here.residency]
        encoders = [model for model in sorted(self.encoders) if model in here.residency]
        try:
            for model in encoders + own:
                await home.residency.ensure(model, deadline)
        except TenantBroken as error:
            log.warning("%s stays on %s: %s", tenant, here.name, error.message)
            self._placement.stay(tenant)
            return
        except Overloaded as error:
            log.info("%s returns to %s when there is room: %s", tenant, home.name, error.message)
            self._placement.wait_for_room(tenant, home)
            return
        except LipsyncError as error:
            log.info("%s cannot return to %s yet: %s", tenant, home.name, error.message)
            self._placement.postpone(tenant)
            return
        self._placement.move(tenant, home)
        log.info("%s is back on %s", tenant, home.name)
        for model in own:
            self._left[model, here] = (-1, time.monotonic())

    async def _end(self, model: str, endpoint: Endpoint, count: int, since_s: float) -> None:
        """Unloads a copy once its count of uses has stood still for long enough."""
        if not endpoint.up or self._placement.at(tenant_of(model)) is endpoint:
            del self._left[model, endpoint]
            return
        try:
            use = (await endpoint.triton.uses()).get(model)
            if use is None:
                del self._left[model, endpoint]
            elif use.count != count:
                self._left[model, endpoint] = (use.count, time.monotonic())
            elif time.monotonic() - since_s >= self._min_resident_s:
                del self._left[model, endpoint]
                await endpoint.residency.drop(model)
        except LipsyncError as error:
            log.info("%s is left on %s: %s", model, endpoint.name, error.message)
