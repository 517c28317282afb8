"""How many places are kept free, so that a load need not wait for another model's end: waits and loads go in, a number
comes out. Only arithmetic.

A free place saves the next newcomer a wait, and costs a load where the model that left for it is wanted again. So there
is one more after each wait for room, and one less after each model that returns before its place is taken, or so soon
that it should have stayed: where all that is wanted fits, none is kept, and where newcomers keep coming, as many as are
allowed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

SOON_S = 30.0
"""Who is wanted again after so long should not have left for a free place."""


class _Leave(NamedTuple):
    taken: int
    """The load after which, at the latest, its place is taken."""
    at_s: float


class Headroom:
    """The places to be kept free on each device of a server: `places`, from 0 to `most`. Moments are in seconds."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.places = min(1, most)
        self._waiting: set[str] = set()
        self._loads = 0
        self._left: dict[str, _Leave] = {}

    def waits(self, models: Collection[str]) -> None:
        """All that wait for room now."""
        self.places = min(self.most, self.places + len(set(models) - self._waiting))
        self._waiting = set(models)

    def left(self, models: Iterable[str], now_s: float) -> None:
        """They leave for a free place."""
        self._left = {model: leave for model, leave in self._left.items() if self._matters(leave, now_s)}
        self._left.update(dict.fromkeys(models, _Leave(self._loads + self.places, now_s)))

    def loads(self, model: str, now_s: float) -> None:
        """It takes a place."""
        leave = self._left.pop(model, None)
        if leave and self._matters(leave, now_s):
            self.places = max(0, self.places - 1)
        self._loads += 1

    def _matters(self, leave: _Leave, now_s: float) -> bool:
        return self._loads < leave.taken or now_s - leave.at_s < SOON_S
