"""The service as several processes on the same ports: this one reserves the ports and keeps the others alive.

The kernel gives each new connection to one of them (SO_REUSEPORT), where it stays, session and all. Limits count for
each process; metrics are those of all.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from . import server
from .disk import reserve
from .errors import LipsyncError, SettingsInvalid
from .logs import set_up_logging
from .memory import keep_pauses_short
from .metrics import SHARED_VARIABLE, Metrics, forget_worker
from .residency.models import devices_of
from .scratch import scratch_folder, sweep
from .settings import Settings
from .signals import Signals
from .transports.ledger import Ledger

log = logging.getLogger(__name__)

_MODULE = "compositor.workers"
_METRICS = ("counter", "histogram", "gauge_livesum", "gauge_livemin", "gauge_livemax")
"""The files that Prometheus's library maps for each worker, by what they begin with."""
_SPARE_BYTES = 128 << 10
"""In each of them for what comes up with its use: the other methods of HTTP, each by status; reasons of failures."""
_STOP, _HURRY = signal.SIGUSR1, signal.SIGUSR2
"""What a parent tells a worker. Whoever stops a service may send SIGTERM to each of its processes, as systemd does; a
second one, of the parent's, would cut off what is under way."""
_PAUSE_S = 1.0
"""Between the end of a worker and the start of the one in its place."""
_PATIENCE_S = 10.0
"""Beyond the time to drain, until a worker is killed."""


class Listening(Protocol):
    """Where a service listens."""

    @property
    def port(self) -> int: ...

    @property
    def http_port(self) -> int: ...


@dataclass(frozen=True)
class _Ports:
    port: int
    http_port: int


async def serve(settings: Settings, started: Callable[[Listening], None] | None = None) -> None:
    """Runs the service, in `server.workers` processes of their own if more than one, until SIGTERM or SIGINT.

    Raises SettingsInvalid, and LipsyncError where a worker does not start.
    """
    if settings.server.workers == 1:
        await server.serve(settings, started)
        return
    signals = Signals()
    async with running(settings, signals.stop, signals.hurry) as ports:
        if started and not signals.stop.is_set():
            started(ports)
        await signals.stop.wait()
        log.info("stopping %d workers", settings.server.workers)
    log.info("stopped")


@contextlib.asynccontextmanager
async def running(
    settings: Settings, stop: asyncio.Event | None = None, hurry: asyncio.Event | None = None
) -> AsyncIterator[Listening]:
    """The workers, listening, unless `stop` was set before they did; leaving the block drains and stops them. hurry:
    once set, ends their time to drain."""
    server.check(settings)
    sweep()
    with (
        _reserved(settings.server.host, settings.server.port, "server.port") as port,
        _reserved(settings.http.host, settings.http.port, "http.port") as http_port,
        scratch_folder() as folder,
    ):
        own = settings.with_ports(port, http_port)
        stop, hurry = stop or asyncio.Event(), hurry or asyncio.Event()
        workers = [_Worker(number + 1, own, folder, hurry) for number in range(settings.server.workers)]
        tasks = [asyncio.create_task(worker.keep()) for worker in workers]
        try:
            await _all_ready(workers, tasks, stop)
            yield _Ports(port, http_port)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.contextmanager
def _reserved(host: str, port: int, setting: str) -> Iterator[int]:
    """A port that nobody else listens on, or a free one for 0, and that only those who share it may bind meanwhile."""
    try:
        shared = _reserve(host, port)
    except OSError as error:
        raise SettingsInvalid(
            f"{setting}: {host}:{port} cannot be bound ({error.strerror}); is another service on it? choose another, "
            "or 0 for a free one",
            field=setting,
        ) from error
    with shared:
        reserved: int = shared.getsockname()[1]
        yield reserved


