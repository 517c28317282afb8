"""The service as its clients meet it: real gRPC, real Triton, every kind of request, every kind of bad one."""

from __future__ import annotations

import io
import wave
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status
from numpy.typing import NDArray

from compositor import jpeg
from compositor.blending import set_prediction, split_planes
from compositor.geometry import ping_pong
from compositor.proto import lipsync_v1_pb2 as pb
from compositor.proto import lipsync_v1_pb2_grpc as pb_grpc
from compositor.rendering import Output, render
from compositor.tenant import Tenant

from ..conftest import Stack

pytestmark = pytest.mark.triton

Tone = Callable[[float, int], NDArray[np.float32]]
FEATURE_BYTES = 32 * 16 * 16 * 4


def features(count: int, value: float = 0.0) -> bytes:
    return np.full((count, 32, 16, 16), value, np.float32).tobytes()


def pcm16(samples: NDArray[np.float32]) -> bytes:
    return (samples * 32767).astype("<i2").tobytes()


def wav(samples: NDArray[np.float32], rate: int) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes(pcm16(samples))
    return buffer.getvalue()


def composite(stub: pb_grpc.LipsyncStub, tenant: str = "plain", **fields: Any) -> pb.CompositeResponse:
    answer: pb.CompositeResponse = stub.Composite(pb.CompositeRequest(tenant=tenant, **fields), timeout=60)
    return answer


def numbers(*values: int) -> pb.FrameNumbers:
    return pb.FrameNumbers(numbers=values)


def same_as_idle(frame: pb.Frame, tenant: Tenant) -> float:
    """Mean absolute difference to the prepared frame, grey levels."""
    return float(np.abs(jpeg.decode(frame.data).astype(int) - jpeg.decode(tenant.frame(frame.number).jpeg())).mean())


def test_composite_gives_the_frames_asked_for_in_order(stub: pb_grpc.LipsyncStub, stack: Stack) -> None:
    answer = composite(stub, numbers=numbers(3, 0, 7, 3, 1), features=features(5))
    assert [frame.number for frame in answer.frames] == [3, 0, 7, 3, 1]
    tenant = Tenant(stack.repository, "plain")
    for frame in answer.frames:
        # The do-nothing model predicts the ROI itself, so the frame is the idle one, byte for byte.
        assert frame.data == tenant.frame(frame.number).jpeg()
        assert (frame.width, frame.height) == (320, 240)
    assert answer.stages.inference_s > 0
    assert answer.stages.total_s > 0


def test_sent_crops_give_the_same_frames(stub: pb_grpc.LipsyncStub) -> None:
    wanted = {"numbers": numbers(*range(8)), "features": features(8, 0.1)}
    resident, sent = (composite(stub, tenant, **wanted) for tenant in ("plain", "sent"))
    assert [frame.data for frame in resident.frames] == [frame.data for frame in sent.frames]


@pytest.mark.parametrize("count", [1, 4, 5, 50])
def test_composite_from_a_start_follows_the_ping_pong_order(stub: pb_grpc.LipsyncStub, count: int) -> None:
    answer = composite(stub, start=5, features=features(count))
    assert [frame.number for frame in answer.frames] == [ping_pong(5 + step, 8) for step in range(count)]


def test_the_classical_call_pastes_what_the_raw_model_predicts(stub: pb_grpc.LipsyncStub, stack: Stack) -> None:
    rng = np.random.default_rng(5)
    visual = rng.random((3, 6, 320, 320), np.float32)
    answer = composite(stub, numbers=numbers(0, 4, 2), features=features(3), visual_frames=visual.tobytes())
    tenant = Tenant(stack.repository, "plain")
    for frame, prediction in zip(answer.frames, visual[:, :3], strict=True):
        expected = render(
            tenant,
            frame.number,
            split_planes(set_prediction(tenant.crop(frame.number), prediction)),
            Output(),
        )
        assert frame.data == expected.data


