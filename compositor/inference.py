"""Triton, as the compositor needs it: mouths and audio embeddings in, loads and unloads. The only importer of
tritonclient, whose errors end here.

Mouths come back through system shared memory where Triton can map this process's region, as tensors otherwise. A slot
is used again only after Triton answered the request that names it; one whose answer never came stays unused, or one
tenant's face could appear in another's frame.
"""

from __future__ import annotations

import asyncio
import logging
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
from .settings import TritonSettings
from .shared_memory import Region

log = logging.getLogger(__name__)

MOUTH_BYTES = CROP_SIZE * CROP_SIZE * 3
EMBEDDING_SIZE = 512
ENCODER_BATCH = 32
_CHANNEL = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
]


class ModelNotLoaded(LipsyncError):
    """Triton does not have the model right now; loading it helps."""


class RegionLost(LipsyncError):
    """Triton does not know the shared memory region, having been restarted since."""


@dataclass
class Mouths:
    """Predicted mouths: uint8 (n, 328, 328, 3) BGR, valid until `release`."""

    crops: NDArray[np.uint8]
    release: Callable[[], None]


def translate(error: InferenceServerException) -> LipsyncError:
    """Triton's error as ours. UNAVAILABLE has four meanings, so the message decides (seen on Triton 2.51)."""
    status, message = str(error.status()).removeprefix("StatusCode."), str(error.message())
    if "shared memory region" in message:
        return RegionLost(message)
    if (
        "has no available versions" in message
        or "not at ready state" in message
        or (status == "NOT_FOUND" and "is not found" in message)
    ):
        return ModelNotLoaded(message)
    if "Exceeds maximum queue size" in message:
        return Overloaded("Triton's queue for this tenant is full", retry_after_s=0.2)
    if "Request timeout expired" in message or status in ("DEADLINE_EXCEEDED", "CANCELLED"):
        return DeadlinePassed("Triton did not answer in time")
    if status == "UNAVAILABLE" and "restricted" not in message:
        return TritonUnavailable("Triton cannot be reached; it may be restarting", retry_after_s=1)
    return InferenceFailed(f"Triton failed: {message}")


