"""Which models one Triton holds: loaded on first use, once for all who wait, and unloaded to make room for others.

Several compositors share a Triton without talking to each other: its statistics say what is loaded and how it is used,
and a lock of the host keeps their decisions apart. What Triton answers has the last word: a request that finds its
model gone makes its caller `forget` it and ask for it again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from types import TracebackType

from ..deadline import Deadline
from ..errors import DeadlinePassed, LipsyncError, Overloaded, Stopping, TritonUnavailable
from ..settings import ResidencySettings
from .budget import Holding
from .evictions import Evictions
from .holdings import Holdings
from .host_lock import HostLock
from .loads import Loads
from .models import Device, Facts, ModelReport, Observer, OutOfMemory, Server, State, Unobserved, Use
from .plan import DeviceOrder, Policy
from .record import Model

__all__ = [
    "Device",
    "Facts",
    "Lease",
    "ModelReport",
    "Observer",
    "OutOfMemory",
    "Residency",
    "Server",
    "State",
    "Unobserved",
    "Use",
]

log = logging.getLogger(__name__)

_START_S = 600.0
"""How long pinned and preloaded models are tried to be loaded, each time that they are."""


class Lease:
    """The right to send requests to a model while the block lasts: it is not unloaded from here."""

    __slots__ = ("_deadline", "_model", "_name", "_residency")

    def __init__(self, residency: Residency, name: str, deadline: Deadline) -> None:
        self._residency, self._name, self._deadline = residency, name, deadline
        self._model: Model | None = None

    async def __aenter__(self) -> None:
        self._model = await self._residency._enter(self._name, self._deadline)

    async def __aexit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._model is not None:
            self._residency._leave(self._model)


class Residency:
    """The models of one server."""

    def __init__(
        self,
        server: Server,
        settings: ResidencySettings,
        facts: Callable[[str], Facts],
        devices: Sequence[Device],
        observe: Observer,
        placement: Policy,
        *,
        lock: HostLock | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """facts: of a model by its name, from the files, quickly. devices: one at least. clock: seconds since 1970."""
        self._server, self._settings, self._facts, self._observe = server, settings, facts, observe
        self._lock = lock or HostLock(server.endpoint)
        self._devices = [device.name for device in devices]
        self._holdings = Holdings(server, facts, devices, self._notice)
        self._evictions = Evictions(self._holdings, settings, devices, observe, clock)
        self._loads = Loads(
            server,
            settings,
            facts,
            devices,
            DeviceOrder(placement, self._devices),
            self._holdings,
            self._evictions,
            self._lock,
            observe,
        )
        self._leases = 0
        self._closed = False
        self._starting: asyncio.Task[None] | None = None
        self._preload = list(dict.fromkeys(settings.preload))
        """What is still to be loaded, once."""
        self._complaints: dict[str, str] = {}

    def __contains__(self, name: object) -> bool:
        """Whether the model is loaded, and its requests need not wait."""
        model = self._holdings.models.get(str(name))
        return model is not None and (model.state is State.READY or self._is_kept(model))

    def lease(self, name: str, deadline: Deadline) -> Lease:
        """`async with` it: enters when the model is loaded, and raises what `ensure` raises."""
        return Lease(self, name, deadline)

    @property
    def load(self) -> float:
        """Leases under way."""
        return float(self._leases)

    async def ensure(self, name: str, deadline: Deadline) -> None:
        """Returns when the model is loaded. A caller that goes away does not stop the load for the others.

        Raises TenantBroken, Overloaded where there is no room, DeadlinePassed, TritonUnavailable, Stopping.
        """
        model = self._holdings.model(name)
        try:
            if not self._usable(model):
                self._check(model)
                await self._wait(model, deadline)
        finally:
            self._holdings.discard(model)

    def forget(self, name: str, *, lost: bool = False) -> None:
        """The model is not loaded any more; the next lease loads it unless the server has it.

        lost: a request found that the server does not have the model any more.
        """
        model = self._holdings.models.get(name)
        if model is None or model.state not in (State.READY, State.DRAINING):
            return
        if lost and model.state is State.READY:
            self._observe.lost_race()
        # Who unloaded it may not be done with it.
        self._holdings.became(model, State.UNLOADING if lost else State.ABSENT)

    def replaced(self, name: str) -> None:
        """The model's files may be others now: if so, the next lease loads them."""
        model = self._holdings.models.get(name)
        if model is not None and self._facts(name).stamp != model.stamp:
            self.forget(name)

    def forget_all(self) -> None:
        """The server was restarted."""
        self._holdings.clear()

    async def drop(self, name: str) -> None:
        """Unloads a model that was loaded from here, after the requests under way.

        Not one that is pinned or, as an audio encoder, everybody's, unless its files are gone.
        """
        model, facts = self._holdings.models.get(name), self._facts(name)
        if model is None or (facts.stamp is not None and (name in self._settings.pinned or not facts.evictable)):
            return
        if model.state is State.LOADING:
            model.unwanted = True
        elif model.state is State.READY:
            await self._holdings.drain(model)

    def room(self) -> bool:
        """Whether one more model would fit without unloading one that is in use."""
        candidates, budget = self._evictions.candidates(), self._evictions.budget()
        wish, places = Holding("", None, 0, counted=True), len(self._loads) + 1
        return any(
            budget.fits_soon(wish, device, [each for each in candidates if each.device in (device, None)], places)
            for device in self._devices
        )

    def report(self) -> list[ModelReport]:
        """All models that the server holds, or that are waited for."""
        return [self._report(name) for name in dict.fromkeys([*self._holdings.names(), *self._holdings.models])]

    async def watch(self) -> None:
        """Loads what is pinned or preloaded, and keeps the server's models in order, until it is cancelled."""
        while True:
            if self._starting is None or self._starting.done():
                self._starting = asyncio.create_task(self._start())
            try:
                await self._sweep()
            except LipsyncError as error:
                log.debug("%s: %s", self._server.endpoint, error.message)
            except Exception:
                log.exception("the look at the models of %s failed", self._server.endpoint)
            await asyncio.sleep(self._settings.sweep_s)

    async def close(self) -> None:
        """Ends what is under way. Models stay loaded."""
        self._closed = True
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        await self._loads.close()
        await self._holdings.close()
        self._lock.close()

    async def _enter(self, name: str, deadline: Deadline) -> Model:
        model = self._holdings.model(name)
        # Who waits counts as well, so that the model is not evicted between its load and the first request.
        model.leases += 1
        self._leases += 1
        try:
            if self._usable(model):
                self._observe.hit()
            else:
                self._observe.miss()
                await self.ensure(name, deadline)
        except BaseException:
            self._leave(model)
            raise
        return model

    def _leave(self, model: Model) -> None:
        model.leases -= 1
        self._leases -= 1
        if not model.leases:
            self._holdings.let_go(model)

    def _usable(self, model: Model) -> bool:
        if self._is_kept(model):
            self._holdings.became(model, State.READY)
        return model.state is State.READY

    def _is_kept(self, model: Model) -> bool:
        """Whether it stays, if it is wanted: whoever dropped it did not know that, and its files are the same."""
        return model.state is State.DRAINING and self._facts(model.name).stamp == model.stamp is not None

    def _check(self, model: Model) -> None:
        """Raises what is known to stand in the way."""
        if self._closed:
            raise Stopping("the service stops")
        failure, model.failure = model.failure, None
        if failure is None or asyncio.get_running_loop().time() >= failure.until_s:
            return
        if self._facts(model.name).stamp == failure.stamp:
            model.failure = failure
            raise failure.error.with_traceback(None)

    async def _wait(self, model: Model, deadline: Deadline) -> None:
        left_s = deadline.remaining_s()
        arrival = self._loads.ask(model)
        model.waiting += 1
        try:
            await asyncio.wait((arrival,), timeout=left_s)
            if not arrival.done():
                raise self._too_late(model)
            arrival.result()
        finally:
            model.waiting -= 1
            if not model.waiting:
                self._loads.withdraw(model)

    def _too_late(self, model: Model) -> LipsyncError:
        if model.state is State.LOADING:
            return DeadlinePassed(f"{model.name!r} was not loaded before the deadline")
        words = f"{model.name!r} waited for others to be loaded or unloaded until its deadline"
        return Overloaded(words, retry_after_s=self._evictions.retry_s())

    def _notice(self, error: LipsyncError | None) -> None:
        self._loads.notice(error)

    async def _start(self) -> None:
        """Loads models, one after the other, so that those who wait for theirs come in between."""
        for name in self._settings.pinned:
            await self._start_tenant(name)
        for name in list(self._preload):
            if await self._start_tenant(name):
                self._preload.remove(name)

    async def _start_tenant(self, name: str) -> bool:
        """Loads a model and, before it, the audio encoder that it needs; whether both are settled, loaded or not."""
        names = filter(None, (self._facts(name).encoder, name))
        errors = [await self._start_one(each) for each in names]
        return not any(isinstance(error, TritonUnavailable) for error in errors)

    async def _start_one(self, name: str) -> LipsyncError | None:
        """Loads a model, or says why it is not."""
        try:
            await self.ensure(name, Deadline.after(_START_S))
        except LipsyncError as error:
            if self._complaints.get(name) != error.message:
                log.warning("%s is not loaded at the start: %s", name, error.message)
            self._complaints[name] = error.message
            return error
        self._complaints.pop(name, None)
        return None

    async def _sweep(self) -> None:
        self._holdings.refresh()
        self._holdings.forgive(asyncio.get_running_loop().time())
        self._observe.leased(self._leases)
        await self._evictions.survey()
        if any(self._evictions.surplus()):
            async with self._lock.held():
                await self._evictions.survey(self._lock.notes)
                await self._evictions.evict(*self._evictions.surplus())
        self._evictions.tell()

    def _report(self, name: str) -> ModelReport:
        holding, model = self._holdings.holding(name), self._holdings.model(name)
        use = self._holdings.uses.get(name, Use(0, 0.0))
        state = State.LOADING if model.arrival and model.state is State.ABSENT else model.state
        self._holdings.discard(model)
        return ModelReport(
            name=name,
            state=state,
            device=holding.device or "",
            bytes=holding.bytes,
            leases=model.leases,
            uses=use.count,
            last_use_s=use.last_s,
            pinned=name in self._settings.pinned,
        )
