"""Part `efficiency`: the compositor's frames a second over Triton's own, same model, same concurrency, same requests.

Triton's ceiling is what perf_analyzer gets of the fused model without the compositor. The compositor adds the blend,
the encoding and the wire to the caller, whose CPU on a small machine is taken from the model's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from compositor.manifest import AUDIO_ENCODER
from compositor.pipeline import BATCHES_AHEAD
from compositor.tenant import Tenant
from lipsync import architecture, avatar
from lipsync.avatar_model import loudness_encoder
from lipsync.model_config import TENANT_BATCH
from lipsync.preparation import Choices
from lipsync.repository import Serving, add_encoder, add_tenant
from lipsync.sources import open_source
from lipsync.tritonserver import EmbeddedTriton, default_home, install

from . import ceiling, perf_analyzer, service
from .caller import Caller, Turn, Yield, calling
from .figures import Figure, PartReport, Spread, Target, ratios
from .part import Part, Run
from .perf_analyzer import Load, Measured, PerfAnalyzer

TITLE = "The compositor against Triton's ceiling"
CEILING, COMPOSITE, GENERATE = "perf_analyzer, fused model", "Composite", "Generate"
FPS = "frames a second"
_COMPOSITOR, _TRITON, _CALLER = "compositor", "triton", "caller"
_SPEECH_FRAMES = 100


@dataclass(frozen=True)
class Subject:
    """A tenant to measure: its name in the report, how its source is written, and how long and often it is measured."""

    case: str
    write: Callable[[Path], None]
    rounds: int
    turn_s: float


@dataclass(frozen=True)
class Sizes:
    """Frames a request, requests in flight, and the tenants by name."""

    subjects: Mapping[str, Subject]
    batch: int = TENANT_BATCH
    concurrency: int = 4


@dataclass(frozen=True)
class Round:
    """One round: the ceiling and both ways through the compositor."""

    ceiling: Measured
    ways: Mapping[str, Yield]


def run(run: Run) -> PartReport:
    """Adds the tenants, starts Triton and the service, and measures."""
    if run.quick:
        return measure(
            run, Sizes({"tiny": Subject("constructed mouth, small", _demo(320, 240, 4), 1, 0.5)}, concurrency=2)
        )
    true = Subject("true graph, random weights", _true_graph, 2, 4.0)
    return measure(run, Sizes({"demo": Subject("constructed mouth", _demo(1280, 720, 24), 3, 1.5), "true": true}))


def measure(run: Run, sizes: Sizes) -> PartReport:
    """Figures of all tenants, one after another on one Triton."""
    repository = run.folder / "repository"
    repository.mkdir()
    encoder = run.folder / "encoder.onnx"
    onnx.save(loudness_encoder(), encoder)
    add_encoder(repository, AUDIO_ENCODER, encoder)
    for name, subject in sizes.subjects.items():
        subject.write(run.folder / name)
        source = open_source(run.folder / name)
        choices = Choices(idle="background", crops="resident", max_batch_size=sizes.batch)
        add_tenant(repository, name, source, choices, Serving(), lambda *_: None)
    analyzer = perf_analyzer.install(install(default_home(), lambda _: None), lambda _: None)
    found: dict[str, list[Round]] = {}
    with (
        EmbeddedTriton(repository) as triton,
        service.running(repository, triton.grpc, run.folder) as served,
        calling("grpc", served.address) as caller,
    ):
        for name in sizes.subjects:
            found[name] = _rounds(run, sizes, Tenant(repository, name), analyzer, triton, served.pid, caller)
    how = (
        f"{sizes.concurrency} requests of {sizes.batch} frames in flight. Ceiling: perf_analyzer from "
        f"{perf_analyzer.WHEEL} on the fused model, "
        f"shared memory, no compositor. Composite: {sizes.concurrency} calls of {sizes.batch} frames at once. "
        f"Generate: {_streams(sizes)} at once, each with up to {BATCHES_AHEAD} requests in flight; the "
        "constructed mouth's encoder hears the speech. Default settings, nothing bound to a core; the caller takes its "
        "CPU from the same machine."
    )
    figures = [each for name, rounds in found.items() for each in _figures(sizes.subjects[name].case, rounds)]
    targets = [each for name, rounds in found.items() for each in _targets(sizes.subjects[name].case, rounds)]
    return PartReport("efficiency", TITLE, how, FPS, figures, targets, [_NOTE])


_NOTE = (
    "`CPU's limit`: frames a second that all cores would give if every one worked all the time on the compositor, the "
    "caller and Triton as they were measured. Where it lies below the ceiling, the cores and not the compositor's "
    "pipeline are what is missing."
)


def _demo(width: int, height: int, frames: int) -> Callable[[Path], None]:
    return lambda folder: avatar.write_source(folder, frames=frames, width=width, height=height)


def _true_graph(folder: Path) -> None:
    """The demo's frames with the field's network at its full size."""
    _demo(1280, 720, 8)(folder)
    onnx.save(architecture.unet(), folder / "checkpoint" / "model_best.onnx")


def _streams(sizes: Sizes) -> int:
    """Streams that keep `concurrency` requests in flight; one has BATCHES_AHEAD."""
    return max(1, sizes.concurrency // BATCHES_AHEAD)


def _rounds(
    run: Run,
    sizes: Sizes,
    tenant: Tenant,
    analyzer: PerfAnalyzer,
    triton: EmbeddedTriton,
    served: int,
    caller: Caller,
) -> list[Round]:
    """The ceiling and both ways in turns; the first turn of each way, which loads the models, is not counted."""
    subject = sizes.subjects[tenant.name]
    folder = run.folder / f"{tenant.name}-inputs"
    folder.mkdir()
    data = ceiling.write_inputs(tenant, folder)["fused"]
    load = ceiling.load_of(tenant, "fused", triton.grpc, data, sizes.batch, sizes.concurrency)
    for turn in _turns(sizes, tenant.name, 0.1, {}).values():
        caller.take(turn)
    # The models' own processes live from now on.
    watched = {_COMPOSITOR: [served], _TRITON: service.triton_pids(triton)}
    turns = _turns(sizes, tenant.name, subject.turn_s, watched)
    rounds = []
    for number in range(subject.rounds):
        rounds.append(_round(number, analyzer, load, caller, turns))
        run.progress(subject.case, number + 1, subject.rounds)
    return rounds


def _round(number: int, analyzer: PerfAnalyzer, load: Load, caller: Caller, turns: Mapping[str, Turn]) -> Round:
    """Every second round begins with the compositor."""
    if number % 2 == 0:
        measured = perf_analyzer.measure(analyzer, load)
        return Round(measured, {way: caller.take(turn) for way, turn in turns.items()})
    ways = {way: caller.take(turn) for way, turn in turns.items()}
    return Round(perf_analyzer.measure(analyzer, load), ways)


def _turns(sizes: Sizes, tenant: str, seconds: float, watched: Mapping[str, list[int]]) -> dict[str, Turn]:
    return {
        COMPOSITE: Turn(tenant, "composite", sizes.concurrency, sizes.batch, seconds, watched),
        GENERATE: Turn(tenant, "generate", _streams(sizes), _SPEECH_FRAMES, seconds, watched),
    }


def _figures(case: str, rounds: Sequence[Round]) -> Iterator[Figure]:
    top = [each.ceiling for each in rounds]
    yield Figure(case, CEILING, FPS, "fps", Spread.of(each.inferences_per_s for each in top))
    yield Figure(case, CEILING, "latency of a request, p50", "ms", Spread.of(each.latency_ms for each in top))
    for way in (COMPOSITE, GENERATE):
        turns = [each.ways[way] for each in rounds]
        yield Figure(case, way, FPS, "fps", Spread.of(turn.fps for turn in turns))
        yield Figure(case, way, "CPU's limit", "fps", Spread.of(cpu_limit(turn, _cores()) for turn in turns))
        for who in (_COMPOSITOR, _TRITON, _CALLER):
            yield Figure(case, way, f"{who} CPU a frame", "ms", Spread.of(turn.cpu_ms(who) for turn in turns))


def _targets(case: str, rounds: Sequence[Round]) -> Iterator[Target]:
    for way in (COMPOSITE, GENERATE):
        found = ratios([each.ways[way].fps for each in rounds], [each.ceiling.inferences_per_s for each in rounds])
        yield Target(f"frames a second of {way} / Triton's ceiling, {case}", found, "at least", 0.9, "x")


def cpu_limit(turn: Yield, cores: int) -> float:
    """Frames a second that `cores` cores give where a frame takes the CPU that it took in this turn."""
    return cores * turn.frames / sum(turn.cpu_s.values())


def _cores() -> int:
    return len(os.sched_getaffinity(0))


PART = Part("efficiency", TITLE, run)
