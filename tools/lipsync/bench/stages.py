"""Part `stages`: the compositor at full load on one core, frames a second and where its CPU goes.

The model does nothing; Triton and the caller run on the other cores. Two ways: the compositor opened and called in one
process, and the service behind gRPC. Triton may be the limit, so frames a second stand beside frames a CPU second of
the compositor, which are what its core would give if nothing else were the limit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import onnx

from compositor.geometry import Box
from compositor.manifest import AUDIO_ENCODER
from lipsync import architecture
from lipsync.preparation import Choices
from lipsync.repository import Serving, add_encoder, add_tenant
from lipsync.sources import open_source
from lipsync.tritonserver import EmbeddedTriton

from . import accounting, profiler, service
from .caller import Caller, Turn, Way, Yield, calling
from .figures import Figure, PartReport, Spread, Target
from .part import Part, Run
from .subjects import centred_rects, footage, reference_rects, write_source

TITLE = "The compositor on one core, with a model that does nothing"
FPS, CPU = "frames a second, wall", "compositor CPU a frame"
INSIDE, INSIDE_SPEECH, STREAM = "in process, composite", "in process, generate", "Generate through gRPC"
_COMPOSITOR, _TRITON, _CALLER = "compositor", "triton", "caller"


@dataclass(frozen=True)
class Sizes:
    """The tenants' frames, and how long and often they are measured."""

    width: int = 1280
    height: int = 720
    frames: int = 24
    side: int = 300
    rounds: int = 5
    turn_s: float = 1.0
    profile_s: float = 8.0
    flame_s: float = 3.0

    @property
    def cases(self) -> dict[str, tuple[str, list[Box]]]:
        """By tenant: the case's name and its crop rectangles."""
        every = reference_rects(self.width, self.height)
        picked = [every[number * len(every) // self.frames] for number in range(self.frames)]
        size = f"{self.width}x{self.height}"
        centred = centred_rects(self.width, self.height, self.frames, self.side)
        return {
            "reference": (f"{size}, reference rectangles", picked),
            "centred": (f"{size}, mouth {self.side} px", centred),
        }


@dataclass(frozen=True)
class Contestant:
    """Who calls what, so many calls at once of so many frames each, and whose CPU is the compositor's."""

    caller: Caller
    way: Way
    calls: int
    frames: int
    pid: int

    def turn(self, tenant: str, seconds: float, triton: list[int]) -> Turn:
        return Turn(tenant, self.way, self.calls, self.frames, seconds, {_COMPOSITOR: [self.pid], _TRITON: triton})


def run(run: Run) -> PartReport:
    """Adds the tenants, starts Triton and the service, and measures."""
    return measure(run, Sizes(320, 240, 4, 100, 1, 0.3, 1.0, 1.0) if run.quick else Sizes())


def measure(run: Run, sizes: Sizes) -> PartReport:
    """Figures of both tenants and the stage table of the first one's stream."""
    repository = run.folder / "repository"
    _add_tenants(run, repository, sizes)
    *others, own = sorted(os.sched_getaffinity(0))
    notes = [] if others else ["There is one core only: Triton and the caller take from it."]
    elsewhere = set(others) or {own}
    with EmbeddedTriton(repository) as triton:
        service.pin(service.triton_pids(triton), elsewhere)
        with (
            service.running(repository, triton.grpc, run.folder, cores={own}, settings={"server.threads": 1}) as served,
            calling("inside", str(repository), triton.grpc, cores={own}) as inside,
            calling("grpc", served.address, cores=elsewhere) as outside,
        ):
            contestants = {
                INSIDE: Contestant(inside, "composite", 2, 48, inside.pid),
                INSIDE_SPEECH: Contestant(inside, "generate", 2, 250, inside.pid),
                STREAM: Contestant(outside, "generate", 4, 250, served.pid),
            }
            found = _rounds(run, sizes, contestants, triton)
            stream = contestants[STREAM]
            load_s = sizes.profile_s + sizes.flame_s + 4
            stream.caller.begin(stream.turn("reference", load_s, service.triton_pids(triton)))
            table, flame, fault = _profile(run.folder, served.pid, sizes)
            stream.caller.end()
    notes += [*([_HOW_PROFILED] if table else []), *([fault] if fault else [])]
    figures = list(_figures(sizes, found))
    cpu_ms = Spread.of(each.cpu_ms(_COMPOSITOR) for each in found["reference", STREAM]).median
    case = f"{sizes.cases['reference'][0]}, {STREAM}"
    figures += [
        Figure(case, stage, "CPU a frame by stage", "us", Spread.once(cpu_ms * 1e3 * share))
        for stage, share in table.items()
        if share
    ]
    return PartReport("stages", TITLE, _HOW, CPU, figures, list(_targets(sizes, found)), notes, files=flame)


_HOW = (
    "A graph that does nothing, default settings but for one render thread. The compositor is bound to one core, the "
    "embedded Triton and the caller to the others. `frames a second, wall` is what came; `frames a CPU second` is that "
    "over the compositor's own CPU: what its core would give if Triton were never waited for."
)
_HOW_PROFILED = (
    "The stages: py-spy's samples of the service under the stream's load, weighted with the exact CPU time of each "
    "thread (schedstat), as shares of the median CPU a frame without a profiler. Waiting counts for nothing."
)


def _add_tenants(run: Run, repository: Path, sizes: Sizes) -> None:
    repository.mkdir()
    encoder = run.folder / "encoder.onnx"
    onnx.save(architecture.do_nothing_encoder(), encoder)
    add_encoder(repository, AUDIO_ENCODER, encoder)
    for place, (tenant, (_, rects)) in enumerate(sizes.cases.items()):
        source = run.folder / tenant
        frames = footage(sizes.width, sizes.height, sizes.frames)
        for _ in write_source(source, frames, rects, architecture.do_nothing()):
            pass
        add_tenant(repository, tenant, open_source(source), Choices(idle="background"), Serving(), lambda *_: None)
        run.progress("add tenants", place + 1, len(sizes.cases))


Found = dict[tuple[str, str], list[Yield]]
"""Turns by (tenant, contestant), round by round."""


def _rounds(run: Run, sizes: Sizes, contestants: Mapping[str, Contestant], triton: EmbeddedTriton) -> Found:
    """All contestants in turns; the first turn of each, which loads the models, is not counted."""
    found: Found = {(tenant, name): [] for tenant in sizes.cases for name in contestants}
    for tenant, name in found:
        contestants[name].caller.take(contestants[name].turn(tenant, 0.1, []))
    # The models' own processes live from now on.
    pids = service.triton_pids(triton)
    turns = list(found)
    for number in range(sizes.rounds):
        first = number % len(turns)
        for tenant, name in turns[first:] + turns[:first]:
            contestant = contestants[name]
            found[tenant, name].append(contestant.caller.take(contestant.turn(tenant, sizes.turn_s, pids)))
        run.progress("one core", number + 1, sizes.rounds)
    return found


def _profile(folder: Path, pid: int, sizes: Sizes) -> tuple[dict[str, float], dict[str, str], str]:
    """Shares of the CPU by stage, the flame graph by file name, and what is lacking and why."""
    try:
        shares = accounting.shares(profiler.record(pid, sizes.profile_s, folder / "samples.txt"))
    except profiler.ProfilerMissing as error:
        return {}, {}, f"No stage table and no flame graph: {error.message}."
    try:
        return shares, {"flame.svg": profiler.draw(pid, sizes.flame_s, folder / "flame.svg")}, ""
    except profiler.ProfilerMissing as error:
        return shares, {}, f"No flame graph: {error.message}."


def _figures(sizes: Sizes, found: Found) -> Iterator[Figure]:
    for (tenant, name), turns in found.items():
        each = partial(Figure, sizes.cases[tenant][0], name)
        yield each(FPS, "fps", Spread.of(turn.fps for turn in turns))
        yield each("frames a CPU second of the compositor", "fps", _per_cpu_second(turns))
        yield each(CPU, "ms", Spread.of(turn.cpu_ms(_COMPOSITOR) for turn in turns))
        yield each("Triton CPU a frame", "ms", Spread.of(turn.cpu_ms(_TRITON) for turn in turns))
        if name == STREAM:
            yield each("caller CPU a frame", "ms", Spread.of(turn.cpu_ms(_CALLER) for turn in turns))


def _per_cpu_second(turns: list[Yield]) -> Spread:
    return Spread.of(1e3 / turn.cpu_ms(_COMPOSITOR) for turn in turns)


def _targets(sizes: Sizes, found: Found) -> Iterator[Target]:
    for name, least in ((INSIDE, 700), (STREAM, 400)):
        for tenant, (case, _) in sizes.cases.items():
            spread = Spread.of(turn.fps for turn in found[tenant, name])
            yield Target(f"frames a second on one core, {name}, {case}", spread, "at least", least, "fps")


PART = Part("stages", TITLE, run)
