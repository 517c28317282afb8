"""Part `inference`: what memory the true graph takes in Triton, by ONNX Runtime's settings and batch size, and how fast
it is then."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count

from tritonclient.utils import InferenceServerException

from compositor.errors import InferenceFailed
from compositor.manifest import CROPS
from lipsync import architecture
from lipsync.model_config import TENANT_BATCH, Kind
from lipsync.tritonserver import EmbeddedTriton, default_home, install

from .clocks import Clock, Contestant, Rounds, take_turns
from .figures import Figure, PartReport, Spread, Target, ratios
from .half_precision import halved
from .inference_models import GPU_SETTINGS, INSTALLED, PLAIN, SETTINGS, THREADS, Server, Setting, Subject
from .part import Part, Run
from .process_memory import available_bytes, gpu_bytes, mapping_bytes, process_bytes

TITLE = "Memory of inference"
_ENOUGH_BYTES = 300_000_000
"""More than a frame of the batch takes with any setting."""
_ALONE = 2
_ROUNDS, _CALLS = 7, 20
_GPUS = ("GPU, FP32", "GPU, FP16")
_LABELS = {"private": "private memory", "device": "device memory"}

Bytes = Mapping[str, int]


@dataclass(frozen=True)
class Sizes:
    """How much is measured: the graph, its crops, and the batch sizes at which every setting runs, only the installed
    one, that one with two threads, and those of a GPU. frames: about how many a setting runs at a batch size, but two
    batches at least."""

    width: float = 1.0
    crops: int = 523
    every: Sequence[int] = (1, 2, 4, 8)
    installed: Sequence[int] = (24,)
    threads: Sequence[int] = (1, 4)
    gpu: Sequence[int] = (1, 4, 8, 24)
    frames: int = 8

    def settings(self, batch: int) -> list[Setting]:
        chosen = list(SETTINGS) if batch in self.every else [INSTALLED]
        return [*chosen, THREADS] if batch in self.threads else chosen

    def rounds(self, batch: int) -> int:
        return max(2, self.frames // batch)


@dataclass(frozen=True)
class Place:
    """Where models run, and what reads the memory of the backend process with a given pid there, in bytes by kind."""

    name: str
    kind: Kind
    read: Callable[[int], Bytes]


@dataclass(frozen=True)
class Taken:
    """The memory of one model: loaded, after its first run, after all runs, and after single frames then."""

    loaded: Bytes
    first: Bytes
    after: Bytes
    alone: Bytes


@dataclass(frozen=True)
class Found:
    """What was measured at one batch size, by the setting's name."""

    place: Place
    batch: int
    taken: Mapping[str, Taken]
    rounds: Rounds

    @property
    def case(self) -> str:
        return f"{self.place.name}, batch {self.batch}"


def run(run: Run) -> PartReport:
    """Starts Triton and measures."""
    tiny = Sizes(width=0.1, crops=8, every=(TENANT_BATCH,), installed=(), threads=(), gpu=(1,), frames=2)
    return measure(run, tiny if run.quick else Sizes())


def measure(run: Run, sizes: Sizes) -> PartReport:
    """Figures of every setting at its batch sizes, and of the crops once all of them have been used."""
    repository = run.folder / "repository"
    repository.mkdir()
    model = architecture.unet(sizes.width)
    subject = Subject(run.folder / "true", repository, model, sizes.crops)
    half = partial(Subject, run.folder / "half", repository, halved(model), sizes.crops)
    nothing = Subject(run.folder / "nothing", repository, architecture.do_nothing(), sizes.crops)
    cuda = install(default_home(), lambda _: None).cuda
    with EmbeddedTriton(repository) as triton:
        server = Server(triton)
        try:
            sweep = Sweep(run, sizes, server, subject, half)
            found = [*sweep.on_cpu(), *sweep.on_gpu(cuda)]
            rest = [*_mapped(server, nothing), *_around(server, nothing)]
        except InferenceServerException as error:
            raise InferenceFailed(f"Triton failed: {error.message()}") from error
        finally:
            server.close()
    how = (
        f"The true graph at width {sizes.width:g} with {sizes.crops} crops, in the embedded Triton with its "
        "Python-based backend, a process for each model; one request at a time, one thread unless said. Every batch "
        "size begins with a fresh process. Private memory: what is the process's own (weights, arena, heap, Python); "
        "the peak counts mapped files, too."
    )
    taken = [figure for each in found for figure in figures(each)]
    return PartReport("inference", TITLE, how, "private memory after", [*taken, *rest], targets(found), sweep.notes)


