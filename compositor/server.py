"""The composition root: builds the service from its settings, starts it, and drains it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from .catalogue import Catalogue
from .disk import Disk
from .draining import Draining
from .errors import LipsyncError, SettingsInvalid, TritonUnavailable
from .health import Health
from .limits import allow_open_files
from .memory import keep_pauses_short
from .metrics import Metrics
from .pipeline import Compositor
from .proto import lipsync_v1_pb2 as pb
from .proto import lipsync_v1_pb2_grpc as pb_grpc
from .scratch import scratch_home, sweep
from .sessions.live import Live
from .settings import Settings
from .signals import Signals
from .threads import keep_libraries_single_threaded
from .tracing import open_tracer
from .transports.admission import Admission
from .transports.http import Site
from .transports.ledger import Ledger
from .transports.rpc import LipsyncService
from .transports.rpc_health import HealthService
from .transports.web import bind, serving
from .triton.connection import read_key
from .triton.fleet import Fleet, open_fleet

log = logging.getLogger(__name__)

KEEPALIVE_MS = 20_000
SERVICE = pb.DESCRIPTOR.services_by_name["Lipsync"].full_name


@dataclass(frozen=True)
class Running:
    """A started service."""

    port: int  # gRPC
    http_port: int
    health: Health


@contextlib.asynccontextmanager
async def running(
    settings: Settings,
    *,
    share_ports: bool = False,
    metrics: Metrics | None = None,
    hurry: asyncio.Event | None = None,
) -> AsyncIterator[Running]:
    """The service, listening; leaving the block drains and stops it. Raises SettingsInvalid and DiskFull.

    share_ports: with other processes of the same user that do so, too. hurry: once set, ends the time to drain.
    """
    check(settings)
    keep_libraries_single_threaded()
    allow_open_files()
    sweep()
    disk = Disk(scratch_home())
    disk.look()
    async with contextlib.AsyncExitStack() as stack:
        metrics = metrics or Metrics()
        parts = _assemble(stack, settings, metrics)
        server = _server(settings, parts.service, share_ports)
        health = _health(server, parts.fleet, disk)
        site = Site(parts.compositor, parts.live, metrics, health, parts.admission, parts.ledger)
        listening = stack.enter_context(bind(settings.http, share_ports))
        port = _bind(server, settings)
        await server.start()
        stack.push_async_callback(server.stop, None)  # it is by then, unless draining failed
        watches = parts.fleet.watch(), disk.watch(), health.watch()
        async with serving(site.app, listening, settings.http) as web, _going_on(*watches):
            draining = Draining(
                settings.server,
                hurry or asyncio.Event(),
                health,
                server,
                web,
                parts.admission,
                parts.live,
                parts.service.calls,
                parts.service.live_calls,
                site.conversations,
            )
            http_port: int = listening.getsockname()[1]
            tritons = ", ".join(settings.triton.endpoints)
            log.info("listening on %s:%d, Triton at %s", settings.server.host, port, tritons)
            log.info("the page is at http://%s:%d/", settings.http.host, http_port)
            try:
                yield Running(port, http_port, health)
            finally:
                await draining.run()
    log.info("stopped")


@contextlib.asynccontextmanager
async def _going_on(*works: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Work that goes on until the block ends."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(frozen=True)
class _Parts:
    """What every transport shares."""

    fleet: Fleet
    compositor: Compositor
    live: Live
    admission: Admission
    ledger: Ledger
    service: LipsyncService


def _assemble(stack: contextlib.AsyncExitStack, settings: Settings, metrics: Metrics) -> _Parts:
    """The parts, closed with the stack."""
    cores = len(os.sched_getaffinity(0))
    threads = settings.server.threads or max(1, cores // settings.server.workers)
    pool = stack.enter_context(ThreadPoolExecutor(threads, thread_name_prefix="render"))
    fleet = _fleet(settings, metrics)
    stack.push_async_callback(fleet.close)
    tracer = open_tracer(settings.tracing)
    stack.push_async_callback(asyncio.to_thread, tracer.close)
    compositor = Compositor(settings, fleet, pool, metrics.observe_stage)
    live = Live(compositor, settings, metrics)
    admission = Admission(settings.server.max_calls)
    ledger = Ledger(metrics, tracer)
    return _Parts(fleet, compositor, live, admission, ledger, LipsyncService(compositor, live, admission, ledger))


def _health(server: grpc.aio.Server, fleet: Fleet, disk: Disk) -> Health:
    """The service's health, which gRPC's health service tells, too."""
    told = HealthService(("", SERVICE))
    health_pb2_grpc.add_HealthServicer_to_server(told, server)

    async def find_fault() -> LipsyncError | None:
        if not await fleet.ready():
            return TritonUnavailable("Triton does not answer", retry_after_s=1)
        return disk.fault

    return Health(find_fault, told.tell)


def check(settings: Settings) -> None:
    """Raises SettingsInvalid where settings name files that are not there."""
    if not settings.model_repository.is_dir():
        raise SettingsInvalid(
            f"model_repository: {settings.model_repository} is no directory; create it, or name another",
            field="model_repository",
        )
    if settings.triton.key_file is not None:
        read_key(settings.triton.key_file)


def _fleet(settings: Settings, metrics: Metrics) -> Fleet:
    budget = settings.residency.max_models, settings.residency.max_mb * 10**6
    return open_fleet(
        settings,
        Catalogue(settings.model_repository).facts,
        lambda endpoint: metrics.observer(endpoint, *budget),
        lambda endpoint, up: metrics.up.labels(endpoint).set(up),
        metrics.observer_of("queue"),
        lambda endpoint, works: metrics.works.labels(endpoint).set(works),
    )


def _server(settings: Settings, service: LipsyncService, share_port: bool) -> grpc.aio.Server:
    limit = settings.server.max_message_mb << 20
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", limit),
            ("grpc.max_send_message_length", limit),
            ("grpc.so_reuseport", int(share_port)),
            # A client that hangs with its connection open would hold its session: it is asked, and has to answer.
            ("grpc.keepalive_time_ms", KEEPALIVE_MS),
            ("grpc.http2.ping_timeout_ms", KEEPALIVE_MS),
        ]
    )
    pb_grpc.add_LipsyncServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    reflection.enable_server_reflection(
        (SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME), server
    )
    return server


def _bind(server: grpc.aio.Server, settings: Settings) -> int:
    address = f"{settings.server.host}:{settings.server.port}"
    try:
        port: int = server.add_insecure_port(address)
    except RuntimeError:
        port = 0
    if port == 0:
        raise SettingsInvalid(
            f"server.port: {address} cannot be bound; is another service on it? choose another, or 0 for a free one",
            field="server.port",
        )
    return port


async def serve(settings: Settings, started: Callable[[Running], None] | None = None) -> None:
    """Runs the service until SIGTERM or SIGINT, the second of which ends the time to drain."""
    signals = Signals()
    keep_pauses_short()
    async with running(settings, hurry=signals.hurry) as service:
        if started:
            started(service)
        await signals.stop.wait()
