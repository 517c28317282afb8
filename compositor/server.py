"""The composition root: builds the service from its settings, starts it, and drains it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from .catalogue import Catalogue
from .errors import SettingsInvalid
from .health import Health
from .metrics import Metrics
from .pipeline import Compositor
from .proto import lipsync_v1_pb2 as pb
from .proto import lipsync_v1_pb2_grpc as pb_grpc
from .sessions.live import Live
from .settings import Settings
from .threads import keep_libraries_single_threaded
from .transports.admission import Admission
from .transports.http import Site
from .transports.rpc import LipsyncService
from .transports.web import bind, serving
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
    settings: Settings, *, share_ports: bool = False, metrics: Metrics | None = None
) -> AsyncIterator[Running]:
    """The service, listening; leaving the block drains and stops it. Raises SettingsInvalid.

    share_ports: with other processes of the same user that do so, too.
    """
    if not settings.model_repository.is_dir():
        raise SettingsInvalid(
            f"model_repository: {settings.model_repository} is no directory; create it, or name another",
            field="model_repository",
        )
    keep_libraries_single_threaded()
    cores = len(os.sched_getaffinity(0))
    threads = settings.server.threads or max(1, cores // settings.server.workers)
    async with contextlib.AsyncExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(threads, thread_name_prefix="render"))
        metrics = metrics or Metrics()
        fleet = _fleet(settings, metrics)
        stack.push_async_callback(fleet.close)
        compositor = Compositor(settings, fleet, pool, metrics.observe_stage)
        live = Live(compositor, settings, metrics)
        admission = Admission(settings.server.max_calls)
        service = LipsyncService(compositor, live, admission)
        server = _server(settings, service, share_ports)
        servicer = health_aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)

        async def publish(serving: bool) -> None:
            state = health_pb2.HealthCheckResponse
            for name in ("", SERVICE):
                await servicer.set(name, state.SERVING if serving else state.NOT_SERVING)

        health = Health(fleet.ready, publish)
        site = Site(compositor, live, metrics, health, admission)
        await publish(False)
        listening = stack.enter_context(bind(settings.http, share_ports))
        port = _bind(server, settings)
        await server.start()
        watching = [asyncio.create_task(work) for work in (fleet.watch(), health.watch())]
        async with serving(site.app, listening, settings.http, settings.server.drain_s):
            http_port: int = listening.getsockname()[1]
            log.info(
                "listening on %s:%d, Triton at %s", settings.server.host, port, ", ".join(settings.triton.endpoints)
            )
            log.info("the page is at http://%s:%d/", settings.http.host, http_port)
            try:
                yield Running(port, http_port, health)
            finally:
                await servicer.enter_graceful_shutdown()
                for task in watching:
                    task.cancel()
                service.live_calls.stop()
                await site.conversations.stop()
                # Both drain at the same time.
                draining = asyncio.create_task(server.stop(settings.server.drain_s))
                stack.push_async_callback(asyncio.wait, {*watching, draining})
    log.info("stopped")


def _fleet(settings: Settings, metrics: Metrics) -> Fleet:
    budget = settings.residency.max_models, settings.residency.max_mb * 10**6
    return open_fleet(
        settings,
        Catalogue(settings.model_repository).facts,
        lambda endpoint: metrics.observer(endpoint, *budget),
        lambda endpoint, up: metrics.up.labels(endpoint).set(up),
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
    """Runs the service until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with running(settings) as service:
        if started:
            started(service)
        await stop.wait()
        log.info("draining, at most %.0f s", settings.server.drain_s)
