"""The compositor: a tenant, frame numbers and speech go in, finished frames come out.

The one path that every transport calls. Inference is awaited; blending and encoding run in a thread pool, handed over
once for each batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from .audio import SAMPLE_RATE
from .blending import ROI_SIZE, Pixels, set_prediction, split_planes
from .call import Call, Frame, Stages
from .deadline import Deadline
from .errors import EncoderMissing, InvalidInput, TenantBroken, TenantNotFound
from .features import FeatureStream, frame_count
from .geometry import ping_pong
from .manifest import RAW_SUFFIX
from .rendering import Rendered, render
from .settings import Settings
from .tenant import Tenant
from .tenants import Tenants
from .tracing import traced
from .triton.fleet import Fleet
from .triton.inference import Mouths, Triton

Samples = NDArray[np.float32]
Features = NDArray[np.float32]
Answer = TypeVar("Answer")
Observe = Callable[[str, float], None]

FEATURE_SHAPE = (32, 16, 16)
VISUAL_SHAPE = (6, ROI_SIZE, ROI_SIZE)
BATCHES_AHEAD = 4
"""Batches of one stream that are in work at once: enough to keep inference and compositing busy side by side."""
CHUNK_S = 0.48
"""Speech of a stream that becomes features at once: 12 frames at 25 fps."""
_HANDED_OVER = 8
"""Mouths that one thread of the pool gets at once: fewer would cost more hand-overs, more would leave threads idle."""


class Compositor:
    """Speech and frame numbers in, frames out, for every tenant in the repository."""

    def __init__(
        self, settings: Settings, fleet: Fleet, pool: ThreadPoolExecutor, observe: Observe = lambda stage, seconds: None
    ) -> None:
        """observe: is told of every stage (`metrics.STAGES`) how many seconds it took."""
        self.settings = settings
        self._observe = observe
        self.fleet = fleet
        self.pool = pool
        self._tenants = Tenants(settings.model_repository, settings.residency.open_mb * 10**6)

    async def open(self, name: str, stages: Stages) -> Tenant:
        """The tenant of that name. Raises InvalidInput, TenantNotFound or TenantBroken."""
        try:
            with stages.measure("open_s"):
                tenant, fresh = self._tenants.get(name)
        except TenantNotFound:
            await self.fleet.drop(name)
            raise
        if fresh:
            # Triton may hold what these files replaced.
            self.fleet.replaced(name)
        return tenant

    async def features(self, call: Call, samples: Samples, rate: int, fps: int) -> Features:
        """Audio features float32 (n, 32, 16, 16) of a short speech: mono samples at `rate` Hz, n frames at `fps`."""
        parts = [part async for part in self._feature_stream(call, samples, rate, fps)]
        return np.concatenate(parts)

    async def composite(
        self,
        call: Call,
        numbers: Sequence[int],
        features: Features,
        visual: NDArray[np.float32] | None = None,
    ) -> list[Frame]:
        """Frames `numbers` for audio features float32 (n, 32, 16, 16), n = 1 to the setting `server.max_frames`.

        visual: float32 (n, 6, 320, 320) for the classical call, which predicts from the caller's own pictures.
        """
        self._check_composite(call, numbers, features, visual)
        size = self.batch_size(call.tenant)
        ahead = asyncio.Semaphore(BATCHES_AHEAD)

        async def work(batch: slice) -> list[Rendered]:
            async with ahead:
                own = None if visual is None else visual[batch]
                return await self._batch(call, numbers[batch], features[batch], own)

        batches = [slice(begin, begin + size) for begin in range(0, len(numbers), size)]
        tasks = [asyncio.create_task(work(batch)) for batch in batches]
        try:
            done = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        rendered = itertools.chain.from_iterable(done)
        fps = call.tenant.manifest.fps
        return [
            Frame(frame.data, number, position * SAMPLE_RATE // fps)
            for position, (number, frame) in enumerate(zip(numbers, rendered, strict=True))
        ]

    def _check_composite(
        self, call: Call, numbers: Sequence[int], features: Features, visual: NDArray[np.float32] | None
    ) -> None:
        most = self.settings.server.max_frames
        manifest, limit_mb = call.tenant.manifest, self.settings.server.max_message_mb
        if not 1 <= len(numbers) <= most:
            raise InvalidInput(f"{len(numbers)} frames asked for: one call makes 1 to {most}", field="frames")
        if len(features) != len(numbers):
            raise InvalidInput(
                f"{len(numbers)} frames but audio for {len(features)}: give as much of both", field="audio"
            )
        if visual is not None and len(visual) != len(numbers):
            raise InvalidInput(
                f"{len(numbers)} frames but visual tensors for {len(visual)}: give as many of both",
                field="visual_frames",
            )
        if call.output.raw and len(numbers) * manifest.width * manifest.height * 3 > limit_mb << 20:
            raise InvalidInput(
                f"{len(numbers)} raw frames of {manifest.width}x{manifest.height} are more than {limit_mb} MiB: "
                "ask for fewer, or use Generate",
                field="output.format",
            )
        for number in numbers:
            call.tenant.check_frame(number)

    async def generate(
        self, call: Call, samples: Samples, rate: int, start: int = 0, fps: int = 0
    ) -> AsyncGenerator[Frame, None]:
        """The frames of a whole speech, in order, each as soon as it and its forerunners are ready.

        samples: float32 mono at `rate` Hz. start: position of the first background in the endless ping-pong order.
        fps: 1 to 60, or 0 for the tenant's own. A consumer that stops taking frames stops the work.
        """
        fps = fps or call.tenant.manifest.fps
        working: deque[tuple[int, asyncio.Task[list[Rendered]]]] = deque()
        position = 0
        try:
            async with contextlib.aclosing(self._batches(call, samples, rate, fps)) as batches:
                async for features in batches:
                    numbers = self._numbers(call.tenant, start + position, len(features))
                    working.append((position, asyncio.create_task(self._batch(call, numbers, features))))
                    position += len(features)
                    while working and (working[0][1].done() or len(working) >= BATCHES_AHEAD):
                        for frame in self._frames(call.tenant, start, fps, *await _first(working)):
                            yield frame
            while working:
                for frame in self._frames(call.tenant, start, fps, *await _first(working)):
                    yield frame
        finally:
            for _, task in working:
                task.cancel()
            await asyncio.gather(*(task for _, task in working), return_exceptions=True)

    def _numbers(self, tenant: Tenant, position: int, count: int) -> list[int]:
        return [ping_pong(position + step, tenant.frames) for step in range(count)]

    def _frames(self, tenant: Tenant, start: int, fps: int, position: int, rendered: list[Rendered]) -> Iterator[Frame]:
        numbers = self._numbers(tenant, start + position, len(rendered))
        for step, (number, frame) in enumerate(zip(numbers, rendered, strict=True)):
            yield Frame(frame.data, number, (position + step) * SAMPLE_RATE // fps)

    async def _batches(self, call: Call, samples: Samples, rate: int, fps: int) -> AsyncGenerator[Features, None]:
        """Features in batches of the size that the tenant takes, the last one perhaps smaller."""
        size = self.batch_size(call.tenant)
        kept = np.empty((0, *FEATURE_SHAPE), np.float32)
        async with contextlib.aclosing(self._feature_stream(call, samples, rate, fps)) as stream:
            async for features in stream:
                kept = np.concatenate((kept, features))
                while len(kept) >= size:
                    yield kept[:size]
                    kept = kept[size:]
        if len(kept):
            yield kept

    async def _feature_stream(
        self, call: Call, samples: Samples, rate: int, fps: int
    ) -> AsyncGenerator[Features, None]:
        stream = FeatureStream(rate, fps, self.settings.audio.edge)
        step = max(1, int(rate * CHUNK_S))
        for begin in range(0, len(samples), step):
            with self._measure(call, "features"):
                last = begin + step >= len(samples)
                windows = await self.in_pool(_advance, stream, samples[begin : begin + step], last)
            if len(windows):
                stream.put_embeddings(await self.embeddings(call, windows))
            features = stream.take_features()
            if len(features):
                yield features

    async def embeddings(self, call: Call, windows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Embeddings float32 (n, 512) of mel windows float32 (n, 1, 80, 16), by the tenant's audio encoder."""
        encoder = call.tenant.manifest.encoder
        deadline = self._step_deadline(call)
        return await self._resident(
            encoder, call, deadline, "features", lambda triton: triton.embeddings(encoder, windows, deadline)
        )

    def _step_deadline(self, call: Call) -> Deadline:
        return call.step_deadline(self.settings.server.timeout_s)

    def batch_size(self, tenant: Tenant) -> int:
        """Most frames in one request to Triton."""
        return min(tenant.manifest.max_batch_size, self.settings.triton.slot_frames)

    async def _batch(
        self, call: Call, numbers: Sequence[int], features: Features, visual: NDArray[np.float32] | None = None
    ) -> list[Rendered]:
        """At most one request to Triton: mouths, then blend and encode in the pool."""
        works = [partial(render, call.tenant, number, output=call.output) for number in numbers]
        return await self._predict(call, numbers, features, works, visual)

    async def predict(
        self, call: Call, numbers: Sequence[int], features: Features, works: Sequence[Callable[[Pixels], Answer]]
    ) -> list[Answer]:
        """One request to Triton of at most `batch_size` frames; what each work makes, in the pool, of its mouth.

        A work gets planes of BGR uint8 (3, 328, 328), whose memory is another's as soon as it returns.
        """
        return await self._predict(call, numbers, features, works, None)

    async def _predict(
        self,
        call: Call,
        numbers: Sequence[int],
        features: Features,
        works: Sequence[Callable[[Pixels], Answer]],
        visual: NDArray[np.float32] | None,
    ) -> list[Answer]:
        mouths = await self._mouths(call, numbers, features, visual)
        try:
            # Of other files now, and the mouths would be another person's.
            self._tenants.check_current(call.tenant)
            with traced(call.span, "render"):
                answers = await self._render(works, mouths.crops)
        finally:
            # After a cancellation a thread may still read mouths that are being overwritten: its frames are dropped.
            mouths.release()
        for answer in answers:
            if isinstance(answer, Rendered):
                self._account(call, "blend", answer.blend_s)
                self._account(call, "encode", answer.encode_s)
        return answers

    async def _render(self, works: Sequence[Callable[[Pixels], Answer]], crops: Pixels) -> list[Answer]:
        """What each work makes, in the pool, of its mouth."""
        handed_s = time.perf_counter()
        parts = [slice(begin, begin + _HANDED_OVER) for begin in range(0, len(works), _HANDED_OVER)]
        made = await asyncio.gather(*(self.in_pool(_carry_out, works[part], crops[part]) for part in parts))
        for begin_s, _ in made:
            self._observe("pool", begin_s - handed_s)
        return list(itertools.chain.from_iterable(answers for _, answers in made))

    @contextlib.contextmanager
    def _measure(self, call: Call, stage: str) -> Iterator[None]:
        """The wall time of the block is that of a stage."""
        begin = time.perf_counter()
        try:
            with traced(call.span, stage):
                yield
        finally:
            self._account(call, stage, time.perf_counter() - begin)

    def _account(self, call: Call, stage: str, seconds: float) -> None:
        call.stages.add(f"{stage}_s", seconds)
        self._observe(stage, seconds)

    async def _mouths(
        self, call: Call, numbers: Sequence[int], features: Features, visual: NDArray[np.float32] | None
    ) -> Mouths:
        tenant, deadline = call.tenant, self._step_deadline(call)
        if visual is not None:
            model = tenant.name + RAW_SUFFIX
            predictions = await self._resident(
                model,
                call,
                deadline,
                "inference",
                lambda triton: triton.predictions(model, visual, features, deadline),
            )
            crops = await self.in_pool(_set_predictions, tenant, numbers, predictions)
            return Mouths(crops, lambda: None)
        subject: NDArray[np.int32] | NDArray[np.uint8] = (
            np.array(numbers, np.int32)
            if tenant.manifest.crops == "resident"
            else await self.in_pool(_crops, tenant, numbers)
        )
        return await self._resident(
            tenant.name,
            call,
            deadline,
            "inference",
            lambda triton: triton.mouths(tenant.name, subject, features, deadline),
        )

    async def _resident(
        self, model: str, call: Call, deadline: Deadline, stage: str, request: Callable[[Triton], Awaitable[Answer]]
    ) -> Answer:
        """A request to a model, which may have to be loaded first. Its time counts for `stage`."""

        async def ask(triton: Triton) -> Answer:
            with self._measure(call, stage):
                return await request(triton)

        return await self._serve(model, call, deadline, ask)

    async def _serve(
        self, model: str, call: Call, deadline: Deadline, request: Callable[[Triton], Awaitable[Answer]]
    ) -> Answer:
        """A request to a model; the wait for its load, if it is not there, counts for the stage `load`."""
        loading = partial(self._measure, call, "load")
        try:
            return await self.fleet.serve(model, deadline, request, loading, call.tenant.name)
        except TenantBroken as error:
            if model == call.tenant.manifest.encoder:
                raise EncoderMissing(f"the audio encoder {model!r} does not load: {error.message}") from error
            raise

    async def load(self, call: Call) -> None:
        """Returns when the tenant's model and its audio encoder are loaded."""
        for model in (call.tenant.manifest.encoder, call.tenant.name):
            await self._serve(model, call, self._step_deadline(call), _nothing)

    def in_pool(self, work: Callable[..., Answer], *arguments: object) -> asyncio.Future[Answer]:
        """Work that takes the CPU, off the event loop."""
        return asyncio.get_running_loop().run_in_executor(self.pool, work, *arguments)

    def frames_of(self, samples: int, rate: int, fps: int) -> int:
        """How many frames a speech of `samples` at `rate` Hz has."""
        return frame_count(-(-samples * SAMPLE_RATE // rate), fps)


async def _first(working: deque[tuple[int, asyncio.Task[list[Rendered]]]]) -> tuple[int, list[Rendered]]:
    position, task = working[0]
    rendered = await task
    working.popleft()
    return position, rendered


async def _nothing(triton: Triton) -> None:
    """The request of a call that only wants a model to be loaded."""


def _advance(stream: FeatureStream, samples: Samples, last: bool) -> NDArray[np.float32]:
    stream.push(samples)
    if last:
        stream.finish()
    return stream.take_windows()


def _carry_out(works: Sequence[Callable[[Pixels], Answer]], crops: Pixels) -> tuple[float, list[Answer]]:
    """What the works make, and since when."""
    return time.perf_counter(), [work(crop) for work, crop in zip(works, crops, strict=True)]


def _crops(tenant: Tenant, numbers: Sequence[int]) -> NDArray[np.uint8]:
    return np.stack([tenant.crop_planes(number) for number in numbers])


def _set_predictions(tenant: Tenant, numbers: Sequence[int], predictions: NDArray[np.float32]) -> NDArray[np.uint8]:
    pairs = zip(numbers, predictions, strict=True)
    mouths = (set_prediction(tenant.crop(number), prediction) for number, prediction in pairs)
    return np.stack([split_planes(mouth) for mouth in mouths])
