"""Part `compositing`: a predicted mouth into a finished JPEG frame on one core, the plain way and ours.

Plain: the background lies there as pixels; copy it, resize the mouth into it, blend the edge, encode the whole frame.
Ours: `compositor.rendering.render` on a prepared tenant. Both give the same picture, which is checked first.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from compositor import jpeg, rendering
from compositor.blending import Pixels, cut_crop, paste, split_planes
from compositor.errors import LipsyncError
from compositor.geometry import Box
from compositor.jpeg import Encoding
from compositor.rendering import Output
from compositor.tenant import Tenant
from lipsync import architecture
from lipsync.preparation import Choices, Graph, prepare
from lipsync.sources import Source

from .clocks import Clock, Contestant, Rounds, take_turns
from .figures import Figure, PartReport, Spread, Target
from .part import Part, Run
from .subjects import centred_rects, footage, reference_rects, speaking

TITLE = "Compositing a frame, one core"
_PLAIN, _OURS = "plain", "ours"
_MOUTHS = 4
_HEADLINE = "1280x720, mouth 300 px"


@dataclass(frozen=True)
class Case:
    """A frame size and the crop rectangles in it."""

    name: str
    width: int
    height: int
    rects: list[Box]


@dataclass
class Stages:
    """Wall seconds of the two stages, one entry a frame."""

    blend_s: list[float] = field(default_factory=list)
    encode_s: list[float] = field(default_factory=list)

    def add(self, blend_s: float, encode_s: float) -> None:
        self.blend_s.append(blend_s)
        self.encode_s.append(encode_s)


class Film:
    """A tenant's frames held in memory, as `prepare` reads them."""

    def __init__(self, frames: list[Pixels]) -> None:
        self.path = Path("memory")
        self.frames = frames
        self.names = [str(number) for number in range(len(frames))]
        self.size = (frames[0].shape[1], frames[0].shape[0])

    def __iter__(self) -> Iterator[Pixels]:
        return iter(self.frames)


