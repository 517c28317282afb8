"""What all commands share: where they write, how they show progress, and the options they have in common."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from lipsync.preparation import Report

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

Repository = Annotated[
    Path, typer.Option("--repository", "-r", envvar="LIPSYNC_MODEL_REPOSITORY", help="The model repository.")
]
REPOSITORY = Path("model_repository")
Config = Annotated[Path | None, typer.Option("--config", "-c", help="Settings file (YAML).")]
SAY_EVERY_S = 2.0


def say(text: str) -> None:
    """A line on stdout, as it is: neither wrapped nor read as markup."""
    out.print(text, soft_wrap=True, markup=False)


@contextlib.contextmanager
def progress() -> Iterator[Report]:
    """Takes reports of (stage, done, total) and shows them: bars on a terminal, elsewhere a line every few seconds, so
    that a quick refusal is the only line on stderr."""
    if err.is_terminal:
        with _bars() as report:
            yield report
    else:
        yield _Lines()


class _Lines:
    """Says where the work is, now and then."""

    def __init__(self) -> None:
        self._said_s = time.monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if time.monotonic() - self._said_s >= SAY_EVERY_S:
            self._said_s = time.monotonic()
            typer.echo(f"{stage} {done}/{total}", err=True)


@contextlib.contextmanager
def _bars() -> Iterator[Report]:
    bars = Progress(
        TextColumn("{task.description:<8}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=err
    )
    tasks: dict[str, TaskID] = {}

    def report(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total)
        bars.update(tasks[stage], completed=done, total=total)

    with bars:
        yield report


def size(count: int) -> str:
    """Bytes for people."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"


def columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns two spaces apart, one line a row whatever the terminal's width, so that other programs can read them."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def age(seconds: float) -> str:
    """A time that has passed, for people."""
    for limit, unit, length in ((120, "s", 1), (7200, "min", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{max(seconds, 0) / length:.0f} {unit}"
    return f"{seconds / 86_400:.0f} d"
