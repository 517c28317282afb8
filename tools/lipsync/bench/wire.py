"""Part `wire`: what a frame costs around the model, by a graph that does nothing, through the real Triton.

The classical call sends float32 pictures and gets float32 back; the fused tenant takes a frame number and gives uint8.
All go through the same client library to the same server, and all end with the same crops uint8 (n, 328, 328, 3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tritonclient.grpc as wire
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from compositor.blending import CROP_SIZE, ROI_BORDER, ROI_SIZE, Pixels
from compositor.errors import InferenceFailed, LipsyncError
from compositor.manifest import RAW_SUFFIX
from compositor.tenant import Tenant
from compositor.triton.shared_memory import Region
from lipsync import architecture
from lipsync.fusing import MASK
from lipsync.preparation import Choices
from lipsync.repository import Serving, add_tenant
from lipsync.sources import open_source
from lipsync.tritonserver import EmbeddedTriton

from .allocator import keep_large_blocks
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
READY_SPLIT = "classical wire, visual precomputed, in 6 requests"
SHARED_SPLIT = "fused, shared memory, in 6 requests"
_REQUESTS = 6


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

    def __init__(
        self, server: wire.InferenceServerClient, tenant: Tenant, region: Region, batch: int, requests: int
    ) -> None:
        self._server, self._region = server, region
        self._frames = np.arange(batch, dtype=np.int32).reshape(-1, 1) % tenant.frames
        self._audio = np.random.default_rng(0).standard_normal((batch, 32, 16, 16), np.float32)
        self._crops: Pixels = np.stack([tenant.crop(number) for number in self._frames[:, 0].tolist()])
        self._visual = build_visual(self._crops)
        size = -(-batch // requests)
        self._whole, self._parts = [slice(0, batch)], [slice(at, min(at + size, batch)) for at in range(0, batch, size)]

    def built(self) -> Pixels:
        """The classical call, its pictures made from crops for each request."""
        return self._classical(build_visual(self._crops), self._whole)

    def ready(self) -> Pixels:
        """The classical call with pictures that were made before."""
        return self._classical(self._visual, self._whole)

    def ready_split(self) -> Pixels:
        """The same in several requests, all in flight."""
        return self._classical(self._visual, self._parts)

    def tensors(self) -> Pixels:
        """The fused tenant; mouths come back in the answer."""
        mouth = wire.InferRequestedOutput("mouth")
        answers = self._fused(self._whole, [mouth])
        return _merged(np.concatenate([answer.as_numpy("mouth") for answer in answers]))

    def shared(self) -> Pixels:
        """The fused tenant; mouths come back through shared memory."""
        return self._through_memory(self._whole)

    def shared_split(self) -> Pixels:
        """The same in several requests, all in flight: as the compositor calls."""
        return self._through_memory(self._parts)

    def _through_memory(self, parts: list[slice]) -> Pixels:
        outputs = []
        for part in parts:
            mouth = wire.InferRequestedOutput("mouth")
            size = (part.stop - part.start) * _MOUTH_BYTES
            mouth.set_shared_memory(self._region.name, size, part.start * _MOUTH_BYTES)
            outputs.append(mouth)
        self._fused(parts, outputs)
        memory = self._region.view(0, len(self._frames) * _MOUTH_BYTES)
        return _merged(memory.reshape(len(self._frames), 3, CROP_SIZE, CROP_SIZE))

    def _classical(self, visual: NDArray[np.float32], parts: list[slice]) -> Pixels:
        requests = [
            (
                [_tensor("visual", visual[part], "FP32"), _tensor("audio", self._audio[part], "FP32")],
                [wire.InferRequestedOutput("output")],
            )
            for part in parts
        ]
        answers = self._answers(TENANT + RAW_SUFFIX, requests)
        pairs = zip(parts, answers, strict=True)
        mouths = [set_predictions(self._crops[part], answer.as_numpy("output")) for part, answer in pairs]
        return mouths[0] if len(mouths) == 1 else np.concatenate(mouths)

    def _fused(self, parts: list[slice], mouths: list[wire.InferRequestedOutput]) -> list[wire.InferResult]:
        requests = [
            (
                [_tensor("frame_index", self._frames[part], "INT32"), _tensor("audio", self._audio[part], "FP32")],
                [mouth, wire.InferRequestedOutput("finite")],
            )
            for part, mouth in zip(parts, mouths, strict=True)
        ]
        answers = self._answers(TENANT, requests)
        if not all(answer.as_numpy("finite").all() for answer in answers):
            raise InferenceFailed("the graph that does nothing predicted NaN")
        return answers

    def _answers(
        self, model: str, requests: list[tuple[list[wire.InferInput], list[wire.InferRequestedOutput]]]
    ) -> list[wire.InferResult]:
        """The answers to all requests, which are in flight at the same time."""
        if len(requests) == 1:
            return [self._server.infer(model, requests[0][0], outputs=requests[0][1])]
        futures: list[Future[wire.InferResult]] = []
        for inputs, outputs in requests:
            future: Future[wire.InferResult] = Future()
            futures.append(future)
            self._server.async_infer(model, inputs, partial(_settle, future), outputs=outputs)
        return [future.result() for future in futures]


def _settle(future: Future[wire.InferResult], result: wire.InferResult, error: InferenceServerException | None) -> None:
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def _merged(planes: Pixels) -> Pixels:
    """Mouths uint8 (n, 3, 328, 328) as pixels, ready to be pasted."""
    pixels = np.empty((len(planes), CROP_SIZE, CROP_SIZE, 3), np.uint8)
    for mouth, out in zip(planes, pixels, strict=True):
        cv2.merge(list(mouth), out)
    return pixels


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
    keep_large_blocks()
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
        f"{sizes.batch} frames in one request, or in {_REQUESTS} that are in flight together as the compositor sends "
        "them, through tritonclient's gRPC client, of a graph that does nothing, served by the embedded Triton with "
        "its Python-based backend; all contestants end with the same crops, uint8, ready to be pasted. The client "
        "keeps its large buffers; by the C library's defaults the classical wire costs it several times as much. "
        "Triton CPU: the server and its backend processes."
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
        client = Client(server, tenant, region, sizes.batch, _REQUESTS)
        contestants = {
            BUILT: Contestant(client.built),
            READY: Contestant(client.ready),
            TENSORS: Contestant(client.tensors, sizes.calls),
            SHARED: Contestant(client.shared, sizes.calls),
            READY_SPLIT: Contestant(client.ready_split),
            SHARED_SPLIT: Contestant(client.shared_split, sizes.calls),
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
    for classical, fused, what in (
        (READY, SHARED, "precomputed, one request"),
        (READY_SPLIT, SHARED_SPLIT, f"precomputed, {_REQUESTS} requests"),
        (BUILT, SHARED, "built, one request"),
    ):
        subject = f"classical / fused over shared memory, visual {what}"
        yield Target(f"client CPU, {subject}", measured.cpu_ratio(classical, fused), "at least", 50, "x")
        yield Target(f"wall, {subject}", measured.wall_ratio(classical, fused), "at least", 30, "x")


PART = Part("wire", TITLE, run)
