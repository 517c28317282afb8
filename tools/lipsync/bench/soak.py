"""`lipsync bench soak`: models evicted and loaded again and again in the real Triton, and whether the memory of Triton
and of the compositor grows with it.

Beside them runs a process that leaks on purpose, which the same criterion has to catch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from compositor.errors import LipsyncError
from lipsync.triton_processes import SHM, region_prefix
from lipsync.tritonserver import EmbeddedTriton

from . import leaking, service, tenant_callers
from .child import Child
from .copies import add_small_tenant, link_tenants
from .figures import Figure, PartReport, Spread, Target
from .growth import Sample, growth, second_half
from .leaking import LEAK_BYTES
from .part import Part, Run
from .process_memory import process_bytes
from .residency_counts import Counts, Tally
from .tenant_callers import Callers, Turn

TITLE = "Models evicted and loaded again"
LIMIT_BYTES = 2048
"""Least growth a cycle that counts as a leak: 177 MB a day where a model is loaded every second."""
LIMIT_DESCRIPTORS = 0.01
COMPOSITOR, TRITON, KEEPER, CONTROL = "compositor", "Triton's server", "its keeper", "the control"
REGIONS = "Triton's shared memory regions"
_SIZE = (320, 240, 4)
_SAMPLES = 100
_LEAST_SAMPLES = 3
_FEW_CYCLES = 2000
_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Demand:
    """How often a model is evicted and another loaded, for how long at most, and among which: so many tenants, of which
    `cache` may be loaded, wanted in turn by callers side by side. samples: a file that takes each sample at once."""

    cycles: int = 5000
    minutes: float = 90.0
    tenants: int = 48
    cache: int = 16
    callers: int = 8
    samples: Path | None = None

    @property
    def calls(self) -> int:
        """Between two samples."""
        return max(self.callers, self.cycles // _SAMPLES)


@dataclass
class Done:
    """What the calls of a run came to."""

    hits: int = 0
    misses: int = 0
    failed: int = 0
    words: str = ""
    """Of the first failure."""


def part(demand: Demand | None = None) -> Part:
    """The part for this demand."""

    def run(run: Run) -> PartReport:
        wanted = demand or Demand()
        quick = Demand(cycles=18, tenants=10, cache=4, callers=3, samples=wanted.samples)
        return measure(run, quick if run.quick else wanted)

    return Part("soak", TITLE, run)


def measure(run: Run, demand: Demand) -> PartReport:
    """Starts everything, evicts and loads, and judges."""
    repository, names = run.folder / "repository", [f"tenant-{number:03d}" for number in range(demand.tenants)]
    add_small_tenant(run.folder, repository, names[0], *_SIZE)
    list(link_tenants(repository, names[0], names[1:]))
    settings = {
        "residency.max_models": demand.cache,
        "residency.min_resident_s": 0,
        "residency.policy": "lru",
    }
    with (
        EmbeddedTriton(repository) as triton,
        service.running(repository, triton.grpc, run.folder, settings=settings) as served,
        Child(tenant_callers.__name__, [served.address]) as child,
        Child(leaking.__name__, []) as leak,
    ):
        service.wait_until_ready(served.address)
        soak = _Soak(demand, names, triton, served, Callers(child), leak)
        for done in soak.run():
            run.progress("cycles", min(done, demand.cycles), demand.cycles)
    return soak.report()


class _Soak:
    """One run and what was seen in it."""

    def __init__(
        self,
        demand: Demand,
        names: list[str],
        triton: EmbeddedTriton,
        served: service.Service,
        callers: Callers,
        leak: Child,
    ) -> None:
        self._demand, self._names, self._triton, self._served = demand, names, triton, served
        self._callers, self._leak = callers, leak
        self._tally = Tally(served)
        self._begin_s = time.monotonic()
        self._samples: list[Sample] = []
        self._done = Done()
        self._counts: Counts | None = None

    def run(self) -> Iterator[int]:
        """Goes on until there were enough cycles or the time is up; gives how many there were."""
        cycles = first = 0
        while cycles < self._demand.cycles and time.monotonic() - self._begin_s < 60 * self._demand.minutes:
            self._call(first)
            first += self._demand.calls
            self._counts = self._tally.so_far()
            self._leak.say(str(self._counts.evictions - cycles))
            self._leak.hear()
            cycles = self._counts.evictions
            self._samples.append(self._look(cycles))
            self._write()
            yield cycles

    def _call(self, first: int) -> None:
        demand = self._demand
        turn = Turn(self._names, demand.callers, 1e9, demand.calls, first=first, timeout_s=_TIMEOUT_S)
        answers = self._callers.take(turn)
        self._done.hits += len(answers.hits_s)
        self._done.misses += len(answers.misses_s)
        self._done.failed += answers.failed
        self._done.words = self._done.words or next(iter(answers.failures), "")

    def _look(self, cycles: int) -> Sample:
        """Private memory, in bytes, and file descriptors of each process that lives on from model to model."""
        server, keeper = self._triton.pid, self._triton.keeper_pid
        if server is None or keeper is None or self._triton.restarts:
            raise LipsyncError(f"Triton ended after {cycles} cycles")
        pids = {COMPOSITOR: self._served.pid, TRITON: server, KEEPER: keeper, CONTROL: self._leak.pid}
        values: dict[str, float] = {name: process_bytes(pid)["private"] for name, pid in pids.items()}
        for name in (COMPOSITOR, TRITON):
            values[descriptors_of(name)] = len(list(Path(f"/proc/{pids[name]}/fd").iterdir()))
        values[REGIONS] = len(list(SHM.glob(f"{region_prefix(keeper)}*")))
        return Sample(cycles, time.monotonic() - self._begin_s, values)

    def _write(self) -> None:
        if self._demand.samples is not None:
            self._demand.samples.parent.mkdir(parents=True, exist_ok=True)
            content = {"cycles": self._demand.cycles, **asdict(self._done), "samples": [*map(asdict, self._samples)]}
            self._demand.samples.write_text(json.dumps(content, indent=1) + "\n")

    def report(self) -> PartReport:
        """Figures and targets. Raises LipsyncError where it ended before they can be told."""
        if self._counts is None or len(second_half(self._samples)) < _LEAST_SAMPLES:
            raise LipsyncError(f"too few cycles to tell whether anything grows: {len(self._samples)} samples")
        demand, counts, last = self._demand, self._counts, self._samples[-1]
        how = (
            f"{demand.tenants} tenants whose graph does nothing, wanted in turn by {demand.callers} callers, at most "
            f"{demand.cache} loaded (`residency.min_resident_s` 0, policy lru), so that each call loads a model and "
            f"another leaves for it: a cycle. {len(self._samples)} samples of private memory in {last.seconds:.0f} s, "
            f"taken while no call is under way. Growth: the median slope (Theil-Sen) from the middle of the cycles on. "
            f"The control is a process that keeps {LEAK_BYTES} bytes of each cycle."
        )
        notes = (
            [f"Failed {self._done.failed} times, the first time so: {self._done.words}"] if self._done.failed else []
        )
        if last.cycles < demand.cycles:
            notes.append(f"Ended after {last.cycles} of {demand.cycles} cycles: {demand.minutes:g} minutes were over.")
        if last.cycles < _FEW_CYCLES:
            notes.append(
                f"So few cycles tell little of growth: memory goes up and down by a megabyte or two, which is "
                f"{2e6 / last.cycles:,.0f} bytes for each."
            )
        figures = [*counted(self._done, counts, last), *seen(self._samples)]
        return PartReport("soak", TITLE, how, "growth a cycle", figures, targets_of(self._samples, self._done), notes)


def descriptors_of(name: str) -> str:
    """The name of a process's file descriptors among a sample's values."""
    return f"file descriptors of {name}"


def counted(done: Done, counts: Counts, last: Sample) -> Iterator[Figure]:
    """What the calls came to."""
    case = f"{last.cycles:,} cycles"
    for quantity, value in (
        ("evictions", counts.evictions),
        ("loads", len(counts.loads_s)),
        ("failed loads", counts.failed_loads),
        ("calls that waited for a load", done.misses),
        ("calls that found the model loaded", done.hits),
        ("calls that failed", done.failed),
    ):
        yield Figure(case, "models", quantity, "", Spread.once(value))
    yield Figure(case, "models", "cycles a second", "", Spread.once(last.cycles / last.seconds))
    if counts.loads_s:
        yield Figure(case, "models", "load", "ms", Spread.of(counts.loads_s).times(1e3))


def seen(samples: list[Sample]) -> Iterator[Figure]:
    """What the processes took."""
    half, case = second_half(samples), f"{samples[-1].cycles:,} cycles"
    for name in samples[0].values:
        memory = name in (COMPOSITOR, TRITON, KEEPER, CONTROL)
        quantity, unit, factor = ("private memory", "MB", 1e-6) if memory else ("open", "", 1.0)
        for moment, sample in (("mid-run", half[0]), ("the end", half[-1])):
            yield Figure(case, name, f"{quantity} at {moment}", unit, Spread.once(factor * sample.values[name]))
        yield Figure(case, name, "growth a cycle", "B" if memory else "", growth(half, name))


def targets_of(samples: list[Sample], done: Done) -> list[Target]:
    """That nothing grows, and that what does is found."""
    half = second_half(samples)
    what = "growth a cycle from mid-run"
    return [
        Target(f"{TRITON}: {what}", growth(half, TRITON), "below", LIMIT_BYTES, "B"),
        Target(f"{COMPOSITOR}: {what}", growth(half, COMPOSITOR), "below", LIMIT_BYTES, "B"),
        Target(f"{CONTROL}, which leaks {LEAK_BYTES} B: {what}", growth(half, CONTROL), "at least", LIMIT_BYTES, "B"),
        *(
            Target(f"{name}: {what}", growth(half, name), "below", LIMIT_DESCRIPTORS, "")
            for name in (descriptors_of(TRITON), descriptors_of(COMPOSITOR), REGIONS)
        ),
        Target("calls that failed", Spread.once(done.failed), "at most", 0, ""),
    ]


PART = part()
