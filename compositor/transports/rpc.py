"""gRPC: converts a request, calls the compositor, converts the frames back."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator

import numpy as np
from numpy.typing import NDArray

from .. import pcm
from ..call import Call, Frame, Stages
from ..deadline import Deadline
from ..errors import InvalidInput
from ..geometry import ping_pong
from ..pipeline import FEATURE_SHAPE, VISUAL_SHAPE, Compositor, Samples
from ..proto import lipsync_v1_pb2 as pb
from ..proto import lipsync_v1_pb2_grpc as pb_grpc
from ..sessions.live import Live
from ..tenant import Tenant
from .admission import Admission, check_fps, check_speech
from .ledger import Entry, Ledger
from .speak import Calls, output_of
from .status import Context, reporting, write
from .stopping import Stoppable


class LipsyncService(pb_grpc.LipsyncServicer):
    """lipsync.v1.Lipsync on a Compositor and its live sessions. Those end by `live_calls.stop()`, other calls
    by `calls.stop()`."""

    def __init__(self, compositor: Compositor, live: Live, admission: Admission, ledger: Ledger) -> None:
        self._compositor = compositor
        self._admission = admission
        self._ledger = ledger
        self.calls = Stoppable()
        self.live_calls = Calls(live, ledger)

    async def Composite(self, request: pb.CompositeRequest, context: Context) -> pb.CompositeResponse:  # noqa: N802
        """1 to 50 frames in one reply."""
        begin = time.perf_counter()
        async with reporting(context, self._ledger, "Composite") as entry, self.calls.told(), self._admission.counted():
            call = await self._call(request.tenant, request.output, context, entry)
            numbers, features = await self._frames_and_features(call, request)
            visual = None
            if request.visual_frames:
                visual = await asyncio.to_thread(_floats, request.visual_frames, VISUAL_SHAPE, "visual_frames")
            frames = await self._compositor.composite(call, numbers, features, visual)
            return pb.CompositeResponse(
                frames=[_frame(frame, call.tenant) for frame in frames], stages=_stages(call.stages, begin)
            )
        raise AssertionError("unreachable")

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:  # noqa: N802
        """Speech in, its frames as a stream, then one summary."""
        begin = time.perf_counter()
        async with reporting(context, self._ledger, "Generate") as entry, self.calls.told(), self._admission.counted():
            call = await self._call(request.tenant, request.output, context, entry)
            fps = request.fps or call.tenant.manifest.fps
            check_fps(fps)
            samples, rate = await self._speech(request.speech)
            count = 0
            frames = self._compositor.generate(call, samples, rate, request.start, fps)
            async with contextlib.aclosing(frames):
                async for frame in frames:
                    count += 1
                    entry.sending()
                    await write(context, pb.GenerateResponse(frame=_frame(frame, call.tenant)))
                    entry.sent()
            summary = pb.Summary(frames=count, fps=fps, stages=_stages(call.stages, begin))
            await write(context, pb.GenerateResponse(summary=summary))

    async def Speak(self, request_iterator: AsyncIterator[pb.SpeakRequest], context: Context) -> None:  # noqa: N802
        """A live session."""
        await self.live_calls.serve(request_iterator, context)

    async def _call(self, tenant: str, output: pb.Output, context: Context, entry: Entry) -> Call:
        stages = Stages()
        remaining_s = context.time_remaining()
        deadline = None if remaining_s is None else Deadline.after(remaining_s)
        wanted = output_of(output)
        opened = await self._compositor.open(tenant, stages)
        entry.serve(opened.name)
        return Call(opened, wanted, stages, deadline, entry.span)

    async def _frames_and_features(
        self, call: Call, request: pb.CompositeRequest
    ) -> tuple[list[int], NDArray[np.float32]]:
        audio = request.WhichOneof("audio")
        if audio is None:
            raise InvalidInput("no audio: give features (n x 32 x 16 x 16 float32) or speech", field="audio")
        numbers = list(request.numbers.numbers)
        explicit = request.WhichOneof("frames") == "numbers"
        if explicit and not numbers:
            raise InvalidInput("no frames asked for: one call makes 1 to 50", field="numbers")
        if audio == "features":
            features = await asyncio.to_thread(_floats, request.features, FEATURE_SHAPE, "features")
        else:
            samples, rate = await self._speech(request.speech)
            self._check_length(call, len(samples), rate)
            features = await self._compositor.features(call, samples, rate, call.tenant.manifest.fps)
        if not explicit:
            numbers = [ping_pong(request.start + step, call.tenant.frames) for step in range(len(features))]
        return numbers, features

    def _check_length(self, call: Call, samples: int, rate: int) -> None:
        count = self._compositor.frames_of(samples, rate, call.tenant.manifest.fps)
        most = self._compositor.settings.server.max_frames
        if count > most:
            raise InvalidInput(
                f"{samples / rate:.2f} s of speech are {count} frames: one call makes 1 to {most}; use Generate",
                field="speech",
            )

    async def _speech(self, speech: pb.Speech) -> tuple[Samples, int]:
        """Mono samples and their rate."""
        if not speech.data:
            raise InvalidInput("no speech: data is empty", field="speech.data")
        rate, channels = speech.sample_rate or 16_000, speech.channels or 1
        if speech.encoding == pb.Speech.WAV:
            samples, rate = await asyncio.to_thread(pcm.read_wav, speech.data)
        elif speech.encoding in (pb.Speech.ENCODING_UNSPECIFIED, pb.Speech.PCM16):
            samples = await asyncio.to_thread(pcm.pcm16, speech.data, channels)
        elif speech.encoding == pb.Speech.FLOAT32:
            samples = await asyncio.to_thread(pcm.pcm_float32, speech.data, channels)
        else:
            raise InvalidInput(
                f"encoding {speech.encoding} is unknown: use PCM16, FLOAT32 or WAV", field="speech.encoding"
            )
        check_speech(samples, rate, self._compositor.settings.server.max_audio_s)
        return samples, rate


def _floats(data: bytes, shape: tuple[int, ...], field: str) -> NDArray[np.float32]:
    """Little-endian float32 (n, *shape). Raises InvalidInput for another size and for NaN or infinity."""
    size = int(np.prod(shape)) * 4
    dimensions = "x".join(map(str, shape))
    if not data or len(data) % size:
        raise InvalidInput(f"{field} has {len(data)} bytes: give n x {size}, float32 n x {dimensions}", field=field)
    values = np.frombuffer(data, "<f4").reshape(-1, *shape)
    if not np.isfinite(values).all():
        frame = int(np.argwhere(~np.isfinite(values))[0][0])
        raise InvalidInput(f"{field} holds NaN or infinity in frame {frame}", field=field)
    return values


def _frame(frame: Frame, tenant: Tenant) -> pb.Frame:
    return pb.Frame(
        data=frame.data,
        number=frame.number,
        pts_samples=frame.pts_samples,
        width=tenant.manifest.width,
        height=tenant.manifest.height,
    )


def _stages(stages: Stages, begin: float) -> pb.Stages:
    return pb.Stages(total_s=time.perf_counter() - begin, **dataclasses.asdict(stages))
