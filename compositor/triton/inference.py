"""Triton, as the compositor needs it: mouths and audio embeddings in, loads and unloads.

Mouths come back through system shared memory where Triton can map this process's region, as tensors otherwise. The
slot of a request is given back only once Triton has answered it: else one tenant's face could get into another's frame.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as wire
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2

from ..blending import CROP_SIZE
from ..deadline import Deadline
from ..errors import DeadlinePassed, InferenceFailed, InvalidInput, LipsyncError, TenantBroken, TritonUnavailable
from ..features import ENCODER_BATCH
from ..settings import TritonSettings
from ..tracing import headers_onwards
from .channel import Answer, Client
from .connection import GivenUp, NoAnswer
from .control import Control
from .shared_memory import Region, is_left_behind, sweep_locks
from .slots import Lease, Slots

log = logging.getLogger(__name__)

MOUTH_BYTES = CROP_SIZE * CROP_SIZE * 3
EMBEDDING_SIZE = 512
_BRIEF_S = 1.0
"""How long Triton may take to tell of regions, or to end one."""


@dataclass
class Mouths:
    """Predicted mouths: uint8 (n, 3, 328, 328), planes of BGR, valid until `release`."""

    crops: NDArray[np.uint8]
    release: Callable[[], None]


class Triton(Control):
    """One Triton server."""

    def __init__(
        self,
        settings: TritonSettings,
        endpoint: str,
        repository: Path | None = None,
        queued: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        """repository: where the models' config.pbtxt are, for loads that name a GPU. queued: is told how long each
        request waited for one of `triton.slots`."""
        super().__init__(settings, endpoint, repository)
        self._queued = queued
        slot_bytes, wanted = settings.slot_frames * MOUTH_BYTES, settings.shared_memory == "auto"
        self._slots = Slots(settings.slots, slot_bytes, self._register, self._end, wanted)
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def answers(self) -> int:
        """How many requests were answered, however."""
        return self._connection.answers

    async def close(self) -> None:
        """Ends the connection; requests in flight fail, and Triton gets a moment to answer them."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # As long as it has one that names a region it does not end that.
        await self._connection.settle()
        await asyncio.gather(*(self._unregister(region.name) for region in self._slots.mapped))
        self._slots.forget()
        await self._connection.close()

    async def ping(self, wait_s: float) -> bool:
        """Whether Triton takes requests. Raises TritonUnavailable, and NoAnswer after `wait_s`."""
        return await self._connection.ping(wait_s)

    def give_up(self) -> None:
        """Triton hangs: every request fails with TritonUnavailable, those in flight at once, until a `ping` is
        answered. Slots that wait for an answer are not used again, for Triton may still write into them; their memory
        is taken back once it does not."""
        self._connection.give_up()

    async def embeddings(self, encoder: str, windows: NDArray[np.float32], deadline: Deadline) -> NDArray[np.float32]:
        """Audio embeddings float32 (n, 512) of mel windows float32 (n, 1, 80, 16)."""
        if len(windows) <= ENCODER_BATCH:
            return await self._embed(encoder, windows, deadline)
        parts = [
            self._embed(encoder, windows[start : start + ENCODER_BATCH], deadline)
            for start in range(0, len(windows), ENCODER_BATCH)
        ]
        return np.concatenate(await asyncio.gather(*parts))

    async def _embed(self, encoder: str, windows: NDArray[np.float32], deadline: Deadline) -> NDArray[np.float32]:
        inputs = [_tensor("mel_spectrogram", windows, "FP32")]
        result = await self._tensors(encoder, inputs, ["audio_features"], deadline)
        embeddings: NDArray[np.float32] | None = result.as_numpy("audio_features")
        if (
            embeddings is None
            or embeddings.dtype != np.float32
            or embeddings.shape != (len(windows), EMBEDDING_SIZE)
            or not np.isfinite(embeddings).all()
        ):
            raise InferenceFailed(f"encoder {encoder!r} answered with something else than finite (n, 512)")
        self.inferences += 1
        return embeddings

    async def mouths(
        self,
        model: str,
        subject: NDArray[np.int32] | NDArray[np.uint8],
        audio: NDArray[np.float32],
        deadline: Deadline,
    ) -> Mouths:
        """Mouths of one batch of a fused tenant.

        subject: frame numbers int32 (n,), or crops uint8 (n, 3, 328, 328) for a tenant whose crops are sent. audio:
        float32 (n, 32, 16, 16). n is at most the tenant's max_batch_size and the setting `triton.slot_frames`.
        The caller must `release` the answer. Raises ModelNotLoaded, TenantBroken for a prediction that is not finite,
        Overloaded, DeadlinePassed, TritonUnavailable, InferenceFailed.
        """
        first = (
            _tensor("frame_index", subject.reshape(-1, 1), "INT32")
            if subject.dtype == np.int32
            else _tensor("crop", subject, "UINT8")
        )
        inputs = [first, _tensor("audio", audio, "FP32")]
        lease = await self._lease(deadline, memory=True)
        request = self._request(model, inputs, len(audio), lease, deadline)
        return await self._outlived(request, deadline, lambda mouths: mouths.release())

    async def _outlived(
        self, request: Coroutine[Any, Any, Answer], deadline: Deadline, unwanted: Callable[[Answer], None]
    ) -> Answer:
        """What a request comes to by the deadline. Without its caller it goes on, and keeps its lease, for
        `triton.timeout_s`: Triton goes on with it, too. What it comes to then is `unwanted`."""
        task = asyncio.create_task(request)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            # It leaves the task alone whatever happens, and costs less than wait_for around a shield.
            await asyncio.wait((task,), timeout=deadline.remaining_s())
            if not task.done():
                raise DeadlinePassed("Triton did not answer in time")
        except BaseException:
            task.add_done_callback(partial(_throw_away, unwanted))
            end = asyncio.get_running_loop().call_later(self._settings.timeout_s, task.cancel)
            task.add_done_callback(lambda _: end.cancel())
            raise
        return task.result()

    async def _lease(self, deadline: Deadline, *, memory: bool) -> Lease:
        begin_s = time.perf_counter()
        try:
            return await self._slots.lease(deadline, memory=memory)
        finally:
            self._queued(time.perf_counter() - begin_s)

    async def _request(
        self, model: str, inputs: list[wire.InferInput], count: int, lease: Lease, deadline: Deadline
    ) -> Mouths:
        """One request on a lease, which the answer carries on, or which ends with the error."""
        region, size = lease.region, count * MOUTH_BYTES
        mouth = wire.InferRequestedOutput("mouth")
        if region is not None:
            mouth.set_shared_memory(region.name, size, region.offset(lease.slot))
        try:
            result = await self._infer(model, inputs, [mouth, wire.InferRequestedOutput("finite")], deadline)
            _check_finite(model, result.as_numpy("finite"), count)
            _check_mouth(model, result.get_output("mouth"), count)
            self.inferences += 1
            crops: NDArray[np.uint8] = result.as_numpy("mouth") if region is None else region.view(lease.slot, size)
        except (NoAnswer, TritonUnavailable, asyncio.CancelledError) as error:
            self._slots.abandon(lease)
            if isinstance(error, TritonUnavailable) and not isinstance(error, GivenUp):
                self._slots.lost(region)
            raise
        except BaseException:
            self._slots.release(lease)
            raise
        return Mouths(crops.reshape(count, 3, CROP_SIZE, CROP_SIZE), lambda: self._slots.release(lease))

    async def _register(self, region: Region) -> bool:
        async def request(client: Client) -> None:
            await client.register_system_shared_memory(
                region.name, region.key, region.size, client_timeout=self._settings.timeout_s
            )

        try:
            await self._ask(request)
        except TritonUnavailable:
            raise
        except LipsyncError as error:
            log.info("no shared memory: %s", error.message)
            return False
        await self._sweep()
        return True

    async def _end(self, regions: Sequence[Region]) -> list[Region]:
        """Makes Triton end regions. Those that are gone; it keeps one for as long as a request that it has names it."""
        await asyncio.gather(*(self._unregister(region.name) for region in regions))
        try:
            kept = await self._mapped()
        except LipsyncError as error:
            log.debug("%s: %s", self.endpoint, error.message)
            return []
        return [region for region in regions if region.name not in kept]

    async def _mapped(self) -> list[str]:
        """The names of all regions that Triton has mapped, for whomever."""
        status = await self._ask(lambda client: client.get_system_shared_memory_status(client_timeout=_BRIEF_S))
        return list(status.regions)

    async def _sweep(self) -> None:
        """Ends the regions that processes left behind which were killed. Only where Triton has just mapped one of ours:
        then its /dev/shm is this process's own, and what is not known there is nobody's."""
        try:
            names = await self._mapped()
        except LipsyncError as error:
            log.debug("%s: %s", self.endpoint, error.message)
            return
        for name in names:
            if is_left_behind(name):
                await self._unregister(name)
        sweep_locks()

    async def _unregister(self, name: str) -> None:
        """Makes Triton end a region. One that it still writes into stays, until somebody sweeps."""

        async def request(client: Client) -> None:
            await client.unregister_system_shared_memory(name, client_timeout=_BRIEF_S)

        try:
            await self._ask(request)
        except LipsyncError as error:
            log.debug("%s keeps the region %s: %s", self.endpoint, name, error.message)

    async def _tensors(
        self, model: str, inputs: list[wire.InferInput], outputs: list[str], deadline: Deadline
    ) -> wire.InferResult:
        """A request whose answer comes as tensors."""
        lease = await self._lease(deadline, memory=False)

        async def request() -> wire.InferResult:
            requested = [wire.InferRequestedOutput(name) for name in outputs]
            try:
                return await self._infer(model, inputs, requested, deadline)
            finally:
                self._slots.release(lease)

        return await self._outlived(request(), deadline, lambda result: None)

    async def predictions(
        self, model: str, visual: NDArray[np.float32], audio: NDArray[np.float32], deadline: Deadline
    ) -> NDArray[np.float32]:
        """The classical call on an uploaded graph: visual float32 (n, 6, 320, 320) -> float32 (n, 3, 320, 320)."""
        inputs = [_tensor("visual", visual, "FP32"), _tensor("audio", audio, "FP32")]
        result = await self._tensors(model, inputs, ["output"], deadline)
        output: NDArray[np.float32] | None = result.as_numpy("output")
        if output is None or output.dtype != np.float32 or output.shape != (len(audio), 3, 320, 320):
            raise InferenceFailed(f"{model!r} answered with predictions of the wrong shape")
        if not np.isfinite(output).all():
            raise TenantBroken(f"the model of {model!r} predicted NaN or infinity", field="tenant")
        self.inferences += 1
        return output

    async def _infer(
        self,
        model: str,
        inputs: list[wire.InferInput],
        outputs: list[wire.InferRequestedOutput],
        deadline: Deadline,
    ) -> wire.InferResult:
        """One request, whose answer is awaited beyond the deadline, to know that its slot is free again."""
        wait_s = max(deadline.at_s - time.monotonic(), 0) + self._settings.timeout_s
        return await self._connection.infer(model, inputs, outputs, wait_s, headers_onwards())


