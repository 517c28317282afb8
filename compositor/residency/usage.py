"""How much each model is used, and who leaves first: counts and moments go in, names in order come out.

Only arithmetic. A frame inferred counts one, and half of that after each half-life. What is known of a model outlives
its unloading, so that a favourite that was evicted is one again when it comes back.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from .models import Use

Policy = Literal["lfu", "lru"]
MOST_REMEMBERED = 16_384
"""Models, loaded or not, whose use is remembered."""


@dataclass
class _Tally:
    frames: float
    """Decayed, as of `at_s`."""
    at_s: float
    counted: int
    """The server's count when it was last looked at."""


class Usage:
    """The use of every model that was seen of late."""

    def __init__(self, half_life_s: float, most: int = MOST_REMEMBERED) -> None:
        self._half_life_s = half_life_s
        self._most = most
        self._tallies: dict[str, _Tally] = {}

    def __len__(self) -> int:
        return len(self._tallies)

    def observe(self, uses: Mapping[str, Use], now_s: float) -> None:
        """Takes in the server's counts as of `now_s`, seconds since 1970. A count that shrank began anew at 0."""
        for model, use in uses.items():
            tally = self._tallies.setdefault(model, _Tally(0.0, now_s, 0))
            new = use.count - tally.counted if use.count >= tally.counted else use.count
            tally.frames, tally.at_s = self._decayed(tally, now_s) + new, max(now_s, tally.at_s)
            tally.counted = use.count
        self._forget_the_least(uses, now_s)

    def frames(self, model: str, now_s: float) -> float:
        """The decayed number of frames as of `now_s`; 0.0 for a model never seen."""
        tally = self._tallies.get(model)
        return self._decayed(tally, now_s) if tally else 0.0

    def first_to_leave(self, policy: Policy, last_s: Mapping[str, float], now_s: float) -> list[str]:
        """The models of `last_s` (their last use, seconds since 1970) in the order in which they should be unloaded.

        lfu: the fewest decayed frames first, of equals the longest unused. lru: the longest unused first.
        """
        if policy == "lru":
            return sorted(last_s, key=lambda model: (last_s[model], model))
        return sorted(last_s, key=lambda model: (self.frames(model, now_s), last_s[model], model))

    def _decayed(self, tally: _Tally, now_s: float) -> float:
        age_s = max(0.0, now_s - tally.at_s)
        # 2.0 ** -1100 underflows to 0.0, which is what it should be by then.
        return float(tally.frames * 2.0 ** (-age_s / self._half_life_s))

    def _forget_the_least(self, loaded: Mapping[str, Use], now_s: float) -> None:
        excess = len(self._tallies) - self._most
        if excess > 0:
            hints = [model for model in self._tallies if model not in loaded]
            for model in heapq.nsmallest(excess, hints, key=lambda model: (self.frames(model, now_s), model)):
                del self._tallies[model]


def common_now_s(clock_s: float, uses: Mapping[str, Use]) -> float:
    """The present by this host's clock, or by the server's where that is ahead, seconds since 1970."""
    return max([clock_s, *(use.last_s for use in uses.values())])
