"""Triton, as the compositor needs it: mouths and audio embeddings in, loads and unloads. The only importer of
tritonclient, whose errors end here.

Mouths come back through system shared memory where Triton can map this process's region, as tensors otherwise. The
slot of a request is given back only once Triton has answered it: else one tenant's face could get into another's frame.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import tritonclient.grpc as wire
from numpy.typing import NDArray
from tritonclient.grpc import aio
from tritonclient.utils import InferenceServerException

from .blending import CROP_SIZE
from .deadline import Deadline
from .errors import (
    DeadlinePassed,
    InferenceFailed,
    InvalidInput,
    LipsyncError,
    Overloaded,
    TenantBroken,
    TritonUnavailable,
)
from .features import ENCODER_BATCH
from .settings import TritonSettings
from .shared_memory import Region
from .slots import Lease, Slots

log = logging.getLogger(__name__)

MOUTH_BYTES = CROP_SIZE * CROP_SIZE * 3
EMBEDDING_SIZE = 512
_CHANNEL = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
]


class ModelNotLoaded(LipsyncError):
    """Triton does not have the model right now; loading it helps."""


class RegionLost(TritonUnavailable):
    """Triton does not know the shared memory region, having been restarted since."""


@dataclass
class Mouths:
    """Predicted mouths: uint8 (n, 3, 328, 328), planes of BGR, valid until `release`."""

    crops: NDArray[np.uint8]
    release: Callable[[], None]


class NoAnswer(DeadlinePassed):
    """The wait for Triton's answer ended; whether it still works on the request is not known."""


def translate(error: InferenceServerException) -> LipsyncError:
    """Triton's error as ours. UNAVAILABLE has four meanings, so the message decides (seen on Triton 2.51)."""
    status, message = str(error.status()).removeprefix("StatusCode."), str(error.message())
    if "Unable to find shared memory region" in message:
        return RegionLost(message)
    if (
        "has no available versions" in message
        or "not at ready state" in message
        or (status == "NOT_FOUND" and "is not found" in message)
    ):
        return ModelNotLoaded(message)
    if "Exceeds maximum queue size" in message:
        return Overloaded("Triton's queue for this tenant is full", retry_after_s=0.2)
    if "Request timeout expired" in message:
        return Overloaded("Triton's queue for this tenant is too long for the time given", retry_after_s=0.5)
    if status in ("DEADLINE_EXCEEDED", "CANCELLED"):
        return NoAnswer("Triton did not answer in time")
    if status == "UNAVAILABLE" and "restricted" not in message:
        return TritonUnavailable("Triton cannot be reached; it may be restarting", retry_after_s=1)
    return InferenceFailed(f"Triton failed: {message}")


