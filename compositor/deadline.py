"""The time that a caller gives: one object, made at the door, that travels down to the connection to Triton.

Triton itself is not told: an inference whose time is over is answered all the same (`triton/channel.py`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from .errors import DeadlinePassed


@dataclass(frozen=True)
class Deadline:
    """A point of the monotonic clock, in seconds."""

    at_s: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        return cls(time.monotonic() + seconds)

    def remaining_s(self) -> float:
        """Seconds left, more than 0. Raises DeadlinePassed when there are none."""
        left = self.at_s - time.monotonic()
        if left <= 0:
            raise DeadlinePassed("the deadline passed before the work was done")
        return left
