"""All Triton servers as one: a model and a request for it go in, its answer comes out, from whichever server has the
model or gets it.

Requests are repeated where that helps: the model is not loaded any more, or the server cannot be reached, or failed as
a broken one would; then on another server, if there is one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
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
from ..errors import DeadlinePassed, InferenceFailed, LipsyncError, Overloaded, TenantBroken, TritonUnavailable
from ..residency.models import Facts, Observer, Unobserved, devices_of
from ..residency.residency import Residency
from ..settings import Settings
from .connection import ModelNotLoaded, RegionLost, Unresponsive
from .endpoint import Endpoint, EndpointReport
from .examination import Examiner
from .homecoming import Homecoming
from .inference import Triton
from .opinions import Opinions
from .placement import Placement, models_of, ranked, tenant_of

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")
_BACK_OFF_S = 0.05


class _Full(Exception):
    """A server has no room for the model."""

    def __init__(self, reason: Overloaded) -> None:
        super().__init__(reason.message)
        self.reason = reason


class _Search:
    """Where one request goes, and whether it goes on when it failed there."""

    def __init__(
        self, placement: Placement, restart_wait_s: float, tenant: str, model: str, deadline: Deadline
    ) -> None:
        self._placement, self._restart_wait_s = placement, restart_wait_s
        self._tenant, self._model, self._deadline = tenant, model, deadline
        self._full: list[Endpoint] = []
        self._reason: Overloaded | None = None
        self._tried: list[Endpoint] = []
        """Where it failed, for want of room or of an answer."""
        self._silent: list[Endpoint] = []
        """Those that others are asked before."""
        self._end_s: float | None = None
        """When it ends, once a server could not be reached."""

    def endpoint(self) -> Endpoint | None:
        """The next to ask; None: none is up but those without room. Raises Overloaded where it is of no use to wait for
        another, which is so once every other has been down for `restart_wait_s`."""
        find = self._placement.find
        endpoint = find(self._tenant, self._model, [*self._full, *self._silent])
        if endpoint is None and self._silent:
            self._silent.clear()
            endpoint = find(self._tenant, self._model, self._full)
        if endpoint is None and self._reason and not self._placement.may_return(self._full, self._restart_wait_s):
            raise self._reason
        return endpoint

    def is_full(self, endpoint: Endpoint, reason: Overloaded) -> None:
        """Raises the reason where there is no time left to ask another."""
        if self._deadline.at_s <= time.monotonic():
            raise reason
        self._full.append(endpoint)
        self._tried.append(endpoint)
        self._reason = reason

    def is_unavailable(self, endpoint: Endpoint | None, falls: int, error: TritonUnavailable) -> None:
        """Raises the error, or that the others have no room, where waiting and asking them does not help any more.

        falls: how often the server had been down when it was asked.
        """
        # Without its region Triton is there, and restarted: the next request brings it a new one.
        restarted = isinstance(error, RegionLost)
        if endpoint is not None:
            self._tried.append(endpoint)
            if isinstance(error, Unresponsive):
                self._silent.append(endpoint)
            elif not restarted:
                endpoint.failed(falls)
        now_s = time.monotonic()
        if self._end_s is None:
            self._end_s = min(now_s + self._restart_wait_s, self._deadline.at_s)
        if self._end_s - now_s <= _BACK_OFF_S and (restarted or not self._placement.has_others(self._tried)):
            raise self._reason or error


class Fleet:
    """The Triton servers that the compositor asks."""

    def __init__(self, endpoints: Sequence[Endpoint], settings: Settings, facts: Callable[[str], Facts]) -> None:
        """facts: what the files say of a model."""
        self._endpoints = tuple(endpoints)
        self._restart_wait_s = settings.triton.restart_wait_s
        self._placement = Placement(self._endpoints, settings.triton.slots)
        self._homecoming = Homecoming(
            self._placement, settings.triton.load_timeout_s, settings.residency.min_resident_s, facts
        )
        self._opinions = Opinions(self._placement, self._homecoming.leave)
        self._examiner = Examiner(self._endpoints, settings.triton.load_timeout_s, facts)

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
        longer awaited when this returns or raises; Triton may still be at one whose caller is gone. tenant: on whose
        behalf it is, where the model's name does not say it: an audio encoder is asked, and loaded, where those are who
        need it. Raises what the request and a load raise, Overloaded where no server has room, and TritonUnavailable
        where none could be reached for `triton.restart_wait_s`; while there is another to ask, that time does not
        count. A server that went down less than that ago is waited for, too, where all others are full. What failed as
        it would at a broken server is made once more at another that has the model or room for it (`opinions`).
        """
        tenant = tenant or tenant_of(model)
        search = _Search(self._placement, self._restart_wait_s, tenant, model, deadline)
        ask = partial(self._ask, model, deadline, request, loading)
        if tenant in self._opinions.unanswered and (answered := await self._opinions.first(tenant, model, ask)):
            return answered[0]
        while True:
            endpoint = search.endpoint()
            falls = endpoint.falls if endpoint else 0
            try:
                if endpoint is None:
                    raise TritonUnavailable("Triton cannot be reached; it may be restarting", retry_after_s=1)
                async with self._lease(endpoint, model, deadline, loading):
                    try:
                        return await request(endpoint.triton)
                    except (InferenceFailed, TenantBroken) as error:
                        if not self._opinions.doubts(error, endpoint, model):
                            raise
                        fault = error
                    except (DeadlinePassed, Overloaded, asyncio.CancelledError):
                        # A caller whose deadline has passed is often seen to leave first. Those behind it never got to
                        # be sent.
                        self._opinions.gave_up(endpoint, tenant, model)
                        raise
                return await self._opinions.second(fault, endpoint, tenant, model, ask)
            except _Full as error:
                assert endpoint
                search.is_full(endpoint, error.reason)
                continue
            except ModelNotLoaded:
                assert endpoint
                endpoint.residency.forget(model, lost=True)
            except TritonUnavailable as error:
                search.is_unavailable(endpoint, falls, error)
            await asyncio.sleep(min(_BACK_OFF_S, deadline.remaining_s()))

    async def _ask(
        self,
        model: str,
        deadline: Deadline,
        request: Callable[[Triton], Awaitable[Answer]],
        loading: Callable[[], AbstractContextManager[None]],
        endpoint: Endpoint,
    ) -> Answer:
        """The answer to a request that is made at this server only; twice where it had lost what the first needs."""

        async def once() -> Answer:
            async with self._lease(endpoint, model, deadline, loading):
                return await request(endpoint.triton)

        try:
            try:
                return await once()
            except ModelNotLoaded:
                endpoint.residency.forget(model, lost=True)
            except RegionLost as error:
                log.debug("%s: %s", endpoint.name, error.message)
            return await once()
        except _Full as error:
            raise error.reason from error

    def _lease(
        self, endpoint: Endpoint, model: str, deadline: Deadline, loading: Callable[[], AbstractContextManager[None]]
    ) -> AbstractAsyncContextManager[None]:
        lease = endpoint.residency.lease(model, deadline)
        return lease if model in endpoint.residency else self._awaited(lease, model, loading)

    @asynccontextmanager
    async def _awaited(
        self,
        lease: AbstractAsyncContextManager[None],
        model: str,
        loading: Callable[[], AbstractContextManager[None]],
    ) -> AsyncIterator[None]:
        """A lease whose model has to be loaded. Others that ask for it meanwhile wait there, too."""
        async with AsyncExitStack() as stack:
            try:
                with loading(), self._placement.waiting(model):
                    await stack.enter_async_context(lease)
            except Overloaded as error:
                raise _Full(error) from error
            yield

    def replaced(self, tenant: str) -> None:
        """The tenant's files may be others now: if so, its models are loaded again before they are used again."""
        self._opinions.forget(tenant)
        for endpoint in self._endpoints:
            for model in models_of(tenant):
                endpoint.breaker.forget(model)
                endpoint.residency.replaced(model)

    async def drop(self, tenant: str) -> None:
        """The tenant's files are gone: its models are unloaded."""
        self._placement.forget(tenant)
        self._opinions.forget(tenant)
        for endpoint in self._endpoints:
            for model in models_of(tenant):
                endpoint.breaker.forget(model)
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
            self._examiner.watch(),
        )

    def report(self) -> list[EndpointReport]:
        """Every server and its models."""
        return [endpoint.report() for endpoint in self._endpoints]

    async def close(self) -> None:
        """Ends loads and requests that are under way, and the connections."""
        await asyncio.gather(*(_close(endpoint) for endpoint in self._endpoints))


