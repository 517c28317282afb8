"""Part `tenants`: thousands of tenants of which a few dozen are loaded, in the real Triton, and callers who want some
of them more than others.

Makes them, starts Triton, the compositor and the callers, and measures; `tenant_callers` is who calls.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compositor.errors import LipsyncError
from lipsync.tritonserver import EmbeddedTriton

from . import service, tenant_callers
from .child import Child
from .clocks import living_cpu_s
from .copies import add_small_tenant, link_tenants
from .figures import Figure, PartReport, Spread, Target
from .hit_cost import hit_cost_s
from .part import Part, Run
from .process_memory import folder_bytes, process_bytes
from .residency_counts import Counts, Tally
from .tenant_callers import Answers, Callers, Turn
from .watching import zipf_weights

TITLE = "Thousands of tenants"
COMPOSITOR, TRITON = "compositor", "Triton"
HITS, MISSES, LOADS = "calls that find the model loaded", "calls that wait for it", "loads"
_FRAMES, _WIDTH, _HEIGHT = 4, 320, 240
_LISTINGS = 3
_FILLERS = 4
_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Sizes:
    """The tenants, the places for them in Triton, and who wants them."""

    tenants: int = 11_000
    cache: int = 40
    """How many may be loaded at once: `residency.max_models`."""
    callers: int = 8
    pause_s: float = 2.0
    """Mean time between an answer and its caller's next call."""
    seconds: float = 60.0
    """How long they call."""
    history_s: float = 5.0
    """How long the most wanted were called before."""
    idle_s: float = 10.0
    """How long the service is watched in between, while nobody calls; also `residency.min_resident_s`, so that any
    model may be unloaded afterwards."""
    zipf: float = 1.0
    """Exponent of the tenants' popularity."""
    headroom: int = 4
    """Places kept free at most: `residency.headroom`."""

    @property
    def case(self) -> str:
        return f"{self.tenants:,} tenants, {self.cache} loaded at most"


QUICK = Sizes(tenants=30, cache=4, headroom=1, callers=3, pause_s=0.2, seconds=3.0, history_s=0.2, idle_s=0.2)


@dataclass(frozen=True)
class Idle:
    """CPU seconds a second that the processes took while nobody called."""

    compositor: float
    triton: float


@dataclass(frozen=True)
class Memory:
    """Bytes of the processes at the end. files: of the compositor's resident ones, those of tenants that it has open.
    models: private ones of each model's process."""

    compositor: int
    files: int
    server: int
    models: list[int]


@dataclass(frozen=True)
class Found:
    """All that was measured. Times in seconds."""

    making_s: float
    triton_s: float
    compositor_s: float
    listing_s: Spread
    idle: Idle
    answers: Answers
    counts: Counts
    memory: Memory
    hit_s: Spread


def part(sizes: Sizes | None = None) -> Part:
    """The part at these sizes."""

    def run(run: Run) -> PartReport:
        return measure(run, QUICK if run.quick else sizes or Sizes())

    return Part("tenants", TITLE, run)


