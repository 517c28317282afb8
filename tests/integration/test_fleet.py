"""Several Tritons behind one service: one is killed, hangs, or answers garbage, and the callers see nothing of it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from compositor.proto import lipsync_v1_pb2 as pb
from compositor.proto import lipsync_v1_pb2_grpc as pb_grpc
from compositor.server import running
from compositor.settings import Settings
from compositor.triton import endpoint as endpoint_module
from compositor.triton import placement as placement_module
from compositor.triton.placement import ranked
from lipsync.tritonserver import EmbeddedTriton

from ..compositor.triton.kserve import Tensors, good, serving
from .demand import ONE, Demand, Several, allow_silence, make_folders, served
from .processes import freeze
from .waiting import until


class Three(Several):
    """Three real Tritons, the first of which, home to four tenants, is the victim; one is at home on each of the
    others."""

    def __init__(self, tritons: Sequence[EmbeddedTriton], repository: Path, sources: Path, **residency: float) -> None:
        super().__init__(tritons, repository, sources, (4, 1, 1), **residency)

    def up(self) -> set[str]:
        return {each["endpoint"] for each in self.stats()["endpoints"] if each["up"]}

    def homes(self) -> dict[str, set[str]]:
        """Where each model is loaded, of the servers that are up."""
        found: dict[str, set[str]] = {}
        up = self.up()
        for model in self.stats()["models"]:
            if model["state"] == "ready" and model["endpoint"] in up:
                found.setdefault(model["name"], set()).add(model["endpoint"])
        return found

    def all_at(self, endpoint: str, tenants: Sequence[str]) -> bool:
        """Whether the tenants are loaded there, and nowhere else."""
        homes = self.homes()
        return all(homes.get(tenant) == {endpoint} for tenant in tenants)


@pytest.fixture
def three(tmp_path: Path, triton_home: Path, request: pytest.FixtureRequest) -> Iterator[Three]:
    """With what settings of residency the test asks for."""
    repository, sources = make_folders(tmp_path)
    with contextlib.ExitStack() as stack:
        tritons = [stack.enter_context(EmbeddedTriton(repository)) for _ in range(3)]
        yield stack.enter_context(served(Three(tritons, repository, sources, **getattr(request, "param", {}))))


@pytest.fixture
def silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Is no sign of a server's being down."""
    allow_silence(monkeypatch)


@pytest.mark.triton
@pytest.mark.usefixtures("silence")
def test_a_killed_triton_costs_no_request_and_gets_its_tenants_back(three: Three) -> None:
    victim, triton = next(iter(three.tritons.items()))
    tenants = three.at[victim]
    with Demand(three.service, tenants) as demand:
        demand.go_on()
        assert three.all_at(victim, tenants)
        assert triton.pid is not None
        os.kill(triton.pid, signal.SIGKILL)
        demand.go_on()
        until(lambda: triton.restarts > 0)
        until(lambda: three.all_at(victim, tenants))
        demand.go_on()


@pytest.mark.triton
@pytest.mark.usefixtures("silence")
def test_the_tenants_of_a_triton_that_stays_away_live_elsewhere(three: Three) -> None:
    victim, triton = next(iter(three.tritons.items()))
    tenants = three.at[victim]
    others = {endpoint: own for endpoint, own in three.at.items() if endpoint != victim}
    with Demand(three.service, [*tenants, *itertools.chain(*others.values())]) as demand:
        demand.go_on()
        triton.stop()
        demand.go_on()
        assert victim not in three.up()
        until(lambda: set(tenants) <= three.homes().keys())
        assert all(three.all_at(endpoint, own) for endpoint, own in others.items())
        port = int(victim.rpartition(":")[2])
        with EmbeddedTriton(three.service.settings.model_repository, grpc_port=port):
            until(lambda: three.up() == set(three.tritons))
            until(lambda: three.all_at(victim, tenants))
            demand.go_on()


@pytest.mark.triton
def test_a_triton_that_hangs_costs_no_request_and_gets_its_tenants_back(three: Three) -> None:
    victim, triton = next(iter(three.tritons.items()))
    tenants = three.at[victim]
    assert triton.pid is not None
    with Demand(three.service, tenants) as demand:
        demand.go_on()
        freeze(triton.pid)
        try:
            demand.go_on()
            assert victim not in three.up()
        finally:
            os.kill(triton.pid, signal.SIGCONT)
        until(lambda: three.all_at(victim, tenants))
        demand.go_on()
    assert triton.restarts == 0


