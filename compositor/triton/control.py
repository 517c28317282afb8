"""What one Triton has loaded: models are loaded, unloaded and warmed by name; its index and statistics come out."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import tritonclient.grpc as wire
from google.protobuf import text_format
from google.protobuf.json_format import MessageToJson
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import InferenceServerException, triton_to_np_dtype

from ..errors import InferenceFailed, LipsyncError, TenantBroken
from ..residency.models import OutOfMemory, Use
from ..settings import TritonSettings
from .channel import Answer, Client
from .connection import Connection, ModelNotLoaded, NoAnswer, Unresponsive, read_key

MOST_OWED = 6
"""Inferences that Triton may owe an answer, for each slot: what a model that hangs piles up stays below."""
_IN_MEMORY = {"READY", "LOADING", "UNLOADING"}
_OUT_OF_MEMORY = re.compile(
    r"out of memory|failed to allocate|cannot allocate memory|STATUS_ALLOC_FAILED|std::bad_alloc|MemoryError:"
    r"|No space left on device|the --shm-size flag",
    re.IGNORECASE,
)
"""What CUDA, cuDNN, ONNX Runtime's arena, the C++ library, Python, and Triton's Python backend say of it."""

_UNKNOWN_GPU = re.compile("unsupported gpu id|no GPUs are available")
"""What Triton says of a config that names a GPU which it does not have, or has none at all."""


class Control:
    """The models of one Triton server."""

    def __init__(self, settings: TritonSettings, endpoint: str, repository: Path | None = None) -> None:
        """repository: where the models' config.pbtxt are, for loads that name a GPU."""
        key = read_key(settings.key_file) if settings.key_file else None
        self.endpoint = endpoint
        self.inferences = 0
        """How many were answered as they should be."""
        self._settings = settings
        self._repository = repository
        self._connection = Connection(endpoint, key, MOST_OWED * settings.slots)

    @property
    def inferred(self) -> int:
        """How many inferences were answered, that worked or failed."""
        return self._connection.inferred

    @property
    def slowest_s(self) -> float:
        """What the slowest inference of late took that a caller asked for."""
        return self._connection.slowest_s

    def silent_s(self) -> float:
        """For how long inferences have been waited for, and none was answered."""
        return self._connection.silent_s()

    def let_go(self) -> None:
        """Requests in flight fail at once, with TritonUnavailable; further ones go out."""
        self._connection.let_go()

    async def load(self, model: str, gpu: int | None = None) -> None:
        """Loads a model; at once where it is loaded and unchanged.

        gpu: the one that the model's instances are put on, all else being as config.pbtxt says; a model that is made
        for the CPU stays there. A load that names a GPU loads again what is loaded.
        Raises OutOfMemory, TenantBroken, TritonUnavailable, NoAnswer.
        """
        config = None if gpu is None else self._config_on(model, gpu)
        wait_s = self._settings.load_timeout_s
        try:
            await self._connection.ask(lambda client: client.load_model(model, config=config, client_timeout=wait_s))
        except (InferenceFailed, ModelNotLoaded) as fault:
            said = _said(fault).strip()
            words = f"{model!r} does not load into Triton: {said}"
            if _OUT_OF_MEMORY.search(said):
                raise OutOfMemory(words, retry_after_s=1) from fault
            if config is not None and _UNKNOWN_GPU.search(said):
                words = f"the setting triton.gpus names GPU {gpu}, which {self.endpoint} does not have"
                raise TenantBroken(f"{words}: name those it has, or none ({said})", field="triton.gpus") from fault
            raise TenantBroken(words, field="tenant") from fault

    async def unload(self, model: str) -> None:
        """Unloads a model; returns before its memory is free. An unknown model is no error.

        Raises Unresponsive, as everything that is asked about models does, and TritonUnavailable.
        """
        wait_s = self._settings.timeout_s
        await self._ask(lambda client: client.unload_model(model, client_timeout=wait_s))

    async def states(self) -> dict[str, str]:
        """The models that take memory: READY, LOADING or UNLOADING. Costs Triton the more the more are installed."""
        wait_s = self._settings.timeout_s
        index = await self._ask(lambda client: client.get_model_repository_index(client_timeout=wait_s))
        return {model.name: model.state for model in index.models if model.state in _IN_MEMORY}

    async def uses(self) -> dict[str, Use]:
        """Triton's statistics of the models that are loaded and not unloading."""
        wait_s = self._settings.timeout_s
        statistics = await self._ask(lambda client: client.get_inference_statistics(client_timeout=wait_s))
        return {model.name: Use(model.inference_count, model.last_inference / 1000) for model in statistics.model_stats}

    async def placed(self, model: str) -> int | None:
        """The GPU that a loaded model is on, the first where there are several; None on the CPU, or not loaded."""
        try:
            return next(iter(await self.gpus(model)), None)
        except ModelNotLoaded:
            return None

    async def gpus(self, model: str) -> list[int]:
        """The GPUs that a loaded model has a copy on: all of them, unless its load or its config.pbtxt names some; none
        on the CPU. Raises ModelNotLoaded."""
        config = await self._config(model)
        return sorted({gpu for group in config.instance_group for gpu in group.gpus})

    async def warm(self, model: str) -> None:
        """One request of a loaded model, zeros of one frame, so that Triton says when it was used last.

        Raises ModelNotLoaded, InferenceFailed, TritonUnavailable, NoAnswer.
        """
        config = await self._config(model)
        inputs = [_zeros(each, config.max_batch_size > 0) for each in config.input]
        smallest = min(config.output, key=lambda output: int(np.prod(output.dims)))
        outputs = [wire.InferRequestedOutput(smallest.name)]
        # The first one after a load may build engines, for minutes.
        await self._connection.infer(model, inputs, outputs, self._settings.load_timeout_s, measured=False)

    async def _ask(self, request: Callable[[Client], Awaitable[Answer]]) -> Answer:
        """What Triton answers to what no caller asked: the time given is the service's own."""
        try:
            return await self._connection.ask(request)
        except NoAnswer as error:
            raise Unresponsive("Triton did not answer in time", retry_after_s=1) from error

    async def _config(self, model: str) -> model_config_pb2.ModelConfig:
        wait_s = self._settings.timeout_s
        answer = await self._ask(lambda client: client.get_model_config(model, client_timeout=wait_s))
        return answer.config

    def _config_on(self, model: str, gpu: int) -> str | None:
        if self._repository is None:
            raise ValueError("a load that names a GPU needs the model repository")
        try:
            text = (self._repository / model / "config.pbtxt").read_text(encoding="utf-8")
            return config_on(text, gpu)
        except (OSError, ValueError, text_format.ParseError) as error:
            raise TenantBroken(f"the config.pbtxt of {model!r} cannot be used: {error}", field="tenant") from error


def config_on(text: str, gpu: int) -> str | None:
    """The config.pbtxt `text` as JSON, its instances put on one GPU; None where they are made for the CPU."""
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    groups = config.instance_group or [config.instance_group.add()]
    kinds = model_config_pb2.ModelInstanceGroup
    if any(group.kind == kinds.KIND_CPU for group in groups):
        return None
    for group in groups:
        group.kind = kinds.KIND_GPU
        group.gpus[:] = [gpu]
    return str(MessageToJson(config, preserving_proto_field_name=True))


def _zeros(tensor: model_config_pb2.ModelInput, batched: bool) -> wire.InferInput:
    datatype = model_config_pb2.DataType.Name(tensor.data_type).removeprefix("TYPE_")
    shape = [1, *tensor.dims] if batched else list(tensor.dims)
    zeros = wire.InferInput(tensor.name, shape, datatype)
    zeros.set_data_from_numpy(np.zeros(shape, triton_to_np_dtype(datatype)))
    return zeros


def _said(fault: LipsyncError) -> str:
    cause = fault.__cause__
    return str(cause.message()) if isinstance(cause, InferenceServerException) else fault.message