async def _close(endpoint: Endpoint) -> None:
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
    queued: Callable[[float], None] = lambda seconds: None,
    told_works: Callable[[str, bool], None] = lambda endpoint, works: None,
) -> Fleet:
    """The fleet that the settings describe; nothing is connected or loaded yet.

    facts: what the files say of a model. observe: gives each server, by its address, its models' observer. told: hears
    of each server whether it is up. queued: hears how long each request waited for its turn to be sent. told_works:
    hears of each server whether inference works there. Tenants that are pinned or preloaded are so at home only.
    """
    devices = devices_of(settings.triton.gpus)

    def endpoint(name: str) -> Endpoint:
        triton = Triton(settings.triton, name, settings.model_repository, queued)

        def at_home(tenants: Sequence[str]) -> tuple[str, ...]:
            return tuple(tenant for tenant in tenants if ranked(tenant, settings.triton.endpoints)[0] == name)

        chosen = settings.residency
        own = chosen.model_copy(update={"pinned": at_home(chosen.pinned), "preload": at_home(chosen.preload)})
        residency = Residency(triton, own, facts, devices, observe(name), settings.triton.placement)
        return Endpoint(triton, residency, partial(told, name), partial(told_works, name))

    return Fleet([endpoint(name) for name in dict.fromkeys(settings.triton.endpoints)], settings, facts)
