"""Loads of one server: who waits for a model comes in, and goes on when it is loaded or cannot be.

Loads begin in the order in which they were asked for, as room and the bound on loads at once allow. From the look at
what the server holds until the end of the load, no other compositor of the host loads or evicts.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from ..errors import LipsyncError, Overloaded, Stopping, TenantBroken, TritonUnavailable
from ..logs import fields, of_nobody
from ..settings import ResidencySettings
from ..triton.connection import ModelNotLoaded
from .budget import MB, Holding
from .evictions import Evictions
from .holdings import Holdings
from .host_lock import HostLock
from .models import Device, Facts, Observer, OutOfMemory, Server, State
from .plan import DeviceOrder, Plan, Wish, make_plan
from .record import Failure, Model

log = logging.getLogger(__name__)


class Loads:
    """The queue of loads, and those under way."""

    def __init__(
        self,
        server: Server,
        settings: ResidencySettings,
        facts: Callable[[str], Facts],
        devices: Sequence[Device],
        placement: DeviceOrder,
        holdings: Holdings,
        evictions: Evictions,
        lock: HostLock,
        observe: Observer,
    ) -> None:
        self._server, self._settings, self._facts, self._observe = server, settings, facts, observe
        self._devices = {device.name: device for device in devices}
        self._placement, self._holdings, self._evictions, self._lock = placement, holdings, evictions, lock
        self._queue: list[Model] = []
        self._changed = asyncio.Event()
        self._allotting: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        """Models that wait for their load to begin."""
        return len(self._queue)

    def ask(self, model: Model) -> asyncio.Future[None]:
        """Done when the model is loaded; its error says why it is not."""
        if model.arrival is None:
            loop = asyncio.get_running_loop()
            model.arrival, model.asked_s = loop.create_future(), loop.time()
            self._holdings.refresh(model.name)
            self._queue.append(model)
            if model.state is State.DRAINING:
                self._holdings.became(model, State.ABSENT)
            self._hurry()
        model.unwanted = False
        return model.arrival

    def withdraw(self, model: Model) -> None:
        """Nobody waits for it any more: what has not begun does not begin."""
        if model in self._queue:
            self._settle(model, Stopping("nobody waits for it"))
            self._changed.set()

    def notice(self, error: LipsyncError | None) -> None:
        """Something changed at the server, or it cannot be told."""
        if error is not None:
            self._refuse_all(error)
        self._changed.set()

    async def close(self) -> None:
        """Ends what is under way; who waits gets Stopping."""
        self._refuse_all(Stopping("the service stops"))
        tasks = [*self._tasks, *([self._allotting] if self._allotting else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        # Those whose task was cancelled before it began.
        for model in list(self._holdings.models.values()):
            self._settle(model, Stopping("the service stops"))

    # The queue.

    def _hurry(self) -> None:
        self._changed.set()
        if self._allotting is None or self._allotting.done():
            self._allotting = of_nobody(self._allot())

    async def _allot(self) -> None:
        """Serves the queue until it is empty, each time that something changed."""
        while self._queue:
            self._changed.clear()
            try:
                async with self._lock.held():
                    await self._evictions.survey(self._lock.notes)
                    await self._carry_out(self._plan())
            except LipsyncError as error:
                self._refuse_all(error)
            except Exception as error:
                log.exception("no load into %s could be begun", self._server.endpoint)
                self._refuse_all(LipsyncError(f"no load could be begun: {error}"))
            if self._queue:
                await self._changed.wait()

    def _plan(self) -> Plan:
        wishes = [self._wish(model) for model in self._queue]
        most = self._settings.concurrent_loads - len(self._tasks)
        budget, candidates = self._evictions.budget(), self._evictions.candidates()
        return make_plan(wishes, budget, candidates, self._placement, most, self._evictions.headroom.places)

    def _wish(self, model: Model) -> Wish:
        facts, leaving = self._holdings.facts(model.name), model.state is State.UNLOADING
        held = not leaving and self._holdings.has(model.name)
        place = self._holdings.place(model.name) if held else None
        blocked = leaving or (model.after is not None and model.after.state is State.UNLOADING)
        return Wish(Holding(model.name, place, facts.bytes, facts.evictable), held, blocked)

    async def _carry_out(self, plan: Plan) -> None:
        for name in plan.refusals:
            self._settle(self._holdings.model(name), self._refusal(name))
        self._evictions.headroom.waits(plan.waits)
        for name, device in plan.grants.items():
            if not self._holdings.has(name):
                self._evictions.headroom.loads(name, self._evictions.now_s())
            self._begin(self._holdings.model(name), self._devices[device])
        await self._evictions.evict(plan.evictions, plan.ahead)

    def _refusal(self, name: str) -> Overloaded:
        size_mb = self._holdings.facts(name).bytes / MB
        if 0 < self._settings.max_mb < size_mb:
            return Overloaded(f"{name!r} takes {size_mb:.0f} MB: more than residency.max_mb allows for all models")
        words = f"no room for {name!r}: the models that are loaded are in use, or were a moment ago"
        return Overloaded(words, retry_after_s=self._evictions.retry_s())

    def _refuse_all(self, error: LipsyncError) -> None:
        for model in list(self._queue):
            self._settle(model, error)

    def _settle(self, model: Model, error: LipsyncError | None) -> None:
        """Whoever waits for the model goes on."""
        if model in self._queue:
            self._queue.remove(model)
        arrival, model.arrival, model.after = model.arrival, None, None
        if arrival is not None and not arrival.done():
            if error is None:
                arrival.set_result(None)
            else:
                arrival.set_exception(error)
                arrival.exception()  # perhaps nobody waits
        self._holdings.discard(model)

    # One load.

    def _begin(self, model: Model, device: Device) -> None:
        self._queue.remove(model)
        self._holdings.became(model, State.LOADING)
        self._lock.share()
        task = of_nobody(self._load(model, device))
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._lock.release()
        self._changed.set()

    async def _load(self, model: Model, device: Device) -> None:
        begin_s = asyncio.get_running_loop().time()
        try:
            await self._install(model, device)
            await self._warm(model)
        except asyncio.CancelledError:
            self._holdings.became(model, State.ABSENT)
            self._settle(model, Stopping("the service stops"))
            raise
        except OutOfMemory as error:
            await self._make_room(model, device, error)
        except ModelNotLoaded:
            # Another compositor unloaded it before its first inference.
            self._observe.lost_race()
            self._holdings.became(model, State.UNLOADING)
            self._again(model)
        except LipsyncError as error:
            self._failed(model, error)
        except Exception as error:
            log.exception("the load of %s failed", model.name)
            self._failed(model, LipsyncError(f"the load of {model.name!r} failed: {error}"))
        else:
            await self._loaded(model, begin_s)

    async def _install(self, model: Model, device: Device) -> None:
        """Loads the files as they are at its end."""
        while True:
            stamp = self._facts(model.name).stamp
            if not self._is_there(model, device, stamp):
                self._holdings.put(model, device)
                # Others shall know of it even if this process is killed, or gets no answer.
                self._note(model.name, ())
                self._lock.save()
                await self._server.load(model.name, device.gpu)
                self._note(model.name, stamp or ())
            # Those that were replaced meanwhile may have been read before or after.
            if self._facts(model.name).stamp == stamp:
                model.stamp = stamp
                return

    def _is_there(self, model: Model, device: Device, stamp: tuple[int, ...] | None) -> bool:
        """Whether another compositor of this host has loaded these files there: a load that names a GPU would load
        them again."""
        return (
            device.gpu is not None
            and self._holdings.has(model.name)
            and self._holdings.place(model.name) == device.name
            and bool(stamp)
            and self._lock.notes.get(model.name, ())[1:] == stamp
        )

    def _note(self, name: str, stamp: tuple[int, ...]) -> None:
        names = set(self._holdings.names())
        notes = {each: note for each, note in self._lock.notes.items() if each in names}
        self._lock.notes = {**notes, name: (time.time_ns(), *stamp)}

    async def _warm(self, model: Model) -> None:
        try:
            await self._server.warm(model.name)
        except (ModelNotLoaded, TritonUnavailable):
            raise
        except LipsyncError as error:
            # It is loaded; what is wrong with it, the first request tells its caller.
            log.warning("%s is loaded and does not answer: %s", model.name, error.message)

    async def _loaded(self, model: Model, begin_s: float) -> None:
        load_s, waited_s = asyncio.get_running_loop().time() - begin_s, begin_s - model.asked_s
        about = fields(model=model.name, triton=self._server.endpoint, load_s=load_s, waited_s=waited_s)
        words = "%s loaded in %.3f s after %.3f s in the queue"
        log.info(words, model.name, load_s, waited_s, extra=about)
        self._observe.loaded(load_s, waited_s)
        model.failure, model.loaded_s = None, self._evictions.now_s()
        self._holdings.became(model, State.READY)
        self._settle(model, None)
        self._evictions.tell()
        if model.unwanted:
            await self._holdings.drain(model)

    def _failed(self, model: Model, error: LipsyncError) -> None:
        self._observe.load_failed()
        # After another error Triton may go on with it: it counts until the index says otherwise.
        state = State.UNLOADING
        if isinstance(error, (TenantBroken, OutOfMemory)):
            state = State.ABSENT
            self._lock.notes.pop(model.name, None)
        if isinstance(error, TenantBroken):
            until_s = asyncio.get_running_loop().time() + self._settings.failed_s
            model.failure = Failure(error, self._facts(model.name).stamp, until_s)
        self._holdings.became(model, state)
        self._settle(model, error)

    async def _make_room(self, model: Model, device: Device, error: OutOfMemory) -> None:
        """The device had less room than was thought: one model leaves and the load is tried once more."""
        candidates: list[Holding] = []
        try:
            await self._evictions.survey(self._lock.notes)
            candidates = [each for each in self._evictions.candidates() if each.device in (device.name, None)]
        except LipsyncError as trouble:
            log.debug("%s: %s", self._server.endpoint, trouble.message)
        if model.after is not None or not candidates:
            self._failed(model, OutOfMemory(error.message, retry_after_s=self._evictions.retry_s()))
            return
        log.warning("%s: %s; %s leaves for it", model.name, error.message, candidates[0].model)
        [model.after] = await self._evictions.evict([candidates[0].model])
        self._lock.notes.pop(model.name, None)
        self._holdings.became(model, State.ABSENT)
        self._again(model)

    def _again(self, model: Model) -> None:
        """First in the queue once more."""
        if model.waiting:
            self._queue.insert(0, model)
            self._hurry()
        else:
            self._settle(model, Stopping("nobody waits for it"))
