"""Whether live sessions are late, as measured, and whether one more may begin: ticks that were shown and pictures that
were due come in, each late or not; a share, and a refusal or none, go out. Pure.

Time goes in slots of `SLOT_S`. The share is the median of the last `SLOTS` whole ones, so that a single stall, however
deep, is no reason to refuse anybody, and an overload is one after three of them; it is over once all of them have at
most half the share that made it one. What a new session weighs shows only once it has spoken: so all but the first few
come one by one, after an overload more slowly; and while one is new, a single late slot is enough to wait for the next.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal

Reason = Literal["max_sessions", "late", "burst"]

SLOT_S = 0.5
SLOTS = 5
LATE_S = 0.04
"""What a tick may be shown after its time; at less than 25 frames a second, a frame's period."""
SETTLED_S = 2.0
"""Age at which a session that speaks is measured with the others: its lookahead, and three slots."""
CAREFUL_S = 30.0
"""How long after an overload sessions come at least SETTLED_S apart."""
_LEAST_COUNT, _LEAST_LATE = 5, 2
"""Ticks, or pictures, and late ones among them, without which a slot says nothing."""
_MANY = 16
"""Sessions beyond which more than one may begin in a second."""
_RETRY_S = (3.0, 30.0)


@dataclass(frozen=True)
class Refusal:
    """Why a session may not begin, and when to come back."""

    reason: Reason
    message: str
    retry_after_s: float


class Window:
    """The late ones among what was counted of late; `add` is called at every picture of every session."""

    __slots__ = ("_count", "_late", "_shares")

    def __init__(self) -> None:
        self._count = self._late = 0
        self._shares = deque([0.0] * SLOTS, SLOTS)

    def add(self, late: bool) -> None:
        """One more in the slot that is not whole yet."""
        self._count += 1
        self._late += late

    def close(self, slots: int) -> None:
        """The slot is whole, and those behind it, so many together, had nothing in them."""
        says_something = self._count >= _LEAST_COUNT and self._late >= _LEAST_LATE
        share = self._late / self._count if says_something else 0.0
        self._shares.extend([share, *[0.0] * min(slots - 1, SLOTS)])
        self._count = self._late = 0

    @property
    def share(self) -> float:
        """The median of the whole slots' shares of late ones, 0 to 1."""
        return sorted(self._shares)[SLOTS // 2]

    @property
    def last(self) -> float:
        """The share of the last whole slot."""
        return self._shares[-1]

    @property
    def worst(self) -> float:
        """The greatest of these shares."""
        return max(self._shares)


class Pressure:
    """How late the live sessions of a process are. All times are seconds of one clock, which never goes back."""

    def __init__(self, most_late: float, burst: int) -> None:
        """most_late: the share of late ones above which no session begins, 0 to 1; at 1 nothing is refused. burst: so
        many sessions may begin at once; others one a second, or a sixteenth of all where these are more."""
        self._most_late, self._burst = most_late, burst
        self.share = 0.0
        """Of ticks, or of pictures where that is more, that were late."""
        self.late_since_s: float | None = None
        """Since when no session may begin; None: they may."""
        self._careful_until_s = float("-inf")
        self._ticks, self._pictures = Window(), Window()
        self._slot: int | None = None

    def tick(self, now_s: float, *, late: bool) -> bool:
        """A tick of a session was shown; whether a slot has become whole, and `share` is new."""
        renewed = self.look(now_s)
        self._ticks.add(late)
        return renewed

    def picture(self, now_s: float, *, late: bool) -> None:
        """A predicted picture was there in time, or not."""
        self.look(now_s)
        self._pictures.add(late)

    def look(self, now_s: float) -> bool:
        """Takes in that time has passed; whether `share` is new."""
        slot = int(now_s / SLOT_S)
        if slot == self._slot:
            return False
        passed = SLOTS if self._slot is None else slot - self._slot
        self._slot = slot
        for window in (self._ticks, self._pictures):
            window.close(passed)
        self._judge(now_s)
        return True

    def _judge(self, now_s: float) -> None:
        self.share = max(self._ticks.share, self._pictures.share)
        if self.late_since_s is None:
            if self.share > self._most_late:
                self.late_since_s = now_s
        elif max(self._ticks.worst, self._pictures.worst) <= self._most_late / 2:
            self.late_since_s, self._careful_until_s = None, now_s + CAREFUL_S

    def forget(self) -> None:
        """What was measured says nothing of the sessions to come: all others have gone, or there was no Triton."""
        self._ticks, self._pictures = Window(), Window()
        self.share, self.late_since_s, self._careful_until_s = 0.0, None, float("-inf")

    def refusal(self, now_s: float, sessions: int, newest_s: float, *, speaking: bool) -> Refusal | None:
        """Why one more session may not begin beside so many, of which the last began at `newest_s`; None: it may.
        speaking: whether one of them speaks. One that speaks is always let in, or two that do not."""
        self.look(now_s)
        if self._most_late >= 1 or not sessions or (sessions == 1 and not speaking):
            return None
        if self.late_since_s is not None:
            # As long again as it has been so: who is refused again and again comes ever less often.
            shortest_s, longest_s = _RETRY_S
            retry_s = min(longest_s, max(shortest_s, round(now_s - self.late_since_s)))
            return Refusal("late", "busy: one more session would make all of them late", retry_s)
        age_s = now_s - newest_s
        if age_s < SETTLED_S and max(self._ticks.last, self._pictures.last) > self._most_late:
            return Refusal("late", "busy: the sessions that have just begun may be too many already", SETTLED_S)
        if age_s < self._gap_s(now_s, sessions):
            return Refusal("burst", "busy: another session has only just begun", SETTLED_S)
        return None

    def _gap_s(self, now_s: float, sessions: int) -> float:
        """The least time between the begins of two sessions."""
        if now_s < self._careful_until_s:
            return SETTLED_S
        return 0.0 if sessions < self._burst else min(1.0, _MANY / sessions)
