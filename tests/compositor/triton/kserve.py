"""A server that speaks Triton's protocol, and can be told to answer garbage, or nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import model_config_pb2, service_pb2_grpc
from tritonclient.grpc import service_pb2 as pb

Tensors = dict[str, NDArray[Any]]
_DATATYPES = {"uint8": "UINT8", "bool": "BOOL", "float32": "FP32"}


class Kserve(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Loads anything. `answer` makes the tensors of a request; `go` holds everything back while it is not set; what is
    in `deaf` is never answered."""

    def __init__(self, answer: Callable[[pb.ModelInferRequest], Tensors]) -> None:
        self.answer = answer
        self.go = asyncio.Event()
        self.go.set()
        self.port = 0
        self.deaf = set[str]()
        self.requests = asyncio.Queue[str]()
        """Names of the calls that came."""
        self.ends = asyncio.Queue[tuple[str, str]]()
        """Names of the calls that went on from where they are held back, "to be answered", or ended there,
        "cancelled"."""
        self.loaded: dict[str, int] = {}
        self.given_s: list[float] = []
        """How long each inference may take by its gRPC deadline."""
        self.seen: Callable[[dict[str, str]], None] = lambda headers: None
        """Is told of the headers of each inference."""
        self.refusal: tuple[grpc.StatusCode, str] | None = None
        """What inferences are refused with."""

    async def _turn(self, name: str) -> None:
        self.requests.put_nowait(name)
        try:
            await self.go.wait()
            if name in self.deaf:
                await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            self.ends.put_nowait((name, "cancelled"))
            raise
        self.ends.put_nowait((name, "to be answered"))

    async def ServerLive(self, request: Any, context: Any) -> pb.ServerLiveResponse:  # noqa: N802
        await self._turn("ping")
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Any) -> pb.ServerReadyResponse:  # noqa: N802
        """As of a real one with --strict-readiness, its default, where a model did not load."""
        return pb.ServerReadyResponse(ready=False)

    async def RepositoryModelLoad(self, request: Any, context: Any) -> pb.RepositoryModelLoadResponse:  # noqa: N802
        await self._turn("load")
        self.loaded.setdefault(request.model_name, 0)
        return pb.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(self, request: Any, context: Any) -> pb.RepositoryModelUnloadResponse:  # noqa: N802
        await self._turn("unload")
        self.loaded.pop(request.model_name, None)
        return pb.RepositoryModelUnloadResponse()

    async def RepositoryIndex(self, request: Any, context: Any) -> pb.RepositoryIndexResponse:  # noqa: N802
        await self._turn("index")
        models = [pb.RepositoryIndexResponse.ModelIndex(name=name, state="READY") for name in self.loaded]
        return pb.RepositoryIndexResponse(models=models)

    async def ModelStatistics(self, request: Any, context: Any) -> pb.ModelStatisticsResponse:  # noqa: N802
        await self._turn("statistics")
        return pb.ModelStatisticsResponse(
            model_stats=[pb.ModelStatistics(name=name, inference_count=uses) for name, uses in self.loaded.items()]
        )

    async def ModelConfig(self, request: Any, context: Any) -> pb.ModelConfigResponse:  # noqa: N802
        await self._turn("config")
        answer = pb.ModelConfigResponse()
        answer.config.max_batch_size = 4
        answer.config.input.add(name="frame_index", data_type=model_config_pb2.TYPE_INT32, dims=[1])
        answer.config.output.add(name="finite", data_type=model_config_pb2.TYPE_BOOL, dims=[1])
        return answer

    async def SystemSharedMemoryRegister(self, request: Any, context: Any) -> None:  # noqa: N802
        await self._turn("register")
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "no shared memory here")

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Any) -> pb.ModelInferResponse:  # noqa: N802
        self.seen(dict(context.invocation_metadata()))
        self.given_s.append(context.time_remaining())
        await self._turn("infer")
        if self.refusal:
            await context.abort(*self.refusal)
        answer = pb.ModelInferResponse(model_name=request.model_name)
        for name, values in self.answer(request).items():
            answer.outputs.add(name=name, datatype=_DATATYPES[values.dtype.name], shape=values.shape)
            answer.raw_output_contents.append(values.tobytes())
        self.loaded[request.model_name] = self.loaded.get(request.model_name, 0) + 1
        return answer

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.port}"


@contextlib.asynccontextmanager
async def serving(answer: Callable[[pb.ModelInferRequest], Tensors] = lambda request: {}) -> AsyncIterator[Kserve]:
    """The server on a free port. It has no shared memory."""
    kserve = Kserve(answer)
    server = grpc.aio.server(options=[("grpc.max_send_message_length", -1)])
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(kserve, server)
    kserve.port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield kserve
    finally:
        kserve.go.set()
        await server.stop(None)


def good(request: pb.ModelInferRequest) -> Tensors:
    """Mouths of grey level 7 for any request of a fused tenant."""
    count = request.inputs[0].shape[0]
    return {
        "mouth": np.full((count, 3, 328, 328), 7, np.uint8),
        "finite": np.ones((count, 1), bool),
    }
