"""`lipsync bench`: measures the project and writes a report."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from lipsync.bench import ceiling
from lipsync.bench import load as viewers
from lipsync.bench import soak as soaking
from lipsync.bench import tenants as many
from lipsync.bench.figures import Report
from lipsync.bench.part import Part
from lipsync.bench.parts import PARTS, measure
from lipsync.bench.readme import rewrite
from lipsync.bench.report import number, write
from lipsync.tritonserver import default_home, install

from .console import REPOSITORY, Repository, err, out, progress

app = typer.Typer(no_args_is_help=True, help="Measure the project: a report as JSON, Markdown and a plot.")

Output = Annotated[Path, typer.Option("--output", "-o", help="The folder for the report.")]
Quick = Annotated[bool, typer.Option("--quick", help="Tiny sizes, to see that it works; the figures mean nothing.")]
OUTPUT = Path("out/bench")
README, PUBLISHED = "README.md", "benchmarks.json"


def _seconds(text: str) -> int:
    """Seconds of a time as locust takes it: 30, 30s, 5m, 1h30m."""
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", text)
    hours, minutes, seconds = (int(part or 0) for part in match.groups()) if match else (0, 0, 0)
    if not (found := 3600 * hours + 60 * minutes + seconds):
        raise typer.BadParameter(f"{text!r} is no time; give such as 30s, 5m or 1h30m", param_hint="--time")
    return found


@app.command("all")
def all_(
    output: Output = OUTPUT,
    quick: Quick = False,
    publish: Annotated[
        Path | None,
        typer.Option(
            help="Also write benchmarks.json, .md and .svg into this folder (docs), and the numbers of the README.md "
            "beside it."
        ),
    ] = None,
) -> None:
    """Everything, in under ten minutes on two cores: report.json, report.md and report.svg."""
    report = _measure(PARTS, quick=quick)
    write(output, "report", report)
    if publish is not None:
        write(publish, "benchmarks", report)
        if (publish.absolute().parent / README).is_file():
            rewrite(publish.absolute().parent / README, publish / PUBLISHED)
    _tell(report, output / "report.md")


def _command(part: Part) -> Callable[[Path, bool], None]:
    def one(output: Output = OUTPUT, quick: Quick = False) -> None:
        report = _measure([part], quick=quick)
        write(output, part.name, report)
        _tell(report, output / f"{part.name}.md")

    return one


for _part in PARTS:
    if _part.name in ("load", "tenants"):  # have commands of their own, with options
        continue
    app.command(_part.name, help=f"{_part.title}.")(_command(_part))


@app.command("readme")
def readme_(
    page: Annotated[Path, typer.Argument(metavar="README", help="The README.")] = Path(README),
    report: Annotated[Path, typer.Option(help="The published report, JSON.")] = Path("docs") / PUBLISHED,
) -> None:
    """Write the README's numbers anew from the published report, without measuring."""
    rewrite(page, report)
    out.print(f"wrote {page}")


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


@app.command()
def tenants(
    tenants: Annotated[int, typer.Option("--tenants", "-n", min=2, max=60_000, help="How many there are.")] = 11_000,
    cache: Annotated[int, typer.Option(min=2, max=1000, help="How many may be loaded at once.")] = 40,
    headroom: Annotated[int, typer.Option(min=0, max=100, help="How many of these places are kept free at most.")] = 4,
    callers: Annotated[int, typer.Option(min=1, max=200, help="Who calls, side by side.")] = 8,
    pause: Annotated[
        float, typer.Option(min=0, help="Mean time between an answer and its caller's next call, seconds.")
    ] = 2.0,
    time: Annotated[str, typer.Option("--time", "-t", help="How long they call: 30s, 5m, 1h30m.")] = "60s",
    zipf: Annotated[
        float, typer.Option(min=0, max=10, help="Exponent of the tenants' popularity; 0: all alike.")
    ] = 1.0,
    output: Output = OUTPUT,
    quick: Quick = False,
) -> None:
    """Thousands of tenants, a few dozen of them loaded: start-up, list, memory, hits, loads, evictions, failures."""
    sizes = many.Sizes(tenants, cache, callers, pause, _seconds(time), zipf=zipf, headroom=headroom)
    report = _measure([many.part(sizes)], quick=quick)
    write(output, "tenants", report)
    _tell(report, output / "tenants.md")


@app.command()
def soak(
    cycles: Annotated[int, typer.Option(min=1, max=1_000_000, help="How often a model is evicted and loaded.")] = 5000,
    time: Annotated[str, typer.Option("--time", "-t", help="How long at most: 30s, 5m, 1h30m.")] = "1h30m",
    output: Output = OUTPUT,
    quick: Quick = False,
) -> None:
    """Models evicted and loaded again and again: whether the memory of Triton and of the compositor grows.

    Each sample is in soak-samples.json as soon as it is taken.
    """
    demand = soaking.Demand(cycles, _seconds(time) / 60, samples=output / "soak-samples.json")
    report = _measure([soaking.part(demand)], quick=quick)
    write(output, "soak", report)
    _tell(report, output / "soak.md")


@app.command()
def load(
    users: Annotated[int, typer.Option("--users", "-u", min=1, max=10_000, help="Viewers at once.")] = 4,
    host: Annotated[
        str | None, typer.Option(help="gRPC address of a compositor that runs, host:port; default: start one.")
    ] = None,
    time: Annotated[str, typer.Option("--time", "-t", help="How long: 30s, 5m, 1h30m.")] = "30s",
    spawn_rate: Annotated[
        float | None, typer.Option(min=0.01, help="Viewers that come a second; default: all at once.")
    ] = None,
    zipf: Annotated[
        float, typer.Option(min=0, max=10, help="Exponent of the tenants' popularity; 0: all alike.")
    ] = 1.0,
    tenants: Annotated[
        str, typer.Option(metavar="ID,ID,...", help="The tenants, the most wanted first; default: all.")
    ] = "",
    repository: Annotated[
        Path | None,
        typer.Option("--repository", "-r", help="The tenants' model repository; default: a new one of small tenants."),
    ] = None,
    flat_out: Annotated[
        bool, typer.Option("--flat-out", help="Ask again at once, without watching each speech to its end.")
    ] = False,
    timeout: Annotated[float, typer.Option(min=0.1, help="Longest that one speech may take, seconds.")] = 60.0,
    web: Annotated[
        bool, typer.Option("--web", help="Start and stop on locust's web page; the report follows Ctrl-C.")
    ] = False,
    web_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of locust's web page.")] = 8089,
    output: Output = OUTPUT,
    quick: Quick = False,
) -> None:
    """Viewers by locust on the whole service: first frame, frame gaps, late frames, total, and the CPU of each side."""
    names = [name.strip() for name in tenants.split(",") if name.strip()]
    port = web_port if web else None
    demand = viewers.Demand(users, _seconds(time), spawn_rate, zipf, names, flat_out, timeout, port)
    if web:
        err.print(f"locust's page will be at http://127.0.0.1:{web_port}; Ctrl-C ends it and writes the report")
    report = _measure([viewers.part(demand, host, repository)], quick=quick, embedded=host is None)
    write(output, "load", report)
    _tell(report, output / "load.md")


def _measure(parts: Sequence[Part], *, quick: bool, embedded: bool = True) -> Report:
    if embedded:
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