class Triton:
    """One Triton server."""

    def __init__(self, settings: TritonSettings) -> None:
        self._settings = settings
        self._client: aio.InferenceServerClient = aio.InferenceServerClient(settings.endpoint, channel_args=_CHANNEL)
        self._region: Region | None = None
        self._mapping = asyncio.Lock()
        self._tensors_only = settings.shared_memory == "off"
        self._in_flight = asyncio.Semaphore(settings.slots)
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
            if isinstance(fault, InferenceFailed):
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
        parts = [
            self._embed(encoder, windows[start : start + ENCODER_BATCH], deadline)
            for start in range(0, len(windows), ENCODER_BATCH)
        ]
        return np.concatenate(await asyncio.gather(*parts))

    async def _embed(self, encoder: str, windows: NDArray[np.float32], deadline: Deadline) -> NDArray[np.float32]:
        inputs = [_tensor("mel_spectrogram", windows, "FP32")]
        async with self._in_flight:
            result = await self._infer(encoder, inputs, ["audio_features"], deadline)
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

        subject: frame numbers int32 (n,), or crops uint8 (n, 328, 328, 3) for a tenant whose crops are sent. audio:
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
        try:
            return await self._mouths(model, inputs, len(audio), deadline)
        except RegionLost:
            self._region = None
            return await self._mouths(model, inputs, len(audio), deadline)

    async def _mouths(self, model: str, inputs: list[wire.InferInput], count: int, deadline: Deadline) -> Mouths:
        """The request is a task of its own: a caller that goes away must not free a slot that Triton still fills."""
        region = await self._mapped_region()
        task = asyncio.create_task(self._request(model, inputs, count, region, deadline))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            return await asyncio.wait_for(asyncio.shield(task), deadline.remaining_s())
        except asyncio.TimeoutError as error:
            task.add_done_callback(_release_unwanted)
            raise DeadlinePassed("Triton did not answer in time") from error
        except BaseException:
            task.add_done_callback(_release_unwanted)
            raise

    async def _request(
        self, model: str, inputs: list[wire.InferInput], count: int, region: Region | None, deadline: Deadline
    ) -> Mouths:
        if region is None:
            async with self._in_flight:
                result = await self._infer(model, inputs, ["mouth", "finite"], deadline)
            _check_finite(model, result.as_numpy("finite"), count)
            crops: NDArray[np.uint8] | None = result.as_numpy("mouth")
            if crops is None or crops.shape != (count, CROP_SIZE, CROP_SIZE, 3):
                raise InferenceFailed(f"{model!r} answered with mouths of the wrong shape")
            return Mouths(crops, lambda: None)
        slot = await self._slot(region, deadline)
        size = count * MOUTH_BYTES
        mouth = wire.InferRequestedOutput("mouth")
        mouth.set_shared_memory(region.name, size, region.offset(slot))
        try:
            result = await self._infer(model, inputs, [mouth, wire.InferRequestedOutput("finite")], deadline)
            _check_finite(model, result.as_numpy("finite"), count)
        except (DeadlinePassed, TritonUnavailable, asyncio.CancelledError) as error:
            # No answer: Triton may still write into the slot, so it is not released.
            self._quarantine(region, lost=isinstance(error, TritonUnavailable))
            raise
        except BaseException:
            region.release(slot)
            raise
        crops = region.view(slot, size).reshape(count, CROP_SIZE, CROP_SIZE, 3)
        return Mouths(crops, lambda: region.release(slot))

    async def _slot(self, region: Region, deadline: Deadline) -> int:
        try:
            return await asyncio.wait_for(region.acquire(), deadline.remaining_s())
        except asyncio.TimeoutError as error:
            raise Overloaded("no request to Triton was free in time", retry_after_s=0.2) from error

    def _quarantine(self, region: Region, *, lost: bool) -> None:
        """Counts a slot in doubt. A lost connection, or half of the slots in doubt, ends the use of the region."""
        region.in_doubt += 1
        if self._region is region and (lost or region.in_doubt * 2 >= self._settings.slots):
            self._region = None

    async def _mapped_region(self) -> Region | None:
        """The current region, or None where tensors must do."""
        if self._region is not None or self._tensors_only:
            return self._region
        async with self._mapping:
            if self._region is None and not self._tensors_only:
                await self._map_region()
        return self._region

    async def _map_region(self) -> None:
        try:
            region = Region(self._settings.slots, self._settings.slot_frames * MOUTH_BYTES)
        except OSError as error:
            log.warning("no shared memory (%s): mouths come back as tensors", error.strerror)
            self._tensors_only = True
            return
        try:
            await self._client.register_system_shared_memory(
                region.name, region.key, region.size, client_timeout=self._settings.timeout_s
            )
        except InferenceServerException as error:
            fault = translate(error)
            if isinstance(fault, (TritonUnavailable, DeadlinePassed)):
                raise fault from error
            log.warning("Triton cannot map shared memory (%s): mouths come back as tensors", error.message())
            self._tensors_only = True
            return
        finally:
            region.forget_name()
        log.info("shared memory mapped: %d slots of %d bytes", self._settings.slots, region.slot_bytes)
        self._region = region

    async def predictions(
        self, model: str, visual: NDArray[np.float32], audio: NDArray[np.float32], deadline: Deadline
    ) -> NDArray[np.float32]:
        """The classical call on an uploaded graph: visual float32 (n, 6, 320, 320) -> float32 (n, 3, 320, 320)."""
        inputs = [_tensor("visual", visual, "FP32"), _tensor("audio", audio, "FP32")]
        async with self._in_flight:
            result = await self._infer(model, inputs, ["output"], deadline)
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
        outputs: list[str] | list[wire.InferRequestedOutput] | None,
        deadline: Deadline,
    ) -> wire.InferResult:
        """Triton drops the request from its queue at the deadline; the setting bounds the wait for its answer."""
        queue_s = min(deadline.remaining_s(), self._settings.timeout_s)
        requested = [wire.InferRequestedOutput(out) if isinstance(out, str) else out for out in outputs or []]
        try:
            return await self._client.infer(
                model,
                inputs,
                outputs=requested or None,
                timeout=int(queue_s * 1e6),
                client_timeout=self._settings.timeout_s,
            )
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
