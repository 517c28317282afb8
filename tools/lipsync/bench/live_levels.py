"""So many live sessions: what was seen and counted comes in, whether it holds and what a report says go out. Pure."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .figures import Figure, Spread, Target
from .live_viewers import Seen

LATENESS = "lateness"
ONE, OWN = "one tenant for all", "a tenant each"
COMPOSITOR, TRITON, CLIENTS = "compositor", "Triton", "clients"
LATE_MS = 40.0
BUSY = 0.8
"""Part of the machine's CPU up to which pictures shall be punctual."""
_MOST_LATE_MOUTHS = 0.01
_CLIENTS_BUSY = 0.8


@dataclass(frozen=True)
class Counted:
    """What the servers counted from begin to end of a turn. executions, frames: as Triton says, of fused tenants;
    batches: requests of the compositor by the largest number of frames that they may have (Prometheus' `le`)."""

    executions: int
    frames: int
    late: int
    pictures: int
    batches: Mapping[str, int] = field(default_factory=dict)

    def since(self, before: Counted) -> Counted:
        batches = {bound: count - before.batches.get(bound, 0) for bound, count in self.batches.items()}
        return Counted(
            self.executions - before.executions,
            self.frames - before.frames,
            self.late - before.late,
            self.pictures - before.pictures,
            batches,
        )

    @property
    def per_execution(self) -> float:
        """Frames in one execution of a model."""
        return self.frames / self.executions if self.executions else 0.0


@dataclass(frozen=True)
class Level:
    """So many sessions, what their viewers saw and what the servers counted."""

    sessions: int
    seen: Seen
    counted: Counted

    @property
    def p99_ms(self) -> float:
        return float(np.percentile(self.seen.lateness_ms, 99))

    def cpu_ms(self, *names: str) -> float:
        """CPU milliseconds that these took for each session and second."""
        return 1000 * sum(self.seen.cpu_s[name] for name in names) / (self.seen.wall_s * self.sessions)

    @property
    def cores(self) -> float:
        return sum(self.seen.cpu_s.values()) / self.seen.wall_s

    @property
    def within(self) -> bool:
        """Whether the machine had CPU left."""
        return self.cores <= BUSY * len(os.sched_getaffinity(0))

    @property
    def fault(self) -> str:
        """Why it does not hold; nothing where it does."""
        late = self.counted.late / max(1, self.counted.pictures)
        if self.p99_ms >= LATE_MS:
            return f"lateness p99 {self.p99_ms:.0f} ms"
        if self.seen.dropped:
            return f"{self.seen.dropped} pictures dropped"
        if late > _MOST_LATE_MOUTHS:
            return f"{late:.0%} of the mouths not ready in time"
        return "" if self.within else f"{self.cores:.2f} cores busy"


def case_of(kind: str, level: Level) -> str:
    """How a report names a level."""
    return f"{sessions_of(level.sessions)}, {kind}"


def sessions_of(count: int) -> str:
    return f"{count} session{'s' * (count > 1)}"


def figures_of(case: str, level: Level) -> Iterator[Figure]:
    """Delays, losses and CPU of a level."""
    seen, counted = level.seen, level.counted
    for quantity, share in (("p50", 50), ("p95", 95), ("p99", 99)):
        yield Figure(case, LATENESS, quantity, "ms", Spread.once(float(np.percentile(seen.lateness_ms, share))))
    yield Figure(case, "pictures", "dropped", "", Spread.once(seen.dropped))
    yield Figure(case, "pictures", "late mouths", "", Spread.once(counted.late))
    yield Figure(case, "pictures", "of interrupted speech, at most", "", Spread.once(seen.outdated))
    yield Figure(case, "speech", "first audio to first moving frame", "ms", Spread.of(seen.first_moving_ms))
    yield Figure(case, "interruption", "to first new frame", "ms", Spread.of(seen.interrupt_ms))
    yield from _cpu_figures(case, level)
    yield Figure(case, "machine", "CPU", "cores", Spread.once(level.cores))
    yield Figure(case, TRITON, "frames an execution", "", Spread.once(counted.per_execution))


def _cpu_figures(case: str, level: Level) -> Iterator[Figure]:
    for name in (COMPOSITOR, TRITON, CLIENTS):
        yield Figure(case, name, "CPU a session and second", "ms", Spread.once(level.cpu_ms(name)))


def wire_figures_of(case: str, level: Level) -> Iterator[Figure]:
    """What a transport or a kind of pictures costs."""
    rate = level.seen.size / (level.seen.wall_s * level.sessions)
    yield Figure(case, "pictures", "bytes a session and second", "kB", Spread.once(rate / 1000))
    yield Figure(case, LATENESS, "p99", "ms", Spread.once(level.p99_ms))
    yield from _cpu_figures(case, level)


def targets_of(climbs: Mapping[str, Sequence[Level]]) -> Iterator[Target]:
    """CPU at the most sessions of one tenant that hold, and the worst lateness while there is CPU left."""
    held = [level for level in climbs[ONE] if not level.fault]
    best = max(held or climbs[ONE], key=_by_sessions)
    what = f"CPU a session and second, {case_of(ONE, best)}"
    yield Target(f"compositor {what}", Spread.once(best.cpu_ms(COMPOSITOR)), "at most", 40, "ms")
    yield Target(f"compositor and Triton {what}", Spread.once(best.cpu_ms(COMPOSITOR, TRITON)), "at most", 80, "ms")
    for kind, levels in climbs.items():
        if within := [level for level in levels if level.within]:
            worst = max(level.p99_ms for level in within)
            what = f"lateness p99 while at most {BUSY:.0%} of the CPU is busy, {kind}"
            yield Target(what, Spread.once(worst), "below", LATE_MS, "ms")


def _by_sessions(level: Level) -> int:
    return level.sessions


def held(levels: Sequence[Level]) -> int:
    """The most sessions that hold; 0 where none do."""
    return max((level.sessions for level in levels if not level.fault), default=0)


def notes_of(kind: str, levels: Sequence[Level]) -> Iterator[str]:
    """How many sessions hold and why more do not, whether the clients were the bottleneck, and the batches."""
    faults = sorted((level for level in levels if level.fault), key=_by_sessions)
    failed = "".join(f"; not {level.sessions}: {level.fault}" for level in faults)
    yield f"{kind}: holds up to {held(levels)}{failed}."
    for level in levels:
        clients = level.seen.cpu_s[CLIENTS] / level.seen.wall_s
        if clients > _CLIENTS_BUSY:
            yield (
                f"{case_of(kind, level)}: the clients took {clients:.2f} cores and can take one: their own delay is in "
                "the lateness."
            )
    last = max(levels, key=_by_sessions)
    yield f"{case_of(kind, last)}: the compositor's requests by their frames: {histogram(last.counted.batches)}."


def histogram(batches: Mapping[str, int]) -> str:
    """Cumulative counts by upper bound, as counts of what lies between the bounds: `1: 20, 2: 7`."""
    bounds = sorted(batches, key=float)
    below = [0, *(batches[bound] for bound in bounds)]
    counts = {bound: batches[bound] - before for bound, before in zip(bounds, below, strict=False)}
    return ", ".join(
        f"{'more' if bound == '+Inf' else format(float(bound), 'g')}: {count}"
        for bound, count in counts.items()
        if count
    )
