"""What one server holds, by its statistics, which name what is loaded by whomever, and by what was asked of it here.

A model counts from before its load until the server's index says that it is gone. The index is costly where thousands
of models are installed, and is read only while something is leaving.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence

from ..errors import LipsyncError
from ..logs import of_nobody
from .budget import Holding
from .host_lock import Note
from .models import Device, Facts, Server, State, Use
from .record import Model

log = logging.getLogger(__name__)

POLL_S = 0.1
"""Least time between two looks at the index; more where a look takes more than a fifth of it."""
_POLL_SHARE = 5
_TROUBLE_S = 1.0
_HELD = (State.LOADING, State.READY, State.DRAINING, State.UNLOADING)


class Holdings:
    """The models of one server. `notify` is told when room may have come up, with an error where that is not known."""

    def __init__(
        self,
        server: Server,
        facts: Callable[[str], Facts],
        devices: Sequence[Device],
        notify: Callable[[LipsyncError | None], None],
    ) -> None:
        self.endpoint = server.endpoint
        self.models: dict[str, Model] = {}
        self.uses: dict[str, Use] = {}
        self.seen_s: dict[str, float] = {}
        """Since when the server has had each model, as far as known; seconds since 1970."""
        self._server, self._read_facts, self._devices, self._notify = server, facts, devices, notify
        self._facts: dict[str, Facts] = {}
        self._places: dict[str, str | None] = {}
        self._compared: Mapping[str, Note] = {}
        self._ticks = itertools.count(1)
        self._surveyed = 0
        self._indexed = False
        self._indexing = asyncio.Lock()
        self._following: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def tick(self) -> int:
        """A moment: later ones are more."""
        return next(self._ticks)

    def model(self, name: str) -> Model:
        """What is known of a model, from now on also if nothing was."""
        return self.models.setdefault(name, Model(name))

    def discard(self, model: Model) -> None:
        """Forgets a model of which nothing is known any more."""
        if model.state is State.ABSENT and not (model.leases or model.waiting or model.arrival or model.failure):
            self.models.pop(model.name, None)

    def facts(self, name: str) -> Facts:
        """What the files say of a model, as of its load or the last `refresh`."""
        if name not in self._facts:
            self._facts[name] = self._read_facts(name)
        return self._facts[name]

    def refresh(self, name: str | None = None) -> None:
        """Facts are read from the files again."""
        self._facts = {} if name is None else {each: self._facts[each] for each in self._facts if each != name}

    def became(self, model: Model, state: State) -> None:
        model.state, model.changed = state, self.tick()
        if state is State.UNLOADING:
            self._follow()
        self.discard(model)

    def let_go(self, model: Model) -> None:
        """Its last lease ended."""
        if model.state is State.DRAINING and not self._closed:
            self.mark_leaving(model)
            task = of_nobody(self.unload(model))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        self.discard(model)

    def put(self, model: Model, device: Device) -> None:
        """The load of a model onto a device begins."""
        self._places[model.name] = device.name

    def has(self, name: str) -> bool:
        """Whether the server's statistics, when last read, had the model."""
        return name in self.uses

    def place(self, name: str) -> str | None:
        """The device of a model that the server holds; None: all of them."""
        return self._devices[0].name if len(self._devices) == 1 else self._places.get(name)

    def names(self) -> list[str]:
        """All that takes memory."""
        own = [name for name, model in self.models.items() if model.state in _HELD]
        return list(dict.fromkeys([*self.uses, *own]))

    def holding(self, name: str) -> Holding:
        """What a model takes."""
        facts, known = self.facts(name), self.models.get(name)
        leaving = known is not None and known.state is State.UNLOADING
        return Holding(name, self.place(name), facts.bytes, facts.evictable, leaving)

    def holdings(self) -> list[Holding]:
        """All that takes memory, or will until it is seen to be gone."""
        return [self.holding(name) for name in self.names()]

    def last_s(self, name: str) -> float:
        """When a model was last used or, where it never was, loaded; seconds since 1970."""
        known, use = self.models.get(name), self.uses.get(name)
        loaded_s = known.loaded_s if known and known.state is not State.ABSENT else 0.0
        used_s = use.last_s if use else 0.0
        return max(used_s or self.seen_s.get(name, 0.0), loaded_s)

    def since_s(self, name: str) -> float:
        """Since when the server has had a model, as far as known; seconds since 1970."""
        known = self.models.get(name)
        return max(self.seen_s.get(name, 0.0), known.loaded_s if known else 0.0)

    async def survey(self, now: Callable[[], float], notes: Mapping[str, Note] | None = None) -> list[Model]:
        """Reads the server's statistics; which models were loaded for us and are not any more.

        now: seconds since 1970. notes: of the host's lock, where it is held. Raises LipsyncError.
        """
        async with self._indexing:
            if not self._indexed:
                await self._read_index()
        begun = self.tick()
        uses = await self._server.uses()
        if begun < self._surveyed:
            return []
        self._surveyed = begun
        gone = self._take_in(uses, begun)
        if notes is not None:
            self._compare(notes)
        self.seen_s = {name: self.seen_s.get(name, now()) for name in self.names()}
        await self._find_places()
        return gone

    async def drain(self, model: Model) -> None:
        """Unloads a model that is loaded, at once or when its last lease ends."""
        self.became(model, State.DRAINING)
        if not model.leases:
            self.mark_leaving(model)
            await self.unload(model)

    def mark_leaving(self, model: Model) -> None:
        """It takes no leases any more; `unload` follows."""
        # No look at the server counts that began before the server was told.
        model.state, model.changed = State.UNLOADING, math.inf

    async def unload(self, model: Model) -> None:
        """Tells the server to unload a model that was marked; it counts until it is gone."""
        try:
            await self._server.unload(model.name)
        except LipsyncError as error:
            log.warning("%s was not told to unload: %s", model.name, error.message)
        finally:
            if model.state is State.UNLOADING:
                self.became(model, State.UNLOADING)

    def clear(self) -> None:
        """The server holds nothing: it was restarted. What is being loaded fails by itself."""
        self._surveyed, self._indexed, self.uses, self._places = self.tick(), False, {}, {}
        for model in list(self.models.values()):
            if model.state is not State.LOADING:
                self.became(model, State.ABSENT)
        self._notify(None)

    def forgive(self, now_s: float) -> None:
        """Forgets failures whose time is over, by the event loop's clock."""
        for model in list(self.models.values()):
            if model.failure is not None and now_s >= model.failure.until_s:
                model.failure = None
                self.discard(model)

    async def close(self) -> None:
        """Ends what is under way."""
        self._closed = True
        tasks = [*self._tasks, *([self._following] if self._following else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _take_in(self, uses: dict[str, Use], begun: int) -> list[Model]:
        gone = []
        own = [name for name, model in self.models.items() if model.state in (State.READY, State.DRAINING)]
        for name in {*self.uses, *own} - uses.keys():
            model = self.model(name)
            if model.state not in (State.LOADING, State.UNLOADING) and model.changed < begun:
                # Somebody else unloads it.
                gone += [model] if model.state is not State.ABSENT else []
                self.became(model, State.UNLOADING)
        for name in uses:
            known = self.models.get(name)
            if known is not None and known.state is State.UNLOADING and known.changed < begun:
                # Somebody else loaded it again, or it was never unloaded.
                self.became(known, State.ABSENT)
                self._notify(None)  # its load may be what waits for its end
        self.uses = uses
        names = set(self.names())
        self._places = {name: place for name, place in self._places.items() if name in names}
        self._facts = {name: facts for name, facts in self._facts.items() if name in names}
        return gone

    def _compare(self, notes: Mapping[str, Note]) -> None:
        """Takes in what compositors of this host have loaded since the last look."""
        held, compared = set(self.names()), self._compared
        self._compared = dict(notes)
        for name, note in notes.items():
            if compared.get(name) != note:
                if name not in held:
                    # It came and went, and may not be gone yet.
                    self.became(self.model(name), State.UNLOADING)
                elif self.model(name).state is not State.LOADING:
                    self._places.pop(name, None)

    async def _find_places(self) -> None:
        """Where the models are that others loaded."""
        if len(self._devices) == 1:
            return
        devices = {device.gpu: device.name for device in self._devices}
        for name in [name for name in self.uses if name not in self._places]:
            with contextlib.suppress(LipsyncError):
                self._places[name] = devices.get(await self._server.placed(name))

    async def _read_index(self) -> None:
        """What was on its way when this process came."""
        states = await self._server.states()
        self._indexed = True
        for name, state in states.items():
            if state in ("LOADING", "UNLOADING") and self.model(name).state is State.ABSENT:
                self.became(self.model(name), State.UNLOADING)

    def _leaving(self) -> list[Model]:
        return [model for model in self.models.values() if model.state is State.UNLOADING]

    def _follow(self) -> None:
        if not self._closed and (self._following is None or self._following.done()):
            self._following = of_nobody(self._follow_leaving())

    async def _follow_leaving(self) -> None:
        """Until all that is leaving is gone."""
        loop, pause_s = asyncio.get_running_loop(), POLL_S
        while self._leaving():
            await asyncio.sleep(pause_s)
            begun, begun_s = self.tick(), loop.time()
            try:
                states = await self._server.states()
            except LipsyncError as error:
                pause_s = _TROUBLE_S
                self._notify(error)
            except Exception:
                log.exception("the index of %s cannot be read", self._server.endpoint)
                pause_s = _TROUBLE_S
            else:
                pause_s = max(POLL_S, _POLL_SHARE * (loop.time() - begun_s))
                self._see_off(states, begun)

    def _see_off(self, states: dict[str, str], begun: int) -> None:
        """Takes in the index: who is leaving no more."""
        for model in self._leaving():
            if model.changed < begun and states.get(model.name) not in ("LOADING", "UNLOADING"):
                if states.get(model.name) == "READY":
                    self.uses.setdefault(model.name, Use(0, 0.0))
                else:
                    self.uses.pop(model.name, None)
                self.became(model, State.ABSENT)
                self._notify(None)
