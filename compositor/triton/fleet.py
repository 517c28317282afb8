"""All Triton servers as one: a model and a request for it go in, its answer comes out, from whichever server has the
model or gets it.

Requests are repeated where that helps: the model is not loaded any more, or the server cannot be reached; then on
another server, if there is one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncExitStack,
    asynccontextmanager,
    nullcontext,
)
from functools import partial
from typing import TypeVar

from ..deadline import Deadline
from ..errors import LipsyncError, Overloaded, TritonUnavailable
from ..residency.models import Device, Facts, Observer, Unobserved
from ..residency.residency import Residency
from ..settings import Settings
from .connection import ModelNotLoaded, RegionLost
from .endpoint import Endpoint, EndpointReport
from .homecoming import Homecoming
from .inference import Triton
from .placement import Placement, models_of, ranked, tenant_of

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")
_BACK_OFF_S = 0.05


class _Full(Exception):
    """A server has no room for the model."""

    def __init__(self, endpoint: Endpoint, reason: Overloaded) -> None:
        super().__init__(endpoint.name)
        self.endpoint = endpoint
        self.reason = reason


class Fleet:
    """The Triton servers that the compositor asks."""

    def __init__(self, endpoints: Sequence[Endpoint], settings: Settings) -> None:
        self._endpoints = tuple(endpoints)
        self._restart_wait_s = settings.triton.restart_wait_s
        self._placement = Placement(self._endpoints, settings.triton.slots)
        self._homecoming = Homecoming(
            self._placement, settings.triton.load_timeout_s, settings.residency.min_resident_s
        )

    async def serve(
        self,
        model: str,
        deadline: Deadline,
        request: Callable[[Triton], Awaitable[Answer]],
        loading: Callable[[], AbstractContextManager[None]] = nullcontext,
        tenant: str = "",
    ) -> Answer:
        """The answer to a request to a model, which stays loaded meanwhile.

        The model is loaded first if need be, within `loading()`. The request may be made several times, and is no
        longer under way when this returns or raises. tenant: on whose behalf it is, where the model's name does not
        say it: an audio encoder is asked, and loaded, where those are who need it. Raises what the request and a load
        raise, Overloaded where no server has room, and TritonUnavailable where none could be reached for
        `triton.restart_wait_s`; while there is another to ask, that time does not count.
        """
        own = tenant_of(model)
        if tenant and own != tenant:
            self._homecoming.encoders.add(model)
        tenant = tenant or own
        give_up: Deadline | None = None
        full: list[Endpoint] = []
        failed: list[Endpoint] = []
        reason: Overloaded | None = None
        while True:
            endpoint = self._placement.find(tenant, model, full)
            if endpoint is None and reason is not None:
                raise reason
            falls = endpoint.falls if endpoint else 0
            try:
                if endpoint is None:
                    raise TritonUnavailable("Triton cannot be reached; it may be restarting", retry_after_s=1)
                lease: AbstractAsyncContextManager[None] = endpoint.residency.lease(model, deadline)
                if model not in endpoint.residency:
                    lease = self._awaited(lease, endpoint, model, loading)
                async with lease:
                    return await request(endpoint.triton)
            except _Full as error:
                full.append(error.endpoint)
                reason = error.reason
                continue
            except ModelNotLoaded:
                assert endpoint
                endpoint.residency.forget(model, lost=True)
            except TritonUnavailable as error:
                # Without its region Triton is there, and restarted: the next request brings it a new one.
                if endpoint:
                    failed.append(endpoint)
                    if not isinstance(error, RegionLost):
                        endpoint.failed(falls)
                give_up = give_up or Deadline.after(self._restart_wait_s)
                left_s = min(give_up.at_s, deadline.at_s) - time.monotonic()
                if left_s <= _BACK_OFF_S and (isinstance(error, RegionLost) or not self._is_another([*failed, *full])):
                    raise
            await asyncio.sleep(min(_BACK_OFF_S, deadline.remaining_s()))

    def _is_another(self, tried: Collection[Endpoint]) -> bool:
        """Whether there is a server to ask besides those."""
        return any(endpoint.up and endpoint not in tried for endpoint in self._endpoints)

    @asynccontextmanager
    async def _awaited(
        self,
        lease: AbstractAsyncContextManager[None],
        endpoint: Endpoint,
        model: str,
        loading: Callable[[], AbstractContextManager[None]],
    ) -> AsyncIterator[None]:
        """A lease whose model has to be loaded. Others that ask for it meanwhile wait there, too."""
        async with AsyncExitStack() as stack:
            try:
                with loading(), self._placement.waiting(model):
                    await stack.enter_async_context(lease)
            except Overloaded as error:
                raise _Full(endpoint, error) from error
            yield

    def replaced(self, tenant: str) -> None:
        """The tenant's files may be others now: if so, its models are loaded again before they are used again."""
        for endpoint in self._endpoints:
            for model in models_of(tenant):
                endpoint.residency.replaced(model)

    async def drop(self, tenant: str) -> None:
        """The tenant's files are gone: its models are unloaded."""
        self._placement.forget(tenant)
        for endpoint in self._endpoints:
            await _drop(tenant, endpoint)

    async def ready(self) -> bool:
        """Whether at least one server answers and takes requests."""
        return any(endpoint.ready for endpoint in self._endpoints)

    async def watch(self) -> None:
        """What goes on besides requests, until it is cancelled: the servers' health and their models' residency."""
        await asyncio.gather(
            *(endpoint.watch() for endpoint in self._endpoints),
            *(endpoint.residency.watch() for endpoint in self._endpoints),
            self._homecoming.watch(),
        )

    def report(self) -> list[EndpointReport]:
        """Every server and its models."""
        return [endpoint.report() for endpoint in self._endpoints]

    async def close(self) -> None:
        """Ends loads and requests that are under way, and the connections."""
        for endpoint in self._endpoints:
            await endpoint.residency.close()
            await endpoint.triton.close()


async def _drop(tenant: str, endpoint: Endpoint) -> None:
    try:
        for model in models_of(tenant):
            await endpoint.residency.drop(model)
    except LipsyncError as error:
        log.info("models of %s may be left on %s: %s", tenant, endpoint.name, error.message)


def open_fleet(
    settings: Settings,
    facts: Callable[[str], Facts],
    observe: Callable[[str], Observer] = lambda endpoint: Unobserved(),
    told: Callable[[str, bool], None] = lambda endpoint, up: None,
) -> Fleet:
    """The fleet that the settings describe; nothing is connected or loaded yet.

    facts: what the files say of a model. observe: gives each server, by its address, its models' observer. told: hears
    of each server whether it is up. Tenants that are pinned or preloaded are so at home only.
    """
    devices = [Device(f"gpu{gpu}", gpu) for gpu in settings.triton.gpus] or [Device("cpu", None)]

    def endpoint(name: str) -> Endpoint:
        triton = Triton(settings.triton, name, settings.model_repository)

        def at_home(tenants: Sequence[str]) -> tuple[str, ...]:
            return tuple(tenant for tenant in tenants if ranked(tenant, settings.triton.endpoints)[0] == name)

        chosen = settings.residency
        own = chosen.model_copy(update={"pinned": at_home(chosen.pinned), "preload": at_home(chosen.preload)})
        residency = Residency(triton, own, facts, devices, observe(name), settings.triton.placement)
        return Endpoint(triton, residency, partial(told, name))

    return Fleet([endpoint(name) for name in dict.fromkeys(settings.triton.endpoints)], settings)
