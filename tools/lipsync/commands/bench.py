"""`lipsync bench`: measures the project and writes a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from lipsync.bench import ceiling
from lipsync.bench.figures import Report
from lipsync.bench.part import Part
from lipsync.bench.parts import PARTS, measure
from lipsync.bench.report import number, write
from lipsync.tritonserver import default_home, install

from .console import REPOSITORY, Repository, err, out, progress

app = typer.Typer(no_args_is_help=True, help="Measure the project: a report as JSON, Markdown and a plot.")

Output = Annotated[Path, typer.Option("--output", "-o", help="The folder for the report.")]
Quick = Annotated[bool, typer.Option("--quick", help="Tiny sizes, to see that it works; the figures mean nothing.")]
OUTPUT = Path("out/bench")


@app.command("all")
def all_(
    output: Output = OUTPUT,
    quick: Quick = False,
    publish: Annotated[
        Path | None, typer.Option(help="Also write benchmarks.json, .md and .svg into this folder (docs).")
    ] = None,
) -> None:
    """Everything, in under ten minutes on two cores: report.json, report.md and report.svg."""
    report = _measure(PARTS, quick=quick)
    write(output, "report", report)
    if publish is not None:
        write(publish, "benchmarks", report)
    _tell(report, output / "report.md")


def _command(part: Part) -> Callable[[Path, bool], None]:
    def one(output: Output = OUTPUT, quick: Quick = False) -> None:
        report = _measure([part], quick=quick)
        write(output, part.name, report)
        _tell(report, output / f"{part.name}.md")

    return one


for _part in PARTS:
    app.command(_part.name, help=f"{_part.title}.")(_command(_part))


@app.command()
def triton(
    name: Annotated[str, typer.Argument(metavar="ID", help="The tenant.")],
    concurrency: Annotated[list[int] | None, typer.Option(min=1, max=64, help="Requests in flight; repeat it.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, max=50, help="Frames a request; default: the most.")] = None,
    repository: Repository = REPOSITORY,
    output: Output = OUTPUT,
    quick: Quick = False,
) -> None:
    """Triton's ceiling for one tenant, by NVIDIA's perf_analyzer: its fused and its raw model."""
    report = _measure([ceiling.part(repository, name, concurrency or [1, 2, 4], batch)], quick=quick)
    write(output, "triton", report)
    _tell(report, output / "triton.md")


def _measure(parts: Sequence[Part], *, quick: bool) -> Report:
    install(default_home(), err.print)
    with progress() as report:
        return measure(parts, report, quick=quick)


def _tell(report: Report, page: Path) -> None:
    """The targets, where the report is, and exit status 1 where a part failed."""
    table = Table(box=None, pad_edge=False)
    for heading in ("target", "is", "should be", ""):
        table.add_column(heading, justify="right" if heading == "is" else "left")
    for part in report.parts:
        for target in part.targets:
            value, limit = (f"{number(it)} {target.unit}" for it in (target.spread.median, target.limit))
            table.add_row(target.what, value, f"{target.bound} {limit}", "met" if target.met else "missed")
    if table.row_count:
        out.print(table)
    for part in report.parts:
        if part.failure:
            err.print(Text(f"{part.name} failed: {part.failure}"), soft_wrap=True)
    out.print(f"wrote {page}")
    if not report.passed:
        raise typer.Exit(1)
