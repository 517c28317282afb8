"""Brings tenants back to their home, which was down, failed, or had no room: each is loaded there, and answers there,
while it is still served elsewhere."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Hashable
from functools import partial

from ..deadline import Deadline
from ..errors import EncoderMissing, LipsyncError, Overloaded, TenantBroken
from ..residency.models import Facts
from .endpoint import Endpoint
from .placement import Placement, models_of, tenant_of

log = logging.getLogger(__name__)

PERIOD_S = 1.0
"""At most one tenant sets out in so long: its server has others to serve, and the loads cost them time."""
MOST_UNDER_WAY = 2
"""Tenants on their way to one server: one whose load takes long holds back no other."""
AGAIN_S = 10.0
"""A tenant that could not return is left where it is for so long."""


class Homecoming:
    """The way back of tenants that are elsewhere, and the end of the copies that they leave behind."""

    def __init__(
        self,
        placement: Placement,
        load_timeout_s: float,
        min_resident_s: float,
        facts: Callable[[str], Facts],
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """min_resident_s: a copy left behind goes when nobody, another compositor included, used it for so long. facts:
        what the files say of a model. now_s: seconds that only grow."""
        self._placement = placement
        self._load_timeout_s = load_timeout_s
        self._min_resident_s = min_resident_s
        self._facts = facts
        self._now_s = now_s
        self._homes: dict[str, Endpoint] = {}
        """Where those who have set out go."""
        self._again_s: dict[str, float] = {}
        """When those who could not return may try again."""
        self._left: defaultdict[Endpoint, dict[str, tuple[int, float]]] = defaultdict(dict)
        """Of each copy left behind: its count of uses, and since when that has stood still."""
        self._tasks: dict[Hashable, asyncio.Task[None]] = {}

    async def watch(self) -> None:
        """Runs until it is cancelled."""
        try:
            while True:
                await asyncio.sleep(PERIOD_S)
                try:
                    self.step()
                except Exception:
                    log.exception("looking for tenants to bring home failed")
        finally:
            for task in self._tasks.values():
                task.cancel()
            await self.settle()

    def step(self) -> None:
        """Lets one more tenant set out, and looks at what those before it left behind; waits for neither."""
        now_s = self._now_s()
        self._again_s = {tenant: at_s for tenant, at_s in self._again_s.items() if at_s > now_s}
        self._placement.look()
        found = self._placement.displaced(self._may_set_out) or self._placement.spilled(self._may_set_out)
        if found is not None:
            tenant, here, home = found
            self._homes[tenant] = home
            self._placement.disturb(home)
            self._begin(tenant, partial(self._bring, tenant, here, home))
        for endpoint, left in self._left.items():
            if left and endpoint not in self._tasks:
                self._begin(endpoint, partial(self._tidy, endpoint))

    async def settle(self) -> None:
        """Returns when what was begun has ended."""
        while self._tasks:
            await asyncio.wait(list(self._tasks.values()))

    def _may_set_out(self, tenant: str, home: Endpoint) -> bool:
        under_way = sum(each is home for each in self._homes.values())
        return tenant not in self._homes and tenant not in self._again_s and under_way < MOST_UNDER_WAY

    def _begin(self, key: Hashable, work: Callable[[], Awaitable[None]]) -> None:
        async def guarded() -> None:
            try:
                await work()
            except Exception:
                log.exception("bringing a tenant home failed")

        self._tasks[key] = task = asyncio.create_task(guarded())
        task.add_done_callback(lambda _: self._tasks.pop(key))

    async def _bring(self, tenant: str, here: Endpoint, home: Endpoint) -> None:
        own = [model for model in models_of(tenant) if model in here.residency]
        try:
            await self._load(tenant, own, here, home)
        except TenantBroken as error:
            log.warning("%s stays on %s: %s", tenant, here.name, error.message)
            self._placement.stay(tenant)
        except Overloaded as error:
            log.info("%s returns to %s when there is room: %s", tenant, home.name, error.message)
            self._placement.wait_for_room(tenant, home)
        except Exception as error:
            self._again_s[tenant] = self._now_s() + AGAIN_S
            if not isinstance(error, LipsyncError):
                raise
            log.info("%s cannot return to %s yet: %s", tenant, home.name, error.message)
        else:
            self._arrive(tenant, own, here, home)
        finally:
            del self._homes[tenant]

    async def _load(self, tenant: str, own: list[str], here: Endpoint, home: Endpoint) -> None:
        """Loads at home what the tenant has here, the audio encoder first, and makes an inference of what is its own.

        Raises what `Residency.ensure` and `Control.warm` raise, and EncoderMissing where the encoder does not load:
        which is not the tenant's fault, and may be mended for all.
        """
        deadline = Deadline.after(self._load_timeout_s)
        encoder = self._facts(tenant).encoder
        if encoder in here.residency:
            try:
                await home.residency.ensure(encoder, deadline)
            except TenantBroken as error:
                raise EncoderMissing(error.message) from error
        for model in own:
            await home.residency.ensure(model, deadline)
            # It may have been loaded all along, and have gone as its requests failed here.
            await home.triton.warm(model)

    def _arrive(self, tenant: str, own: list[str], here: Endpoint, home: Endpoint) -> None:
        if self._placement.at(tenant) is None:  # it was removed meanwhile
            return
        self._placement.move(tenant, home)
        log.info("%s is back on %s", tenant, home.name)
        for model in own:
            self.leave(here, model)

    def leave(self, endpoint: Endpoint, model: str) -> None:
        """A copy of a model is left behind there."""
        self._left[endpoint][model] = (-1, self._now_s())

    async def _tidy(self, endpoint: Endpoint) -> None:
        """Unloads the copies left there whose count of uses has stood still for long enough."""
        left = self._left[endpoint]
        try:
            uses = await endpoint.triton.uses()
            for model in list(left):
                count, since_s = left[model]
                use, now_s = uses.get(model), self._now_s()
                if use is None or not endpoint.up or self._placement.at(tenant_of(model)) is endpoint:
                    del left[model]
                elif use.count != count:
                    left[model] = (use.count, now_s)
                elif now_s - since_s >= self._min_resident_s:
                    del left[model]
                    await endpoint.residency.drop(model)
        except LipsyncError as error:
            log.info("copies are left on %s: %s", endpoint.name, error.message)
