"""What gRPC's health service tells, over a real connection."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import pytest
from grpc_health.v1 import health_pb2 as pb
from grpc_health.v1 import health_pb2_grpc as pb_grpc

from compositor.transports.rpc_health import HealthService

NOT_SERVING, SERVING = pb.HealthCheckResponse.NOT_SERVING, pb.HealthCheckResponse.SERVING


class Served:
    """The service, and a client of it."""

    def __init__(self, service: HealthService, channel: grpc.aio.Channel) -> None:
        self.tell = service.tell
        self._stub = pb_grpc.HealthStub(channel)

    async def check(self, name: str = "") -> int:
        answer = await self._stub.Check(pb.HealthCheckRequest(service=name), timeout=60)
        return int(answer.status)

    def watch(self, name: str = "") -> grpc.aio.UnaryStreamCall[pb.HealthCheckRequest, pb.HealthCheckResponse]:
        return self._stub.Watch(pb.HealthCheckRequest(service=name), timeout=60)


async def state(call: grpc.aio.UnaryStreamCall[pb.HealthCheckRequest, pb.HealthCheckResponse]) -> int:
    """The next one."""
    return int((await call.read()).status)


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    service, server = HealthService(("", "lipsync.v1.Lipsync")), grpc.aio.server()
    pb_grpc.add_HealthServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Served(service, channel)
    finally:
        await server.stop(None)


@pytest.mark.parametrize("name", ["", "lipsync.v1.Lipsync"])
async def test_it_serves_once_it_is_told_so(served: Served, name: str) -> None:
    assert await served.check(name) == NOT_SERVING
    await served.tell(True)
    assert await served.check(name) == SERVING


async def test_a_service_that_is_not_here_is_unknown(served: Served) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.check("nobody")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert await state(served.watch("nobody")) == pb.HealthCheckResponse.SERVICE_UNKNOWN


async def test_who_watches_hears_each_change_although_others_leave(served: Served) -> None:
    staying, leaving = served.watch(), served.watch()
    for call in (staying, leaving):
        assert await state(call) == NOT_SERVING
    await served.tell(True)
    for call in (staying, leaving):
        assert await state(call) == SERVING
    leaving.cancel()
    await served.tell(True)
    late = served.watch()
    assert await state(late) == SERVING
    await served.tell(False)
    for call in (staying, late):
        assert await state(call) == NOT_SERVING