def _reserve(host: str, port: int) -> socket.socket:
    """A socket that shares the port. Bound and not listening, it gets no connections."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    with socket.socket(family, kind, protocol) as alone:
        alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        alone.bind(address)
        port = alone.getsockname()[1]
    shared = socket.socket(family, kind, protocol)
    try:
        shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        shared.bind((address[0], port, *address[2:]))
    except OSError:
        shared.close()
        raise
    return shared


async def _all_ready(workers: list[_Worker], tasks: list[asyncio.Task[None]], stop: asyncio.Event) -> None:
    """Returns when every worker serves, or nobody wants them to any more. Raises what ends one of the tasks that keep
    them."""
    waiting = [asyncio.create_task(_ready(workers)), asyncio.create_task(_set(stop))]
    try:
        done, _ = await asyncio.wait([*waiting, *tasks], return_when=asyncio.FIRST_COMPLETED)
        if not stop.is_set():
            for task in done:
                await task
    finally:
        for task in waiting:
            task.cancel()


async def _set(event: asyncio.Event) -> None:
    await event.wait()


async def _ready(workers: list[_Worker]) -> None:
    for worker in workers:
        await worker.ready.wait()


class _Worker:
    """One place among the workers, and the process that holds it."""

    def __init__(self, number: int, settings: Settings, metrics: Path, hurry: asyncio.Event) -> None:
        self.ready = asyncio.Event()
        self._number, self._settings, self._metrics, self._hurry = number, settings, metrics, hurry

    async def keep(self) -> None:
        """Starts the process, again whenever it ends, and drains it when this is cancelled. Raises LipsyncError where
        the first one does not start."""
        while True:
            try:
                ending = f"ended with status {await self._run()}"
            except OSError as error:
                ending = f"could not be made: {error.strerror}"
            if not self.ready.is_set():
                raise LipsyncError(f"worker {self._number} did not start but {ending}; it says above what it can")
            log.warning("worker %d %s; it is started again", self._number, ending)
            await asyncio.sleep(_PAUSE_S)

    async def _run(self) -> int:
        """One process from its start to its end. Raises OSError where there is none."""
        process = await self._start()
        try:
            assert process.stdout
            if await process.stdout.readline():
                self.ready.set()
            return await process.wait()
        finally:
            await self._end(process)

    async def _start(self) -> Process:
        process = await asyncio.create_subprocess_exec(
            *("env", f"{SHARED_VARIABLE}={self._metrics}", sys.executable, "-m", _MODULE),
            *(str(self._metrics), str(self._number)),
            stdin=PIPE,
            stdout=PIPE,
            # A terminal's Ctrl-C reaches the parent only, which passes it on.
            start_new_session=True,
        )
        assert process.stdin
        # Its end tells the worker that this process is gone.
        process.stdin.write(self._settings.model_dump_json().encode() + b"\n")
        return process

    async def _end(self, process: Process) -> None:
        server = self._settings.server
        if process.returncode is None:
            process.send_signal(_STOP)
            hurrying = asyncio.create_task(self._pass_on(process))
            try:
                await asyncio.wait_for(process.wait(), server.drain_delay_s + server.drain_s + _PATIENCE_S)
            except asyncio.TimeoutError:
                log.error("worker %d does not end and is killed", self._number)
                process.kill()
                await process.wait()
            finally:
                hurrying.cancel()
        forget_worker(self._number, self._metrics)

    async def _pass_on(self, process: Process) -> None:
        """Tells a process that is ending to hurry, once somebody says so."""
        await self._hurry.wait()
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(_HURRY)


async def _work(settings: Settings, folder: Path, number: int) -> None:
    """The worker's side: serves until it is told to stop, or its parent is gone."""
    signals, loop = Signals(), asyncio.get_running_loop()
    loop.add_signal_handler(_STOP, signals.stop.set)
    loop.add_signal_handler(_HURRY, signals.hurry.set)
    keep_pauses_short()

    def part() -> None:
        # The end of a parent's pipe would be told again and again.
        loop.remove_reader(sys.stdin.fileno())
        signals.stop.set()

    loop.add_reader(sys.stdin.fileno(), part)
    _reserve_metrics(settings, folder, number)
    metrics = Metrics(folder, number)
    async with server.running(settings, share_ports=True, metrics=metrics, hurry=signals.hurry):
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        await signals.stop.wait()


def _reserve_metrics(settings: Settings, folder: Path, number: int) -> None:
    """Makes the files of a worker's metrics, for all Tritons: their growth would not be reserved. Raises DiskFull."""
    metrics = Metrics()
    Ledger(metrics)
    metrics.expect(settings.triton.endpoints, [device.name for device in devices_of(settings.triton.gpus)])
    sizes = metrics.file_bytes()
    for kind in _METRICS:
        path = folder / f"{kind}_{number}.db"
        if not path.exists():  # of a worker that was in this place before
            reserve(path, sizes[kind.partition("_")[0]] + _SPARE_BYTES)


def main() -> int:
    """The worker's process: its settings are the first line of stdin."""
    try:
        settings = Settings.model_validate(json.loads(sys.stdin.buffer.readline()))
        set_up_logging(settings.logging)
        asyncio.run(_work(settings, Path(sys.argv[1]), int(sys.argv[2])))
    except LipsyncError as error:
        sys.stderr.write(f"error: {error.message}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
