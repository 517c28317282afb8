"""Several Tritons on one repository, a service in front of them, and callers that ask it for frames without end."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import grpc
import httpx
import numpy as np
import onnx
import pytest

from compositor.proto import lipsync_v1_pb2 as pb
from compositor.settings import Settings
from compositor.triton import endpoint as endpoint_module
from compositor.triton.placement import ranked
from lipsync import architecture
from lipsync.preparation import Choices
from lipsync.repository import Serving, add_encoder, add_tenant
from lipsync.sources import open_source
from lipsync.tritonserver import EmbeddedTriton

from ..conftest import ServiceThread, connect, silent, write_small_source
from .waiting import until

ONE = np.zeros((1, 32, 16, 16), np.float32)


def ask(stub: Any, tenant: str, timeout_s: float = 60, frames: int = 1) -> list[bytes]:
    request = pb.CompositeRequest(tenant=tenant, features=ONE.repeat(frames, 0).tobytes())
    return [frame.data for frame in stub.Composite(request, timeout=timeout_s).frames]


class Demand:
    """Callers, one a tenant, that ask for one frame after the other, and go on when they are refused."""

    def __init__(self, service: ServiceThread, tenants: Sequence[str], *, may_fail: bool = False) -> None:
        self.answers = dict.fromkeys(tenants, 0)
        self.failures: list[str] = []
        self._service, self._may_fail = service, may_fail
        self._expected: dict[str, list[bytes]] = {}
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._call, args=(tenant,)) for tenant in tenants]

    def _call(self, tenant: str) -> None:
        for stub in connect(self._service.address):
            while not self._over.is_set():
                self._ask(stub, tenant)

    def _ask(self, stub: Any, tenant: str) -> None:
        try:
            frame = ask(stub, tenant)
        except grpc.RpcError as error:
            self.failures.append(f"{tenant}: {error}")
            return
        if frame != self._expected.setdefault(tenant, frame):
            self.failures.append(f"{tenant}: another frame")
        self.answers[tenant] += 1

    def __enter__(self) -> Demand:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def go_on(self, tenants: Sequence[str] = (), count: int = 20) -> None:
        """Returns when each of these callers, or every one, has had so many further answers; fails where one of all
        failed, unless they may."""
        before = dict(self.answers)

        def is_done() -> bool:
            return all(self.answers[each] >= before[each] + count for each in tenants or before)

        until(lambda: self._failed or is_done(), 120)
        assert not self._failed, self.failures

    @property
    def _failed(self) -> bool:
        return bool(self.failures) and not self._may_fail


class Several:
    """Several real Tritons on one repository, and a service in front. `at`: the tenants at home on each."""

    def __init__(
        self,
        tritons: Sequence[EmbeddedTriton],
        repository: Path,
        sources: Path,
        most: Sequence[int],
        **residency: float,
    ) -> None:
        """most: how many tenants each Triton is home to."""
        self.tritons = {triton.grpc: triton for triton in tritons}
        names = [f"tenant-{number}" for number in range(200)]
        self.at = {
            endpoint: [name for name in names if ranked(name, list(self.tritons))[0] == endpoint][:count]
            for endpoint, count in zip(self.tritons, most, strict=True)
        }
        onnx.save(architecture.do_nothing_encoder(), sources / "encoder.onnx")
        add_encoder(repository, "audio_encoder", sources / "encoder.onnx")
        source = write_small_source(sources / "source", architecture.do_nothing(), frames=4)
        for tenant in itertools.chain(*self.at.values()):
            add_tenant(repository, tenant, open_source(source), Choices(), Serving(threads=1), silent)
        self.service = ServiceThread(
            Settings.model_validate(
                {
                    "model_repository": repository,
                    "server": {"port": 0},
                    "http": {"port": 0},
                    # A busy machine takes its time to start a Triton again.
                    "triton": {"endpoints": list(self.tritons), "restart_wait_s": 60},
                    "residency": {"min_resident_s": 1, "sweep_s": 0.2, **residency},
                }
            )
        )

    def stats(self) -> dict[str, Any]:
        answer: dict[str, Any] = httpx.get(f"http://{self.service.http_address}/stats", timeout=60).json()
        return answer


SeveralServed = TypeVar("SeveralServed", bound=Several)


@contextlib.contextmanager
def served(several: SeveralServed) -> Iterator[SeveralServed]:
    """Meanwhile the service runs."""
    several.service.start()
    try:
        yield several
    finally:
        several.service.stop()


def make_folders(parent: Path) -> tuple[Path, Path]:
    """A repository, and what its tenants are made from."""
    repository, sources = parent / "repository", parent / "sources"
    repository.mkdir()
    sources.mkdir()
    return repository, sources


def allow_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Triton that stands still for a while, as anything does on a busy machine, is not taken to hang. One that is
    gone is found gone as ever."""
    monkeypatch.setattr(endpoint_module, "LOOK_S", 30)
