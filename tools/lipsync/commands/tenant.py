"""`lipsync tenant`: add, list, show, verify and remove tenants."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from compositor.catalogue import Catalogue
from compositor.geometry import Subsampling
from compositor.manifest import AUDIO_ENCODER, RAW_SUFFIX
from compositor.settings import read_settings
from compositor.tenant import Tenant
from lipsync.model_config import TENANT_BATCH, Kind
from lipsync.tenant_list import Entry, list_tenants

from .console import REPOSITORY, Config, Repository, age, columns, progress, size

app = typer.Typer(no_args_is_help=True, help="Add, list, show, verify and remove tenants.")

Name = Annotated[str, typer.Argument(metavar="ID", help="The tenant's name: a-z 0-9 _ -, at most 64.")]


@app.command()
def add(
    name: Name,
    source: Annotated[
        Path | None,
        typer.Argument(help="Directory with checkpoint/model_best.onnx, frames/*.png|jpg and crop_rects.json."),
    ] = None,
    model: Annotated[Path | None, typer.Option(help="The avatar's ONNX model.")] = None,
    frames: Annotated[Path | None, typer.Option(help="Folder of images, or a video file.")] = None,
    crop_rects: Annotated[
        Path | None, typer.Option(help="JSON: a list of x1, y1, x2, y2 for each frame, or keyed by frame.")
    ] = None,
    visual: Annotated[str | None, typer.Option(help="Name of the visual input, where shapes do not tell.")] = None,
    audio: Annotated[str | None, typer.Option(help="Name of the audio input.")] = None,
    output: Annotated[str | None, typer.Option(help="Name of the output.")] = None,
    quality: Annotated[int, typer.Option(min=1, max=100, help="JPEG quality of the frames.")] = 75,
    subsampling: Annotated[Subsampling, typer.Option(help="Chroma subsampling of the frames.")] = Subsampling.S420,
    blend: Annotated[
        Literal["feather", "hard"], typer.Option(help="How the mouth's edge meets the frame.")
    ] = "feather",
    idle: Annotated[
        Literal["rendered", "background"],
        typer.Option(help="Idle frames: rendered once with silence, or the source as it is (mouth at rest)."),
    ] = "rendered",
    crops: Annotated[
        Literal["resident", "sent"] | None,
        typer.Option(help="Crops in the model, or sent with each request. Default: resident up to 1,000 frames."),
    ] = None,
    encoder: Annotated[str, typer.Option(help="The audio encoder that the model was trained with.")] = AUDIO_ENCODER,
    fps: Annotated[int, typer.Option(min=1, max=60, help="Frames a second.")] = 25,
    max_batch_size: Annotated[
        int, typer.Option(min=1, max=50, help="Most frames in one run of the model.")
    ] = TENANT_BATCH,
    kind: Annotated[Kind, typer.Option(help="Where Triton runs the model.")] = "auto",
    threads: Annotated[
        int,
        typer.Option(
            min=0, max=64, help="Threads of a run on a CPU; 0: one a core. More serve one large model faster."
        ),
    ] = 1,
    repository: Repository = REPOSITORY,
) -> None:
    """Check, prepare and install a tenant. It is live at once; nothing has to be restarted."""
    # Late, here and below: ONNX Runtime takes longer to import than all tenants to list.
    from lipsync import repository as tenants
    from lipsync.preparation import Choices
    from lipsync.sources import open_source

    begin = time.monotonic()
    tenants.free_name(repository, name)
    found = open_source(source, model, frames, crop_rects)
    choices = Choices(quality, subsampling, blend, idle, crops, encoder, fps, max_batch_size)
    roles = {"visual": visual, "audio": audio, "output": output}
    names = {role: tensor for role, tensor in roles.items() if tensor is not None}
    with progress() as report:
        manifest = tenants.add_tenant(repository, name, found, choices, tenants.Serving(kind, threads), report, names)
    typer.echo(
        f"tenant {name} added in {time.monotonic() - begin:.1f} s: {manifest.frames} frames of "
        f"{manifest.width}x{manifest.height}, {size(tenants.disk_bytes(repository, name))}"
    )


@app.command("list")
def list_(
    repository: Repository = REPOSITORY,
    triton: Annotated[
        str | None,
        typer.Option("--triton", help="Tritons to ask, host:port, with commas between. Default: the settings'."),
    ] = None,
    config: Config = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with all that is known.")] = False,
) -> None:
    """List the tenants: what of them is loaded, where, when and how much it was used, and what it takes in memory."""
    options = {} if triton is None else {"triton.endpoints": ("--triton", triton)}
    entries, silent = list_tenants(repository, read_settings(config, options=options).triton)
    if as_json:
        typer.echo(json.dumps([_described(entry, known=not silent) for entry in entries], indent=2))
    elif not entries:
        typer.echo(f"no tenants in {repository}; add one with `lipsync tenant add`")
    else:
        now_s = time.time()
        _write_columns([_HEADINGS, *(_row(entry, now_s, known=not silent) for entry in entries)])
    if entries:
        for address, reason in silent.items():
            typer.echo(f"Triton at {address}: {reason}; what it has loaded is not known", err=True)


_HEADINGS = (
    "tenant", "state", "device", "last use", "uses", "memory", "frames", "size", "fps", "encoder", "added"
)  # fmt: skip


def _state(entry: Entry, *, known: bool) -> str | None:
    """Of its copies, the one that can serve first; None: not known, for a Triton did not answer."""
    states = {copy.state for copy in entry.copies}
    found = next((state for state in ("ready", "loading", "unloading") if state in states), None)
    return found or ("absent" if known else None)


def _described(entry: Entry, *, known: bool) -> dict[str, object]:
    return {"state": _state(entry, known=known), **dataclasses.asdict(entry)}


def _row(entry: Entry, now_s: float, *, known: bool) -> tuple[str, ...]:
    where = {copy.triton for copy in entry.copies}
    devices = [f"{copy.triton}/{copy.device}" if len(where) > 1 else copy.device for copy in entry.copies]
    last_s = max((copy.last_use_s for copy in entry.copies), default=0)
    state = (
        _state(entry, known=known) or "?",
        ",".join(devices) or "-",
        age(now_s - last_s) if last_s else "-",
        str(sum(copy.uses for copy in entry.copies)) if entry.copies else "-",
        size(entry.memory_bytes) if entry.memory_bytes else "-",
    )
    if entry.fault:
        return (entry.tenant, *state, "damaged", "-", "-", "-", entry.fault)
    dimensions = f"{entry.width}x{entry.height}"
    return (entry.tenant, *state, str(entry.frames), dimensions, str(entry.fps), entry.encoder, entry.created)


@app.command()
def show(name: Name, repository: Repository = REPOSITORY) -> None:
    """Show all that is known of a tenant."""
    from lipsync import repository as tenants

    manifest = Tenant(repository, name).manifest
    values = manifest.model_dump(mode="json", exclude={"header", "files"})
    values["disk"] = size(tenants.disk_bytes(repository, name))
    catalogue = Catalogue(repository)
    for label, model in (("memory", name), ("memory of the raw model", name + RAW_SUFFIX)):
        values[label] = size(catalogue.facts(model).bytes)
    for file, record in manifest.files.items():
        values[f"file {file}"] = size(record.size)
    _write_columns([(key.replace("_", " "), str(value)) for key, value in values.items()])


@app.command()
def verify(name: Name, repository: Repository = REPOSITORY) -> None:
    """Compare every file of a tenant with its checksum."""
    Tenant(repository, name).verify()
    typer.echo(f"tenant {name} is sound")


@app.command()
def remove(name: Name, repository: Repository = REPOSITORY) -> None:
    """Remove a tenant and everything of it."""
    from lipsync import repository as tenants

    tenants.remove_tenant(repository, name)
    typer.echo(f"tenant {name} removed")


def _write_columns(rows: Sequence[Sequence[str]]) -> None:
    typer.echo("\n".join(columns(rows)))
