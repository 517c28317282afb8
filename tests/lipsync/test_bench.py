"""The benchmark's clocks, machine, subjects and parts. Parts run in tiny sizes; no test depends on how long it took."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from compositor.blending import set_prediction
from compositor.errors import InvalidInput, LipsyncError
from lipsync import architecture
from lipsync.app import build
from lipsync.bench import machine, parts, subjects, wire
from lipsync.bench.clocks import Clock, Contestant, Cost, Rounds, living_cpu_s, take_turns
from lipsync.bench.figures import PartReport, Spread
from lipsync.bench.part import Part, Run, carry_out
from lipsync.fusing import MASK
from lipsync.sources import open_source


@pytest.fixture(autouse=True)
def opencv_threads() -> Iterator[None]:
    """Parts measure with one thread; other tests get theirs back."""
    threads = cv2.getNumThreads()
    yield
    cv2.setNumThreads(threads)


def run_in(folder: Path, seen: list[tuple[str, int, int]] | None = None) -> Run:
    noted = [] if seen is None else seen
    return Run(folder, lambda *progress: noted.append(progress), quick=True)


def test_a_cost_is_for_one_unit_of_work() -> None:
    calls: list[int] = []
    spin = Contestant(lambda: calls.append(sum(range(20_000))), calls=3, units=5)
    begin = time.perf_counter(), time.process_time()
    cost = Clock().cost(spin)
    whole = time.perf_counter() - begin[0], time.process_time() - begin[1]
    assert len(calls) == 3
    assert 0 < cost.wall_s * 15 <= whole[0]
    assert 0 < cost.cpu_s * 15 <= whole[1]
    assert cost.server_cpu_s == 0
    assert cost.wall_s * 4.99 <= cost.slowest_call_s <= whole[0]


def test_the_clock_reads_the_cpu_of_another_session() -> None:
    with subprocess.Popen(["sh", "-c", "while :; do :; done & wait"], start_new_session=True) as busy:
        try:
            deadline = time.monotonic() + 60
            while Clock(busy.pid).cost(Contestant(lambda: sum(range(100_000)))).server_cpu_s == 0:
                assert time.monotonic() < deadline, "the loop of the other session shows no CPU time"
        finally:
            os.killpg(busy.pid, signal.SIGKILL)


def test_processes_that_are_gone_took_no_cpu() -> None:
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    begin = time.process_time()
    spent = living_cpu_s([os.getpid(), gone.pid])
    assert begin <= spent <= time.process_time()
    assert living_cpu_s([gone.pid]) == 0


def test_contestants_take_turns_and_each_round_begins_with_another() -> None:
    order: list[str] = []
    steps: list[tuple[int, int]] = []
    contestants = {name: Contestant(lambda name=name: order.append(name)) for name in "abc"}  # type: ignore[misc]
    found = take_turns(contestants, 4, Clock(), lambda *step: steps.append(step))
    assert "".join(order) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert {name: len(costs) for name, costs in found.costs.items()} == {"a": 4, "b": 4, "c": 4}


def test_rounds_tell_wall_cpu_and_server_apart() -> None:
    costs = {"slow": [Cost(8, 6, 4, 9), Cost(16, 12, 8, 17)], "fast": [Cost(2, 3, 1), Cost(4, 4, 1)]}
    found = Rounds(costs)
    assert found.wall_s("slow") == Spread.of([8, 16])
    assert found.cpu_s("slow") == Spread.of([6, 12])
    assert found.server_cpu_s("slow") == Spread.of([4, 8])
    assert found.slowest_call_s("slow") == Spread.of([9, 17])
    assert found.wall_ratio("slow", "fast") == Spread(4, 4, 4, 2)
    assert found.cpu_ratio("slow", "fast") == Spread.of([2, 3])


def test_the_machine_is_described_without_names_and_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    described = machine.machine()
    assert set(described) == {"cpu", "cores", "memory_gb", "kernel", "gpu"}
    assert all(described.values())
    assert machine.libjpeg_turbo_version().split(".")[0] in ("2", "3")
    assert machine.versions()["numpy"] == np.__version__
    monkeypatch.setattr(sys, "argv", ["/some/where/bin/lipsync", "bench", "all"])
    assert machine.command_line() == "lipsync bench all"


def test_the_commit_is_unknown_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert machine.commit() == "unknown"


def test_film_has_grain_that_changes() -> None:
    first, second = subjects.footage(160, 120, 2, drawn=1)
    difference = first.astype(int) - second
    assert first.shape == (120, 160, 3)
    assert first.dtype == np.uint8
    assert 3 < difference.std() < 12
    assert np.abs(difference.mean()) < 1


def test_the_reference_rectangles_are_those_of_a_real_tenant() -> None:
    rects = subjects.reference_rects()
    assert len(rects) == 523
    assert rects[0] == (532, 210, 182, 182)
    assert subjects.reference_rects(640, 360)[0] == (266, 105, 91, 91)
    assert np.median([rect.width for rect in rects]) == 182


def test_centred_rectangles_lie_in_the_frame_and_move() -> None:
    rects = subjects.centred_rects(320, 240, 12, 100)
    assert {rect[2:] for rect in rects} == {(100, 100)}
    assert all(rect.x >= 0 and rect.y >= 0 and rect.right <= 320 and rect.bottom <= 240 for rect in rects)
    assert len(set(rects)) > 3


def test_a_source_is_what_tenant_add_takes(tmp_path: Path) -> None:
    rects = subjects.centred_rects(320, 240, 3, 100)
    frames = list(subjects.footage(320, 240, 3))
    assert list(subjects.write_source(tmp_path, iter(frames), rects, architecture.do_nothing())) == [1, 2, 3]
    source = open_source(tmp_path)
    assert source.rects == rects
    assert np.array_equal(list(source.frames), frames)


def test_the_classical_client_makes_what_the_model_wants() -> None:
    crops = np.random.default_rng(0).integers(0, 256, (2, 328, 328, 3), dtype=np.uint8)
    visual = wire.build_visual(crops)
    roi = crops[:, 4:324, 4:324].transpose(0, 3, 1, 2) / np.float32(255)
    assert visual.dtype == np.float32
    assert np.array_equal(visual[:, :3], roi)
    roi[:, :, MASK[0], MASK[1]] = 0
    assert np.array_equal(visual[:, 3:], roi)


def test_the_classical_client_ends_with_the_same_crops_as_the_service() -> None:
    random = np.random.default_rng(0)
    crops = random.integers(0, 256, (2, 328, 328, 3), dtype=np.uint8)
    predictions = random.uniform(-0.2, 1.2, (2, 3, 320, 320)).astype(np.float32)
    expected = [set_prediction(crop, prediction) for crop, prediction in zip(crops, predictions, strict=True)]
    assert np.array_equal(wire.set_predictions(crops, predictions), expected)


def test_contestants_that_disagree_are_refused() -> None:
    ways = {"a": lambda: np.zeros(3), "b": lambda: np.array([0, 0, 1.0])}
    with pytest.raises(LipsyncError, match="'b' gives other mouths"):
        wire.check_equal(ways)
    wire.check_equal({"a": ways["a"], "c": ways["a"]})


@pytest.mark.parametrize(
    ("fault", "line"), [(InvalidInput("no good; mend it"), "no good; mend it"), (OSError(28, "disk full"), "disk full")]
)
def test_a_part_that_fails_says_why(tmp_path: Path, fault: Exception, line: str) -> None:
    def fail(run: Run) -> PartReport:
        raise fault

    found = carry_out(Part("some", "Some", fail), run_in(tmp_path))
    assert (found.name, found.title, found.failure) == ("some", "Some", line)
    assert found.wall_s > 0


def test_parts_run_in_folders_of_their_own_that_are_gone_afterwards() -> None:
    folders: list[Path] = []

    def note(run: Run) -> PartReport:
        assert list(run.folder.iterdir()) == []
        (run.folder / "something").write_text("")
        folders.append(run.folder)
        return PartReport("some", "Some")

    found = parts.measure([Part("some", "Some", note)] * 2, lambda *_: None, quick=True)
    assert [part.failure for part in found.parts] == ["", ""]
    assert found.quick
    assert len(set(folders)) == 2
    assert not any(folder.exists() for folder in folders)


def test_part_names_are_commands_of_their_own() -> None:
    names = [part.name for part in parts.PARTS]
    shown = CliRunner().invoke(build(), ["bench", "--help"]).output
    assert len(set(names)) == len(names)
    assert all(f" {name} " in shown for name in ["all", *names])


@pytest.mark.parametrize("name", ["compositing", "memory"])
def test_a_part_measures(tmp_path: Path, name: str) -> None:
    part = next(part for part in parts.PARTS if part.name == name)
    seen: list[tuple[str, int, int]] = []
    found = carry_out(part, run_in(tmp_path, seen))
    assert found.failure == ""
    assert found.targets
    assert {figure.quantity for figure in found.figures} >= {found.plotted}
    assert all(figure.spread.median >= 0 for figure in found.figures)
    assert seen[-1][1] == seen[-1][2]


@pytest.mark.triton
def test_the_wire_part_measures_against_triton(
    triton_home: Path, tmp_path: Path, leftovers: Callable[[], list[str]]
) -> None:
    part = next(part for part in parts.PARTS if part.name == "wire")
    found = carry_out(part, run_in(tmp_path))
    assert found.failure == ""
    assert len(found.targets) == 6
    for quantity in ("client CPU", "wall", "Triton CPU"):
        medians = [figure.spread.median for figure in found.figures if figure.quantity == quantity]
        assert len(medians) == 6
        assert min(medians) > 0
    assert leftovers() == []


def test_the_command_writes_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lipsync.commands.bench.install", lambda *_: None)
    done = CliRunner().invoke(build(), ["bench", "compositing", "--quick", "-o", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "CPU plain / ours" in done.output
    found = json.loads((tmp_path / "compositing.json").read_text())
    assert [part["name"] for part in found["parts"]] == ["compositing"]
    assert found["quick"] is True


def test_a_failed_part_is_the_commands_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(run: Run) -> PartReport:
        raise InvalidInput("no good; mend it")

    monkeypatch.setattr("lipsync.commands.bench.install", lambda *_: None)
    monkeypatch.setattr("lipsync.commands.bench.PARTS", [Part("some", "Some", fail)])
    done = CliRunner().invoke(build(), ["bench", "all", "-o", str(tmp_path), "--publish", str(tmp_path / "docs")])
    assert done.exit_code == 1
    assert "Failed: no good; mend it" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "docs" / "benchmarks.json").is_file()
