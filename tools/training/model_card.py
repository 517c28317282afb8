"""The figures in the model card: a report goes in, the lines between two marks come out, so that none is typed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from compositor.errors import InvalidInput

BEGIN: Final = "<!-- figures: `python -m training evaluate` writes them from evaluation.json; do not edit -->"
END: Final = "<!-- end of figures -->"


def rewritten(card: str, report: Mapping[str, Any]) -> str:
    """The text of a model card with the figures of a report between its marks.

    Raises InvalidInput for a card without the marks.
    """
    before, begin, rest = card.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise InvalidInput(f"the model card has no place for figures; put these lines where they belong: {BEGIN} {END}")
    return "\n".join([before + begin, "", *section(report), "", end + after])


def section(report: Mapping[str, Any]) -> Iterator[str]:
    """The lines: what was run where and when, the size of it, and every target with what was reached."""
    machine, cases = report["machine"], report["cases"]
    yield f"Made by `{report['command']}`, {report['date'][:10]}, commit {report['commit']}, on {machine['cpu']},"
    yield f"{machine['cores']} cores."
    for name, case in cases.items():
        spoken = f"{case['sentences']} sentences, {case['seconds']:.0f} s, {case['closures']} p, b and m"
        yield f"{name.capitalize()}: {spoken}, {case['silent_frames']} silent frames."
    yield ""
    yield "| what | measured | target |  |"
    yield "| --- | --- | --- | --- |"
    for target in report["targets"]:
        limit = f"{target['bound']} {number(target['limit'])} {target['unit']}".rstrip()
        reached = "nothing to measure" if target["value"] is None else f"{number(target['value'])} {target['unit']}"
        yield f"| {target['what']} | {reached.rstrip()} | {limit} | {'met' if target['met'] else '**missed**'} |"


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"