@pytest.mark.triton
@pytest.mark.usefixtures("silence")
def test_all_tritons_killed_at_once_cost_no_request(three: Three) -> None:
    tenants = [tenants[0] for tenants in three.at.values()]
    with Demand(three.service, tenants) as demand:
        demand.go_on()
        for triton in three.tritons.values():
            assert triton.pid is not None
            os.kill(triton.pid, signal.SIGKILL)
        demand.go_on()
        # The first one that is back may have answered them all.
        until(lambda: all(triton.restarts > 0 for triton in three.tritons.values()))
        demand.go_on()


@pytest.mark.triton
@pytest.mark.usefixtures("silence")
@pytest.mark.parametrize("three", [{"max_models": 2, "headroom": 0}], indirect=True)
def test_tenants_that_found_no_room_return_when_there_is_some(three: Three, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement_module, "CALM_S", 1.0)
    victim = next(iter(three.tritons))
    tenants = three.at[victim]
    with Demand(three.service, tenants) as demand:
        demand.go_on()
        homes = three.homes()
        away = [tenant for tenant in tenants if victim not in homes.get(tenant, set())]
        assert len(away) >= 2
    with Demand(three.service, away[:2]) as demand:
        demand.go_on()
        until(lambda: three.all_at(victim, away[:2]))
        demand.go_on()
    until(lambda: three.up() == set(three.tritons))


@contextlib.asynccontextmanager
async def service_of(
    repository: Path, endpoints: Sequence[str], residency: Mapping[str, Any] | None = None, **triton: Any
) -> AsyncIterator[pb_grpc.LipsyncStub]:
    """A service in this loop on servers that speak Triton's protocol, and a client of it."""
    values = {"endpoints": list(endpoints), "slots": 2, "restart_wait_s": 30, **triton}
    settings = Settings.model_validate(
        {
            "model_repository": repository,
            "server": {"port": 0},
            "http": {"port": 0},
            "triton": values,
            "residency": residency or {},
        }
    )
    async with running(settings) as service, grpc.aio.insecure_channel(f"127.0.0.1:{service.port}") as channel:
        yield pb_grpc.LipsyncStub(channel)  # type: ignore[no-untyped-call]


async def frames_of(stub: Any, tenant: str = "plain", timeout_s: float = 60, frames: int = 1) -> int:
    request = pb.CompositeRequest(tenant=tenant, features=ONE.repeat(frames, 0).tobytes())
    return len((await stub.Composite(request, timeout=timeout_s)).frames)


def with_mouth(mouth: NDArray[Any], finite: bool = True) -> Callable[[Any], Tensors]:
    return lambda request: {"mouth": mouth, "finite": np.array([[finite]])}


MOUTH = np.zeros((1, 3, 328, 328), np.uint8)


@pytest.mark.usefixtures("silence")
@pytest.mark.parametrize(
    ("answer", "code", "words"),
    [
        (with_mouth(np.zeros((1, 3, 320, 320), np.uint8)), "INTERNAL", "mouths of the wrong shape"),
        (with_mouth(MOUTH.repeat(2, 0)), "INTERNAL", "mouths of the wrong shape"),
        (with_mouth(MOUTH.astype(np.float32)), "INTERNAL", "mouths of the wrong shape"),
        (with_mouth(MOUTH, finite=False), "FAILED_PRECONDITION", "NaN or infinity"),
        (lambda request: {"mouth": MOUTH}, "INTERNAL", "whether its prediction is finite"),
        (lambda request: {"finite": np.ones((1, 1), bool)}, "INTERNAL", "mouths of the wrong shape"),
        (lambda request: {"finite": np.ones((3, 1), bool), "mouth": MOUTH}, "INTERNAL", "prediction is finite"),
        (lambda request: {}, "INTERNAL", "prediction is finite"),
    ],
)
async def test_garbage_fails_its_own_request_and_leaves_nothing(
    repository: Path, answer: Callable[[Any], Tensors], code: str, words: str
) -> None:
    async with serving(good) as kserve, service_of(repository, [kserve.endpoint]) as stub:
        assert await frames_of(stub) == 1
        before = {task.get_name() for task in asyncio.all_tasks()}
        kserve.answer = answer
        # More than there are slots: none may be lost by it.
        for _ in range(6):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await frames_of(stub)
            assert (caught.value.code().name, words in str(caught.value.details())) == (code, True)
        kserve.answer = good
        assert await frames_of(stub, frames=8) == 8
        # What serves the connection comes and goes; so does a look at the server that is just under way.
        while len(asyncio.all_tasks()) > len(before) + 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@pytest.mark.usefixtures("silence")
