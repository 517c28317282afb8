"""Part `baselines`: the same frames by the predecessor's pipeline, by the loop that a user writes first, and by us.

Same model, speech, backgrounds and JPEG quality; all give the same pictures, which is checked first. They take turns
within one run.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import cv2

from compositor.manifest import PATCHES, SCANS
from compositor.tenant import CROP_BYTES, Tenant
from compositor.triton.inference import MOUTH_BYTES
from lipsync import architecture
from lipsync.tritonserver import EmbeddedTriton

from .allocator import keep_large_blocks
from .baseline_scene import Model, Scene, Sizes
from .baseline_stage import COMPOSITE, GENERATE, LEAST_PSNR_DB, PLAIN, PREDECESSOR, Stage
from .clocks import Clock, Contestant, Step, process_clock, take_turns
from .contenders import Contender
from .figures import Figure, PartReport, Spread, ratios
from .part import Part, Run
from .process_memory import rollup_bytes

TITLE = "The predecessor's pipeline, the plain loop, and ours"
WIDTH = 0.25
"""Of the U-Net: 10 to 20 ms a frame on two cores, about what the predecessor's documents say of its GPU (17 ms)."""
NOTHING = Model("nothing", "model that does nothing", architecture.do_nothing, 1, {1: 7, 4: 3})
UNET = Model(
    "unet", f"U-Net of width {WIDTH:g}", partial(architecture.unet, WIDTH), len(os.sched_getaffinity(0)), {1: 5, 2: 3}
)
CPU = "CPU a frame, all processes"


@dataclass(frozen=True)
class Sample:
    """One round of one contender: seconds of wall and of CPU a frame, and seconds from a call to its first frame."""

    wall_s: float
    first_s: float
    client_s: float
    service_s: float
    triton_s: float

    @property
    def cpu_s(self) -> float:
        """CPU of all processes."""
        return self.client_s + self.service_s + self.triton_s


Rounds = Mapping[str, Sequence[Sample]]


def run(run: Run) -> PartReport:
    """Starts everybody and measures."""
    cv2.setNumThreads(1)
    keep_large_blocks()
    if run.quick:
        tiny = Model("nothing", NOTHING.name, NOTHING.graph, 1, {1: 2, 2: 2})
        return measure(run, Sizes(320, 240, 100, 4, 4), [tiny])
    return measure(run, Sizes(), [NOTHING, UNET])


def measure(run: Run, sizes: Sizes, models: Sequence[Model]) -> PartReport:
    """Figures of everybody with each model. Raises LipsyncError where they do not give the same pictures."""
    scratch = run.folder / "scratch"
    scratch.mkdir()
    scene = Scene(run.folder, sizes)
    for model in models:
        scene.add(model)
    figures: list[Figure] = []
    notes: list[str] = []
    with EmbeddedTriton(scene.repository) as triton:
        for model in models:
            stage = Stage(scene, model, triton.grpc, scratch)
            if model is models[0]:
                figures += _wire(model.name, stage)
            with stage.contenders() as contenders:
                # Only now: everything that Triton starts for the models is there.
                clock = Clock(triton.keeper_pid)
                for clients, rounds in model.rounds.items():
                    case = f"{model.name}, {clients} client{'s' if clients > 1 else ''}"
                    take = partial(sample, clients=clients, frames=sizes.batch, triton=clock)
                    measured = in_turns(contenders, take, rounds, partial(run.progress, case))
                    figures += [*_times(case, measured), *_ratios(case, measured)]
                figures += _memory(model.name, contenders)
            threads = f"{model.threads} thread{'s' if model.threads > 1 else ''} for everybody"
            notes.append(f"{model.name}: {threads}; the plain loop is fastest with {stage.loop_batch} frames a batch.")
    figures += _backgrounds(Tenant(scene.repository, models[0].tenant), scene)
    return PartReport("baselines", TITLE, _how(sizes), CPU, figures, (), notes)


def sample(contender: Contender, clients: int, frames: int, triton: Clock) -> Sample:
    """One round: the batch of `frames` for each client at once."""
    first_s: list[float] = []
    holder = process_clock(contender.pid)
    service_s = time.clock_gettime(holder)
    cost = triton.cost(Contestant(lambda: first_s.extend(contender.run(clients)), units=clients * frames))
    service_s = (time.clock_gettime(holder) - service_s) / (clients * frames)
    # Triton may still tidy up after the one before.
    triton_s = cost.server_cpu_s if contender.asks_triton else 0.0
    return Sample(cost.wall_s, sum(first_s) / len(first_s), cost.cpu_s, service_s, triton_s)


