"""`lipsync triton`, `lipsync serve`, `lipsync up`: run Triton, the compositor, or both, until stopped."""

from __future__ import annotations

import asyncio
import signal
import threading
from pathlib import Path
from typing import Annotated

import typer

from compositor.errors import SettingsInvalid, TritonUnavailable
from compositor.logs import set_up_logging
from compositor.manifest import tenant_names
from compositor.settings import LoggingSettings, Settings, read_settings
from compositor.signals import ignore_signals, leave_when_told
from compositor.workers import Listening
from compositor.workers import serve as serve_compositor
from lipsync.tritonserver import EmbeddedTriton, default_home, install

from .console import REPOSITORY, Config, err, say

Repository = Annotated[Path | None, typer.Option("--repository", "-r", help="The model repository.")]
Port = Annotated[int | None, typer.Option(min=0, max=65535, help="The compositor's gRPC port; 0: a free one.")]
WebPort = Annotated[
    int | None,
    typer.Option("--http-port", min=0, max=65535, help="The port of the page, HTTP and WebSocket; 0: a free one."),
]
Workers = Annotated[int | None, typer.Option(min=1, max=64, help="Processes that serve, all on the same ports.")]
GrpcPort = Annotated[int, typer.Option("--grpc-port", min=0, max=65535, help="Triton's gRPC port; 0: a free one.")]
HttpPort = Annotated[int, typer.Option("--http-port", min=0, max=65535, help="Triton's HTTP port; 0: a free one.")]
MetricsPort = Annotated[int, typer.Option("--metrics-port", min=0, max=65535, help="Triton's metrics port.")]
Log = Annotated[Path | None, typer.Option(help="File for Triton's log.")]

WATCH_EVERY_S = 0.5
GONE = "Triton ended and could not be started again; its log says why"


def triton(
    repository: Annotated[
        Path, typer.Option("--repository", "-r", envvar="LIPSYNC_MODEL_REPOSITORY", help="The model repository.")
    ] = REPOSITORY,
    grpc_port: GrpcPort = 8001,
    http_port: HttpPort = 8000,
    metrics_port: MetricsPort = 8002,
    log: Log = None,
) -> None:
    """Run the embedded Triton, supervised, until Ctrl-C."""
    leave_when_told()
    server = EmbeddedTriton(
        repository, grpc_port=grpc_port, http_port=http_port, metrics_port=metrics_port, log_path=log
    )
    set_up_logging(LoggingSettings())
    install(default_home(), err.print)
    with server:
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        say(f"Triton is ready: gRPC {server.grpc}, HTTP {server.http}, metrics {server.metrics}")
        while not stop.wait(WATCH_EVERY_S):
            if not server.alive:
                raise TritonUnavailable(GONE)


def serve(
    triton: Annotated[str | None, typer.Option("--triton", help="Triton's gRPC address, host:port.")] = None,
    config: Config = None,
    repository: Repository = None,
    port: Port = None,
    http_port: WebPort = None,
    workers: Workers = None,
) -> None:
    """Run the compositor alone, against a Triton that runs already."""
    leave_when_told()
    settings = read_settings(config, options=_options(triton, repository, port, http_port, workers))
    set_up_logging(settings.logging)
    try:
        asyncio.run(serve_compositor(settings, _announce))
    finally:
        ignore_signals()


def up(
    config: Config = None,
    repository: Repository = None,
    port: Port = None,
    http_port: WebPort = None,
    workers: Workers = None,
    log: Log = None,
) -> None:
    """Run the embedded Triton and the compositor together, until Ctrl-C."""
    leave_when_told()
    settings = read_settings(config, options=_options(None, repository, port, http_port, workers))
    _find_repository(settings.model_repository)
    set_up_logging(settings.logging)
    install(default_home(), err.print)
    with EmbeddedTriton(settings.model_repository, log_path=log) as server:
        try:
            asyncio.run(_serve_with(server, settings.with_triton(server.grpc)))
        finally:
            ignore_signals()


def _find_repository(path: Path) -> None:
    """Sees that the repository is there. Only the default one is made: another that is missing is a slip."""
    if path == REPOSITORY:
        path.mkdir(exist_ok=True)
    if not path.is_dir():
        raise SettingsInvalid(
            f"model_repository: {path} is no directory; create it, or name another", field="model_repository"
        )
    if not tenant_names(path):
        say("no tenants yet; add one with `lipsync tenant add`")


async def _serve_with(server: EmbeddedTriton, settings: Settings) -> None:
    """Serves until a signal. Raises TritonUnavailable when `server` is gone for good."""
    serving = asyncio.create_task(serve_compositor(settings, _announce))
    while not (await asyncio.wait({serving}, timeout=WATCH_EVERY_S))[0]:
        if not server.alive:
            serving.cancel()
            await asyncio.wait({serving})
            raise TritonUnavailable(GONE)
    await serving


def _options(
    triton: str | None, repository: Path | None, port: int | None, http_port: int | None, workers: int | None
) -> dict[str, tuple[str, str]]:
    """What the command line says of settings, as `read_settings` takes it."""
    said = {
        "triton.endpoints": ("--triton", triton),
        "model_repository": ("--repository", repository),
        "server.port": ("--port", port),
        "http.port": ("--http-port", http_port),
        "server.workers": ("--workers", workers),
    }
    return {setting: (option, str(value)) for setting, (option, value) in said.items() if value is not None}


def _announce(service: Listening) -> None:
    say(f"the compositor listens on port {service.port} (gRPC) and {service.http_port} (HTTP and the page)")