def test_raw_output_is_the_picture(stub: pb_grpc.LipsyncStub, stack: Stack) -> None:
    raw = pb.Output(format=pb.Output.BGR24)
    frame = composite(stub, numbers=numbers(2), features=features(1), output=raw).frames[0]
    picture = np.frombuffer(frame.data, np.uint8).reshape(240, 320, 3).astype(int)
    idle = jpeg.decode(Tenant(stack.repository, "plain").frame(2).jpeg())
    assert np.abs(picture - idle).mean() < 3


def test_another_quality_is_encoded_anew(stub: pb_grpc.LipsyncStub) -> None:
    sizes = []
    for quality in (20, 0, 95):
        output = pb.Output(quality=quality)
        frame = composite(stub, numbers=numbers(2), features=features(1), output=output).frames[0]
        assert jpeg.decode(frame.data).shape == (240, 320, 3)
        assert b"compositeWithTrainedAlgorithmicMedia" in frame.data
        sizes.append(len(frame.data))
    assert sizes == sorted(sizes)


@pytest.mark.parametrize(("rate", "channels"), [(16_000, 1), (24_000, 1), (44_100, 2), (8_000, 1)])
def test_generate_gives_a_frame_for_every_40_ms(
    stub: pb_grpc.LipsyncStub, tone: Tone, rate: int, channels: int
) -> None:
    samples = np.repeat(tone(1.0, rate), channels)
    speech = pb.Speech(data=pcm16(samples), sample_rate=rate, channels=channels)
    answers = list(stub.Generate(pb.GenerateRequest(tenant="plain", speech=speech, start=6), timeout=60))
    frames = [answer.frame for answer in answers[:-1]]
    assert [frame.pts_samples for frame in frames] == [640 * number for number in range(25)]
    assert [frame.number for frame in frames] == [ping_pong(6 + step, 8) for step in range(25)]
    assert answers[-1].summary.frames == 25
    assert answers[-1].summary.fps == 25


def test_generate_at_30_fps(stub: pb_grpc.LipsyncStub, tone: Tone) -> None:
    speech = pb.Speech(data=tone(1.0, 16_000).tobytes(), encoding=pb.Speech.FLOAT32)
    answers = list(stub.Generate(pb.GenerateRequest(tenant="plain", speech=speech, fps=30), timeout=60))
    assert len(answers) == 31
    assert answers[3].frame.pts_samples == 1600


def test_composite_from_speech_equals_generate(stub: pb_grpc.LipsyncStub, tone: Tone) -> None:
    speech = pb.Speech(data=wav(tone(1.3, 22_050), 22_050), encoding=pb.Speech.WAV)
    unary = composite(stub, "avatar", start=0, speech=speech)
    stream = [
        answer.frame.data
        for answer in stub.Generate(pb.GenerateRequest(tenant="avatar", speech=speech), timeout=60)
        if answer.HasField("frame")
    ]
    assert len(unary.frames) == 33
    assert [frame.data for frame in unary.frames] == stream


def test_the_mouth_follows_loudness(stub: pb_grpc.LipsyncStub, stack: Stack, tone: Tone) -> None:
    quiet, loud = np.zeros(8_000, np.float32), tone(0.28, 16_000)
    samples = np.concatenate((quiet, quiet, loud, quiet, loud, quiet, loud, quiet, quiet))
    speech = pb.Speech(data=pcm16(samples))
    answers = stub.Generate(pb.GenerateRequest(tenant="avatar", speech=speech), timeout=60)
    tenant = Tenant(stack.repository, "avatar")
    change = np.array([same_as_idle(answer.frame, tenant) for answer in answers if answer.HasField("frame")])
    energy = np.abs(samples[: len(change) * 640]).reshape(len(change), 640).mean(axis=1)
    assert change[:18].max() < 0.02
    assert change[-8:].max() < 0.02
    assert np.corrcoef(energy, change)[0, 1] > 0.6
    assert change.max() > 0.1


