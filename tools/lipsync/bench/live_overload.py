"""Three times the viewers that a service sustains: what those see who are let in, with and without its own measure of
who may come."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import live_crowd, service
from .child import Child
from .figures import Figure, Spread, Target
from .live_crowd import Crowd, Met
from .live_levels import LATENESS
from .part import Run

TIMES = 3
WITHOUT, WITH = "all let in (live.max_late 1)", "as by default"
_SETTINGS: Mapping[str, Mapping[str, object]] = {WITHOUT: {"live.max_late": 1}, WITH: {}}
_MOST_MISSING = 5.0
_LEAST_LET_IN = 0.7
"""Of what the service sustains."""


@dataclass(frozen=True)
class Pace:
    """Over how long the viewers come, how long after the last one they are watched, and for how long; seconds."""

    arrive_s: float = 8.0
    settle_s: float = 8.0
    seconds: float = 8.0


@dataclass(frozen=True)
class Overload:
    """What so many viewers met where `sustained` would have been served well."""

    sustained: int
    met: Mapping[str, Met]

    def case_of(self, way: str) -> str:
        return f"{TIMES * self.sustained} viewers for {self.sustained} sessions, {way}"


def measure(run: Run, repository: Path, triton: str, tenant: str, sustained: int, pace: Pace) -> Overload:
    """Two crowds, each before a service of its own on that Triton, which has the tenant loaded."""
    met = dict[str, Met]()
    crowd = Crowd([tenant] * (TIMES * sustained), pace.arrive_s, pace.settle_s, pace.seconds)
    for way, settings in _SETTINGS.items():
        run.progress("overload", len(met), len(_SETTINGS))
        with (
            service.running(repository, triton, run.folder, settings=settings) as served,
            Child(live_crowd.__name__, [served.address]) as child,
        ):
            # One alone first: the service asks what the Triton has at its first request.
            live_crowd.gather(child, Crowd([tenant], 0, pace.settle_s / 4, 0))
            met[way] = live_crowd.gather(child, crowd)
    run.progress("overload", len(met), len(_SETTINGS))
    return Overload(sustained, met)


def figures_of(overload: Overload) -> Iterator[Figure]:
    """Who was let in, and what they saw."""
    for way, met in overload.met.items():
        case = overload.case_of(way)
        yield Figure(case, "sessions", "let in", "", Spread.once(met.admitted))
        yield Figure(case, "sessions", "refused, viewers who came again included", "", Spread.once(met.refused))
        yield Figure(case, "sessions", "whose mouth never moved", "", Spread.once(met.never_moved))
        yield Figure(case, "pictures", "of speech that did not come in time", "%", Spread.once(100 * met.missing))
        for quantity, late_ms in _lateness(met.lateness_ms):
            yield Figure(case, LATENESS, quantity, "ms", Spread.once(late_ms))


def _lateness(late_ms: Sequence[float]) -> Iterator[tuple[str, float]]:
    """Of the pictures that came at all."""
    if late_ms:
        for quantity, share in (("p50", 50), ("p95", 95), ("p99", 99)):
            yield quantity, float(np.percentile(late_ms, share))


def targets_of(overload: Overload) -> Iterator[Target]:
    """Who is let in sees a mouth move, and not too few are let in: who refuses everybody misses both."""
    met, case = overload.met[WITH], overload.case_of(WITH)
    missing = Spread.once(100 * met.missing)
    yield Target(f"pictures of speech that did not come in time, {case}", missing, "at most", _MOST_MISSING, "%")
    let_in = Spread.once(met.admitted)
    yield Target(f"sessions let in, {case}", let_in, "at least", _LEAST_LET_IN * overload.sustained, "")


HOW = (
    f"Overload: {TIMES} times the viewers of one tenant that were found to hold, who come one after another, speak "
    "without a pause, and come again when they were told to where they are refused. Watched are those who were let in "
    "until then, for some seconds."
)
