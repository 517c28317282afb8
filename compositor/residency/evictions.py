"""Who may be unloaded and who is: to make room, to keep some free, or for being idle."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence

from ..logs import fields
from ..settings import ResidencySettings
from .budget import Budget, Holding
from .headroom import Headroom
from .holdings import Holdings
from .host_lock import Note
from .models import Device, Observer, State
from .plan import leave_early
from .record import Model
from .usage import Usage, common_now_s

log = logging.getLogger(__name__)


class Evictions:
    """Chooses among the models of one server by their use, whoever uses them, and tells the server to unload them."""

    def __init__(
        self,
        holdings: Holdings,
        settings: ResidencySettings,
        devices: Sequence[Device],
        observe: Observer,
        clock: Callable[[], float],
    ) -> None:
        self._holdings, self._settings, self._observe, self._clock = holdings, settings, observe, clock
        self._devices = [device.name for device in devices]
        self._usage = Usage(settings.half_life_s)
        self._pinned = frozenset(settings.pinned)
        most = max(1, settings.max_models // 10) if settings.headroom is None else settings.headroom
        self.headroom = Headroom(min(most, settings.max_models - 1))

    def now_s(self) -> float:
        """Seconds since 1970."""
        return common_now_s(self._clock(), self._holdings.uses)

    async def survey(self, notes: Mapping[str, Note] | None = None) -> None:
        """Reads the server's statistics, by which all else is judged. notes: of the lock, where it is held.

        Raises LipsyncError.
        """
        for model in await self._holdings.survey(self.now_s, notes):
            if model.leases:
                self._observe.lost_race()
        self._usage.observe(self._holdings.uses, self.now_s())

    def budget(self) -> Budget:
        """The budgets, with all that the server holds."""
        return Budget(self._settings, self._devices, self._holdings.holdings())

    def candidates(self) -> list[Holding]:
        """Who may be unloaded, in the order of leaving."""
        now_s = self.now_s()
        last_s = {name: self._holdings.last_s(name) for name in self._holdings.names() if self._is_free(name, now_s)}
        order = self._usage.first_to_leave(self._settings.policy, last_s, now_s)
        return [self._holdings.holding(name) for name in order]

    def surplus(self) -> tuple[list[str], list[str]]:
        """Who leaves though nobody waits for room: the idle and the removed; and as many as the headroom takes."""
        candidates, budget, now_s = self.candidates(), self.budget(), self.now_s()
        idle = [each for each in candidates if self._is_done_with(each.model, now_s)]
        for each in idle:
            budget.leave(each)
        rest = [each for each in candidates if each not in idle]
        return [each.model for each in idle], leave_early(self.headroom.places, budget, rest)

    async def evict(self, names: Sequence[str], ahead: Sequence[str] = ()) -> list[Model]:
        """Tells the server to unload these; none of them can be leased from now on. ahead: these, too, for whoever
        comes next."""
        models, now_s = [self._holdings.model(name) for name in (*names, *ahead)], self.now_s()
        self.headroom.left(ahead, now_s)
        for model in models:
            age_s = max(0.0, now_s - self._holdings.since_s(model.name))
            about = fields(model=model.name, triton=self._holdings.endpoint, age_s=age_s)
            log.info("%s is evicted %.0f s after its load", model.name, age_s, extra=about)
            self._observe.evicted(age_s)
            self._holdings.mark_leaving(model)
        await asyncio.gather(*(self._holdings.unload(model) for model in models))
        return models

    def retry_s(self) -> float:
        """After how long somebody may have become free to leave."""
        now_s, wait_s = self.now_s(), self._settings.min_resident_s
        waits = [self._holdings.last_s(name) + wait_s - now_s for name in self._holdings.names()]
        return max(0.2, min([wait for wait in waits if wait > 0], default=1.0))

    def tell(self) -> None:
        """Tells the observer what the devices hold."""
        for device, total in self.budget().now.items():
            self._observe.occupied(device, total.models, total.bytes)

    def _is_done_with(self, name: str, now_s: float) -> bool:
        idle_s = self._settings.idle_s
        return self._holdings.facts(name).gone or 0 < idle_s <= now_s - self._holdings.last_s(name)

    def _is_free(self, name: str, now_s: float) -> bool:
        model = self._holdings.models.get(name)
        if name in self._pinned or not self._holdings.facts(name).evictable:
            return False
        if model is not None and (model.leases or model.arrival or model.state not in (State.ABSENT, State.READY)):
            return False
        return now_s - self._holdings.last_s(name) >= self._settings.min_resident_s