class Scene:
    """One case made ready: the same frames as pixels and as a prepared tenant, and mouths for them."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case = case
        self.frames = list(footage(case.width, case.height, len(case.rects), drawn=4))
        self.tenant = _prepared(folder, self.frames, case.rects)
        talking = speaking(case.width, case.height)
        self.mouths = [cut_crop(talking, rect) for rect in case.rects[:_MOUTHS]]
        self.predicted = [split_planes(mouth) for mouth in self.mouths]
        self.whole = Encoding(self.tenant.encoding.quality, self.tenant.encoding.subsampling)
        self.stages = {_PLAIN: Stages(), _OURS: Stages()}

    def mouth(self, number: int) -> Pixels:
        return self.mouths[number % len(self.mouths)]

    def plain_pixels(self, number: int) -> Pixels:
        return paste(self.frames[number], self.mouth(number), self.case.rects[number], self.tenant.manifest.blend)

    def plain(self, number: int) -> bytes:
        begin = time.perf_counter()
        pixels = self.plain_pixels(number)
        blended = time.perf_counter()
        data = jpeg.encode(pixels, self.whole)
        self.stages[_PLAIN].add(blended - begin, time.perf_counter() - blended)
        return data

    def ours(self, number: int) -> bytes:
        done = rendering.render(self.tenant, number, self.predicted[number % len(self.predicted)], Output())
        self.stages[_OURS].add(done.blend_s, done.encode_s)
        return done.data

    def check(self) -> None:
        """Raises LipsyncError unless both ways give the same picture."""
        for number in range(len(self.frames)):
            if not np.array_equal(jpeg.decode(self.plain(number)), jpeg.decode(self.ours(number))):
                raise LipsyncError(f"{self.case.name}: frame {number} is another picture than the plain way's")

    def each(self, render: Callable[[int], object]) -> Callable[[], None]:
        """A function that renders every frame once."""

        def all_frames() -> None:
            for number in range(len(self.frames)):
                render(number)

        return all_frames


def _prepared(folder: Path, frames: list[Pixels], rects: list[Box]) -> Tenant:
    version = folder / "subject" / "1"
    version.mkdir(parents=True)
    model = architecture.do_nothing()
    graph = Graph(model, ("visual", "audio", "output"), "0" * 64)
    source = Source(Path("memory"), Film(frames), rects)
    prepare(version, "subject", source, graph, Path("none"), Choices(idle="background"), lambda *_: None)
    return Tenant(folder, "subject")


def cases(frames: int) -> list[Case]:
    """Those of the report; the mouth of 300 px at 720p grows with the shorter side."""
    made = []
    for width, height in ((1280, 720), (720, 1280), (1080, 1920)):
        side = 300 * min(width, height) // 720
        name = f"{width}x{height}, mouth {side} px"
        made.append(Case(name, width, height, centred_rects(width, height, frames, side)))
    every = reference_rects()
    picked = [every[number * len(every) // frames] for number in range(frames)]
    made.insert(1, Case("1280x720, reference rectangles", 1280, 720, picked))
    return made


def run(run: Run) -> PartReport:
    """Measures all cases."""
    cv2.setNumThreads(1)
    if run.quick:
        tiny = [Case("320x240, mouth 100 px", 320, 240, centred_rects(320, 240, 4, 100))]
        return measure(run, tiny, rounds=2, calls=1)
    # More than caches hold, as of a real tenant.
    return measure(run, cases(64), rounds=21, calls=1)


def measure(run: Run, wanted: list[Case], rounds: int, calls: int) -> PartReport:
    """Figures of each case; every round renders all of its frames `calls` times each way."""
    figures: list[Figure] = []
    targets: list[Target] = []
    for place, case in enumerate(wanted):
        scene = Scene(case, run.folder / str(place))
        scene.check()
        contestants = {
            name: Contestant(scene.each(way), calls, len(scene.frames))
            for name, way in ((_PLAIN, scene.plain), (_OURS, scene.ours))
        }
        measured = take_turns(contestants, rounds, Clock(), partial(run.progress, case.name))
        figures += itertools.chain(_times(scene, measured), _stages(scene), _sizes(scene))
        targets += _targets(case, measured)
    how = (
        "Background as pixels, copied, mouth resized (cubic) and blended into it, whole frame encoded without restart "
        "markers (plain), against `rendering.render` on the prepared tenant (ours); JPEG quality 75, 4:2:0, feathered; "
        "the decoded pictures are identical. One thread. Frames: the drawn avatar with a camera's grain."
    )
    return PartReport("compositing", TITLE, how, "CPU a frame", figures, targets)


def _times(scene: Scene, measured: Rounds) -> Iterator[Figure]:
    for name in (_PLAIN, _OURS):
        yield Figure(scene.case.name, name, "CPU a frame", "ms", measured.cpu_s(name).times(1e3))
        yield Figure(scene.case.name, name, "wall a frame", "ms", measured.wall_s(name).times(1e3))


def _stages(scene: Scene) -> Iterator[Figure]:
    for name, encoding in ((_PLAIN, "encode, wall"), (_OURS, "encode and splice, wall")):
        stage = scene.stages[name]
        yield Figure(scene.case.name, name, "resize and blend, wall", "ms", Spread.of(stage.blend_s).times(1e3))
        yield Figure(scene.case.name, name, encoding, "ms", Spread.of(stage.encode_s).times(1e3))


def _sizes(scene: Scene) -> Iterator[Figure]:
    case, numbers = scene.case.name, range(len(scene.frames))
    plain = [len(scene.plain(number)) for number in numbers]
    ours = [len(scene.ours(number)) for number in numbers]
    marked = [len(jpeg.encode(scene.plain_pixels(number), scene.tenant.encoding)) for number in numbers]
    extra = [100 * (a / b - 1) for a, b in zip(marked, plain, strict=True)]
    covered: NDArray[np.float64] = np.array(
        [scene.tenant.frame(number).patch.area / scene.case.rects[number].area for number in numbers]
    )
    yield Figure(case, _PLAIN, "size of a frame", "kB", Spread.of(plain).times(1e-3))
    yield Figure(case, _OURS, "size of a frame", "kB", Spread.of(ours).times(1e-3))
    k = scene.tenant.encoding.restart_interval
    yield Figure(case, _OURS, f"restart markers every {k} MCUs add", "%", Spread.of(extra))
    yield Figure(case, _OURS, "patch encoded, of the rectangle's area", "x", Spread.of(covered))


def _targets(case: Case, measured: Rounds) -> Iterator[Target]:
    times = measured.cpu_ratio(_PLAIN, _OURS)
    yield Target(f"CPU plain / ours, {case.name}", times, "at least", 6, "x")
    if case.name == _HEADLINE:
        yield Target(f"CPU a frame, {case.name}", measured.cpu_s(_OURS).times(1e3), "at most", 0.7, "ms")


PART = Part("compositing", TITLE, run)
