"""The predecessor's compositing service, as its documents describe it: a process of its own, a baseline.

A client sends the model's pictures as float32; the service sends them on to the raw model, converts, composites and
encodes whole frames in a thread pool, and answers with one list of JPEGs. Backgrounds lie in memory as pixels. The
documented server is written in Go; this one does the same work by libraries that are faster than Go's own.
"""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import grpc
import numpy as np
import tritonclient.grpc as wire
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from compositor import jpeg
from compositor.jpeg import Encoding
from compositor.manifest import RAW_SUFFIX

from .child import announce, wait_for_end
from .held_film import HeldFilm

SERVICE, METHOD = "compositing.CompositingService", "InferBatchComposite"
MESSAGE_LIMIT = 100 << 20
"""Bytes, the documented `max_message_size_mb`."""
CHANNEL = [("grpc.max_send_message_length", MESSAGE_LIMIT), ("grpc.max_receive_message_length", MESSAGE_LIMIT)]
_WORKERS = 8
_VISUAL, _AUDIO = (-1, 6, 320, 320), (-1, 32, 16, 16)
_QUALITY = Encoding(75)
_KINDS = descriptor_pb2.FieldDescriptorProto
_REQUEST = {
    "model_id": (1, _KINDS.TYPE_STRING),
    "visual_frames": (2, _KINDS.TYPE_BYTES),
    "audio_features": (3, _KINDS.TYPE_BYTES),
    "batch_size": (4, _KINDS.TYPE_INT32),
    "start_frame_idx": (5, _KINDS.TYPE_INT32),
}
_RESPONSE = {
    "success": (1, _KINDS.TYPE_BOOL),
    "error": (2, _KINDS.TYPE_STRING),
    "composited_frames": (3, _KINDS.TYPE_BYTES),
}


def _messages() -> tuple[Any, Any]:
    """The message classes of the documented call; of its answer, what this service fills in."""
    file = descriptor_pb2.FileDescriptorProto(name="compositing.proto", package="compositing", syntax="proto3")
    for name, fields in (("CompositeBatchRequest", _REQUEST), ("CompositeBatchResponse", _RESPONSE)):
        message = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            label = _KINDS.LABEL_REPEATED if field == "composited_frames" else _KINDS.LABEL_OPTIONAL
            message.field.add(name=field, number=number, type=kind, label=label)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    request, response = (
        message_factory.GetMessageClass(pool.FindMessageTypeByName(f"compositing.{message.name}"))
        for message in file.message_type
    )
    return request, response


Request, Response = _messages()


class Service:
    """Answers calls, each in a thread of its own; frames are composited in a pool that all calls share."""

    def __init__(self, film: HeldFilm, triton: str, cores: int) -> None:
        """triton: its gRPC address. cores: threads that composite."""
        self._film, self._triton = film, triton
        self._pool = ThreadPoolExecutor(cores)
        # tritonclient's client belongs to one thread.
        self._clients = threading.local()

    def answer(self, request: Any, context: grpc.ServicerContext) -> Any:
        """One call; a fault of Triton's comes back in the answer, as documented."""
        try:
            predictions = self._predict(request)
        except InferenceServerException as error:
            return Response(error=error.message())
        first = request.start_frame_idx
        numbers = [number % len(self._film) for number in range(first, first + request.batch_size)]
        return Response(success=True, composited_frames=self._pool.map(self._composite, numbers, predictions))

    def _predict(self, request: Any) -> NDArray[np.float32]:
        inputs = [
            _tensor("visual", np.frombuffer(request.visual_frames, np.float32).reshape(_VISUAL)),
            _tensor("audio", np.frombuffer(request.audio_features, np.float32).reshape(_AUDIO)),
        ]
        outputs = [wire.InferRequestedOutput("output")]
        answer = self._client().infer(request.model_id + RAW_SUFFIX, inputs, outputs=outputs)
        predictions: NDArray[np.float32] = answer.as_numpy("output")
        return predictions

    def _client(self) -> wire.InferenceServerClient:
        client: wire.InferenceServerClient | None = getattr(self._clients, "client", None)
        if client is None:
            client = self._clients.client = wire.InferenceServerClient(self._triton)
        return client

    def _composite(self, number: int, prediction: NDArray[np.float32]) -> bytes:
        return jpeg.encode(self._film.composited(number, prediction), _QUALITY)


def _tensor(name: str, values: NDArray[np.float32]) -> wire.InferInput:
    tensor = wire.InferInput(name, list(values.shape), "FP32")
    tensor.set_data_from_numpy(values)
    return tensor


def serve(film: HeldFilm, triton: str) -> None:
    """Serves on a free port, which it announces, until this process's standard input ends."""
    cv2.setNumThreads(1)
    service = Service(film, triton, len(os.sched_getaffinity(0)))
    handler = grpc.unary_unary_rpc_method_handler(
        service.answer, request_deserializer=Request.FromString, response_serializer=Response.SerializeToString
    )
    server = grpc.server(ThreadPoolExecutor(_WORKERS), options=CHANNEL)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    announce(f"127.0.0.1:{port}")
    wait_for_end()
    server.stop(None).wait()


if __name__ == "__main__":
    serve(HeldFilm(Path(sys.argv[1])), sys.argv[2])
