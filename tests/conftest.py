"""What tests at every level share: small tenants, a real embedded Triton, and the service in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import grpc
import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, settings

from compositor.proto import lipsync_v1_pb2_grpc as pb_grpc
from compositor.server import running
from compositor.settings import Settings
from lipsync import architecture
from lipsync.avatar import write_source
from lipsync.avatar_model import loudness_encoder
from lipsync.preparation import Choices
from lipsync.repository import Serving, add_encoder, add_tenant
from lipsync.sources import open_source
from lipsync.tritonserver import EmbeddedTriton, default_home, install

# A machine that is busy with something else makes no example wrong.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


def write_small_source(directory: Path, model: onnx.ModelProto, frames: int = 8, seed: int = 0) -> Path:
    """A tenant's source of `frames` smooth random pictures, 320x240, with a moving square crop."""
    (directory / "frames").mkdir(parents=True)
    (directory / "checkpoint").mkdir()
    rng = np.random.default_rng(seed)
    rects = []
    for number in range(frames):
        picture = cv2.GaussianBlur(rng.integers(0, 256, (240, 320, 3), dtype=np.uint8), (0, 0), 3)
        cv2.imwrite(str(directory / "frames" / f"frame_{number:04d}.png"), picture)
        rects.append([60 + number, 40 + number // 2, 180 + number, 160 + number // 2])
    (directory / "crop_rects.json").write_text(json.dumps(rects))
    onnx.save(model, directory / "checkpoint" / "model_best.onnx")
    return directory


def silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


class ServiceThread:
    """The compositor in a thread with an event loop of its own, listening on a free port."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.port = 0
        self.http_port = 0
        self.ready = threading.Event()
        self.loop: asyncio.AbstractEventLoop
        self._stop: asyncio.Event
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="service")

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self._failure = error
        finally:
            self.ready.set()

    async def _serve(self) -> None:
        self.loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        async with running(self.settings) as service:
            self.port, self.http_port = service.port, service.http_port
            self.ready.set()
            await self._stop.wait()

    def start(self) -> None:
        self._thread.start()
        assert self.ready.wait(120), "the service does not start"
        if self._failure:
            raise self._failure

    def stop(self) -> None:
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(120)
        assert not self._thread.is_alive(), "the service does not stop"
        if self._failure:
            raise self._failure

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def http_address(self) -> str:
        return f"127.0.0.1:{self.http_port}"


@dataclass(frozen=True)
class Stack:
    """A repository, the real Triton on it, and the service in front."""

    repository: Path
    triton: EmbeddedTriton
    service: ServiceThread


@pytest.fixture(scope="session")
def triton_home() -> Path:
    """Where the embedded Triton is installed, after seeing that it is."""
    home = default_home()
    install(home, lambda message: None)
    return home


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository with an encoder and the tenants `avatar` (drawn, follows loudness), `plain` (does nothing)
    and `sent` (the same, its crops sent with each request)."""
    root = tmp_path_factory.mktemp("repository")
    sources = tmp_path_factory.mktemp("sources")
    encoder = sources / "encoder.onnx"
    onnx.save(loudness_encoder(), encoder)
    add_encoder(root, "audio_encoder", encoder)
    write_source(sources / "avatar", frames=6, width=640, height=360)
    write_small_source(sources / "plain", architecture.do_nothing())
    add = [("avatar", "avatar", Choices()), ("plain", "plain", Choices()), ("sent", "plain", Choices(crops="sent"))]
    for name, source, choices in add:
        add_tenant(root, name, open_source(sources / source), choices, Serving(threads=1), silent)
    return root


@contextlib.contextmanager
def running_stack(repository: Path) -> Iterator[Stack]:
    """The whole system on a repository."""
    with EmbeddedTriton(repository) as triton:
        settings = Settings.model_validate(
            {
                "model_repository": repository,
                "server": {"port": 0},
                "http": {"port": 0},
                # A busy machine takes its time to start a Triton again.
                "triton": {"endpoints": triton.grpc, "restart_wait_s": 60},
                # Else a machine that is busy with something else would have sessions refused.
                "live": {"max_late": 1},
            }
        )
        service = ServiceThread(settings)
        service.start()
        try:
            yield Stack(repository, triton, service)
        finally:
            service.stop()


@pytest.fixture(scope="session")
def stack(repository: Path, triton_home: Path) -> Iterator[Stack]:
    """The whole system, shared by all tests that do not break it."""
    with running_stack(repository) as running:
        yield running


@pytest.fixture
def stub(stack: Stack) -> Iterator[pb_grpc.LipsyncStub]:
    """A client of the shared service."""
    yield from connect(stack.service.address)


def connect(address: str) -> Iterator[pb_grpc.LipsyncStub]:
    # Of its own: what another has found out of a port's last owner says nothing of this one.
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(address, options=options) as channel:
        yield pb_grpc.LipsyncStub(channel)  # type: ignore[no-untyped-call]


@pytest.fixture
def tone() -> Callable[[float, int], np.ndarray[tuple[int], np.dtype[np.float32]]]:
    """Makes (seconds, rate) of a loud chord in the voice's range."""

    def make(seconds: float, rate: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        time = np.arange(int(seconds * rate)) / rate
        chord = sum(np.sin(2 * np.pi * pitch * time) for pitch in (220, 440, 660, 880, 1320))
        return (0.15 * np.asarray(chord)).astype(np.float32)

    return make
