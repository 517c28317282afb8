"""Part `live`: live sessions on the whole service, more and more of them until it no longer holds.

Starts what is watched and reads what Triton and the compositor count; `live_viewers` is who watches.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import onnx
from prometheus_client.parser import text_string_to_metric_families

from compositor import manifest as files
from compositor.errors import LipsyncError
from lipsync import architecture
from lipsync.preparation import Choices
from lipsync.repository import Serving, add_encoder, add_tenant
from lipsync.sources import open_source
from lipsync.tritonserver import EmbeddedTriton

from . import live_overload, live_viewers, service
from .child import Child
from .copies import link_tenants
from .figures import PartReport
from .live_levels import (
    COMPOSITOR,
    ONE,
    OWN,
    TRITON,
    Counted,
    Level,
    case_of,
    figures_of,
    held,
    notes_of,
    sessions_of,
    targets_of,
    wire_figures_of,
)
from .live_overload import Pace
from .live_viewers import Turn, Viewers
from .part import Part, Run
from .subjects import footage, reference_rects, write_source

TITLE = "Live sessions, until it no longer holds"
_TENANT = "viewed"
_TIMEOUT_S = 10


@dataclass(frozen=True)
class Sizes:
    """The tenants' frames, how long a turn watches, how far the number of sessions goes at least and at most, and how
    many the comparisons of transports and pictures have."""

    width: int = 1280
    height: int = 720
    frames: int = 24
    seconds: float = 1.5
    settle_s: float = 0.5
    least: int = 8
    most: int = 64
    compared: int = 4
    crowd: Pace = field(default_factory=Pace)

    def turn(self, tenants: Sequence[str]) -> Turn:
        return Turn(tenants, self.seconds, self.settle_s)


class Watched(Protocol):
    """What gives levels: a `Bench`."""

    def level(self, turn: Turn) -> Level: ...


class Bench:
    """A service under watch and its viewers."""

    def __init__(self, served: service.Service, triton: EmbeddedTriton, viewers: Viewers) -> None:
        self._served, self._triton, self._viewers = served, triton, viewers
        self._loaded: set[str] = set()

    def level(self, turn: Turn) -> Level:
        """One turn of the viewers, with all models loaded before."""
        if fresh := sorted({*turn.tenants} - self._loaded):
            self._viewers.take(replace(turn, tenants=fresh, seconds=0))
            self._loaded.update(fresh)
        watched = {COMPOSITOR: [self._served.pid], TRITON: service.triton_pids(self._triton)}
        before = self._counted()
        seen = self._viewers.take(replace(turn, watched=watched))
        return Level(len(turn.tenants), seen, self._counted().since(before))

    def _counted(self) -> Counted:
        stats = json.loads(_read(f"http://{self._triton.http}/v2/models/stats"))["model_stats"]
        tenants = [model for model in stats if model["name"].startswith(_TENANT)]
        metrics = {
            (sample.name, *sample.labels.values()): int(sample.value)
            for family in text_string_to_metric_families(_read(f"http://{self._served.http}/metrics"))
            for sample in family.samples
            if sample.name.startswith(("lipsync_pictures_total", "lipsync_batch_frames_bucket"))
        }
        pictures = {key[1]: count for key, count in metrics.items() if key[0] == "lipsync_pictures_total"}
        return Counted(
            sum(int(model["execution_count"]) for model in tenants),
            sum(int(model["inference_count"]) for model in tenants),
            pictures.get("late", 0),
            sum(pictures.values()),
            {key[1]: count for key, count in metrics.items() if key[0] == "lipsync_batch_frames_bucket"},
        )


def _read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer:
        return str(answer.read().decode())


def run(run: Run) -> PartReport:
    """Adds the tenants, starts Triton, the service and the viewers, and goes up until it no longer holds."""
    return measure(run, Sizes(320, 240, 4, 0.4, 0.1, 1, 2, 1, Pace(0.5, 2.5, 0.5)) if run.quick else Sizes())


def measure(run: Run, sizes: Sizes, settings: Mapping[str, object] | None = None) -> PartReport:
    """The part at other sizes, or with other settings of the service."""
    repository = run.folder / "repository"
    names, notes = add_tenants(run, repository, sizes), list[str]()
    with EmbeddedTriton(repository) as triton:
        # All that are asked for begin at once: it is seen here how many hold.
        own = {"live.max_sessions": 2 * sizes.most, "live.max_late": 1, **(settings or {})}
        with (
            service.running(repository, triton.grpc, run.folder, settings=own) as served,
            Child(live_viewers.__name__, [served.address, served.http]) as child,
        ):
            bench = Bench(served, triton, Viewers(child))
            climbs = {
                ONE: list(climb(run, bench, sizes, ONE, [names[0]] * sizes.most, notes)),
                OWN: list(climb(run, bench, sizes, OWN, names, notes)),
            }
            others = dict(_compare(run, bench, sizes, names[0]))
        overload = live_overload.measure(run, repository, triton.grpc, names[0], held(climbs[ONE]) or 1, sizes.crowd)
    figures = [
        figure
        for kind, levels in climbs.items()
        for level in levels
        for figure in figures_of(case_of(kind, level), level)
    ]
    figures += [figure for case, level in others.items() for figure in wire_figures_of(case, level)]
    notes += [note for kind, levels in climbs.items() for note in notes_of(kind, levels)]
    figures += live_overload.figures_of(overload)
    targets = [*targets_of(climbs), *live_overload.targets_of(overload)]
    return PartReport("live", TITLE, f"{_HOW} {live_overload.HOW}", "p99", figures, targets, notes)


_HOW = (
    "25 frames a second, 24 kHz PCM16 in chunks of 20 ms in real time and never silent, a graph and an encoder that "
    "do nothing, default settings but for live.max_late 1. Each viewer has a connection of its own (gRPC `Speak`), "
    "gets its speech back beside the frames, and acknowledges each picture as it comes; all viewers are one process. "
    "Lateness: how much later a picture reaches its viewer than its pts says, counted from that session's most "
    "punctual picture. Late mouths: pictures of speech whose prediction was not ready, as the service counts them. "
    "First audio to first moving frame contains the lookahead of 453 ms and the margin of 80 ms. A number of sessions "
    "that does not hold though there is CPU left is tried once more, but not the one that lies between."
)


def add_tenants(run: Run, repository: Path, sizes: Sizes) -> list[str]:
    """A repository of `sizes.most` tenants: one, and others that share its files by hard links."""
    repository.mkdir()
    encoder, source = run.folder / "encoder.onnx", run.folder / "source"
    onnx.save(architecture.do_nothing_encoder(), encoder)
    add_encoder(repository, files.AUDIO_ENCODER, encoder)
    every = reference_rects(sizes.width, sizes.height)
    rects = [every[number * len(every) // sizes.frames] for number in range(sizes.frames)]
    frames = footage(sizes.width, sizes.height, sizes.frames)
    for written in write_source(source, frames, rects, architecture.do_nothing()):
        run.progress("frames", written, sizes.frames)
    names = [f"{_TENANT}{number:03d}" for number in range(sizes.most)]
    add_tenant(repository, names[0], open_source(source), Choices(idle="background"), Serving(), lambda *_: None)
    list(link_tenants(repository, names[0], names[1:]))
    return names


def climb(run: Run, bench: Watched, sizes: Sizes, kind: str, names: Sequence[str], notes: list[str]) -> Iterator[Level]:
    """1, 2, 4, 8, ... sessions to the first number, at least `sizes.least`, that does not hold, then one between it and
    the number before. Where so many sessions are too many even to be watched, `notes` says so."""
    sessions = 1
    while sessions <= sizes.most:
        run.progress(kind, sessions, sizes.most)
        try:
            level = _level(bench, sizes.turn(names[:sessions]))
        except LipsyncError as error:
            if sessions <= sizes.least:
                raise
            notes.append(f"{sessions_of(sessions)}, {kind}: {error.message}.")
            break
        yield level
        if level.fault and sessions >= sizes.least:
            break
        sessions *= 2
    if 2 < sessions <= sizes.most:
        between = sessions * 3 // 4
        run.progress(kind, between, sizes.most)
        try:
            yield bench.level(sizes.turn(names[:between]))
        except LipsyncError as error:
            notes.append(f"{sessions_of(between)}, {kind}: {error.message}.")
    run.progress(kind, sizes.most, sizes.most)


def _level(bench: Watched, turn: Turn) -> Level:
    """A level, measured once more where it does not hold though there is CPU left: the machine may have stalled."""
    level = bench.level(turn)
    return bench.level(turn) if level.fault and level.within else level


def _compare(run: Run, bench: Bench, sizes: Sizes, name: str) -> Iterator[tuple[str, Level]]:
    turn = sizes.turn([name] * sizes.compared)
    turns = {
        "gRPC, frames": turn,
        "gRPC, patches": replace(turn, picture="patches"),
        "WebSocket, frames": replace(turn, way="websocket"),
    }
    for done, (case, each) in enumerate(turns.items()):
        yield f"{sessions_of(sizes.compared)}, {case}", bench.level(each)
        run.progress("transports", done + 1, len(turns))


PART = Part("live", TITLE, run)
