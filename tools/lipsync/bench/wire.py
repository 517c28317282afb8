"""Part `wire`: what a frame costs around the model, by a graph that does nothing, through the real Triton.

The classical call sends float32 pictures and gets float32 back; the fused tenant takes a frame number and gives uint8.
All go through the same client library to the same server, and all end with the same crops uint8 (n, 328, 328, 3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tritonclient.grpc as wire
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from compositor.blending import CROP_SIZE, ROI_BORDER, ROI_SIZE, Pixels
from compositor.errors import InferenceFailed, LipsyncError
from compositor.shared_memory import Region
from compositor.tenant import RAW_SUFFIX, Tenant
from lipsync import architecture
from lipsync.fusing import MASK
from lipsync.preparation import Choices
from lipsync.repository import Serving, add_tenant
from lipsync.sources import open_source
from lipsync.tritonserver import EmbeddedTriton

from .clocks import Clock, Contestant, Rounds, take_turns
from .figures import Figure, PartReport, Target
from .part import Part, Run
from .subjects import centred_rects, footage, write_source

TITLE = "Serving without the model's own work"
TENANT = "subject"
_INNER = slice(ROI_BORDER, ROI_BORDER + ROI_SIZE)
_WHITE = np.float32(255)
_MOUTH_BYTES = CROP_SIZE * CROP_SIZE * 3

BUILT = "classical wire, visual built for each request"
READY = "classical wire, visual precomputed (2.5 MB a frame)"
TENSORS = "fused, tensors"
SHARED = "fused, shared memory"


@dataclass(frozen=True)
class Sizes:
    """How much is measured: frames a batch, rounds, and calls of the fast contestants in a round."""

    batch: int = 24
    rounds: int = 21
    calls: int = 8
    width: int = 640
    height: int = 360


class Client:
    """One client of the tenant, calling it in every way. Its audio is the same for all."""

    def __init__(self, server: wire.InferenceServerClient, tenant: Tenant, region: Region, batch: int) -> None:
        self._server, self._region = server, region
        self._frames = np.arange(batch, dtype=np.int32).reshape(-1, 1) % tenant.frames
        self._audio = np.random.default_rng(0).standard_normal((batch, 32, 16, 16), np.float32)
        self._crops: Pixels = np.stack([tenant.crop(number) for number in self._frames[:, 0].tolist()])
        self._visual = build_visual(self._crops)

    def built(self) -> Pixels:
        """The classical call, its pictures made from crops for each request."""
        return self._classical(build_visual(self._crops))

    def ready(self) -> Pixels:
        """The classical call with pictures that were made before."""
        return self._classical(self._visual)

    def tensors(self) -> Pixels:
        """The fused tenant; mouths come back in the answer."""
        mouths: Pixels = self._fused(wire.InferRequestedOutput("mouth")).as_numpy("mouth")
        return mouths

    def shared(self) -> Pixels:
        """The fused tenant; mouths come back through shared memory."""
        size = len(self._frames) * _MOUTH_BYTES
        mouth = wire.InferRequestedOutput("mouth")
        mouth.set_shared_memory(self._region.name, size)
        self._fused(mouth)
        return self._region.view(0, size).reshape(len(self._frames), CROP_SIZE, CROP_SIZE, 3)

    def _classical(self, visual: NDArray[np.float32]) -> Pixels:
        inputs = [_tensor("visual", visual, "FP32"), _tensor("audio", self._audio, "FP32")]
        answer = self._server.infer(TENANT + RAW_SUFFIX, inputs, outputs=[wire.InferRequestedOutput("output")])
        return set_predictions(self._crops, answer.as_numpy("output"))

    def _fused(self, mouth: wire.InferRequestedOutput) -> wire.InferResult:
        inputs = [_tensor("frame_index", self._frames, "INT32"), _tensor("audio", self._audio, "FP32")]
        answer = self._server.infer(TENANT, inputs, outputs=[mouth, wire.InferRequestedOutput("finite")])
        if not answer.as_numpy("finite").all():
            raise InferenceFailed("the graph that does nothing predicted NaN")
        return answer


def build_visual(crops: Pixels) -> NDArray[np.float32]:
    """The model's pictures float32 (n, 6, 320, 320) of crops uint8 (n, 328, 328, 3). Planes split by OpenCV and
    divided in place are the fastest of four ways that were tried; a transposed view of the batch is the slowest."""
    visual = np.empty((len(crops), 6, ROI_SIZE, ROI_SIZE), np.float32)
    for crop, planes in zip(crops, visual, strict=True):
        for channel, plane in enumerate(cv2.split(crop[_INNER, _INNER])):
            np.divide(plane, _WHITE, out=planes[channel])
        planes[3:] = planes[:3]
        planes[3:, MASK[0], MASK[1]] = 0
    return visual


def set_predictions(crops: Pixels, predictions: NDArray[np.float32]) -> Pixels:
    """Crops with predictions float32 (n, 3, 320, 320) in [0, 1] in them. Frame by frame in place, merged by OpenCV,
    is several times as fast as one expression over the batch."""
    mouths: Pixels = crops.copy()
    scaled = np.empty(predictions.shape[1:], np.float32)
    levels = np.empty(predictions.shape[1:], np.uint8)
    for mouth, prediction in zip(mouths, predictions, strict=True):
        np.multiply(prediction, _WHITE, out=scaled)
        np.clip(scaled, 0, 255, out=scaled)
        np.copyto(levels, scaled, casting="unsafe")
        mouth[_INNER, _INNER] = cv2.merge(list(levels))
    return mouths


def _tensor(name: str, values: NDArray[Any], datatype: str) -> wire.InferInput:
    tensor = wire.InferInput(name, list(values.shape), datatype)
    tensor.set_data_from_numpy(values)
    return tensor


def run(run: Run) -> PartReport:
    """Starts Triton on a tenant of its own and measures."""
    cv2.setNumThreads(1)
    return measure(run, Sizes(batch=2, rounds=2, calls=1, width=320, height=240) if run.quick else Sizes())


def measure(run: Run, sizes: Sizes) -> PartReport:
    """Figures of all contestants. Raises LipsyncError where they do not agree."""
    repository = run.folder / "repository"
    add_subject(repository, run.folder / "source", sizes)
    tenant = Tenant(repository, TENANT)
    region = Region(1, sizes.batch * _MOUTH_BYTES)
    try:
        with EmbeddedTriton(repository) as triton:
            measured = _against(triton, tenant, region, sizes, run)
    finally:
        region.forget_name()
    how = (
        f"{sizes.batch} frames a request, one request at a time, through tritonclient's gRPC client, of a graph that "
        "does nothing, served by the embedded Triton with its Python-based backend; all contestants end with the same "
        "crops, uint8. Triton CPU: the server and its backend processes."
    )
    return PartReport("wire", TITLE, how, "client CPU", list(_figures(measured)), list(_targets(measured)))


def add_subject(repository: Path, source: Path, sizes: Sizes) -> None:
    """Installs the tenant, both of its models with batches of `sizes.batch`."""
    side = min(sizes.width, sizes.height) // 2
    rects = centred_rects(sizes.width, sizes.height, sizes.batch, side)
    frames = footage(sizes.width, sizes.height, sizes.batch)
    for _ in write_source(source, frames, rects, architecture.do_nothing()):
        pass
    repository.mkdir()
    choices = Choices(idle="background", crops="resident", max_batch_size=sizes.batch)
    add_tenant(repository, TENANT, open_source(source), choices, Serving(), lambda *_: None)


def _against(triton: EmbeddedTriton, tenant: Tenant, region: Region, sizes: Sizes, run: Run) -> Rounds:
    server = wire.InferenceServerClient(triton.grpc)
    try:
        for model in (TENANT, TENANT + RAW_SUFFIX):
            server.load_model(model)
        server.register_system_shared_memory(region.name, region.key, region.size)
        client = Client(server, tenant, region, sizes.batch)
        contestants = {
            BUILT: Contestant(client.built),
            READY: Contestant(client.ready),
            TENSORS: Contestant(client.tensors, sizes.calls),
            SHARED: Contestant(client.shared, sizes.calls),
        }
        check_equal({name: contestant.run for name, contestant in contestants.items()})
        clock = Clock(triton.keeper_pid)
        return take_turns(contestants, sizes.rounds, clock, lambda done, total: run.progress("wire", done, total))
    except InferenceServerException as error:
        raise InferenceFailed(f"Triton failed: {error.message()}") from error
    finally:
        server.close()


def check_equal(ways: Mapping[str, Callable[[], object]]) -> None:
    """Raises LipsyncError unless all ways give the same mouths."""
    expected = np.array(next(iter(ways.values()))())
    for name, way in ways.items():
        found = np.asarray(way())
        if found.shape != expected.shape or not np.array_equal(found, expected):
            raise LipsyncError(f"{name!r} gives other mouths than the first contestant")


def _figures(measured: Rounds) -> Iterator[Figure]:
    for name in measured.costs:
        yield Figure("", name, "client CPU", "ms a batch", measured.cpu_s(name).times(1e3))
        yield Figure("", name, "wall", "ms a batch", measured.wall_s(name).times(1e3))
        yield Figure("", name, "Triton CPU", "ms a batch", measured.server_cpu_s(name).times(1e3))
        yield Figure("", name, "slowest call of a round, wall", "ms", measured.slowest_call_s(name).times(1e3))


def _targets(measured: Rounds) -> Iterator[Target]:
    for name, what in ((READY, "precomputed"), (BUILT, "built")):
        subject = f"classical ({what}) / fused over shared memory"
        yield Target(f"client CPU, {subject}", measured.cpu_ratio(name, SHARED), "at least", 50, "x")
        yield Target(f"wall, {subject}", measured.wall_ratio(name, SHARED), "at least", 30, "x")


PART = Part("wire", TITLE, run)
