"""A README's numbers, made from a report: what stands there, and what stays as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from compositor.errors import InvalidInput
from lipsync.app import build
from lipsync.bench.figures import PartReport, Report, Spread, Target
from lipsync.bench.part import Part, Run
from lipsync.bench.readme import BEGIN, END, rewrite, rewritten, section

TEMPLATE = f"# Title\n\nbefore\n\n{BEGIN}\nold 99 ms\n{END}\n\nafter\n"


def report(*parts: PartReport, quick: bool = False) -> dict[str, Any]:
    machine: dict[str, str | int | float] = {"cpu": "Some CPU", "cores": 2, "memory_gb": 8.0, "gpu": "none at hand"}
    made = Report("2026-01-02T03:04:05", "lipsync bench all", quick, "abc", machine, {}, {}, parts)
    values: dict[str, Any] = json.loads(json.dumps(made.as_json()))
    return values


def part() -> PartReport:
    targets = [
        Target("CPU, plain | ours", Spread(7.123, 6, 8, 5), "at least", 6, "x"),
        Target("memory", Spread.once(1446.4), "below", 175, "MB"),
    ]
    return PartReport("some", "Some part", targets=targets)


def test_every_target_has_a_row() -> None:
    lines = list(section(report(part())))
    assert lines[0] == "Made by `lipsync bench all`, 2026-01-02, commit abc, on Some CPU, 2 cores, 8.0 GB;"
    assert lines[1].startswith("GPU: none at hand.")
    assert lines[-3:] == [
        "| **Some part** |  |  |  |",
        "| CPU, plain \\| ours | 7.12 x | at least 6 x | met |",
        "| memory | 1,446 MB | below 175 MB | **missed** |",
    ]


def test_a_part_without_targets_has_none_and_a_failed_one_says_why() -> None:
    lines = list(section(report(PartReport("calm", "Calm"), PartReport("bad", "Bad", failure="no good"))))
    assert lines[-2:] == ["| --- | --- | --- | --- |", "| **Bad** |  |  | failed: no good |"]


def test_a_quick_run_says_so() -> None:
    assert "**A quick run: its sizes are too small for figures that mean anything.**" in section(report(quick=True))


def test_only_what_is_between_the_marks_changes() -> None:
    text = rewritten(TEMPLATE, report(part()))
    assert text.startswith(f"# Title\n\nbefore\n\n{BEGIN}\n\nMade by")
    assert text.endswith(f"**missed** |\n\n{END}\n\nafter\n")
    assert "old" not in text
    assert rewritten(text, report(part())) == text


@pytest.mark.parametrize("text", ["", BEGIN, END, f"{END} {BEGIN}"])
def test_a_readme_without_marks_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="no place for numbers"):
        rewritten(text, report())


def test_a_damaged_report_is_named(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(TEMPLATE)
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(InvalidInput, match="is no JSON"):
        rewrite(tmp_path / "README.md", tmp_path / "report.json")
    assert (tmp_path / "README.md").read_text() == TEMPLATE


def test_publishing_writes_the_readme_and_the_command_writes_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(run: Run) -> PartReport:
        return part()

    monkeypatch.setattr("lipsync.commands.bench.install", lambda *_: None)
    monkeypatch.setattr("lipsync.commands.bench.PARTS", [Part("some", "Some part", find)])
    readme, docs = tmp_path / "README.md", tmp_path / "docs"
    readme.write_text(TEMPLATE)
    done = CliRunner().invoke(build(), ["bench", "all", "-o", str(tmp_path / "out"), "--publish", str(docs)])
    assert done.exit_code == 0, done.output
    published = readme.read_text()
    assert published == rewritten(TEMPLATE, json.loads((docs / "benchmarks.json").read_text()))
    readme.write_text(TEMPLATE)
    again = CliRunner().invoke(build(), ["bench", "readme", str(readme), "--report", str(docs / "benchmarks.json")])
    assert again.exit_code == 0, again.output
    assert readme.read_text() == published
