"""What waits for a viewer: a session's events go in as they happen, and come out as fast as the viewer takes them.

Pictures are never queued: a newer one takes the place of one that was not taken, and the viewer is told how many it
missed. A viewer with credit has at most 2 pictures on the way that it has not acknowledged, because network windows
would swallow seconds of them. Speech that nobody takes is dropped after a while, too.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from dataclasses import replace
from typing import Literal

from ..errors import Overloaded
from ..metrics import Metrics
from .events import Event, Heard, PlaybackFinished, Shown

UNACKNOWLEDGED = 2
"""Pictures on the way to a viewer with credit."""
_MOST_NOTES = 256


class Outbox:
    """One viewer's. audio_bytes: how much speech may wait."""

    def __init__(self, flow: Literal["credit", "plain"], audio_bytes: int, metrics: Metrics) -> None:
        self._credit = flow == "credit"
        self._audio_bytes = audio_bytes
        self._metrics = metrics
        self._sent = metrics.observer_of("send")
        self._notes: deque[Event] = deque()  # what is not a picture, in order
        self._waiting: deque[Heard] = deque()  # the speech among them
        self._picture: Shown | None = None
        self._due_s = 0.0  # when it came
        self._sending_s: float | None = None  # the same, of the one that is being sent
        self._unacknowledged: deque[int] = deque()
        self._news = asyncio.Event()
        self._closed = False
        self.dropped = 0
        """Pictures that the viewer missed."""
        self.dropped_audio = 0
        """Pieces of speech that the viewer missed."""

    def put(self, event: Event) -> None:
        """Takes an event in and never waits. Raises Overloaded where the viewer takes not even notes any more."""
        if self._closed:  # or a viewer slower than the pictures come would never see the end
            return
        if isinstance(event, Shown):
            if self._picture is not None:
                self.dropped += 1
                self._metrics.dropped.inc()
            self._picture, self._due_s = event, time.perf_counter()
        else:
            if isinstance(event, Heard):
                self._make_room(len(event.data))
                self._waiting.append(event)
            elif len(self._notes) - len(self._waiting) >= _MOST_NOTES:
                raise Overloaded("the viewer takes nothing any more", retry_after_s=1)
            self._notes.append(event)
        self._news.set()

    def _make_room(self, size: int) -> None:
        while self._waiting and sum(len(heard.data) for heard in self._waiting) + size > self._audio_bytes:
            self._notes.remove(self._waiting.popleft())
            self.dropped_audio += 1
            self._metrics.dropped_audio.inc()

    def acknowledge(self, pts: int) -> None:
        """The viewer has shown the picture of this pts, and with it all earlier ones."""
        while self._unacknowledged and self._unacknowledged[0] <= pts:
            self._unacknowledged.popleft()
        self._news.set()

    def lift_credit(self) -> None:
        """Nobody will acknowledge any more: the viewer gets what it takes."""
        self._credit = False
        self._news.set()

    def withdraw(self) -> int:
        """Takes back speech and picture that were not taken: they are out of date. Bytes of speech, of the segment
        under way alone, that the viewer did not get."""
        under_way = itertools.takewhile(lambda note: not isinstance(note, PlaybackFinished), reversed(self._notes))
        missed = sum(len(note.data) for note in under_way if isinstance(note, Heard))
        self._picture = None
        self._waiting.clear()
        self._notes = deque(note for note in self._notes if not isinstance(note, Heard))
        return missed

    def close(self) -> None:
        """Nothing more will come: `get` ends once the notes are taken."""
        self._closed = True
        self._news.set()

    async def get(self) -> Event | None:
        """The next event: notes and speech first, then the newest picture if there is credit. None after the last.

        Who asks for the next one has sent the one before.
        """
        if self._sending_s is not None:
            self._sent(time.perf_counter() - self._sending_s)
            self._sending_s = None
        while True:
            if self._notes:
                event = self._notes.popleft()
                if isinstance(event, Heard):
                    self._waiting.popleft()
                return event
            if self._picture is not None and self._may_show:
                return self._take_picture(self._picture)
            if self._closed:
                return None
            self._news.clear()
            await self._news.wait()

    @property
    def _may_show(self) -> bool:
        return not self._credit or len(self._unacknowledged) < UNACKNOWLEDGED

    def _take_picture(self, picture: Shown) -> Shown:
        self._picture, self._sending_s = None, self._due_s
        if self._credit:
            self._unacknowledged.append(picture.pts)
        return replace(picture, dropped=self.dropped) if self.dropped else picture
