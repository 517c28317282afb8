"""A finished run in three files: JSON for programs, Markdown for people, an SVG plot for both."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from .figures import Figure, PartReport, Report, Spread, Target
from .plot import draw


def write(folder: Path, stem: str, report: Report) -> None:
    """Writes `<stem>.json`, `<stem>.md` and `<stem>.svg` into `folder`, and the parts' files as `<stem>-<name>`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.json").write_text(json.dumps(report.as_json(), indent=1, allow_nan=False) + "\n")
    (folder / f"{stem}.svg").write_text(draw(report))
    (folder / f"{stem}.md").write_text(markdown(report, f"{stem}.svg"))
    for part in report.parts:
        for name, text in part.files.items():
            (folder / f"{stem}-{name}").write_text(text)


def markdown(report: Report, plot: str) -> str:
    """The report as a page; `plot` is the SVG's path as seen from it."""
    return "\n".join(_lines(report, plot)) + "\n"


def number(value: float) -> str:
    """Three significant digits, thousands apart, no exponent."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _lines(report: Report, plot: str) -> Iterator[str]:
    yield "# Benchmarks"
    yield ""
    yield f"Made by `{report.command}`, {report.date}, commit {report.commit}. Do not edit: run it again."
    if report.quick:
        yield ""
        yield "**A quick run: its sizes are too small for figures that mean anything.**"
    yield ""
    yield "Median of the repetitions, and in brackets the 10th and 90th percentile. Contestants take turns within each"
    yield "round; a ratio is the median of the rounds' ratios. Client CPU is all of the measuring process."
    yield ""
    yield f"![Plot]({plot})"
    yield ""
    yield from _table(("machine", ""), [(key.replace("_", " "), str(value)) for key, value in report.machine.items()])
    yield from _table(("version", ""), list(report.versions.items()))
    loads = ", ".join(f"{value:.2f} at {moment}" for moment, value in report.load_average.items())
    yield f"Load average over a minute: {loads}."
    yield ""
    for part in report.parts:
        yield from _part(part, plot.removesuffix(".svg"))


def _part(part: PartReport, stem: str) -> Iterator[str]:
    yield f"## {part.title}"
    yield ""
    if part.failure:
        yield f"Failed: {part.failure}"
        yield ""
        return
    yield f"{part.how} The part took {part.wall_s:.0f} s, {part.cpu_s:.0f} s of them CPU of the measuring process."
    yield ""
    yield from _table(
        ("target", "is", "should be", ""),
        [(target.what, _spread(target.spread, target.unit), *_verdict(target)) for target in part.targets],
    )
    yield from _table(
        ("case", "what", "quantity", "figure", "repetitions"), [_figure(figure) for figure in part.figures]
    )
    notes = [*part.notes, *(f"[{name}]({stem}-{name})" for name in part.files)]
    for note in notes:
        yield f"- {note}"
    if notes:
        yield ""


def _verdict(target: Target) -> tuple[str, str]:
    return f"{target.bound} {number(target.limit)} {target.unit}".rstrip(), "met" if target.met else "**missed**"


def _figure(figure: Figure) -> tuple[str, ...]:
    spread = figure.spread
    return (figure.case, figure.subject, figure.quantity, _spread(spread, figure.unit), str(spread.repetitions))


def _spread(spread: Spread, unit: str) -> str:
    text = f"{number(spread.median)} {unit}".rstrip()
    if spread.repetitions == 1:
        return text
    return f"{text} ({number(spread.p10)} to {number(spread.p90)})"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    if not rows:
        return
    for cells in (head, ("---",) * len(head), *rows):
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    yield ""
