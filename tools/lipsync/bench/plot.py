"""Draws a report as SVG: for each part one bar for each subject, on a logarithmic axis, with p10 and p90."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from xml.sax.saxutils import escape

from .figures import Figure, PartReport, Report

_WIDTH, _LABEL, _VALUE = 900, 380, 90
_BAR, _HEAD, _GAP = 22, 44, 18
_COLOURS = ("#3b6ea5", "#c8792b", "#5a8f4e", "#8a5a9e", "#777777")


def draw(report: Report) -> str:
    """The plot of all parts that have something to plot, as an SVG document."""
    panels: list[str] = []
    top = 10
    for part in report.parts:
        figures = [figure for figure in part.figures if figure.quantity == part.plotted and figure.spread.median > 0]
        if figures:
            panels.extend(_panel(part, figures, top))
            top += _HEAD + _BAR * len(figures) + _GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{top}" viewBox="0 0 {_WIDTH} {top}" '
        'font-family="sans-serif" font-size="12">\n'
        f'<rect width="{_WIDTH}" height="{top}" fill="#ffffff"/>\n' + "".join(panels) + "</svg>\n"
    )


def _panel(part: PartReport, figures: Sequence[Figure], top: int) -> Iterator[str]:
    low = 10 ** math.floor(math.log10(_least(figures)) - 1e-9)
    high = max(figure.spread.p90 for figure in figures)
    span = math.log10(high / low)
    room = _WIDTH - _LABEL - _VALUE

    def across(value: float) -> float:
        return _LABEL + room * math.log10(max(value, low) / low) / span

    yield _text(10, top + 16, f"{part.title}: {part.plotted}, {figures[0].unit}", 'font-weight="bold"')
    bottom = top + _HEAD + _BAR * len(figures)
    for decade in range(round(math.log10(low)), math.floor(math.log10(high) + 1e-9) + 1):
        x = across(10.0**decade)
        yield f'<path d="M{x:.1f} {top + _HEAD - 6}V{bottom}" stroke="#dddddd"/>\n'
        yield _text(x, top + _HEAD - 10, f"{10.0**decade:g}", 'text-anchor="middle" fill="#777777"')
    cases = list(dict.fromkeys(figure.case for figure in figures))
    for row, figure in enumerate(figures):
        y = top + _HEAD + _BAR * row
        spread, middle = figure.spread, y + _BAR / 2 - 2
        end, begin, stop = across(spread.median), across(spread.p10), across(spread.p90)
        colour = _COLOURS[cases.index(figure.case) % len(_COLOURS)]
        label = ", ".join(filter(None, (figure.case, figure.subject)))
        yield _text(_LABEL - 8, middle + 4, label, 'text-anchor="end"')
        yield f'<rect x="{_LABEL}" y="{y}" width="{end - _LABEL:.1f}" height="{_BAR - 5}" fill="{colour}"/>\n'
        yield f'<path d="M{begin:.1f} {middle:.1f}H{stop:.1f}" stroke="#222222" stroke-width="2"/>\n'
        yield _text(max(end, stop) + 6, middle + 4, f"{spread.median:.3g}", "")


def _least(figures: Sequence[Figure]) -> float:
    """The smallest value that a logarithmic axis can show."""
    return min(value for figure in figures for value in (figure.spread.p10, figure.spread.median) if value > 0)


def _text(x: float, y: float, text: str, attributes: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {attributes}>{escape(text)}</text>\n'
