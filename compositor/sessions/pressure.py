"""Whether live sessions are late, as measured, and whether one more may begin: ticks that were shown and pictures that
were due come in, each late or not; a share, and a refusal or none, go out. Pure.

Time goes in slots of `SLOT_S`. A share is the median of the last `SLOTS` whole ones: a single stall, however deep, is
no reason to refuse anybody, and keeps nobody out; an overload is one after three of them, and over after three calm
ones. Ticks are the process's, all sessions together. Pictures are judged tenant by tenant: one whose model is slow
keeps out its own sessions, and others only where most tenants are late, which is then no tenant's fault.

What a new session weighs shows only once it has spoken. So those beyond a burst come at a steady pace, after an
overload one by one; and while one is new, a single late slot is enough to wait for the next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
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
MANY = 16
"""Sessions beyond which more than one a second may begin in the long run: a part of all of so many."""
LONGEST_RETRY_S = 30.0
_SHORTEST_RETRY_S = 3.0
_LEAST_COUNT, _LEAST_LATE = 5, 2
"""Ticks, or pictures, and late ones among them, without which a slot says nothing."""


@dataclass(frozen=True)
class Refusal:
    """Why a session may not begin, and when to come back."""

    reason: Reason
    message: str
    retry_after_s: float


class Window:
    """The late ones among what was counted of late; `add` is called at every picture of every session."""

    __slots__ = ("_count", "_late", "_most_late", "_shares", "careful_until_s", "late_since_s", "share")

    def __init__(self, most_late: float) -> None:
        self._most_late = most_late
        self._count = self._late = 0
        self._shares = deque([0.0] * SLOTS, SLOTS)
        self.share = 0.0
        """The median of the whole slots' shares of late ones, 0 to 1."""
        self.late_since_s: float | None = None
        """Since when the share is above the most; None: it is not."""
        self.careful_until_s = float("-inf")
        """Until when sessions come one by one, since it was."""

    def add(self, late: bool) -> None:
        """One more in the slot that is not whole yet."""
        self._count += 1
        self._late += late

    def close(self, slots: int, now_s: float) -> None:
        """The slot is whole, and those behind it, so many together, had nothing in them."""
        says_something = self._count >= _LEAST_COUNT and self._late >= _LEAST_LATE
        share = self._late / self._count if says_something else 0.0
        self._count = self._late = 0
        self.push(share, slots, now_s)

    def push(self, share: float, slots: int, now_s: float) -> None:
        """The same, of which the share is known."""
        self._shares.extend([share, *[0.0] * min(slots - 1, SLOTS)])
        self.share = sorted(self._shares)[SLOTS // 2]
        if self.share <= self._most_late:
            if self.late_since_s is not None:
                self.careful_until_s = now_s + CAREFUL_S
            self.late_since_s = None
        elif self.late_since_s is None:
            self.late_since_s = now_s

    @property
    def last(self) -> float:
        """The share of the last whole slot."""
        return self._shares[-1]

    @property
    def counts(self) -> bool:
        """Whether so much has come in the present slot that it says something."""
        return self._count >= _LEAST_COUNT


class Pressure:
    """How late the live sessions of a process are. All times are seconds of one clock, which never goes back; tenants
    are told apart by any key."""

    def __init__(self, most_late: float, burst: int) -> None:
        """most_late: the share of late ones above which no session begins, 0 to 1; at 1 nothing is refused. burst: so
        many sessions may begin at once; in the long run one a second, or a part of all in `MANY` where that is more."""
        self._most_late, self._burst = most_late, burst
        self._slot: int | None = None
        self._refill_s = 0.0
        self.forget()

    def forget(self) -> None:
        """All sessions have gone: what was measured says nothing of those to come."""
        self.share = 0.0
        """Of ticks, or of the pictures of that tenant where it is most, that were late."""
        self._ticks, self._most_tenants = Window(self._most_late), Window(self._most_late)
        self._tenants: dict[Hashable, Window] = {}
        self._left = float(self._burst)  # sessions that may begin at once
        self._begun_s = float("-inf")  # the last session
        self._refused = 0  # since then, for coming too many at once

    def forget_tenant(self, tenant: Hashable) -> None:
        """Its last session has gone."""
        self._tenants.pop(tenant, None)

    def tick(self, now_s: float, *, late: bool) -> bool:
        """A tick of a session was shown; whether a slot has become whole, and `share` is new."""
        renewed = self.look(now_s)
        self._ticks.add(late)
        return renewed

    def picture(self, now_s: float, tenant: Hashable, *, late: bool) -> None:
        """A predicted picture of the tenant was there in time, or not."""
        self.look(now_s)
        window = self._tenants.get(tenant)
        if window is None:
            window = self._tenants[tenant] = Window(self._most_late)
        window.add(late)

    def look(self, now_s: float) -> bool:
        """Takes in that time has passed; whether `share` is new."""
        slot = int(now_s / SLOT_S)
        if slot == self._slot:
            return False
        passed = SLOTS if self._slot is None else slot - self._slot
        self._slot = slot
        speaking = [window for window in self._tenants.values() if window.counts]
        for window in (self._ticks, *self._tenants.values()):
            window.close(passed, now_s)
        late = sum(window.last > self._most_late for window in speaking)
        self._most_tenants.push(float(2 <= late > len(speaking) / 2), passed, now_s)
        self.share = max(window.share for window in (self._ticks, *self._tenants.values()))
        return True

    @property
    def closed(self) -> bool:
        """Whether no session of any tenant may begin."""
        return self._ticks.late_since_s is not None or self._most_tenants.late_since_s is not None

    def refusal(self, now_s: float, tenant: Hashable, sessions: int, *, speaking: bool) -> Refusal | None:
        """Why one more session of the tenant may not begin beside so many of all; None: it may. speaking: whether one
        of them speaks. One that speaks is always let in, or two that do not."""
        self.look(now_s)
        if self._most_late >= 1 or not sessions or (sessions == 1 and not speaking):
            return None
        own = self._tenants.get(tenant)
        windows = [self._ticks, self._most_tenants, *([own] if own is not None else [])]
        late_since_s = [window.late_since_s for window in windows if window.late_since_s is not None]
        if late_since_s:
            # As long again as it has been so: who is refused again and again comes ever less often.
            retry_s = min(LONGEST_RETRY_S, max(_SHORTEST_RETRY_S, now_s - min(late_since_s)))
            return Refusal("late", "busy: one more session would make others late", retry_s)
        new = now_s - self._begun_s < SETTLED_S
        if new and max(window.last for window in windows) > self._most_late:
            return Refusal("late", "busy: the sessions that have just begun may be too many already", SETTLED_S)
        careful = any(now_s < window.careful_until_s for window in windows)
        self._refill(now_s, sessions)
        if (new and careful) or self._left < 1:
            self._refused += 1
            retry_s = min(LONGEST_RETRY_S, SETTLED_S + self._refused / _pace(sessions))
            return Refusal("burst", "busy: many sessions have only just begun", retry_s)
        return None

    def begun(self, now_s: float, sessions: int) -> None:
        """One more has begun beside so many."""
        self._refill(now_s, sessions)
        self._left = max(0.0, self._left - 1)
        self._begun_s, self._refused = now_s, 0

    def _refill(self, now_s: float, sessions: int) -> None:
        passed_s, self._refill_s = max(0.0, now_s - self._refill_s), now_s
        self._left = min(self._burst, self._left + passed_s * _pace(sessions))


def _pace(sessions: int) -> float:
    """How many may begin a second, beside so many, in the long run."""
    return max(1.0, sessions / MANY)
