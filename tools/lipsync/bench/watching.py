"""What viewers ask for and what they see: tenants by their popularity, arrivals of frames in, delays out.

Pure: knows neither gRPC nor the load generator, which `viewer` and `load` join to it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

from compositor.audio import SAMPLE_RATE

FIRST_FRAME, FRAME_GAP, LATE_FRAME, TOTAL = "first frame", "frame gap", "late frame", "total"
"""What viewers report, by the names that locust shows. A late frame is reported as a gap too."""


def zipf_weights(count: int, exponent: float) -> list[float]:
    """Popularity of `count` tenants, the most wanted first: proportional to rank^-exponent (Zipf), in sum 1."""
    raw = [rank**-exponent for rank in range(1, count + 1)]
    total = sum(raw)
    return [weight / total for weight in raw]


class Audience:
    """Chooses tenants by Zipf, in the order in which they are given, and sentences evenly."""

    def __init__(self, tenants: Sequence[str], exponent: float, sentences: Sequence[bytes]) -> None:
        """exponent: 0 wants all tenants alike. sentences: whole WAV files. Raises ValueError without either."""
        if not tenants or not sentences:
            raise ValueError("an audience needs tenants and sentences")
        self._tenants, self._sentences = list(tenants), list(sentences)
        self._weights = zipf_weights(len(tenants), exponent)

    def choose(self, random: Random) -> tuple[str, bytes]:
        """A tenant and what it shall say."""
        return random.choices(self._tenants, self._weights)[0], random.choice(self._sentences)


@dataclass(frozen=True)
class Arrival:
    """One frame as its viewer sees it: seconds since the frame before it, or since the question for the first one, and
    seconds after it was due, 0 in time."""

    waited_s: float
    late_s: float


@dataclass
class Watch:
    """One speech as its viewer sees it. Playback begins with the first frame; from then on each frame is due when its
    presentation time says. All times are seconds of one clock."""

    asked_s: float
    frames: int = 0
    playout_s: float = field(init=False)
    """When everything that came has been shown."""

    def __post_init__(self) -> None:
        self._last_s = self.playout_s = self.asked_s
        self._first_s = self._first_pts_s = self._pts_s = 0.0

    def arrive(self, now_s: float, pts_samples: int) -> Arrival:
        """Takes a frame in. pts_samples: its presentation time in samples of 16 kHz."""
        pts_s = pts_samples / SAMPLE_RATE
        if not self.frames:
            self._first_s, self._first_pts_s = now_s, pts_s
        due_s = self._first_s + (pts_s - self._first_pts_s)
        arrival = Arrival(now_s - self._last_s, max(0.0, now_s - due_s))
        # A frame is shown until the next one would be due; how long the last one is, the one before it tells.
        self.playout_s = max(now_s, due_s + pts_s - self._pts_s)
        self.frames += 1
        self._last_s, self._pts_s = now_s, pts_s
        return arrival


@dataclass(frozen=True)
class Measured:
    """What all viewers of a run saw, and what watching took."""

    users: int
    """Most viewers at once."""
    delays_ms: Mapping[str, Sequence[float]]
    """Milliseconds, unrounded, of the events that went well, by name."""
    failures: Mapping[str, int]
    """How often a speech failed, by the words of the failure."""
    tenants: Mapping[str, int]
    """Speeches asked for, by tenant."""
    wall_s: float
    cpu_s: float
    """Of the load generator, all threads."""

    @property
    def frames(self) -> int:
        """Frames that came, those of speeches that failed later included."""
        return len(self.delays_ms[FIRST_FRAME]) + len(self.delays_ms[FRAME_GAP])

    def as_json(self) -> str:
        """For another process."""
        return json.dumps(vars(self))

    @classmethod
    def from_json(cls, text: str) -> Measured:
        """What `as_json` wrote."""
        return cls(**json.loads(text))