class Sweep:
    """Runs one graph with all settings through all batch sizes; on a GPU at half precision, too."""

    def __init__(self, run: Run, sizes: Sizes, server: Server, subject: Subject, half: Callable[[], Subject]) -> None:
        """half: makes the same at half precision, once it is wanted."""
        self.notes: list[str] = []
        self._run, self._sizes, self._server = run, sizes, server
        self._subject, self._half = subject, half
        self._models = count(1)

    def on_cpu(self) -> Iterator[Found]:
        """All settings of a batch size are loaded together and take turns."""
        place = Place("CPU", "cpu", process_bytes)
        batches = [*self._sizes.every, *self._sizes.installed]
        for number, batch in enumerate(batches):
            settings = self._sizes.settings(batch)
            if available_bytes() > _ENOUGH_BYTES * (batch + 1) * len(settings):
                yield self._at(place, self._subject, batch, settings)
            else:
                self.notes.append(f"Batch {batch} was left out: too little memory was free.")
            self._run.progress("inference", number + 1, len(batches))

    def on_gpu(self, cuda: bool) -> Iterator[Found]:
        """One setting after another: the GPU's memory is counted as a whole. cuda: whether onnxruntime can use one."""
        before = gpu_bytes()
        if before is None or not cuda:
            lacking = "no GPU was at hand" if before is None else "the GPU needs onnxruntime-gpu"
            self.notes.append(f"All figures are a CPU's: {lacking}.")
            return
        fp32, fp16 = (Place(name, "gpu", lambda _: {"device": (gpu_bytes() or before) - before}) for name in _GPUS)
        half = self._half()
        for number, batch in enumerate(self._sizes.gpu):
            for setting in GPU_SETTINGS:
                yield self._at(fp32, self._subject, batch, [setting])
            yield self._at(fp16, half, batch, [INSTALLED])
            self._run.progress("inference on the GPU", number + 1, len(self._sizes.gpu))

    def _at(self, place: Place, subject: Subject, batch: int, settings: Sequence[Setting]) -> Found:
        """Loads a model of each setting, runs them in turns and unloads them."""
        server = self._server
        models = {setting.name: f"model{next(self._models)}" for setting in settings}
        for setting in settings:
            subject.install(models[setting.name], setting, batch, place.kind)
        pids = {name: server.load(model) for name, model in models.items()}
        ways = {name: partial(server.infer, model, batch, subject.crops) for name, model in models.items()}

        def read() -> dict[str, Bytes]:
            return {name: place.read(pid) for name, pid in pids.items()}

        loaded = read()
        for way in ways.values():
            way()
        first = read()
        contestants = {name: Contestant(way, units=batch) for name, way in ways.items()}
        rounds = take_turns(contestants, self._sizes.rounds(batch), Clock(server.session), lambda *_: None)
        after = read()
        for model in [*models.values()] * _ALONE:
            server.infer(model, 1, subject.crops)
        alone = read()
        server.unload(models.values(), pids.values())
        taken = {name: Taken(loaded[name], first[name], after[name], alone[name]) for name in models}
        return Found(place, batch, taken, rounds)


def _mapped(server: Server, subject: Subject) -> Iterator[Figure]:
    """What the crops take in a process that has used each of them, with a graph that does nothing."""
    name = "nothing"
    file = subject.install(name, INSTALLED, TENANT_BATCH, "cpu") / CROPS
    pid = server.load(name)
    for _ in range(-(-subject.crops // TENANT_BATCH)):
        server.infer(name, TENANT_BATCH, subject.crops)
    found = mapping_bytes(pid, file.resolve())
    server.unload([name], [pid])
    case = f"crops of all {subject.crops} frames, used"
    yield Figure(case, "mapped by the backend process", "memory", "MB", Spread.once(found["resident"] / 1e6))
    yield Figure(case, "of it copied", "memory", "MB", Spread.once(found["copied"] / 1e6))


def _around(server: Server, subject: Subject) -> Iterator[Figure]:
    """Triton's own work on a frame, by a graph that does nothing: what a batch saves where the model is cheap."""
    for batch in (1, TENANT_BATCH):
        name = f"nothing{batch}"
        subject.install(name, INSTALLED, batch, "cpu")
        pid = server.load(name)
        way = Contestant(partial(server.infer, name, batch, subject.crops), _CALLS, batch)
        rounds = take_turns({name: way}, _ROUNDS, Clock(server.session), lambda *_: None)
        server.unload([name], [pid])
        case = f"graph that does nothing, batch {batch}"
        yield Figure(case, INSTALLED.name, "Triton CPU", "ms a frame", rounds.server_cpu_s(name).times(1e3))


def figures(found: Found) -> Iterator[Figure]:
    """Memory and speed at one batch size."""
    for name, taken in found.taken.items():
        for kind, label in _LABELS.items():
            if kind not in taken.after:
                continue
            moments = {"after": taken.after}
            moments |= {"loaded": taken.loaded} if found.batch == 1 else {"after, then single frames": taken.alone}
            for moment, values in moments.items():
                yield Figure(found.case, name, f"{label} {moment}", "MB", Spread.once(values[kind] / 1e6))
        if "peak" in taken.after:
            yield Figure(found.case, name, "peak of all memory", "MB", Spread.once(taken.after["peak"] / 1e6))
        speed = Spread.of(1 / cost.wall_s for cost in found.rounds.costs[name])
        yield Figure(found.case, name, "frames a second", "fps", speed)
        yield Figure(found.case, name, "Triton CPU", "ms a frame", found.rounds.server_cpu_s(name).times(1e3))


def targets(found: Sequence[Found]) -> list[Target]:
    """That a tenant as it is installed by default takes no more memory the longer it runs, and what that costs."""
    usual = next((each for each in found if each.place.kind == "cpu" and each.batch == TENANT_BATCH), None)
    if usual is None:
        return []
    taken = usual.taken[INSTALLED.name]
    growth = Spread.once(taken.after["private"] / taken.first["private"])
    # Not wall: a few rounds on a shared machine say little, while CPU time repeats.
    installed, plain = ([cost.server_cpu_s for cost in usual.rounds.costs[it.name]] for it in (INSTALLED, PLAIN))
    slower = ratios(installed, plain)
    return [
        Target(
            f"private memory after all runs / after the first, as installed, batch {TENANT_BATCH}",
            growth,
            "at most",
            1.05,
            "x",
        ),
        Target(
            f"Triton CPU, as installed / ONNX Runtime's defaults, batch {TENANT_BATCH}", slower, "at most", 1.1, "x"
        ),
    ]


PART = Part("inference", TITLE, run)
