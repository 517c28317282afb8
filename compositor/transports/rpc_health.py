"""gRPC's health service, grpc.health.v1: whether the service serves, and each change of it to those who watch.

The one of grpcio-health-checking forgets all who watch a service as soon as one of them leaves: the others would never
hear that it stops.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection

import grpc
from grpc_health.v1 import health_pb2 as pb
from grpc_health.v1 import health_pb2_grpc as pb_grpc

from .status import Context, write

_Status = pb.HealthCheckResponse.ServingStatus


class HealthService(pb_grpc.HealthServicer):  # type: ignore[misc]  # its library has no types
    """Not serving until it is told so. names: of the services that are asked for, the whole server, "", among them."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._serving = False
        self._changed = asyncio.Event()

    async def tell(self, serving: bool) -> None:
        """From now on this is the answer."""
        self._serving = serving
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def Check(self, request: pb.HealthCheckRequest, context: Context) -> pb.HealthCheckResponse:  # noqa: N802
        """The state now; NOT_FOUND for a service that is not here."""
        if request.service not in self._names:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service[:100]!r} is here")
        return pb.HealthCheckResponse(status=self._status(request.service))

    async def Watch(self, request: pb.HealthCheckRequest, context: Context) -> None:  # noqa: N802
        """The state now, and then whenever it is another; SERVICE_UNKNOWN for a service that is not here."""
        told = None
        while True:
            changed, status = self._changed, self._status(request.service)
            if status != told:
                await write(context, pb.HealthCheckResponse(status=status))
                told = status
            await changed.wait()

    def _status(self, service: str) -> int:
        state = "SERVING" if self._serving else "NOT_SERVING"
        number: int = _Status.Value(state if service in self._names else "SERVICE_UNKNOWN")
        return number