def measure(run: Run, sizes: Sizes) -> PartReport:
    """Makes the tenants, drives the demand, and reports."""
    repository, begin = run.folder / "repository", time.perf_counter()
    names = _make(run, repository, sizes)
    making_s, begin = time.perf_counter() - begin, time.perf_counter()
    with EmbeddedTriton(repository) as triton:
        triton_s, begin = time.perf_counter() - begin, time.perf_counter()
        settings = {
            "residency.max_models": sizes.cache,
            "residency.min_resident_s": sizes.idle_s,
            "residency.headroom": sizes.headroom,
        }
        with service.running(repository, triton.grpc, run.folder, settings=settings) as served:
            service.wait_until_ready(served.address)
            compositor_s = time.perf_counter() - begin
            with Child(tenant_callers.__name__, [served.address]) as child:
                callers = Callers(child)
                _fill(callers, names, sizes)
                idle = _rest(run, served, triton, sizes.idle_s)
                tally = Tally(served)
                run.progress("demand", 0, 1)
                answers = callers.take(_demand(names, sizes))
                run.progress("demand", 1, 1)
                counts = tally.so_far()
            listing_s = Spread.of(_list(repository, triton.grpc, len(names)) for _ in range(_LISTINGS))
            memory = _memory(served, triton, repository)
        hit_s = hit_cost_s(repository, triton.grpc, names[: max(1, sizes.cache // 2)])
    found = Found(making_s, triton_s, compositor_s, listing_s, idle, answers, counts, memory, hit_s)
    how = (
        f"{sizes.tenants:,} tenants by hard links of one of {_FRAMES} frames of {_WIDTH}x{_HEIGHT} whose graph does "
        f"nothing, each with its raw model; the embedded Triton with its Python-based backend, a process for each "
        f"model. {sizes.callers} callers for {answers.wall_s:.0f} s, {sizes.pause_s:g} s in the mean between an answer "
        f"and the next call; each call wants {tenant_callers.FRAMES} frames, by Composite or Generate, of a tenant "
        f"chosen by Zipf (exponent {sizes.zipf:g}). Before, the {_warm(sizes)} most wanted ones were loaded, and "
        f"called by Zipf for {sizes.history_s:g} s, without a pause. "
        f"`residency.min_resident_s` is {sizes.idle_s:g}, `residency.headroom` {sizes.headroom}, all else as by "
        f"default. A call that fails is not made again."
    )
    return PartReport(
        "tenants", TITLE, how, "p50", list(figures_of(sizes, found)), targets_of(sizes, found), list(notes_of(found))
    )


def _make(run: Run, repository: Path, sizes: Sizes) -> list[str]:
    names = [f"tenant-{number:05d}" for number in range(sizes.tenants)]
    add_small_tenant(run.folder, repository, names[0], _WIDTH, _HEIGHT, _FRAMES)
    for made in link_tenants(repository, names[0], names[1:]):
        run.progress("tenants", made, sizes.tenants - 1)
    return names


def _warm(sizes: Sizes) -> int:
    """As many as stay loaded."""
    return max(1, min(sizes.cache - sizes.headroom, sizes.tenants))


def _fill(callers: Callers, names: list[str], sizes: Sizes) -> None:
    """Loads the encoder and the most wanted tenants, and calls these as often as makes them favourites."""
    favourites = names[: _warm(sizes)]
    turns = (
        # The encoder first, and alone: who waits for it too would be a miss of a tenant.
        Turn(names[:1], 1, _TIMEOUT_S, 1, first=1),
        Turn(favourites, _FILLERS, 10 * _TIMEOUT_S, len(favourites)),
        Turn(favourites, _FILLERS, sizes.history_s, sys.maxsize, sizes.zipf),
    )
    for turn in turns:
        answers = callers.take(turn)
        if answers.failed:
            raise LipsyncError(f"a first call failed: {next(iter(answers.failures))}")


def _demand(names: list[str], sizes: Sizes) -> Turn:
    return Turn(
        names, sizes.callers, sizes.seconds, sys.maxsize, sizes.zipf, pause_s=sizes.pause_s, timeout_s=_TIMEOUT_S
    )


def _rest(run: Run, served: service.Service, triton: EmbeddedTriton, seconds: float) -> Idle:
    """Watches while nobody calls."""
    run.progress("rest", 0, 1)
    before, begin = (served.cpu_s(), living_cpu_s(service.triton_pids(triton))), time.perf_counter()
    time.sleep(seconds)
    wall_s = time.perf_counter() - begin
    after = served.cpu_s(), living_cpu_s(service.triton_pids(triton))
    run.progress("rest", 1, 1)
    return Idle(*((later - earlier) / wall_s for earlier, later in zip(before, after, strict=True)))


def _list(repository: Path, triton: str, tenants: int) -> float:
    """Seconds of `lipsync tenant list`, from its start to its end. Raises LipsyncError unless it lists all."""
    command = [sys.executable, "-m", "lipsync", "tenant", "list", "-r", str(repository), "--triton", triton]
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begin
    lines = done.stdout.splitlines()[1:]
    if done.returncode or len(lines) != tenants or not any(line.split()[1] == "ready" for line in lines):
        raise LipsyncError(f"`tenant list` listed {len(lines)} of {tenants} tenants: {done.stderr.strip()[-200:]}")
    return seconds


def _memory(served: service.Service, triton: EmbeddedTriton, repository: Path) -> Memory:
    """Of every process. Models that leave meanwhile do not count."""
    models = []
    for pid in service.triton_pids(triton):
        if pid not in (triton.pid, triton.keeper_pid):
            try:
                models.append(process_bytes(pid)["private"])
            except (OSError, KeyError):
                continue
    if triton.pid is None:
        raise LipsyncError("Triton ended")
    own, server = process_bytes(served.pid), process_bytes(triton.pid)
    files = folder_bytes(served.pid, repository)
    return Memory(own["private"] + own["mapped"], files, server["private"] + server["mapped"], models)


def figures_of(sizes: Sizes, found: Found) -> Iterator[Figure]:
    """Everything, by what it is of."""
    case, answers, counts, memory = sizes.case, found.answers, found.counts, found.memory
    yield Figure(case, "making them", "wall", "s", Spread.once(found.making_s))
    yield Figure(case, TRITON, "start-up", "s", Spread.once(found.triton_s))
    yield Figure(case, COMPOSITOR, "start-up, until it says that it is ready", "s", Spread.once(found.compositor_s))
    yield Figure(case, "`lipsync tenant list`", "wall", "s", found.listing_s)
    best = sum(zipf_weights(sizes.tenants, sizes.zipf)[: _warm(sizes)])
    yield Figure(case, "calls", "made", "", Spread.once(answers.calls))
    yield Figure(case, "calls", "failed", "", Spread.once(answers.failed))
    yield Figure(case, "calls", "different tenants", "", Spread.once(answers.tenants))
    yield Figure(case, "calls", "model loaded (hit rate)", "%", Spread.once(100 * answers.hit_rate))
    yield Figure(case, "calls", "hit rate if the most wanted stayed loaded", "%", Spread.once(100 * best))
    for name, seconds in ((HITS, answers.hits_s), (MISSES, answers.misses_s)):
        yield from _percentiles(case, name, seconds)
    yield from _percentiles(case, "what a miss waits for its load, queue included", answers.waits_s)
    yield from _percentiles(case, LOADS, counts.loads_s)
    yield from _percentiles(case, "loads: the wait for others and for room", counts.queued_s)
    yield Figure(case, "models", "loads", "", Spread.once(len(counts.loads_s)))
    yield Figure(case, "models", "failed loads", "", Spread.once(counts.failed_loads))
    yield Figure(case, "models", "evictions", "", Spread.once(counts.evictions))
    yield Figure(case, "models", "lost races", "", Spread.once(counts.lost_races))
    yield Figure(case, "residency", "added to a hit", "ms", found.hit_s.times(1e3))
    for who, cores in ((COMPOSITOR, found.idle.compositor), (TRITON, found.idle.triton)):
        yield Figure(case, who, "CPU a second while nobody calls", "ms", Spread.once(1e3 * cores))
    yield Figure(case, COMPOSITOR, "memory (RSS)", "MB", Spread.once(memory.compositor / 1e6))
    yield Figure(case, COMPOSITOR, "of it files of open tenants", "MB", Spread.once(memory.files / 1e6))
    yield Figure(case, "Triton's server", "memory (RSS)", "MB", Spread.once(memory.server / 1e6))
    if memory.models:
        yield Figure(case, "a model's process", "private memory", "MB", Spread.of(memory.models).times(1e-6))


def _percentiles(case: str, subject: str, seconds: list[float]) -> Iterator[Figure]:
    if seconds:
        yield Figure(case, subject, "p50", "ms", Spread.of(seconds).times(1e3))
        yield Figure(case, subject, "p99", "ms", Spread.once(1e3 * float(np.percentile(seconds, 99))))


def targets_of(sizes: Sizes, found: Found) -> list[Target]:
    """What thousands of tenants shall not cost."""
    own = found.memory.compositor - found.memory.files
    count = f"{sizes.tenants:,} tenants"
    return [
        Target(f"start-up of Triton, {count}", Spread.once(found.triton_s), "below", 5, "s"),
        Target(f"start-up of the compositor, {count}", Spread.once(found.compositor_s), "below", 5, "s"),
        Target(f"`lipsync tenant list`, {count}", found.listing_s, "below", 1, "s"),
        Target(
            f"the compositor's memory (RSS) but for files of open tenants, {count}",
            Spread.once(own / 1e6),
            "below",
            300,
            "MB",
        ),
        Target("what residency adds to a call whose model is loaded", found.hit_s.times(1e3), "below", 0.1, "ms"),
        Target(f"calls that failed, {count}", Spread.once(found.answers.failed), "at most", 0, ""),
    ]


def notes_of(found: Found) -> Iterator[str]:
    """Failures in their own words."""
    for words, count in found.answers.failures.items():
        yield f"Failed {count} times: {words}"
