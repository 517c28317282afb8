"""The speaking client against a service of the test's own: what becomes of its output, and what it says of answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import cv2
import grpc
import numpy as np
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from compositor.errors import InvalidInput
from compositor.proto import lipsync_v1_pb2 as pb
from compositor.proto import lipsync_v1_pb2_grpc as pb_grpc
from lipsync.client import ServiceFailed
from lipsync.commands.speaking import read_speech, speak_to
from lipsync.sentences import NUMBERS

SPEECH = NUMBERS
WAV = SPEECH.read_bytes()
OVERLOADED = "overloaded"


class Service(pb_grpc.LipsyncServicer):
    """Says six frames, then as the tenant's name has it: `good` ends well, `broken` does not, `overloaded` at once."""

    def Generate(self, request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateResponse]:  # noqa: N802
        if request.tenant == OVERLOADED:
            info = any_pb2.Any()
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.FromMilliseconds(1500)
            info.Pack(retry)
            code = grpc.StatusCode.RESOURCE_EXHAUSTED
            context.abort_with_status(
                rpc_status.to_status(status_pb2.Status(code=code.value[0], message="queues are full", details=[info]))
            )
        _, picture = cv2.imencode(".jpg", np.full((48, 64, 3), 90, np.uint8))
        for number in range(6):
            frame = pb.Frame(data=picture.tobytes(), number=number, pts_samples=640 * number, width=64, height=48)
            yield pb.GenerateResponse(frame=frame)
        if request.tenant == "broken":
            context.abort(grpc.StatusCode.INTERNAL, "it broke")
        yield pb.GenerateResponse(summary=pb.Summary(frames=6, fps=25, stages=pb.Stages(total_s=1)))


def served(add: Callable[[grpc.Server], None]) -> Iterator[str]:
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        add(server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield f"127.0.0.1:{port}"
        server.stop(None).wait()


@pytest.fixture
def address() -> Iterator[str]:
    yield from served(lambda server: pb_grpc.add_LipsyncServicer_to_server(Service(), server))  # type: ignore[no-untyped-call]


@pytest.fixture
def stranger() -> Iterator[str]:
    """The address of a gRPC server without any service."""
    yield from served(lambda server: None)


def test_a_video_replaces_the_one_before_once_it_is_whole(address: str, tmp_path: Path) -> None:
    output = tmp_path / "out.mp4"
    output.write_bytes(b"before")
    speak_to(address, "good", WAV, str(output))
    with av.open(output) as container:
        assert container.streams.video[0].frames == 6
    assert list(tmp_path.iterdir()) == [output]


def test_a_failed_speech_leaves_the_video_of_before(address: str, tmp_path: Path) -> None:
    output = tmp_path / "out.mp4"
    output.write_bytes(b"before")
    with pytest.raises(ServiceFailed, match="INTERNAL: it broke"):
        speak_to(address, "broken", WAV, str(output))
    assert output.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("name", ["x.jpg", "x.nosuch", "x.wav"])
def test_a_format_that_holds_no_video_is_refused(address: str, tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidInput, match=rf"{name}: cannot be written as a video .*name it such as out\.mp4"):
        speak_to(address, "good", WAV, str(tmp_path / name))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("output", "made"), [("frames.v1/", False), ("there.v1", True), ("plain", False)])
def test_a_slash_or_a_folder_that_is_there_means_a_folder(
    address: str, tmp_path: Path, output: str, made: bool
) -> None:
    if made:
        (tmp_path / output).mkdir()
    speak_to(address, "good", WAV, f"{tmp_path}/{output}")
    assert len(list((tmp_path / output).glob("frame_*.jpg"))) == 6


def test_another_service_is_told_from_none(stranger: str, tmp_path: Path) -> None:
    with pytest.raises(ServiceFailed, match=f"something answers at {stranger}, but no compositor"):
        speak_to(stranger, "good", WAV, str(tmp_path / "out.mp4"))


def test_it_says_when_to_try_again(address: str, tmp_path: Path) -> None:
    with pytest.raises(ServiceFailed, match=r"RESOURCE_EXHAUSTED: queues are full \(try again in 1\.5 s\)$"):
        speak_to(address, OVERLOADED, WAV, str(tmp_path / "out.mp4"))


def test_a_speech_that_is_none_is_named() -> None:
    with pytest.raises(InvalidInput, match=r"test_client\.py: .*not a WAV"):
        read_speech(Path(__file__))
    with pytest.raises(InvalidInput, match=r"typo\.wav: cannot be read"):
        read_speech(Path("typo.wav"))
