"""Two compositors of one host on one real Triton, with more tenants than it may hold: nobody notices."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
import httpx
import numpy as np
import onnx
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from compositor.proto import lipsync_v1_pb2 as pb
from compositor.proto import lipsync_v1_pb2_grpc as pb_grpc
from compositor.settings import Settings
from lipsync import architecture
from lipsync.preparation import Choices
from lipsync.repository import Serving, add_encoder, add_tenant
from lipsync.sources import open_source
from lipsync.tritonserver import EmbeddedTriton

from ..conftest import connect, silent, write_small_source
from .waiting import until

pytestmark = pytest.mark.triton

ENCODER = "audio_encoder"
LIVE = ("live-0", "live-1")
GUESTS = tuple(f"guest-{number}" for number in range(9))
MIN_RESIDENT_S = 3.0
"""Three times the period at which silent sessions keep their tenants in use."""
VISIT_S = MIN_RESIDENT_S / 2 + 0.1
MAX_MODELS = 8
"""The two who are live, and of each of two callers the tenants that it used in the last MIN_RESIDENT_S, which are three
at most; there are no places for the others."""
ONE = np.zeros((1, 32, 16, 16), np.float32)
SERVICE = """
import asyncio, sys
from compositor.server import running
from compositor.settings import Settings

async def main():
    settings = Settings.model_validate_json(sys.stdin.readline())
    async with running(settings) as service:
        print(service.port, service.http_port, flush=True)
        await asyncio.to_thread(sys.stdin.readline)

asyncio.run(main())
"""


class Process:
    """A compositor in a process of its own."""

    def __init__(self, settings: Settings) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVICE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(settings.model_dump_json() + "\n")
        self._process.stdin.flush()
        port, http_port = map(int, self._process.stdout.readline().split())
        self.address, self.http_address = f"127.0.0.1:{port}", f"127.0.0.1:{http_port}"

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        text = httpx.get(f"http://{self.http_address}/metrics", timeout=60).text
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith((name + "{", name + " ")))

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()

    def stop(self) -> None:
        if self._process.returncode is None:
            self._process.communicate("\n", timeout=60)
            assert self._process.returncode == 0


class Guest:
    """A caller that goes from one tenant to the next, and stays with each for a while."""

    def __init__(self, service: Process, seed: int) -> None:
        self.visits = 0
        self.wrong: list[str] = []
        self._service, self._random = service, random.Random(seed)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._go_round)

    def _go_round(self) -> None:
        for stub in connect(self._service.address):
            while not self._over.is_set():
                tenant = self._random.choice(GUESTS)
                try:
                    ask(stub, tenant)
                    end_s = time.monotonic() + VISIT_S
                    while time.monotonic() < end_s:
                        ask(stub, tenant)
                        self._over.wait(0.05)
                except grpc.RpcError as error:
                    self.wrong.append(f"{tenant}: {error}")
                self.visits += 1

    def __enter__(self) -> Guest:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


class Witness:
    """Looks at Triton all the time: how many models it holds, and whether the live ones stay.

    One that leaves was not used for MIN_RESIDENT_S before, by Triton's own clock: that happens where this machine stood
    still for so long that its session could not keep it in use. `uses`: of each, over all of its loads.
    """

    def __init__(self, address: str) -> None:
        self.most = 0
        self.looks = 0
        self.wrong: list[str] = []
        self.uses = dict.fromkeys(LIVE, 0)
        self._seen = dict.fromkeys(LIVE, (0, 0.0))
        self._address = address
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        with triton.InferenceServerClient(self._address) as client:
            while not self._over.wait(0.02):
                index = client.get_model_repository_index().models
                held = {model.name for model in index if model.state in ("READY", "LOADING", "UNLOADING")}
                self.most = max(self.most, len(held - {ENCODER}))
                for name in LIVE:
                    self._look_at(client, name)
                self.looks += 1

    def _look_at(self, client: triton.InferenceServerClient, name: str) -> None:
        count, last_s = self._seen[name]
        try:
            use = client.get_inference_statistics(name).model_stats[0]
            new, new_s = use.inference_count, use.last_inference / 1000
        except InferenceServerException:
            new, new_s = 0, 0.0
        if new < count and time.time() - last_s < MIN_RESIDENT_S:
            self.wrong.append(f"{name} is gone at look {self.looks}, {time.time() - last_s:.3f} s after its last use")
        self.uses[name] += new - count if new > count else 0
        self._seen[name] = (new, new_s)

    def __enter__(self) -> Witness:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def ask(stub: pb_grpc.LipsyncStub, tenant: str) -> None:
    request = pb.CompositeRequest(tenant=tenant, features=ONE.tobytes())
    assert len(stub.Composite(request, timeout=60).frames) == 1


@contextlib.contextmanager
def silent_session(service: Process, tenant: str) -> Iterator[None]:
    """A live session in which nobody says anything."""
    over = threading.Event()

    def requests() -> Iterator[pb.SpeakRequest]:
        yield pb.SpeakRequest(start=pb.SpeakRequest.Start(tenant=tenant))
        over.wait()

    for stub in connect(service.address):
        call = stub.Speak(requests())
        assert next(call).HasField("started")
        watching = threading.Thread(target=watch, args=(call,))
        watching.start()
        try:
            yield
        finally:
            over.set()
            call.cancel()
            watching.join()


def watch(call: grpc.Call) -> None:
    with contextlib.suppress(grpc.RpcError):
        for _ in call:
            pass


@pytest.fixture(scope="module")
def guests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of small tenants."""
    root, sources = tmp_path_factory.mktemp("repository"), tmp_path_factory.mktemp("sources")
    onnx.save(architecture.do_nothing_encoder(), sources / "encoder.onnx")
    add_encoder(root, ENCODER, sources / "encoder.onnx")
    source = write_small_source(sources / "source", architecture.do_nothing(), frames=4)
    for name in (*LIVE, *GUESTS):
        add_tenant(root, name, open_source(source), Choices(), Serving(threads=1), silent)
    return root