def in_turns(
    contenders: Mapping[str, Contender], take: Callable[[Contender], Sample], rounds: int, step: Step
) -> Rounds:
    """Samples of all contenders, who take turns; the first, to warm up, is left out."""
    found: dict[str, list[Sample]] = {name: [] for name in contenders}

    def note(name: str) -> None:
        found[name].append(take(contenders[name]))

    take_turns({name: Contestant(partial(note, name)) for name in contenders}, rounds, Clock(), step)
    return {name: samples[1:] for name, samples in found.items()}


def _wire(case: str, stage: Stage) -> Iterator[Figure]:
    for name, hop, sent in stage.bytes_a_frame():
        yield Figure(case, name, f"bytes on the wire, {hop}", "kB a frame", Spread.once(sent / 1e3))
    yield Figure(case, "ours", "through shared memory", "kB a frame", Spread.once(MOUTH_BYTES / 1e3))


def _times(case: str, measured: Rounds) -> Iterator[Figure]:
    parts: dict[str, Callable[[Sample], float]] = {
        "time to the first frame": lambda sample: sample.first_s,
        CPU: lambda sample: sample.cpu_s,
        "CPU a frame, client": lambda sample: sample.client_s,
        "CPU a frame, process with the tenant": lambda sample: sample.service_s,
        "CPU a frame, Triton": lambda sample: sample.triton_s,
    }
    for name, samples in measured.items():
        yield Figure(case, name, "throughput", "frames/s", Spread.of(1 / sample.wall_s for sample in samples))
        for quantity, value in parts.items():
            yield Figure(case, name, quantity, "ms", Spread.of(map(value, samples)).times(1e3))


def _ratios(case: str, measured: Rounds) -> Iterator[Figure]:
    """How many times what we take the others take, round by round; `Generate` is what is made for a first frame."""
    compared: tuple[tuple[str, str, Callable[[Sample], float]], ...] = (
        ("wall a frame", COMPOSITE, lambda sample: sample.wall_s),
        (CPU, COMPOSITE, lambda sample: sample.cpu_s),
        ("CPU a frame, all but Triton's", COMPOSITE, lambda sample: sample.client_s + sample.service_s),
        ("time to the first frame", GENERATE, lambda sample: sample.first_s),
    )
    for theirs, (quantity, ours, value) in itertools.product((PREDECESSOR, PLAIN), compared):
        spread = ratios([value(each) for each in measured[theirs]], [value(each) for each in measured[ours]])
        yield Figure(case, f"{theirs} / {ours}", f"ratio of {quantity}", "x", spread)


def _memory(case: str, contenders: Mapping[str, Contender]) -> Iterator[Figure]:
    for name, who in ((PREDECESSOR, PREDECESSOR), (PLAIN, PLAIN), (COMPOSITE, "ours")):
        taken = rollup_bytes(contenders[name].pid)
        for field, kind in (("Rss", "resident"), ("Pss_Anon", "resident, its own")):
            yield Figure(
                case, who, f"memory of the process with the tenant, {kind}", "MB", Spread.once(taken[field] / 1e6)
            )


def _backgrounds(tenant: Tenant, scene: Scene) -> Iterator[Figure]:
    """What another background adds where the tenant is held, from the sizes of what it holds."""
    prepared = sum(tenant.manifest.files[file].size for file in (SCANS, PATCHES)) / tenant.frames
    taken = {
        PREDECESSOR: scene.held_bytes,
        "predecessor, its client": scene.visual_bytes,
        PLAIN: scene.held_bytes + scene.visual_bytes,
        "ours": prepared,
        "ours, Triton": CROP_BYTES,
    }
    for who, size in taken.items():
        yield Figure("any model", who, "memory that one more background takes", "kB", Spread.once(size / 1e3))


def _how(sizes: Sizes) -> str:
    return (
        f"{sizes.batch} frames of {sizes.width}x{sizes.height} with a mouth of {sizes.side} px, pasted hard, JPEG "
        f"quality 75, for each client at once; {sizes.backgrounds} backgrounds; everybody's pictures are at least "
        f"{LEAST_PSNR_DB:.0f} dB alike. Predecessor: its documented pipeline, in Python over C libraries, not in Go: "
        "the client's request, float32 pictures and features, lies ready; the service sends them on to the raw model "
        f"({sizes.batch} frames a request) and composites and encodes whole frames, held as pixels, in a pool of a "
        "thread a core; it and its client keep their large buffers. Plain loop: one process, ONNX Runtime and OpenCV, "
        "pictures made beforehand, frames held as pixels; clients wait for each other; its memory and CPU include the "
        "model's. Ours: default settings but for the model's threads, mouths through shared memory; Composite gets "
        "features, Generate gets speech and makes the features. Triton runs one instance of each model."
    )


PART = Part("baselines", TITLE, run)
