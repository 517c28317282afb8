"""The README's numbers: a published report goes in, the lines between two marks come out, so that none is typed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from compositor.errors import InvalidInput

from .report import number

BEGIN = "<!-- numbers: `lipsync bench readme` writes them from docs/benchmarks.json; do not edit -->"
END = "<!-- end of numbers -->"


def rewrite(readme: Path, report: Path) -> None:
    """Puts the numbers of a report (JSON) into a README. Raises InvalidInput for one without the marks."""
    try:
        text = rewritten(readme.read_text(), json.loads(report.read_text()))
    except ValueError as error:
        raise InvalidInput(f"{report}: is no JSON ({error}); make it with `lipsync bench all --publish`") from error
    readme.write_text(text)


def rewritten(readme: str, report: Mapping[str, Any]) -> str:
    """A README's text with the numbers of a report, as `Report.as_json` gives it, between its marks."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise InvalidInput(f"the README has no place for numbers; put these lines where they belong: {BEGIN} {END}")
    return "\n".join([before + begin, "", *section(report), "", end + after])


def section(report: Mapping[str, Any]) -> Iterator[str]:
    """The lines: what was run where and when, and every target with what was reached."""
    machine = report["machine"]
    hardware = f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB"
    yield f"Made by `{report['command']}`, {report['date'][:10]}, commit {report['commit']}, on {hardware};"
    yield f"GPU: {machine['gpu']}. Medians; the report has their spread, versions, and more."
    if report["quick"]:
        yield "**A quick run: its sizes are too small for figures that mean anything.**"
    yield ""
    yield "| what | measured | target |  |"
    yield "| --- | --- | --- | --- |"
    for part in report["parts"]:
        yield from _rows(part)


def _rows(part: Mapping[str, Any]) -> Iterator[str]:
    if part["failure"]:
        yield _row(f"**{part['title']}**", "", "", f"failed: {part['failure']}")
        return
    if part["targets"]:
        yield _row(f"**{part['title']}**", "", "", "")
    for target in part["targets"]:
        is_, limit = (
            f"{number(value)} {target['unit']}".rstrip() for value in (target["spread"]["median"], target["limit"])
        )
        yield _row(target["what"], is_, f"{target['bound']} {limit}", "met" if target["met"] else "**missed**")


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
