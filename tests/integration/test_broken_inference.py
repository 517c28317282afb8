"""Tritons whose inference fails, or hangs, while they answer pings, as with a GPU that fell off its bus."""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import onnx
import pytest

from compositor.proto import lipsync_v1_pb2 as pb
from compositor.settings import Settings
from compositor.triton import placement as placement_module
from compositor.triton.breaker import SILENT_S
from compositor.triton.placement import ranked
from lipsync import architecture
from lipsync.preparation import Choices
from lipsync.repository import Serving, add_encoder, add_tenant
from lipsync.sources import open_source
from lipsync.tritonserver import EmbeddedTriton, TritonHome

from ..conftest import ServiceThread, connect, silent, write_small_source
from .waiting import until

pytestmark = pytest.mark.triton

ONE = np.zeros((1, 32, 16, 16), np.float32)


class FailingTriton(EmbeddedTriton):
    """A real Triton whose inference can be made to fail or to hang; it answers pings all the same."""

    def __init__(self, repository: Path, folder: Path) -> None:
        super().__init__(repository)
        self._backends = folder

    def _command(self, home: TritonHome, server_id: str) -> list[str]:
        shutil.copytree(home.backends, self._backends)
        backend = self._backends / "onnxruntime"
        (backend / "model.py").rename(backend / "backend.py")
        shutil.copy(Path(__file__).with_name("failing_backend.py"), backend / "model.py")
        self.fail()
        self.hang()
        return super()._command(replace(home, backends=self._backends), server_id)

    def fail(self, *models: str) -> None:
        """From now on, inferences of these models fail, and no others; `*`: of all."""
        self._write("fails", models)

    def hang(self, *models: str) -> None:
        """From now on, inferences of these models are not answered, and those of all others are."""
        self._write("hangs", models)

    def _write(self, name: str, models: Sequence[str]) -> None:
        new = self._backends / "onnxruntime" / f"{name}.new"
        new.write_text("\n".join(models))
        new.rename(new.with_name(name))


class Demand:
    """Callers, one a tenant, that ask for one frame after the other, and go on when they are refused."""

    def __init__(self, service: ServiceThread, tenants: Sequence[str]) -> None:
        self.answers = dict.fromkeys(tenants, 0)
        self.failures: list[str] = []
        self._service = service
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._call, args=(tenant,)) for tenant in tenants]

    def _call(self, tenant: str) -> None:
        request = pb.CompositeRequest(tenant=tenant, features=ONE.tobytes())
        for stub in connect(self._service.address):
            while not self._over.is_set():
                self._ask(stub, request)

    def _ask(self, stub: Any, request: pb.CompositeRequest) -> None:
        try:
            stub.Composite(request, timeout=60)
            self.answers[request.tenant] += 1
        except grpc.RpcError as error:
            self.failures.append(f"{request.tenant}: {error}")

    def __enter__(self) -> Demand:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def go_on(self, tenants: Sequence[str] = (), count: int = 20) -> None:
        """Returns when each of these callers, or every one, has had so many further answers."""
        before = dict(self.answers)
        until(lambda: all(self.answers[each] >= before[each] + count for each in tenants or before))


class Pair:
    """Two real Tritons on one repository, and a service in front. `tenants`: at home on the first, which is the victim;
    `neighbour`: on the other."""

    def __init__(self, victim: FailingTriton, other: FailingTriton, repository: Path, sources: Path) -> None:
        self.victim, self.other = victim, other
        endpoints = [victim.grpc, other.grpc]
        names = [f"tenant-{number}" for number in range(200)]
        self.tenants = [name for name in names if ranked(name, endpoints)[0] == victim.grpc][:3]
        self.neighbour = next(name for name in names if ranked(name, endpoints)[0] == other.grpc)
        onnx.save(architecture.do_nothing_encoder(), sources / "encoder.onnx")
        add_encoder(repository, "audio_encoder", sources / "encoder.onnx")
        source = write_small_source(sources / "source", architecture.do_nothing(), frames=4)
        for tenant in (*self.tenants, self.neighbour):
            add_tenant(repository, tenant, open_source(source), Choices(), Serving(threads=1), silent)
        self.service = ServiceThread(
            Settings.model_validate(
                {
                    "model_repository": repository,
                    "server": {"port": 0},
                    "http": {"port": 0},
                    "triton": {"endpoints": endpoints},
                    "residency": {"min_resident_s": 1, "sweep_s": 0.2},
                }
            )
        )

    def stats(self) -> dict[str, Any]:
        answer: dict[str, Any] = httpx.get(f"http://{self.service.http_address}/stats", timeout=60).json()
        return answer

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
    repository, sources = tmp_path / "repository", tmp_path / "sources"
    repository.mkdir()
    sources.mkdir()
    with contextlib.ExitStack() as stack:
        victim, other = (FailingTriton(repository, tmp_path / name) for name in ("one", "two"))
        for triton in (victim, other):
            stack.enter_context(triton)
        pair = Pair(victim, other, repository, sources)
        pair.service.start()
        stack.callback(pair.service.stop)
        yield pair


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


def test_one_broken_model_moves_nobody_else(pair: Pair) -> None:
    broken, *others = pair.tenants
    with Demand(pair.service, [broken, *others, pair.neighbour]) as demand:
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


def test_the_only_triton_is_asked_whatever_is_known_of_it(pair: Pair) -> None:
    values = pair.service.settings.model_dump()
    values["triton"]["endpoints"] = [pair.victim.grpc]
    service = ServiceThread(Settings.model_validate(values))
    service.start()

    def told() -> bool:
        metrics = httpx.get(f"http://{service.http_address}/metrics", timeout=60).text
        return f'lipsync_triton_works{{triton="{pair.victim.grpc}"}} 1.0' in metrics

    try:
        with Demand(service, [*pair.tenants, pair.neighbour]) as demand:
            demand.go_on()
            assert told()
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