def test_a_cancelled_stream_leaves_the_service_well(stub: pb_grpc.LipsyncStub, tone: Tone) -> None:
    speech = pb.Speech(data=pcm16(tone(20.0, 16_000)))
    for _ in range(10):
        stream = stub.Generate(pb.GenerateRequest(tenant="avatar", speech=speech), timeout=60)
        next(stream)
        stream.cancel()
    answer = composite(stub, numbers=numbers(0), features=features(1))
    assert len(answer.frames) == 1


def test_health_and_reflection(stack: Stack) -> None:
    with grpc.insecure_channel(stack.service.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "lipsync.v1.Lipsync"):
            states = health.Watch(health_pb2.HealthCheckRequest(service=name), timeout=30)
            assert any(state.status == health_pb2.HealthCheckResponse.SERVING for state in states)
            states.cancel()
        names = ProtoReflectionDescriptorDatabase(channel).get_services()
    assert {"lipsync.v1.Lipsync", "grpc.health.v1.Health"} <= set(names)


NOT_FINITE = np.full((1, 32, 16, 16), np.nan, np.float32).tobytes()
BAD_COMPOSITES: list[tuple[str, dict[str, Any], str, str]] = [
    ("unknown tenant", {"tenant": "nobody", "numbers": numbers(0), "features": features(1)}, "NOT_FOUND", "nobody"),
    (
        "a path as tenant",
        {"tenant": "../plain", "numbers": numbers(0), "features": features(1)},
        "INVALID_ARGUMENT",
        "no tenant name",
    ),
    ("no frames", {"numbers": numbers(), "features": features(1)}, "INVALID_ARGUMENT", "no frames asked for"),
    ("51 frames", {"numbers": numbers(*[0] * 51), "features": features(51)}, "INVALID_ARGUMENT", "51 frames"),
    ("51 windows", {"start": 0, "features": features(51)}, "INVALID_ARGUMENT", "51 frames"),
    ("no audio", {"numbers": numbers(0)}, "INVALID_ARGUMENT", "no audio"),
    ("empty features", {"numbers": numbers(0), "features": b""}, "INVALID_ARGUMENT", "features has 0 bytes"),
    (
        "short features",
        {"numbers": numbers(0), "features": features(1)[:-4]},
        "INVALID_ARGUMENT",
        f"{FEATURE_BYTES - 4} bytes",
    ),
    (
        "long features",
        {"numbers": numbers(0), "features": features(1) + b"\0"},
        "INVALID_ARGUMENT",
        f"{FEATURE_BYTES + 1} bytes",
    ),
    ("too few windows", {"numbers": numbers(0, 1), "features": features(1)}, "INVALID_ARGUMENT", "audio for 1"),
    ("NaN audio", {"numbers": numbers(0), "features": NOT_FINITE}, "INVALID_ARGUMENT", "NaN"),
    ("a frame out of range", {"numbers": numbers(8), "features": features(1)}, "INVALID_ARGUMENT", "0 to 7"),
    (
        "short visual",
        {"numbers": numbers(0), "features": features(1), "visual_frames": b"\0" * 100},
        "INVALID_ARGUMENT",
        "visual_frames has 100 bytes",
    ),
    (
        "too many visual frames",
        {"numbers": numbers(0), "features": features(1), "visual_frames": bytes(2 * 6 * 320 * 320 * 4)},
        "INVALID_ARGUMENT",
        "visual tensors for 2",
    ),
    (
        "bad quality",
        {"numbers": numbers(0), "features": features(1), "output": pb.Output(quality=101)},
        "INVALID_ARGUMENT",
        "quality 101",
    ),
    ("odd PCM", {"start": 0, "speech": pb.Speech(data=b"\0" * 3201)}, "INVALID_ARGUMENT", "3201 bytes"),
    (
        "a sample too short",
        {"start": 0, "speech": pb.Speech(data=b"\0\0", sample_rate=48_000)},
        "INVALID_ARGUMENT",
        "shorter than one sample",
    ),
    (
        "a long speech",
        {"start": 0, "speech": pb.Speech(data=bytes(16_000 * 2 * 3))},
        "INVALID_ARGUMENT",
        "use Generate",
    ),
]


