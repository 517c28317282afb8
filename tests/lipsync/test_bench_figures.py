"""Statistics, targets and reports of the benchmark: nothing here is timed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lipsync.bench.figures import Figure, PartReport, Report, Spread, Target, ratios
from lipsync.bench.plot import draw
from lipsync.bench.report import markdown, number, write

SVG = "{http://www.w3.org/2000/svg}"


def figure(median: float, subject: str = "ours", quantity: str = "CPU", case: str = "720p") -> Figure:
    return Figure(case, subject, quantity, "ms", Spread(median, median * 0.9, median * 1.2, 7))


def target(bound: str = "at least", limit: float = 6.0, value: float = 7.0) -> Target:
    assert bound in ("at least", "at most", "below")
    return Target("CPU plain / ours", Spread.once(value), bound, limit, "x")  # type: ignore[arg-type]


def report(*parts: PartReport, quick: bool = False) -> Report:
    machine: dict[str, str | int | float] = {"cpu": "a | processor", "cores": 2}
    return Report("2026-01-02", "lipsync bench all", quick, "abc+", machine, {"numpy": "2"}, {"the begin": 0.5}, parts)


def part(**changes: object) -> PartReport:
    values = {
        "name": "some",
        "title": "Some <part> & more",
        "plotted": "CPU",
        "figures": [figure(0.5), figure(12.0, "plain"), figure(3.0, quantity="size")],
        "targets": [target(), target("at most", 6.0)],
    }
    return PartReport(**{**values, **changes})  # type: ignore[arg-type]


def test_a_spread_is_the_median_and_the_outer_tenths() -> None:
    assert Spread.of(range(101)) == Spread(50, 10, 90, 101)
    assert Spread.once(4) == Spread(4, 4, 4, 1)


@pytest.mark.parametrize("samples", [[], [1.0, math.nan], [math.inf]])
def test_a_spread_needs_finite_samples(samples: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        Spread.of(samples)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=30), st.floats(0.1, 1000))
def test_a_spread_is_ordered_and_scales(samples: list[float], factor: float) -> None:
    found = Spread.of(samples)
    assert min(samples) <= found.p10 <= found.median <= found.p90 <= max(samples)
    scaled, expected = found.times(factor), Spread.of(sample * factor for sample in samples)
    assert scaled.repetitions == expected.repetitions
    assert np.allclose((scaled.p10, scaled.median, scaled.p90), (expected.p10, expected.median, expected.p90))


def test_ratios_are_taken_round_by_round() -> None:
    # The medians are 9 and 3; the rounds say 2, 3 and 4.5.
    assert ratios([2, 9, 18], [1, 3, 4]).median == 3
    # The machine is nine times slower in the last round: the medians say 2 / 3, every round says 2.
    assert ratios([2, 2, 18], [1, 1, 9]) == Spread(2, 2, 2, 3)
    with pytest.raises(ValueError, match="shorter"):
        ratios([1, 2], [1])


@pytest.mark.parametrize(
    ("bound", "met"),
    [("at least", (False, True, True)), ("at most", (True, True, False)), ("below", (True, False, False))],
)
def test_a_target_is_met_on_its_own_side(bound: str, met: tuple[bool, bool, bool]) -> None:
    assert tuple(target(bound, 6.0, value).met for value in (5.9, 6.0, 6.1)) == met


def test_json_says_which_targets_are_met_and_reads_back() -> None:
    plain = json.loads(json.dumps(report(part()).as_json()))
    assert [entry["met"] for entry in plain["parts"][0]["targets"]] == [True, False]
    assert plain["parts"][0]["figures"][0]["spread"] == {"median": 0.5, "p10": 0.45, "p90": 0.6, "repetitions": 7}
    assert plain["machine"]["cores"] == 2


def test_a_failed_part_fails_the_run_but_missed_targets_do_not() -> None:
    assert report(part()).passed
    assert not report(part(), PartReport("b", "B", failure="no Triton")).passed


def test_the_page_names_command_machine_figures_and_verdicts() -> None:
    page = markdown(report(part(), PartReport("b", "B", failure="no Triton")), "plot.svg")
    assert "`lipsync bench all`" in page
    assert "![Plot](plot.svg)" in page
    assert "| cpu | a \\| processor |" in page
    assert "| CPU plain / ours | 7 x | at least 6 x | met |" in page
    assert "| CPU plain / ours | 7 x | at most 6 x | **missed** |" in page
    assert "| 720p | ours | CPU | 0.5 ms (0.45 to 0.6) | 7 |" in page
    assert "Failed: no Triton" in page
    assert "quick" not in page


def test_a_quick_run_says_so() -> None:
    assert "quick run" in markdown(report(part(), quick=True), "plot.svg")


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.01234, "0.0123"), (9.876, "9.88"), (99.94, "99.9"), (1446.4, "1,446")]
)
def test_numbers_have_three_digits_and_no_exponent(value: float, text: str) -> None:
    assert number(value) == text


def test_tables_are_whole() -> None:
    rows = [line for line in markdown(report(part()), "p.svg").splitlines() if line.startswith("|")]
    blocks = {line.replace("\\|", "").count("|") for line in rows}
    assert blocks == {3, 5, 6}


def test_the_plot_is_a_picture_with_a_bar_for_each_figure_of_the_plotted_quantity() -> None:
    root = ElementTree.fromstring(draw(report(part())))
    assert root.tag == SVG + "svg"
    bars = [rect for rect in root.findall(SVG + "rect") if rect.get("fill") != "#ffffff"]
    widths = [float(bar.get("width", "nan")) for bar in bars]
    assert len(bars) == 2
    assert 0 < widths[0] < widths[1] < float(root.get("width", "nan"))
    texts = [text.text or "" for text in root.findall(SVG + "text")]
    assert "Some <part> & more: CPU, ms" in texts
    assert "720p, plain" in texts
    assert "12" in texts


def test_everything_in_the_plot_lies_inside() -> None:
    figures = [figure(10.0**power, f"subject {power}") for power in range(-3, 5)]
    root = ElementTree.fromstring(draw(report(part(figures=figures), part(figures=figures[:1]))))
    width, height = float(root.get("width", "nan")), float(root.get("height", "nan"))
    for element in root:
        if element.tag in (SVG + "rect", SVG + "text"):
            assert 0 <= float(element.get("x", "0")) <= width
            assert 0 <= float(element.get("y", "0")) <= height


@pytest.mark.parametrize(
    "empty",
    [PartReport("b", "B", failure="no"), part(figures=[figure(0)]), part(plotted="nothing of that name")],
)
def test_a_part_without_anything_to_plot_is_left_out(empty: PartReport) -> None:
    root = ElementTree.fromstring(draw(report(empty)))
    assert not root.findall(SVG + "text")


def test_a_report_is_three_files(tmp_path: Path) -> None:
    write(tmp_path / "new" / "folder", "report", report(part()))
    files = {path.name: path.read_text() for path in (tmp_path / "new" / "folder").iterdir()}
    assert files.keys() == {"report.json", "report.md", "report.svg"}
    assert json.loads(files["report.json"])["commit"] == "abc+"
    assert "(report.svg)" in files["report.md"]
    ElementTree.fromstring(files["report.svg"])


def test_figures_that_json_cannot_hold_are_not_written(tmp_path: Path) -> None:
    broken = Figure("", "", "", "", Spread(math.nan, 0, 0, 1))
    with pytest.raises(ValueError, match="JSON"):
        write(tmp_path, "report", report(part(figures=[broken])))