class Triton:
    """One Triton server."""

    def __init__(self, settings: TritonSettings) -> None:
        self._settings = settings
        self._client: aio.InferenceServerClient = aio.InferenceServerClient(
            settings.endpoints[0], channel_args=_CHANNEL
        )
        self._slots = Slots(
            settings.slots, settings.slot_frames * MOUTH_BYTES, self._register, settings.shared_memory == "auto"
        )
        self._tasks: set[asyncio.Task[Mouths]] = set()

    async def close(self) -> None:
        """Ends the requests in flight and the connection."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.close()

    async def ready(self) -> bool:
        """Whether Triton answers and takes requests."""
        try:
            return bool(await self._client.is_server_ready(client_timeout=2))
        except InferenceServerException:
            return False

    async def load(self, model: str) -> None:
        """Loads a model; at once where it is loaded and unchanged. Raises TenantBroken, TritonUnavailable, ..."""
        try:
            await self._client.load_model(model, client_timeout=self._settings.load_timeout_s)
        except InferenceServerException as error:
            fault = translate(error)
            if isinstance(fault, (InferenceFailed, ModelNotLoaded)):
                raise TenantBroken(f"{model!r} does not load into Triton: {error.message()}", field="tenant") from error
            raise fault from error

    async def unload(self, model: str) -> None:
        """Unloads a model; returns before its memory is free. An unknown model is no error."""
        try:
            await self._client.unload_model(model, client_timeout=self._settings.timeout_s)
        except InferenceServerException as error:
            raise translate(error) from error

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
            or embeddings.shape != (len(windows), EMBEDDING_SIZE)
            or not np.isfinite(embeddings).all()
        ):
            raise InferenceFailed(f"encoder {encoder!r} answered with something else than finite (n, 512)")
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
        lease = await self._slots.lease(deadline)
        # A task of its own: a caller that goes away must not free a slot that Triton still fills.
        task = asyncio.create_task(self._request(model, inputs, len(audio), lease, deadline))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            # It leaves the task alone whatever happens, and costs less than wait_for around a shield.
            await asyncio.wait((task,), timeout=deadline.remaining_s())
            if not task.done():
                raise DeadlinePassed("Triton did not answer in time")
        except BaseException:
            task.add_done_callback(_release_unwanted)
            raise
        return task.result()

    async def _request(
        self, model: str, inputs: list[wire.InferInput], count: int, lease: Lease, deadline: Deadline
    ) -> Mouths:
        """One request on a lease, which the answer carries on, or which ends with the error."""
        region, size = lease.region, count * MOUTH_BYTES
        mouth = wire.InferRequestedOutput("mouth")
        if region is not None:
            mouth.set_shared_memory(region.name, size, region.offset(lease.slot))
        try:
            # Beyond the deadline, to know that the request's memory is free again.
            wait_s = max(deadline.at_s - time.monotonic(), 0) + self._settings.timeout_s
            result = await self._infer(model, inputs, [mouth, wire.InferRequestedOutput("finite")], wait_s)
            _check_finite(model, result.as_numpy("finite"), count)
            crops: NDArray[np.uint8] | None = (
                result.as_numpy("mouth") if region is None else region.view(lease.slot, size)
            )
            if crops is None or crops.size != size:
                raise InferenceFailed(f"{model!r} answered with mouths of the wrong shape")
        except (NoAnswer, TritonUnavailable, asyncio.CancelledError) as error:
            self._slots.abandon(lease)
            if isinstance(error, TritonUnavailable):
                self._slots.lost(region)
            raise
        except BaseException:
            self._slots.release(lease)
            raise
        return Mouths(crops.reshape(count, 3, CROP_SIZE, CROP_SIZE), lambda: self._slots.release(lease))

    async def _register(self, region: Region) -> bool:
        try:
            await self._client.register_system_shared_memory(
                region.name, region.key, region.size, client_timeout=self._settings.timeout_s
            )
        except InferenceServerException as error:
            fault = translate(error)
            if isinstance(fault, (TritonUnavailable, DeadlinePassed)):
                raise fault from error
            log.info("Triton says: %s", error.message())
            return False
        return True

    async def _tensors(
        self, model: str, inputs: list[wire.InferInput], outputs: list[str], deadline: Deadline
    ) -> wire.InferResult:
        """A request whose answer comes as tensors."""
        lease = await self._slots.lease(deadline, memory=False)
        try:
            requested = [wire.InferRequestedOutput(name) for name in outputs]
            return await self._infer(model, inputs, requested, deadline.remaining_s())
        finally:
            self._slots.release(lease)

    async def predictions(
        self, model: str, visual: NDArray[np.float32], audio: NDArray[np.float32], deadline: Deadline
    ) -> NDArray[np.float32]:
        """The classical call on an uploaded graph: visual float32 (n, 6, 320, 320) -> float32 (n, 3, 320, 320)."""
        inputs = [_tensor("visual", visual, "FP32"), _tensor("audio", audio, "FP32")]
        result = await self._tensors(model, inputs, ["output"], deadline)
        output: NDArray[np.float32] | None = result.as_numpy("output")
        if output is None or output.shape != (len(audio), 3, 320, 320):
            raise InferenceFailed(f"{model!r} answered with predictions of the wrong shape")
        if not np.isfinite(output).all():
            raise TenantBroken(f"the model of {model!r} predicted NaN or infinity", field="tenant")
        return output

    async def _infer(
        self,
        model: str,
        inputs: list[wire.InferInput],
        outputs: list[wire.InferRequestedOutput],
        wait_s: float,
    ) -> wire.InferResult:
        """One request, whose answer is awaited for so long."""
        try:
            return await self._client.infer(model, inputs, outputs=outputs, client_timeout=wait_s)
        except InferenceServerException as error:
            raise translate(error) from error


def _release_unwanted(task: asyncio.Task[Mouths]) -> None:
    if not task.cancelled() and task.exception() is None:
        task.result().release()


def _check_finite(model: str, finite: NDArray[np.bool_] | None, count: int) -> None:
    if finite is None or finite.shape != (count, 1):
        raise InferenceFailed(f"{model!r} answered without saying whether its prediction is finite")
    if not finite.all():
        raise TenantBroken(f"the model of {model!r} predicted NaN or infinity", field="tenant")


def _tensor(name: str, values: NDArray[np.generic], datatype: str) -> wire.InferInput:
    if not values.size:
        raise InvalidInput(f"{name} is empty", field=name)
    tensor = wire.InferInput(name, list(values.shape), datatype)
    tensor.set_data_from_numpy(np.ascontiguousarray(values))
    return tensor