def _throw_away(unwanted: Callable[[Answer], None], task: asyncio.Task[Answer]) -> None:
    if not task.cancelled() and task.exception() is None:
        unwanted(task.result())


def _check_finite(model: str, finite: NDArray[np.bool_] | None, count: int) -> None:
    if finite is None or finite.shape != (count, 1):
        raise InferenceFailed(f"{model!r} answered without saying whether its prediction is finite")
    if not finite.all():
        raise TenantBroken(f"the model of {model!r} predicted NaN or infinity", field="tenant")


def _check_mouth(model: str, mouth: service_pb2.ModelInferResponse.InferOutputTensor | None, count: int) -> None:
    """What is smaller than it should be would leave another request's mouth in the rest of its slot."""
    shape = [count, 3, CROP_SIZE, CROP_SIZE]
    if mouth is None or mouth.datatype != "UINT8" or list(mouth.shape) != shape:
        raise InferenceFailed(f"{model!r} answered with mouths of the wrong shape")


def _tensor(name: str, values: NDArray[np.generic], datatype: str) -> wire.InferInput:
    if not values.size:
        raise InvalidInput(f"{name} is empty", field=name)
    tensor = wire.InferInput(name, list(values.shape), datatype)
    tensor.set_data_from_numpy(np.ascontiguousarray(values))
    return tensor
