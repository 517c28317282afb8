"""Which of a tenant's requests for frames are not worth making: those whose answer would come after its frames are due.

Where more is asked for than can be made, a queue grows until every answer is late, and the work on all of them is lost.
What is dropped before it is begun keeps the queue so short that what is begun comes in time. Pure.
"""

from __future__ import annotations

BEHIND_S = 2.0
"""How long after an answer that came late others are held to be at risk."""
_AGED = 0.5
"""Part of the time left to a request that the oldest one under way may have taken already."""


class Shedding:
    """One tenant's requests under way. All times are seconds of one clock."""

    def __init__(self) -> None:
        self._begun_s: dict[int, float] = {}  # the oldest first
        self._count = 0
        self._behind_until_s = float("-inf")

    def worthless(self, now_s: float, due_s: float) -> bool:
        """Whether a request for frames that are due at `due_s`, made now, would be answered too late.

        That is foreseen only where answers were late of late: from how long the oldest request under way has been
        waiting. A model that is slow, but in time, loses nothing.
        """
        if due_s <= now_s:
            return True
        if now_s >= self._behind_until_s or not self._begun_s:
            return False
        return now_s - next(iter(self._begun_s.values())) > _AGED * (due_s - now_s)

    def begin(self, now_s: float) -> int:
        """A request is made; its number."""
        self._count += 1
        self._begun_s[self._count] = now_s
        return self._count

    def end(self, number: int, now_s: float, *, late: bool) -> None:
        """It was answered, too late or not, or has failed."""
        del self._begun_s[number]
        if late:
            self._behind_until_s = now_s + BEHIND_S
