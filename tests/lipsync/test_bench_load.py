"""Viewers without a service: how they choose, when a frame is late, and which figures follow. Nothing here is timed."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from lipsync.app import build
from lipsync.bench import load
from lipsync.bench.figures import PartReport
from lipsync.bench.load import Demand, figures_of, notes_of
from lipsync.bench.part import Part, Run, carry_out
from lipsync.bench.watching import (
    FIRST_FRAME,
    FRAME_GAP,
    LATE_FRAME,
    TOTAL,
    Audience,
    Measured,
    Watch,
    zipf_weights,
)

LOCUSTFILE = Path(__file__).parents[2] / "tools" / "bench" / "locustfile.py"
FRAME = 640
"""Samples of a frame at 25 fps."""


@given(st.integers(1, 500), st.floats(0, 3))
def test_zipf_weights_fall_and_add_up(count: int, exponent: float) -> None:
    weights = zipf_weights(count, exponent)
    assert len(weights) == count
    assert sum(weights) == pytest.approx(1)
    assert all(first >= second > 0 for first, second in itertools.pairwise(weights))


def test_zipf_weights_are_inverse_to_the_rank() -> None:
    assert zipf_weights(3, 1) == pytest.approx([6 / 11, 3 / 11, 2 / 11])
    assert zipf_weights(4, 0) == [0.25] * 4


def test_the_audience_wants_the_first_tenant_most_and_all_sentences_alike() -> None:
    audience, random = Audience(["a", "b", "c"], 1.0, [b"one", b"two"]), Random(0)
    chosen = [audience.choose(random) for _ in range(11_000)]
    tenants, sentences = Counter(tenant for tenant, _ in chosen), Counter(sentence for _, sentence in chosen)
    assert [tenants[name] for name in "abc"] == pytest.approx([6000, 3000, 2000], rel=0.1)
    assert sentences[b"one"] == pytest.approx(5500, rel=0.1)


@pytest.mark.parametrize(("tenants", "sentences"), [([], [b"one"]), (["a"], [])])
def test_an_audience_needs_both(tenants: list[str], sentences: list[bytes]) -> None:
    with pytest.raises(ValueError, match="needs tenants and sentences"):
        Audience(tenants, 1.0, sentences)


def test_a_frame_is_late_after_the_first_frames_time_and_its_own() -> None:
    watch = Watch(10.0)
    arrivals = [watch.arrive(at_s, number * FRAME) for number, at_s in enumerate((10.5, 10.51, 10.51, 10.7, 10.71))]
    assert [arrival.waited_s for arrival in arrivals] == pytest.approx([0.5, 0.01, 0, 0.19, 0.01])
    # Due at 10.50, .54, .58, .62, .66.
    assert [arrival.late_s for arrival in arrivals] == pytest.approx([0, 0, 0, 0.08, 0.05])
    assert watch.frames == 5


def test_a_speech_that_begins_later_than_zero_is_not_late_for_that() -> None:
    watch = Watch(0.0)
    assert watch.arrive(1.0, 100 * FRAME).late_s == 0
    assert watch.arrive(1.05, 101 * FRAME).late_s == pytest.approx(0.01)


def test_a_speech_has_played_out_a_frame_after_the_last_is_due() -> None:
    watch = Watch(0.0)
    assert watch.playout_s == 0
    for number in range(25):
        watch.arrive(1.0, number * FRAME)
    assert watch.playout_s == pytest.approx(2.0)
    watch.arrive(5.0, 25 * FRAME)
    assert watch.playout_s == 5.0


@given(st.lists(st.floats(0, 100), min_size=1, max_size=50))
def test_waits_add_up_and_nothing_ends_before_it_came(gaps: list[float]) -> None:
    times = list(itertools.accumulate(gaps, initial=3.0))[1:]
    watch = Watch(3.0)
    arrivals = [watch.arrive(at_s, number * FRAME) for number, at_s in enumerate(times)]
    assert sum(arrival.waited_s for arrival in arrivals) == pytest.approx(times[-1] - 3.0)
    assert arrivals[0].late_s == 0
    assert watch.playout_s >= times[-1]


def measured(**changes: object) -> Measured:
    values: dict[str, object] = {
        "users": 3,
        "delays_ms": {FIRST_FRAME: [50.0, 70.0], FRAME_GAP: [float(gap) for gap in range(98)], LATE_FRAME: [7.0]},
        "failures": {"UNAVAILABLE TRITON_UNAVAILABLE: Triton is gone": 1},
        "tenants": {"a": 2, "b": 1},
        "wall_s": 4.0,
        "cpu_s": 1.0,
    }
    values["delays_ms"] = {**values["delays_ms"], TOTAL: [500.0, 700.0]}  # type: ignore[dict-item]
    return Measured(**{**values, **changes})  # type: ignore[arg-type]


def test_the_figures_of_a_run() -> None:
    found = {
        (figure.subject, figure.quantity): (round(figure.spread.median, 2), figure.unit)
        for figure in figures_of(measured(), {"load generator": 1.0, "compositor": 2.0})
    }
    assert found["first frame", "p50"] == (60, "ms")
    assert found["first frame", "p99"] == (69.8, "ms")
    assert found["frame gap", "p95"] == (92.15, "ms")
    assert found["total", "p50"] == (600, "ms")
    assert found["speeches", "asked for"] == (3, "")
    assert found["speeches", "failed"] == (1, "")
    assert found["frames", "frames a second"] == (25, "fps")
    assert found["frames", "late"] == (1, "%")
    assert found["frames", "late by, of those that are"] == (7, "ms")
    assert found["load generator", "CPU a frame"] == (10, "ms")
    assert found["compositor", "CPU"] == (0.5, "cores")


def test_nothing_late_has_no_lateness() -> None:
    calm = measured(delays_ms={FIRST_FRAME: [5.0], FRAME_GAP: [], LATE_FRAME: [], TOTAL: [5.0]})
    found = {(figure.subject, figure.quantity): figure.spread.median for figure in figures_of(calm, {})}
    assert found["frames", "late"] == 0
    assert ("frames", "late by, of those that are") not in found
    assert ("frame gap", "p50") not in found


def test_failures_and_a_generator_at_its_limit_are_told() -> None:
    assert list(notes_of(measured())) == ["Failed 1 times: UNAVAILABLE TRITON_UNAVAILABLE: Triton is gone"]
    (note,) = notes_of(measured(failures={}, cpu_s=3.6))
    assert "took 0.90 cores" in note


def test_what_was_measured_survives_json() -> None:
    assert Measured.from_json(measured().as_json()) == measured()


def drive(folder: Path, demand: Demand, host: str | None = None, repository: Path | None = None) -> PartReport:
    return carry_out(load.part(demand, host, repository), Run(folder, lambda *_: None, quick=True))


def test_tenants_must_be_known(tmp_path: Path) -> None:
    assert "name them with --tenants a,b,c" in drive(tmp_path, Demand(), host="127.0.0.1:1").failure
    empty = tmp_path / "empty"
    empty.mkdir()
    assert drive(tmp_path, Demand(), repository=empty).failure.startswith(f"no tenants in {empty}; add one")


def test_a_host_where_nobody_answers_is_a_failure_with_grpc_s_status(tmp_path: Path) -> None:
    found = drive(tmp_path, Demand(users=1, seconds=1, tenants=["a"]), host="127.0.0.1:1")
    assert found.failure.startswith("no speech went well at 127.0.0.1:1: UNAVAILABLE: ")


def test_locusts_own_complaint_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "LOCUSTFILE", tmp_path / "nowhere.py")
    found = drive(tmp_path, Demand(tenants=["a"]), host="127.0.0.1:1")
    assert found.failure.startswith("locust failed: ")
    assert "nowhere.py" in found.failure


def test_without_locust_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert drive(tmp_path, Demand()).failure == f"locust is missing: run `{sys.executable} -m pip install locust`"


@pytest.mark.parametrize(("text", "seconds"), [("30", 30), ("45s", 45), ("5m", 300), ("1h30m5s", 5405)])
def test_the_command_takes_times_as_locust_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, seconds: int
) -> None:
    demands: list[Demand] = []

    def part(demand: Demand, host: str | None, repository: Path | None) -> Part:
        demands.append(demand)
        return Part("load", "Load", lambda run: PartReport("load", "Load"))

    monkeypatch.setattr("lipsync.commands.bench.viewers.part", part)
    options = ["--host", "127.0.0.1:1", "--time", text, "--tenants", "a, b", "-u", "7", "-o", str(tmp_path)]
    done = CliRunner().invoke(build(), ["bench", "load", *options])
    assert done.exit_code == 0, done.output
    assert demands == [Demand(users=7, seconds=seconds, tenants=["a", "b"])]


@pytest.mark.parametrize("text", ["", "0", "3x", "1m2h", "-5", "1.5s"])
def test_what_is_no_time_is_refused(text: str) -> None:
    done = CliRunner().invoke(build(), ["bench", "load", "--host", "127.0.0.1:1", "--time", text])
    assert done.exit_code == 2
    assert "--time" in done.output


def test_our_process_is_not_patched_for_gevent() -> None:
    code = "import sys, lipsync.commands.bench; sys.exit('gevent' in sys.modules or 'locust' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def locust(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LOCUST_")}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=folder, env=environment)


def test_the_locustfile_has_one_kind_of_user(tmp_path: Path) -> None:
    assert locust("--list", folder=tmp_path).stdout.split() == ["Available", "Users:", "Viewer"]


def test_the_locustfile_ends_without_tenants(tmp_path: Path) -> None:
    done = locust("--headless", "--host", "127.0.0.1:1", folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("error: no tenants; name them, the most wanted first: --tenants a,b,c")