@pytest.mark.parametrize(
    "garbage", [with_mouth(MOUTH.repeat(2, 0)), with_mouth(MOUTH, finite=False), lambda request: {}]
)
async def test_garbage_is_made_good_by_another_server(repository: Path, garbage: Callable[[Any], Tensors]) -> None:
    async with serving(good) as one, serving(good) as other:
        servers = {kserve.endpoint: kserve for kserve in (one, other)}
        home, refuge = (servers[endpoint] for endpoint in ranked("plain", list(servers)))
        async with service_of(repository, list(servers)) as stub:
            for _ in range(2):  # the second is sent after the first was taken in
                while await refuge.requests.get() != "ping":
                    pass
            assert await frames_of(stub) == 1
            home.answer = garbage
            assert [await frames_of(stub) for _ in range(3)] == [1, 1, 1]
            assert refuge.loaded["plain"] >= 3


async def test_a_deadline_holds_whatever_triton_does(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "LOOK_S", 30)
    async with serving(good) as kserve, service_of(repository, [kserve.endpoint], timeout_s=0.1) as stub:
        late, unknown = grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE
        queued = grpc.StatusCode.RESOURCE_EXHAUSTED
        # Before the load nothing is known of the server, which may be said before the client's clock ends it.
        for loaded, codes in ((False, {late, unknown, queued}), (True, {late})):
            kserve.go.clear()
            begin_s = time.monotonic()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await frames_of(stub, timeout_s=0.5)
            assert caught.value.code() in codes
            # The client's own clock would end it, too: the service must not hold on to it.
            assert time.monotonic() - begin_s < 20
            kserve.go.set()
            assert await frames_of(stub, frames=2 + loaded) == 2 + loaded


async def test_a_server_that_accepts_and_never_answers_is_left(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint_module, "LOOK_S", 0.2)
    async with serving(good) as one, serving(good) as other:
        servers = {kserve.endpoint: kserve for kserve in (one, other)}
        async with service_of(repository, list(servers)) as stub:
            home, refuge = (servers[endpoint] for endpoint in ranked("plain", list(servers)))
            while not home.loaded.get("plain"):  # on a busy machine it may seem to hang at first
                assert await frames_of(stub) == 1
            home.go.clear()
            assert await asyncio.gather(*(frames_of(stub) for _ in range(6))) == [1] * 6
            assert refuge.loaded["plain"]
            home.go.set()
            while "plain" in refuge.loaded:
                assert await frames_of(stub) == 1


@pytest.mark.usefixtures("silence")
@pytest.mark.parametrize("deaf", ["statistics", "index", "config", "register"])
async def test_a_server_that_answers_pings_and_not_all_else_is_left_for_another(repository: Path, deaf: str) -> None:
    """It is not down; and its fault is not the caller's deadline."""
    async with serving(good) as one, serving(good) as other:
        servers = {kserve.endpoint: kserve for kserve in (one, other)}
        home, refuge = (servers[endpoint] for endpoint in ranked("plain", list(servers)))
        home.deaf.add(deaf)
        async with service_of(repository, list(servers), timeout_s=0.1) as stub:
            assert await frames_of(stub) == 1
            assert refuge.loaded["plain"]


@pytest.mark.usefixtures("silence")
async def test_the_only_server_is_asked_again_what_it_has_loaded(repository: Path) -> None:
    async with (
        serving(good) as kserve,
        service_of(repository, [kserve.endpoint], timeout_s=0.1, restart_wait_s=60) as stub,
    ):
        kserve.deaf.add("statistics")
        asking = asyncio.create_task(frames_of(stub))
        while await kserve.requests.get() != "statistics":
            pass
        while await kserve.requests.get() != "statistics":
            pass
        kserve.deaf.clear()
        assert await asking == 1


@pytest.mark.usefixtures("silence")
async def test_a_preloaded_tenant_has_its_encoder_at_home_and_nowhere_else(repository: Path) -> None:
    async with serving(good) as one, serving(good) as other:
        servers = {kserve.endpoint: kserve for kserve in (one, other)}
        home, refuge = (servers[endpoint] for endpoint in ranked("plain", list(servers)))
        async with service_of(repository, list(servers), residency={"preload": ["plain"]}):
            while not home.loaded.get("plain"):
                await home.requests.get()
        assert list(home.loaded) == ["audio_encoder", "plain"]
        assert not refuge.loaded


async def test_a_server_that_never_answers_and_has_no_other_beside_it_is_unavailable(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint_module, "LOOK_S", 0.1)
    async with serving(good) as kserve, service_of(repository, [kserve.endpoint], restart_wait_s=0.2) as stub:
        await answered(stub)
        kserve.go.clear()
        for _ in range(2):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await frames_of(stub)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        kserve.go.set()
        await answered(stub)


async def answered(stub: Any) -> None:
    """Returns once a request was answered."""
    frames = 0
    while not frames:
        with contextlib.suppress(grpc.aio.AioRpcError):
            frames = await frames_of(stub)
