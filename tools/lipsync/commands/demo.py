"""`lipsync demo`: draws an avatar, adds it with its trained model as any tenant is added, and lets it speak through the
whole system."""

from __future__ import annotations

import asyncio
import tempfile
import threading
from pathlib import Path
from typing import Annotated

import typer

from compositor.manifest import AUDIO_ENCODER, MODEL, read_manifest, sha256_of, tenant_names
from compositor.server import running
from compositor.settings import Settings
from lipsync import trained
from lipsync.avatar import write_source
from lipsync.preparation import Choices
from lipsync.repository import Serving, add_encoder, add_tenant
from lipsync.sentences import HELLO
from lipsync.sources import open_source
from lipsync.tritonserver import EmbeddedTriton, default_home, install

from .console import REPOSITORY, Repository, err, progress, say
from .speaking import read_speech, speak_to

TENANT = "demo"
# Its one caller is the demo itself: once that is interrupted nobody waits for the rest.
_BRIEF = {"server": {"port": 0, "drain_s": 0}, "http": {"port": 0}}


def demo(
    output: Annotated[str, typer.Option("--output", "-o", metavar="PATH", help="The video to write.")] = "out/demo.mp4",
    wav: Annotated[Path, typer.Option(help="What it says: a WAV file.")] = HELLO,
    repository: Repository = REPOSITORY,
) -> None:
    """Add the demo tenant where it is missing and write a video of it speaking."""
    speech = read_speech(wav)
    install(default_home(), err.print)
    repository.mkdir(parents=True, exist_ok=True)
    if TENANT not in tenant_names(repository):
        _add_tenant(repository)
    elif read_manifest(repository, TENANT).model_sha256 != sha256_of(trained.AVATAR):
        say(f"tenant {TENANT} has another model; for the shipped one run `lipsync tenant remove {TENANT}`, then this")
    with EmbeddedTriton(repository) as triton:
        values = {"model_repository": repository, **_BRIEF, "triton": {"endpoints": triton.grpc}}
        settings = Settings.model_validate(values)
        asyncio.run(_speak(settings, speech, output))


async def _speak(settings: Settings, wav: bytes, output: str) -> None:
    stop = threading.Event()
    async with running(settings) as service:
        try:
            await asyncio.to_thread(speak_to, f"127.0.0.1:{service.port}", TENANT, wav, output, stop)
        finally:
            # Ctrl-C ends this coroutine only; the thread would go on to write the video.
            stop.set()


def _add_tenant(repository: Path) -> None:
    with tempfile.TemporaryDirectory() as folder, progress() as report:
        source = Path(folder)
        write_source(source, progress=lambda done, total: report("draw", done, total))
        choices = Choices(encoder=_encoder(repository))
        add_tenant(repository, TENANT, open_source(source, model=trained.AVATAR), choices, Serving(), report)
    say(f"tenant {TENANT} added to {repository}")


def _encoder(repository: Path) -> str:
    """Installs the demo's encoder and says its name: the shared one's, unless another is installed under it."""
    for name in (AUDIO_ENCODER, "demo_encoder"):
        installed = repository / name / "1" / MODEL
        if not installed.exists():
            add_encoder(repository, name, trained.ENCODER)
            return name
        if sha256_of(installed) == sha256_of(trained.ENCODER):
            return name
    add_encoder(repository, "demo_encoder", trained.ENCODER, replace=True)
    return "demo_encoder"
