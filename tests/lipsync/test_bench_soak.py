"""Whether something grows: the criterion on numbers, a process that really leaks, and the part against Triton."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from lipsync.app import build
from lipsync.bench import leaking, soak
from lipsync.bench.child import Child
from lipsync.bench.figures import PartReport
from lipsync.bench.growth import Sample, growth, second_half
from lipsync.bench.leaking import LEAK_BYTES
from lipsync.bench.part import Part, Run, carry_out
from lipsync.bench.process_memory import process_bytes
from lipsync.bench.soak import COMPOSITOR, CONTROL, KEEPER, LIMIT_BYTES, REGIONS, TRITON, Demand, Done


def line(slope: float, count: int = 40, every: int = 10, noise: tuple[float, ...] = (0.0,)) -> list[Sample]:
    """Samples of a value that grows so much a cycle, with noise that repeats."""
    return [
        Sample(every * number, number, {"value": 5e7 + slope * every * number + noise[number % len(noise)]})
        for number in range(1, count + 1)
    ]


@given(st.floats(-1e4, 1e4), st.integers(3, 60), st.integers(1, 100))
def test_what_grows_evenly_grows_by_its_slope(slope: float, count: int, every: int) -> None:
    assert growth(line(slope, count, every), "value").median == pytest.approx(slope, abs=1e-3)


@given(st.lists(st.floats(-1e5, 1e5), min_size=1, max_size=5))
def test_noise_is_no_growth(noise: list[float]) -> None:
    found = growth(line(0, 50, 50, tuple(noise)), "value")
    assert abs(found.median) < LIMIT_BYTES / 4


def test_a_few_outliers_do_not_move_the_estimate() -> None:
    samples = line(100)
    samples[-1] = Sample(samples[-1].cycles, 0, {"value": 9e9})
    samples[20] = Sample(samples[20].cycles, 0, {"value": 0})
    assert growth(samples, "value").median == pytest.approx(100, rel=0.05)


def test_what_is_filled_in_the_first_half_does_not_count() -> None:
    samples = [Sample(number, 0, {"value": min(number, 50) * 1e6}) for number in range(1, 101)]
    half = second_half(samples)
    assert [half[0].cycles, half[-1].cycles] == [50, 100]
    assert growth(half, "value").median == 0
    assert growth(samples, "value").median > 0


@pytest.mark.parametrize("samples", [[], line(1, 1), [Sample(5, 0, {"value": 1}), Sample(5, 1, {"value": 2})]])
def test_without_cycles_between_samples_nothing_can_be_told(samples: list[Sample]) -> None:
    with pytest.raises(ValueError, match="needs samples"):
        growth(samples, "value")


def run_of(growing: str = "", by: float = 0.0) -> list[Sample]:
    """Samples of a whole run in which nothing grows but the control, and perhaps one more."""
    names = [COMPOSITOR, TRITON, KEEPER, CONTROL, REGIONS, *map(soak.descriptors_of, (COMPOSITOR, TRITON))]
    slopes = {**dict.fromkeys(names, 0.0), CONTROL: float(LEAK_BYTES), **({growing: by} if growing else {})}
    return [
        Sample(50 * number, number, {name: 1000 + slope * 50 * number for name, slope in slopes.items()})
        for number in range(1, 101)
    ]


@pytest.mark.parametrize(
    ("growing", "by"),
    [
        ("", 0),
        (TRITON, 1.1 * LIMIT_BYTES),
        (COMPOSITOR, 1.1 * LIMIT_BYTES),
        (CONTROL, 0.9 * LIMIT_BYTES),
        (REGIONS, 1),
        (soak.descriptors_of(TRITON), 0.1),
        (soak.descriptors_of(COMPOSITOR), 0.1),
    ],
)
def test_whatever_leaks_misses_its_own_target(growing: str, by: float) -> None:
    missed = [target.what for target in soak.targets_of(run_of(growing, by), Done()) if not target.met]
    assert [what.startswith(growing) for what in missed] == [True] * bool(growing)


def test_calls_that_failed_miss_theirs() -> None:
    missed = [target.what for target in soak.targets_of(run_of(), Done(failed=1)) if not target.met]
    assert missed == ["calls that failed"]


def test_the_control_really_leaks() -> None:
    with Child(leaking.__name__, []) as child:
        sizes = []
        for _ in range(3):
            child.say("1000")
            assert child.hear() == "done"
            sizes.append(process_bytes(child.pid)["private"])
    assert sizes[2] - sizes[1] == pytest.approx(1000 * LEAK_BYTES, rel=0.2)


def test_samples_lie_closer_in_shorter_runs() -> None:
    assert Demand(cycles=5000).calls == 50
    assert Demand(cycles=10, callers=3).calls == 3


def test_the_command_takes_cycles_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Demand] = []

    def part(demand: Demand) -> Part:
        asked.append(demand)
        return Part("soak", "Soak", lambda run: PartReport("soak", "Soak"))

    monkeypatch.setattr("lipsync.commands.bench.install", lambda *_: None)
    monkeypatch.setattr(soak, "part", part)
    options = ["--cycles", "200", "-t", "30m", "-o", str(tmp_path)]
    done = CliRunner().invoke(build(), ["bench", "soak", *options])
    assert done.exit_code == 0, done.output
    assert asked == [Demand(200, 30, samples=tmp_path / "soak-samples.json")]


@pytest.mark.triton
@pytest.mark.usefixtures("triton_home")
def test_the_part_measures_against_triton(tmp_path: Path) -> None:
    demand = Demand(samples=tmp_path / "output" / "samples.json")
    (tmp_path / "run").mkdir()
    found = carry_out(soak.part(demand), Run(tmp_path / "run", lambda *_: None, quick=True))
    assert found.failure == ""
    figures = {(figure.subject, figure.quantity): figure.spread.median for figure in found.figures}
    assert figures["models", "evictions"] >= 18
    assert figures["models", "loads"] >= figures["models", "evictions"]
    assert figures["models", "calls that failed"] == 0, found.notes
    for name in (COMPOSITOR, TRITON, CONTROL):
        assert figures[name, "private memory at the end"] > 5
    assert figures[REGIONS, "open at the end"] >= 1
    assert {figure.quantity for figure in found.figures} >= {found.plotted}
    written = json.loads((tmp_path / "output" / "samples.json").read_text())
    assert written["samples"][-1]["cycles"] == figures["models", "evictions"]


@pytest.mark.triton
@pytest.mark.usefixtures("triton_home")
def test_a_run_that_is_over_at_once_says_so(tmp_path: Path) -> None:
    found = carry_out(
        soak.part(Demand(minutes=0, tenants=3, cache=2, callers=1)), Run(tmp_path, lambda *_: None, quick=False)
    )
    assert found.failure == "too few cycles to tell whether anything grows: 0 samples"
