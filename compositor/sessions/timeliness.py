"""Requests for a tenant's frames, by the time at which these are due: those that are not worth making are refused, and
of each picture it is counted whether it came in time."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Sequence

from ..call import Stages
from ..clock import Clock
from ..errors import DeadlinePassed, Overloaded
from .pressure import Pressure
from .shedding import Shedding
from .stage import Ask


class Timeliness:
    """One tenant's requests, as part of what the process has to do."""

    def __init__(self, tenant: Hashable, pressure: Pressure, clock: Clock) -> None:
        self._tenant, self._pressure, self._clock = tenant, pressure, clock
        self._shedding = Shedding()

    def check(self, asks: Sequence[Ask]) -> None:
        """Raises Overloaded where a request for these frames is not worth making: the answer would come too late."""
        now_s = self._clock.now_s()
        if self._shedding.worthless(now_s, max(ask.due_s for ask in asks)):
            self._count(asks, now_s, late=True)
            raise Overloaded("more pictures are wanted than can be made in time", retry_after_s=1)

    @contextlib.contextmanager
    def request(self, asks: Sequence[Ask], stages: Stages) -> Iterator[None]:
        """The block is a request for these frames, and `stages` its times.

        One that had to wait for its model, or found no Triton, says nothing of how much there is to do.
        """
        number = self._shedding.begin(self._clock.now_s())
        late = False
        try:
            yield
            now_s = self._clock.now_s()
            late = any(ask.due_s < now_s for ask in asks) and not stages.load_s
            if not stages.load_s:
                self._count(asks, now_s, late=False)
        except (Overloaded, DeadlinePassed):
            late = not stages.load_s
            if late:
                self._count(asks, self._clock.now_s(), late=True)
            raise
        finally:
            self._shedding.end(number, self._clock.now_s(), late=late)

    def _count(self, asks: Sequence[Ask], now_s: float, *, late: bool) -> None:
        """late: they will not come any more."""
        for ask in asks:
            self._pressure.picture(now_s, self._tenant, late=late or ask.due_s < now_s)
