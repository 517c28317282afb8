"""The README states no measured number that the committed report does not hold."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compositor.settings import Settings
from lipsync.bench.readme import BEGIN, END, rewritten
from lipsync.bench.report import number
from lipsync.preparation import Choices

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
REPORT: dict[str, Any] = json.loads((ROOT / "docs" / "benchmarks.json").read_text())
SPECIFICATION = {
    f"{6 * 320 * 320 * 4 / 1e6:.1f} MB",  # a frame's pictures, float32
    f"{3 * 320 * 320 * 4 / 1e6:.1f} MB",  # a prediction, float32
    f"{32 * 16 * 16 * 4 // 1024} KB",  # a frame's audio features, float32
    f"{1000 // Choices().fps} ms",  # a frame's time
    f"{Settings().live.lookahead_ms} ms",
    f"{Settings().live.margin_ms} ms",
}
"""Numbers that follow from the model's interface and from defaults, and need no measuring."""
UNITS = (
    r"fps|frames/s|frames a second|frames per second|ns|[mµu]?s|(?:milli|micro)?seconds?|minutes?|hours?|x|times|fold|"
    r"[kKMGT]i?B|bytes|cores?|m?W|mAh?"
)
CLAIM = re.compile(rf"(?<![\w.,])(\d[\d,]*(?:\.\d+)?)[ -]?((?:{UNITS})\b|%|×)")  # noqa: RUF001


def claims(text: str) -> Iterator[str]:
    """Every number with a unit of measure, as `number unit`."""
    for value, unit in CLAIM.findall(text):
        yield f"{value} {unit}"


def held(report: dict[str, Any]) -> Iterator[str]:
    """Every number that a report holds, as the README would write it: with the first word of its unit."""
    for part in report["parts"]:
        for entry in (*part["figures"], *part["targets"]):
            values = [entry["spread"]["median"], *([entry["limit"]] if "limit" in entry else [])]
            for value in values:
                yield f"{number(value)} {entry['unit'].partition(' ')[0]}"


def elsewhere(readme: str) -> str:
    """All but the numbers that are made from the report."""
    before, _, rest = readme.partition(BEGIN)
    return before + rest.partition(END)[2]


def test_the_numbers_are_those_of_the_committed_report() -> None:
    assert rewritten(README, REPORT) == README, "README.md is older than the report: run `lipsync bench readme`"


def test_no_other_number_is_claimed() -> None:
    unknown = set(claims(elsewhere(README))) - set(held(REPORT)) - SPECIFICATION
    assert not unknown, f"README.md states {sorted(unknown)}, which docs/benchmarks.json does not hold"


def test_the_report_was_no_quick_run() -> None:
    assert REPORT["quick"] is False


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It takes 3.5 ms; that is 12x less, or 50 % of 1,446 MB.", ["3.5 ms", "12 x", "50 %", "1,446 MB"]),
        ("741 fps, 400 frames/s, 3 times as fast\nas 2 seconds", ["741 fps", "400 frames/s", "3 times", "2 seconds"]),
        ("5 µs and 20-fold", ["5 µs", "20 fold"]),
        ("x86-64, glibc 2.35, Python 3.10 to 3.13, [n,6,320,320], port 50052, 1280x720, 127.0.0.1", []),
    ],
)
def test_claims_are_found(text: str, found: list[str]) -> None:
    assert list(claims(text)) == found


def test_what_a_report_holds() -> None:
    spread = {"median": 7.123}
    figure = {"unit": "ms a batch", "spread": spread}
    target = {"unit": "x", "spread": spread, "limit": 50}
    assert set(held({"parts": [{"figures": [figure], "targets": [target]}]})) == {"7.12 ms", "7.12 x", "50 x"}


def test_a_number_beside_the_marks_is_seen() -> None:
    assert set(claims(elsewhere(f"8 ms {BEGIN} 9 ms {END} 10 ms"))) == {"8 ms", "10 ms"}
