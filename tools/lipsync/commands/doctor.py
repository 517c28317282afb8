"""`lipsync doctor`: checks an installation and says what to do."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from compositor.errors import SettingsInvalid
from compositor.settings import Settings, TritonSettings, read_settings
from compositor.triton.connection import read_key
from lipsync import doctor as checks
from lipsync.doctor import Check, Finding, State
from lipsync.doctor_tls import check_address
from lipsync.doctor_triton import check_triton

from .console import out

_COLOURS = {State.OK: "green", State.WARNING: "yellow", State.WRONG: "bold red"}


def doctor(
    triton: Annotated[str | None, typer.Option("--triton", help="Triton's gRPC address, host:port.")] = None,
    url: Annotated[
        str | None, typer.Option(help="The page's address for viewers, https://...: certificate, WebSocket.")
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Settings file (YAML).")] = None,
    repository: Annotated[Path | None, typer.Option("--repository", "-r", help="The model repository.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Findings as JSON.")] = False,
) -> None:
    """Check this installation: Triton, libraries, memory, ports, clock, disk, tenants. Exit status 1 where something
    is wrong."""
    said = {"triton.endpoints": ("--triton", triton), "model_repository": ("--repository", repository)}
    options = {key: (option, str(value)) for key, (option, value) in said.items() if value is not None}
    findings = []
    for finding in _examine(config, options, url):
        findings.append(finding)
        if not as_json:
            _show(finding)
    if as_json:
        values = [{**dataclasses.asdict(finding), "state": finding.state.value} for finding in findings]
        typer.echo(json.dumps(values, indent=1))
    if any(finding.state is State.WRONG for finding in findings):
        raise typer.Exit(1)


def _examine(config: Path | None, options: dict[str, tuple[str, str]], url: str | None) -> Iterator[Finding]:
    """All findings, one after another; with settings that are wrong, by the default ones."""
    try:
        settings = read_settings(config, options=options)
        yield Finding("settings", State.OK, "understood")
    except SettingsInvalid as error:
        settings = Settings()
        for line in error.message.splitlines():
            yield Finding("settings", State.WRONG, line, "mend it; what follows is by the default settings")
    steps: list[tuple[str, Check]] = [
        ("libturbojpeg", checks.check_jpeg),
        ("embedded Triton", checks.check_embedded),
        ("shared memory", partial(checks.check_memory, settings)),
        ("ports", partial(checks.check_ports, settings)),
        ("open files", partial(checks.check_files, settings)),
        ("clock", partial(checks.check_clock, settings)),
        ("disk", partial(checks.check_disk, settings)),
        ("tenants", partial(checks.check_tenants, settings)),
    ]
    steps += [(f"Triton {each}", partial(_check_triton, each, settings)) for each in settings.triton.endpoints]
    if url:
        steps.append((url, partial(check_address, url)))
    for name, check in steps:
        yield from checks.carry_out(name, check)


def _check_triton(endpoint: str, settings: Settings) -> Iterator[Finding]:
    """As asked; but where nobody named a Triton, one that does not run is none that is missing: `up` brings its own."""
    key_file = settings.triton.key_file
    found = list(check_triton(endpoint, settings.model_repository, read_key(key_file) if key_file else None))
    unnamed = settings.triton.endpoints == TritonSettings().endpoints
    if unnamed and found[0].found == "it cannot be reached":
        yield Finding(found[0].check, State.OK, "none runs there; `lipsync up` starts one of its own")
    else:
        yield from found


def _show(finding: Finding) -> None:
    """A line, and where it is not well, one with what to do."""
    line = Text.assemble((f"{finding.state.value:<8}", _COLOURS[finding.state]), f"{finding.check}: {finding.found}")
    out.print(line, soft_wrap=True)
    if finding.advice:
        out.print(Text(f"        -> {finding.advice}"), soft_wrap=True)
