"""The part `inference`: its batch sizes, its notes, and tiny models of it in the real Triton."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from lipsync.bench import inference_memory
from lipsync.bench.clocks import Cost, Rounds
from lipsync.bench.inference_memory import Found, Place, Sizes, Sweep, Taken
from lipsync.bench.inference_models import GPU_SETTINGS, INSTALLED, PLAIN, SETTINGS, THREADS, Setting, Subject
from lipsync.bench.part import Run, carry_out
from lipsync.model_config import MEMORY, TENANT_BATCH, Kind


def quick(folder: Path) -> Run:
    return Run(folder, lambda *_: None, quick=True)


def sweep_of(monkeypatch: pytest.MonkeyPatch, folder: Path, sizes: Sizes) -> Sweep:
    """A sweep without Triton: what it would measure comes out as empty rounds."""

    def at(self: Sweep, place: Place, subject: Subject, batch: int, settings: Sequence[Setting]) -> Found:
        return Found(place, batch, {}, Rounds({setting.name: [] for setting in settings}))

    nothing: Any = None
    monkeypatch.setattr(Sweep, "_at", at)
    return Sweep(quick(folder), sizes, nothing, nothing, lambda: nothing)


def planned(found: Iterable[Found]) -> list[tuple[str, list[str]]]:
    return [(each.case, list(each.rounds.costs)) for each in found]


def found(first: int, after: int) -> Found:
    at = {"private": after * 1_000_000, "peak": 9_000_000}
    taken = Taken({"private": 1_000_000}, {"private": first * 1_000_000}, at, {"private": 2_000_000})
    costs = {PLAIN.name: [Cost(0.1, 0, 0.2)], INSTALLED.name: [Cost(0.2, 0, 0.3)]}
    names = {INSTALLED.name: taken}
    return Found(Place("CPU", "cpu", lambda _: {}), TENANT_BATCH, names, Rounds(costs))


def test_settings_that_are_compared_differ() -> None:
    assert {"ONNX Runtime's defaults", "as installed"} <= {setting.name for setting in SETTINGS}
    for settings in (SETTINGS, GPU_SETTINGS):
        assert len({setting.name for setting in settings}) == len(settings)
        assert len({tuple(setting.memory.items()) for setting in settings}) == len(settings)
    assert INSTALLED.memory == MEMORY


def test_all_settings_run_at_the_usual_batch_sizes_and_the_installed_one_beyond() -> None:
    sizes = Sizes(every=(1, 2), installed=(24,), threads=(2,))
    assert sizes.settings(1) == list(SETTINGS)
    assert sizes.settings(2) == [*SETTINGS, THREADS]
    assert sizes.settings(24) == [INSTALLED]
    assert TENANT_BATCH in Sizes().every


def test_each_batch_size_has_two_rounds_at_least() -> None:
    assert [Sizes(frames=8).rounds(batch) for batch in (1, 2, 4, 24)] == [8, 4, 2, 2]


def test_a_batch_that_does_not_fit_into_memory_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sweep = sweep_of(monkeypatch, tmp_path, Sizes(every=(1,), installed=(2, 8), threads=()))
    monkeypatch.setattr(inference_memory, "available_bytes", lambda: 2_500_000_000)
    expected = [("CPU, batch 1", [setting.name for setting in SETTINGS]), ("CPU, batch 2", [INSTALLED.name])]
    assert planned(sweep.on_cpu()) == expected
    assert sweep.notes == ["Batch 8 was left out: too little memory was free."]


def test_settings_run_on_the_gpu_one_by_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sweep = sweep_of(monkeypatch, tmp_path, Sizes(gpu=(1, 4)))
    monkeypatch.setattr(inference_memory, "gpu_bytes", lambda: 1)
    expected = [
        each
        for batch in (1, 4)
        for each in (
            *((f"GPU, FP32, batch {batch}", [setting.name]) for setting in GPU_SETTINGS),
            (f"GPU, FP16, batch {batch}", [INSTALLED.name]),
        )
    ]
    assert planned(sweep.on_gpu(cuda=True)) == expected
    assert sweep.notes == []


class FakeServer:
    """Stands for a Triton with a GPU: models are this process, and take 1 MB when they are loaded and 2 MB each run."""

    session = -1

    def __init__(self) -> None:
        self.used = 0
        self.loaded: list[str] = []

    def load(self, name: str) -> int:
        self.loaded.append(name)
        self.used += 1_000_000
        return 1

    def infer(self, name: str, batch: int, crops: int) -> None:
        self.used += 2_000_000

    def unload(self, names: Iterable[str], pids: Iterable[int]) -> None:
        self.used = 0


class FakeSubject:
    crops = 3

    def install(self, name: str, setting: Setting, batch: int, kind: Kind) -> None:
        assert kind == "gpu"


def test_memory_on_the_gpu_is_what_was_added(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server: Any = FakeServer()
    subject: Any = FakeSubject()
    sweep = Sweep(quick(tmp_path), Sizes(gpu=(1, 4), frames=1), server, subject, lambda: subject)
    monkeypatch.setattr(inference_memory, "gpu_bytes", lambda: 700_000_000 + server.used)
    # A run before the rounds, one to warm up, two rounds.
    at = [{"device": 1_000_000 + 2_000_000 * runs} for runs in (0, 1, 4, 6)]
    results = list(sweep.on_gpu(cuda=True))
    assert [taken for each in results for taken in each.taken.values()] == [Taken(*at)] * 2 * (len(GPU_SETTINGS) + 1)
    assert len(set(server.loaded)) == len(results)
    assert "device memory after" in {figure.quantity for figure in inference_memory.figures(results[0])}


@pytest.mark.parametrize(
    ("used", "cuda", "note"), [(None, True, "no GPU was at hand"), (1, False, "the GPU needs onnxruntime-gpu")]
)
def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, used: int | None, cuda: bool, note: str
) -> None:
    sweep = sweep_of(monkeypatch, tmp_path, Sizes())
    monkeypatch.setattr(inference_memory, "gpu_bytes", lambda: used)
    assert list(sweep.on_gpu(cuda)) == []
    assert sweep.notes == [f"All figures are a CPU's: {note}."]


def test_memory_that_grows_misses_the_target() -> None:
    growth, slower = inference_memory.targets([found(100, 104)])
    assert growth.met
    assert slower.spread.median == pytest.approx(1.5)
    assert not inference_memory.targets([found(100, 106)])[0].met


def test_figures_are_in_megabytes_and_frames_a_second() -> None:
    values = {figure.quantity: figure.spread.median for figure in inference_memory.figures(found(1, 3))}
    assert values == {
        "private memory after": 3,
        "private memory after, then single frames": 2,
        "peak of all memory": 9,
        "frames a second": 5,
        "Triton CPU": 300,
    }


@pytest.mark.triton
@pytest.mark.usefixtures("triton_home")
def test_the_part_measures_models_in_triton(tmp_path: Path) -> None:
    report = carry_out(inference_memory.PART, quick(tmp_path))
    assert report.failure == ""
    assert len(report.targets) == 2
    cpu = [figure for figure in report.figures if figure.case == f"CPU, batch {TENANT_BATCH}"]
    assert {figure.subject for figure in cpu} == {setting.name for setting in SETTINGS}
    assert min(figure.spread.median for figure in cpu) > 0
    mapped, copied = (figure.spread.median for figure in report.figures if figure.quantity == "memory")
    assert mapped == pytest.approx(8 * 328 * 328 * 3 / 1e6, rel=0.01)
    assert copied == 0
    around = [figure for figure in report.figures if figure.case.startswith("graph that does nothing, batch ")]
    assert [figure.spread.median > 0 for figure in around] == [True, True]
