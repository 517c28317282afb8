"""`lipsync tenant`: add, list, show, verify and remove tenants."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from compositor.errors import LipsyncError
from compositor.jpeg import Subsampling
from compositor.tenant import AUDIO_ENCODER, Tenant, read_manifest, tenant_names
from lipsync import repository as tenants
from lipsync.model_config import TENANT_BATCH, Kind
from lipsync.preparation import Choices
from lipsync.sources import open_source

from .console import REPOSITORY, Repository, progress, size

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
def list_(repository: Repository = REPOSITORY) -> None:
    """List the tenants."""
    rows = [("tenant", "frames", "size", "fps", "encoder", "added")]
    for name in tenant_names(repository):
        try:
            manifest = read_manifest(repository, name)
        except LipsyncError as error:
            rows.append((name, "damaged", "", "", "", error.message))
            continue
        dimensions = f"{manifest.width}x{manifest.height}"
        rows.append((name, str(manifest.frames), dimensions, str(manifest.fps), manifest.encoder, manifest.created))
    if len(rows) == 1:
        typer.echo(f"no tenants in {repository}; add one with `lipsync tenant add`")
    else:
        _write_columns(rows)


@app.command()
def show(name: Name, repository: Repository = REPOSITORY) -> None:
    """Show all that is known of a tenant."""
    manifest = Tenant(repository, name).manifest
    values = manifest.model_dump(mode="json", exclude={"header", "files"})
    values["disk"] = size(tenants.disk_bytes(repository, name))
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
    tenants.remove_tenant(repository, name)
    typer.echo(f"tenant {name} removed")


def _write_columns(rows: Sequence[Sequence[str]]) -> None:
    """Columns two spaces apart, one line a row whatever the terminal's width, so that other programs can read them."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
