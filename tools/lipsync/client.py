"""The speaking client: a WAV goes to a compositor, frames come back and become a video or a folder of pictures."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Protocol

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from compositor.errors import LipsyncError, TritonUnavailable
from compositor.proto import lipsync_v1_pb2 as pb
from compositor.proto import lipsync_v1_pb2_grpc as pb_grpc


class ServiceFailed(LipsyncError):
    """The service answered with an error, told in its own words."""


class Sink(Protocol):
    """Where frames go: a folder, or a compositor.video.Video."""

    def put(self, data: bytes) -> None: ...

    def close(self) -> None:
        """Completes what was written."""

    def discard(self) -> None:
        """Gives up; what was there before stays, where that can be."""


def speak(address: str, tenant: str, wav: bytes, timeout_s: float | None = None) -> Iterator[pb.GenerateResponse]:
    """The service's answers to a speech, as they come. Raises ServiceFailed or TritonUnavailable."""
    with grpc.insecure_channel(address, options=[("grpc.max_receive_message_length", -1)]) as channel:
        stub = pb_grpc.LipsyncStub(channel)  # type: ignore[no-untyped-call]
        speech = pb.Speech(data=wav, encoding=pb.Speech.WAV)
        try:
            yield from stub.Generate(pb.GenerateRequest(tenant=tenant, speech=speech), timeout=timeout_s)
        except grpc.RpcError as error:
            raise failure_of(address, error) from error


def receive(
    address: str, tenant: str, wav: bytes, sink_for: Callable[[int], Sink], arrived: Callable[[pb.Frame], None]
) -> pb.Summary:
    """Speaks a WAV and hands every frame to a sink; returns the service's summary.

    sink_for: makes the sink for a frame rate, once the first two frames tell it. arrived: called with each frame.
    """
    sink: Sink | None = None
    waiting: list[pb.Frame] = []
    summary = pb.Summary()
    try:
        for answer in speak(address, tenant, wav):
            if answer.WhichOneof("event") == "summary":
                summary = answer.summary
                continue
            arrived(answer.frame)
            waiting.append(answer.frame)
            if sink is None and len(waiting) == 2:
                sink = sink_for(round(16_000 / (waiting[1].pts_samples - waiting[0].pts_samples)))
            if sink is not None:
                _put_all(sink, waiting)
        sink = sink or sink_for(summary.fps)
        _put_all(sink, waiting)
        sink.close()
    except BaseException:
        if sink is not None:
            sink.discard()
        raise
    return summary


def _put_all(sink: Sink, frames: list[pb.Frame]) -> None:
    for frame in frames:
        sink.put(frame.data)
    frames.clear()


def failure_of(address: str, error: grpc.RpcError) -> LipsyncError:
    """What a call to the service at `address` failed of, in words for its operator."""
    status = rpc_status.from_call(error)
    if error.code() is grpc.StatusCode.UNAVAILABLE and status is None:
        return TritonUnavailable(f"no compositor answers at {address}; start one with `lipsync up`, or use --server")
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        return ServiceFailed(
            f"something answers at {address}, but no compositor (is that Triton's port?);"
            " give the compositor's gRPC address with --server"
        )
    wait_s = _retry_after_s(status.details if status is not None else ())
    hint = "" if wait_s is None else f" (try again in {wait_s:g} s)"
    return ServiceFailed(f"{error.code().name}: {error.details()}{hint}")


def _retry_after_s(details: Iterable[any_pb2.Any]) -> float | None:
    """When the service says that trying again helps, in seconds."""
    info = error_details_pb2.RetryInfo()
    for detail in details:
        if detail.Unpack(info):
            return float(info.retry_delay.seconds + info.retry_delay.nanos / 1e9)
    return None


class FolderSink:
    """A folder with every frame as it came, frame_00000.jpg, ..., and the speech beside them."""

    def __init__(self, path: Path, wav: bytes) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._count = 0
        with (path / "speech.wav").open("wb") as file:
            shutil.copyfileobj(BytesIO(wav), file)

    def put(self, data: bytes) -> None:
        (self._path / f"frame_{self._count:05d}.jpg").write_bytes(data)
        self._count += 1

    def close(self) -> None:
        """Every file is complete already."""

    def discard(self) -> None:
        """Frames that came stay: each is whole."""
