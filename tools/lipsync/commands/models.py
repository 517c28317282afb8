"""`lipsync model` and `lipsync encoder`: write the true graphs with random weights; install audio encoders."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import onnx
import typer

from compositor.manifest import AUDIO_ENCODER
from lipsync import architecture
from lipsync.model_size import macs, parameters
from lipsync.repository import add_encoder

from .console import REPOSITORY, Repository, say, size

model_app = typer.Typer(no_args_is_help=True, help="Write models with random weights, for tests and benchmarks.")
encoder_app = typer.Typer(no_args_is_help=True, help="Install audio encoders.")


class Graph(str, Enum):
    """What `lipsync model build` writes."""

    UNET = "unet"
    ENCODER = "encoder"
    DO_NOTHING = "do-nothing"
    DO_NOTHING_ENCODER = "do-nothing-encoder"


@model_app.command()
def build(
    graph: Annotated[Graph, typer.Argument(help="Which graph.")],
    path: Annotated[Path, typer.Argument(help="The ONNX file to write.")],
    width: Annotated[float, typer.Option(min=0.05, max=4, help="Factor on every layer's channels.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the weights.")] = 0,
) -> None:
    """Write the avatar's U-Net, the audio encoder, or a graph with the same interface that does nothing."""
    model = {
        Graph.UNET: lambda: architecture.unet(width, seed),
        Graph.ENCODER: lambda: architecture.audio_encoder(width, seed),
        Graph.DO_NOTHING: architecture.do_nothing,
        Graph.DO_NOTHING_ENCODER: architecture.do_nothing_encoder,
    }[graph]()
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    say(f"{path}: {parameters(model):,} parameters, {macs(model) / 1e9:.3f} GMAC, {size(path.stat().st_size)}")


@model_app.callback()
def _model() -> None:
    """Keeps `build` a subcommand."""


@encoder_app.command()
def add(
    path: Annotated[Path, typer.Argument(help=r"ONNX file: mel \[n,1,80,16] -> \[n,512].")],
    name: Annotated[str, typer.Option(help="Tenants name their encoder so.")] = AUDIO_ENCODER,
    replace: Annotated[bool, typer.Option("--replace", help="Install it anew where one of that name is.")] = False,
    repository: Repository = REPOSITORY,
) -> None:
    """Check and install an audio encoder."""
    add_encoder(repository, name, path, replace=replace)
    say(f"encoder {name} installed in {repository}")


@encoder_app.callback()
def _encoder() -> None:
    """Keeps `add` a subcommand."""