@pytest.mark.parametrize(
    ("fields", "code", "words"), [case[1:] for case in BAD_COMPOSITES], ids=[case[0] for case in BAD_COMPOSITES]
)
def test_bad_composites_are_refused_and_the_service_goes_on(
    stub: pb_grpc.LipsyncStub, fields: dict[str, Any], code: str, words: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        composite(stub, **fields)
    error: Any = caught.value
    assert error.code().name == code
    assert words in error.details()
    assert len(composite(stub, numbers=numbers(0), features=features(1)).frames) == 1
    assert len(composite(stub, "avatar", numbers=numbers(0), features=features(1)).frames) == 1


BAD_SPEECHES: list[tuple[str, pb.GenerateRequest, str]] = [
    ("no data", pb.GenerateRequest(speech=pb.Speech()), "data is empty"),
    ("no WAV", pb.GenerateRequest(speech=pb.Speech(data=b"hello world, no wav", encoding=pb.Speech.WAV)), "WAV"),
    ("odd PCM", pb.GenerateRequest(speech=pb.Speech(data=b"\0" * 1001)), "1001 bytes"),
    ("odd stereo", pb.GenerateRequest(speech=pb.Speech(data=b"\0" * 1002, channels=2)), "1002 bytes"),
    (
        "NaN",
        pb.GenerateRequest(speech=pb.Speech(data=np.array([0, np.nan], "<f4").tobytes(), encoding=pb.Speech.FLOAT32)),
        "sample 1",
    ),
    ("strange rate", pb.GenerateRequest(speech=pb.Speech(data=b"\0" * 1000, sample_rate=7)), "7"),
    ("many channels", pb.GenerateRequest(speech=pb.Speech(data=b"\0" * 1200, channels=6)), "channels"),
    ("one sample", pb.GenerateRequest(speech=pb.Speech(data=b"\0\0", sample_rate=48_000)), "shorter than one sample"),
    ("61 fps", pb.GenerateRequest(speech=pb.Speech(data=b"\0" * 1000), fps=61), "fps 61"),
    ("an hour", pb.GenerateRequest(speech=pb.Speech(data=bytes(8000 * 2 * 601), sample_rate=8000)), "600 s"),
]


@pytest.mark.parametrize(
    ("request_", "words"), [case[1:] for case in BAD_SPEECHES], ids=[case[0] for case in BAD_SPEECHES]
)
def test_bad_speech_is_refused(stub: pb_grpc.LipsyncStub, request_: pb.GenerateRequest, words: str) -> None:
    request_.tenant = "plain"
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Generate(request_, timeout=60))
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert words in error.details()
    assert len(composite(stub, numbers=numbers(0), features=features(1)).frames) == 1


def test_errors_carry_details(stub: pb_grpc.LipsyncStub) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        composite(stub, numbers=numbers(99), features=features(1))
    error: Any = caught.value
    status = rpc_status.from_call(error)
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    assert status.details[0].Unpack(info)
    assert status.details[1].Unpack(bad)
    assert (info.domain, info.reason) == ("lipsync", "INVALID_INPUT")
    assert bad.field_violations[0].field == "frames"


def test_a_message_beyond_the_limit_is_refused(stub: pb_grpc.LipsyncStub) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        composite(stub, numbers=numbers(0), features=bytes(161 << 20))
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_deadline_ends_the_call(stub: pb_grpc.LipsyncStub, tone: Tone) -> None:
    speech = pb.Speech(data=pcm16(tone(60.0, 16_000)))
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Generate(pb.GenerateRequest(tenant="avatar", speech=speech), timeout=0.3))
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert len(composite(stub, numbers=numbers(0), features=features(1)).frames) == 1
