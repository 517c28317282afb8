"""Which of a tenant's requests for frames are not worth making: those whose answer would come after its frames are due.

Where more is asked for than can be made, a queue grows until every answer is late, and the work on all of them is lost.
What is dropped before it is begun keeps the queue so short that what is begun comes in time. Pure.
"""

from __future__ import annotations

BEHIND_S = 5.0
"""How long after a late answer more is held to be asked for than can be made."""
_MANY_LATE, _NEWEST_LATE = 0.25, 1 / 32
"""The share of late answers from which on that is so, and the weight of the newest in it: ten in a row, or more than a
stall makes."""
_TAKEN = (0.2, 1.0)
"""Part of the time left to a request that may be taken already, at least and at most. It differs from request to
request: with one bound for all, those that come first in every tick would get in, and the last ones never."""
_GOLDEN = (5**0.5 - 1) / 2
"""Multiples of it, less their whole parts, fill 0 to 1 evenly, and so do every second, third, ... of them."""
_NEWEST = 1 / 16
"""Weight of the newest answer in how far answers are apart."""


class Shedding:
    """One tenant's requests under way. All times are seconds of one clock."""

    def __init__(self) -> None:
        self._begun_s: dict[int, float] = {}  # the oldest first
        self._count = 0
        self._asked = 0
        self._apart_s = 0.0  # answers, while there is something to answer
        self._ended_s = self._behind_until_s = float("-inf")
        self._late = 0.0  # the share of late answers

    def worthless(self, now_s: float, due_s: float) -> bool:
        """Whether a request for frames that are due at `due_s`, made now, would be answered too late.

        That is foreseen only where many answers were late: from how many are under way and how far answers are apart,
        and from how long the oldest has been waiting. A stall, or a model that is slow, but in time, loses nothing.
        """
        if due_s <= now_s:
            return True
        if now_s >= self._behind_until_s or not self._begun_s:
            return False
        self._asked += 1
        least, most = _TAKEN
        taken = least + (most - least) * (self._asked * _GOLDEN % 1)
        return self._wait_s(now_s) > taken * (due_s - now_s)

    def _wait_s(self, now_s: float) -> float:
        """How long a request made now would wait for its answer, as far as can be seen."""
        oldest_s = next(iter(self._begun_s.values()))
        worked_s = min(self._apart_s, now_s - max(oldest_s, self._ended_s))
        return max(now_s - oldest_s, (len(self._begun_s) + 1) * self._apart_s - worked_s)

    def begin(self, now_s: float) -> int:
        """A request is made; its number."""
        self._count += 1
        self._begun_s[self._count] = now_s
        return self._count

    def end(self, number: int, now_s: float, *, late: bool) -> None:
        """It was answered, too late or not, or has failed."""
        apart_s = now_s - max(self._begun_s.pop(number), self._ended_s)
        self._apart_s += _NEWEST * (apart_s - self._apart_s)
        self._ended_s = now_s
        self._late += _NEWEST_LATE * (late - self._late)
        if late and (self._late > _MANY_LATE or now_s < self._behind_until_s):
            self._behind_until_s = now_s + BEHIND_S
