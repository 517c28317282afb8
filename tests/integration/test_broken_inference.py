"""Tritons whose inference fails, or hangs, while they answer pings, as with a GPU that fell off its bus."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from compositor.proto import lipsync_v1_pb2 as pb
from compositor.settings import Settings
from compositor.triton import endpoint as endpoint_module
from compositor.triton import placement as placement_module
from compositor.triton.breaker import SILENT_S
from lipsync.tritonserver import EmbeddedTriton

from ..conftest import ServiceThread, connect
from .demand import ONE, Demand, Several, allow_silence, make_folders, served
from .failing_triton import FailingTriton
from .waiting import until

pytestmark = pytest.mark.triton


class Pair(Several):
    """Two real Tritons. `tenants`: at home on the first, which is the victim; `neighbour`: on the other."""

    def __init__(self, victim: FailingTriton, other: FailingTriton, repository: Path, sources: Path) -> None:
        super().__init__([victim, other], repository, sources, (3, 1))
        self.victim, self.other = victim, other
        self.tenants, [self.neighbour] = self.at.values()

    def circuit(self, triton: EmbeddedTriton) -> str:
        [circuit] = [each["circuit"] for each in self.stats()["endpoints"] if each["endpoint"] == triton.grpc]
        return str(circuit)

    def frames_at(self, triton: EmbeddedTriton, tenant: str) -> int:
        """How many frames of a tenant a Triton has inferred since the load, by its own count."""
        return sum(
            each["uses"] for each in self.stats()["models"] if (each["endpoint"], each["name"]) == (triton.grpc, tenant)
        )

    def are_home(self, demand: Demand) -> None:
        """Returns when the tenants that ask are served at home."""
        for tenant in demand.answers:
            home = self.other if tenant == self.neighbour else self.victim
            count = self.frames_at(home, tenant)
            until(partial(self._has, home, tenant, count + 20))
        until(lambda: self.circuit(self.victim) == "closed")

    def _has(self, triton: EmbeddedTriton, tenant: str, frames: int) -> bool:
        return self.frames_at(triton, tenant) >= frames


@pytest.fixture
def pair(tmp_path: Path, triton_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    monkeypatch.setattr(placement_module, "CALM_S", 1.0)
    allow_silence(monkeypatch)
    repository, sources = make_folders(tmp_path)
    victim, other = (FailingTriton(repository, tmp_path / name) for name in ("one", "two"))
    with victim, other, served(Pair(victim, other, repository, sources)) as pair:
        yield pair


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is it taken for broken if it answers no inference for long."""
    monkeypatch.setattr(endpoint_module, "SILENT_S", 60.0)


@pytest.mark.usefixtures("slow")
def test_the_tenants_of_a_triton_that_fails_go_on_elsewhere_and_return(pair: Pair) -> None:
    with Demand(pair.service, [*pair.tenants, pair.neighbour]) as demand:
        demand.go_on()
        pair.victim.fail("*")
        demand.go_on()
        until(lambda: pair.circuit(pair.victim) != "closed")
        assert pair.circuit(pair.other) == "closed"
        demand.go_on()
        pair.victim.fail()
        pair.are_home(demand)
    assert demand.failures == []
    assert pair.victim.restarts == 0


def test_the_tenants_of_a_triton_that_hangs_go_on_elsewhere_and_return(pair: Pair) -> None:
    with Demand(pair.service, [*pair.tenants, pair.neighbour]) as demand:
        demand.go_on()
        pair.victim.hang("*")
        demand.go_on()
        assert pair.circuit(pair.victim) != "closed"
        assert pair.circuit(pair.other) == "closed"
        assert all(each["up"] for each in pair.stats()["endpoints"])
        demand.go_on()
        pair.victim.hang()
        pair.are_home(demand)
    assert demand.failures == []
    assert pair.victim.restarts == 0


def test_a_tenant_whose_lonely_requests_hang_loses_those_and_goes_elsewhere(pair: Pair) -> None:
    """Nothing else is loaded there that would tell the model's hanging from the server's."""
    tenant = pair.tenants[0]
    request = pb.CompositeRequest(tenant=tenant, features=ONE.tobytes())
    for stub in connect(pair.service.address):
        stub.Composite(request, timeout=60)
        pair.victim.hang("*")
        assert not _is_answered(stub, request)
        # The service may hear only after the next one came that its caller is gone.
        until(partial(_is_answered, stub, request))
        until(lambda: pair.frames_at(pair.other, tenant) > 0)
        assert pair.circuit(pair.victim) == "closed"
    with Demand(pair.service, [tenant]) as demand:
        demand.go_on()
        pair.victim.hang()
        pair.are_home(demand)
    assert demand.failures == []


def _is_answered(stub: Any, request: pb.CompositeRequest) -> bool:
    """Whether a request is answered that waits a little longer than a server may be silent."""
    try:
        stub.Composite(request, timeout=SILENT_S + 1)
    except grpc.RpcError as error:
        found: Any = error
        assert found.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        return False
    return True


@pytest.mark.usefixtures("slow")
def test_one_broken_model_moves_nobody_else(pair: Pair) -> None:
    broken, *others = pair.tenants
    with Demand(pair.service, [broken, *others, pair.neighbour], may_fail=True) as demand:
        demand.go_on()
        for triton in (pair.victim, pair.other):
            triton.fail(broken)
        until(lambda: len(demand.failures) >= 20)
        demand.go_on([*others, pair.neighbour], 200)
        assert {pair.circuit(triton) for triton in (pair.victim, pair.other)} == {"closed"}
        assert {pair.frames_at(pair.other, tenant) for tenant in others} == {0}
        assert pair.frames_at(pair.victim, pair.neighbour) == 0
        for triton in (pair.victim, pair.other):
            triton.fail()
        demand.go_on()
    assert all(failure.startswith(f"{broken}: ") for failure in demand.failures)


@pytest.mark.usefixtures("slow")
def test_the_only_triton_is_asked_whatever_is_known_of_it(pair: Pair) -> None:
    values = pair.service.settings.model_dump()
    values["triton"]["endpoints"] = [pair.victim.grpc]
    service = ServiceThread(Settings.model_validate(values))
    service.start()

    def told() -> bool:
        metrics = httpx.get(f"http://{service.http_address}/metrics", timeout=60).text
        return f'lipsync_triton_works{{triton="{pair.victim.grpc}"}} 1.0' in metrics

    try:
        with Demand(service, [*pair.tenants, pair.neighbour], may_fail=True) as demand:
            demand.go_on()
            until(told)
            pair.victim.fail("*")
            until(lambda: not told())
            count = len(demand.failures)
            until(lambda: len(demand.failures) >= count + 20)
            assert all("CUDA failure 999" in failure for failure in demand.failures)
            assert httpx.get(f"http://{service.http_address}/readyz", timeout=60).status_code == 200
            pair.victim.fail()
            demand.go_on()
            until(told)
            count = len(demand.failures)
            demand.go_on()
            assert len(demand.failures) == count
    finally:
        service.stop()