@pytest.fixture
def server(guests: Path, triton_home: Path) -> Iterator[EmbeddedTriton]:
    with EmbeddedTriton(guests) as server:
        yield server


@pytest.fixture
def services(guests: Path, server: EmbeddedTriton) -> Iterator[Sequence[Process]]:
    """Two compositors on one Triton."""
    settings = Settings.model_validate(
        {
            "model_repository": guests,
            "server": {"port": 0},
            "http": {"port": 0},
            "triton": {"endpoints": server.grpc},
            "residency": {
                "max_models": MAX_MODELS,
                "headroom": 1,
                "min_resident_s": MIN_RESIDENT_S,
                "sweep_s": 0.25,
            },
        }
    )
    with contextlib.ExitStack() as stack:
        processes = []
        for _ in range(2):
            processes.append(Process(settings))
            stack.callback(processes[-1].stop)
        yield processes


def test_churn_at_the_edge_of_the_budget_harms_nobody(services: Sequence[Process], server: EmbeddedTriton) -> None:
    with contextlib.ExitStack() as stack:
        for service, tenant in zip(services, LIVE, strict=True):
            stack.enter_context(silent_session(service, tenant))
        # A session begins before its tenant is loaded.
        until(lambda: set(LIVE) <= server.resident)
        witness = stack.enter_context(Witness(server.grpc))
        callers = [stack.enter_context(Guest(service, seed)) for seed, service in enumerate(services)]
        until(lambda: all(caller.visits >= 15 for caller in callers), 240)
        # Whom they visit when, and so how many leave, depends on the machine.
        until(lambda: counted(services, "load_seconds") > 10 and counted(services, "eviction_age_seconds") > 5)
        # The sessions say nothing: what is used is kept in use.
        until(lambda: all(uses >= 5 for uses in witness.uses.values()) and witness.looks > 100)
    assert [caller.wrong for caller in callers] == [[], []]
    assert not witness.wrong
    assert witness.most <= MAX_MODELS
    # How many depends on the machine; each is one that the other compositor took away.
    lost = sum(service.metric("lipsync_model_lost_races_total") for service in services)
    assert lost <= counted(services, "eviction_age_seconds")


def counted(services: Sequence[Process], name: str) -> float:
    """How often that was measured of a model."""
    return sum(service.metric(f"lipsync_model_{name}_count") for service in services)


def test_a_model_that_another_compositor_unloaded_is_loaded_again_and_counted(
    services: Sequence[Process], server: EmbeddedTriton
) -> None:
    for stub in connect(services[0].address):
        ask(stub, "guest-0")
        with triton.InferenceServerClient(server.grpc) as client:
            client.unload_model("guest-0")
            ask(stub, "guest-0")
            assert client.is_model_ready("guest-0")
    assert services[0].metric("lipsync_model_lost_races_total") == 1


def test_a_compositor_that_is_killed_in_the_midst_of_a_load_blocks_nobody(services: Sequence[Process]) -> None:
    def doomed() -> None:
        for stub in connect(services[0].address):
            with contextlib.suppress(grpc.RpcError):
                for tenant in GUESTS:
                    ask(stub, tenant)

    thread = threading.Thread(target=doomed)
    thread.start()
    until(lambda: services[0].metric("lipsync_model_misses_total") > 0)
    services[0].kill()
    thread.join()
    for stub in connect(services[1].address):
        for tenant in GUESTS[: MAX_MODELS - 1]:
            ask(stub, tenant)
