"""One segment of live speech: PCM bytes come in as a client sends them; features come out frame by frame, and the bytes
themselves again, piece by piece, when their frames are shown. Knows no clock, no tenant and no Triton."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from . import pcm
from .errors import InvalidInput, Overloaded
from .features import Edge, Features, FeatureStream, Windows

Encoding = Literal["pcm16", "float32"]
SAMPLE_BYTES = {"pcm16": 2, "float32": 4}
FED_S = 0.48
"""Most speech that becomes features at once, so that a long burst does not hold up the event loop."""
_BEFORE, _AFTER = 4, 2
"""Frames around a frame whose loudness keeps its mouth moving: 160 ms after a word, 80 ms before it, at 25 fps."""


class Loudness:
    """Which frames are silent: those with no speech above a level in them or near them."""

    def __init__(self, rate: int, fps: int, floor_dbfs: float) -> None:
        self._rate, self._fps = rate, fps
        self._floor = 10 ** (floor_dbfs / 10)  # mean square
        self._loud: deque[bool] = deque()
        self._first = 0  # the frame of self._loud[0]
        self._rest = np.empty(0, np.float32)

    def push(self, samples: NDArray[np.float32]) -> None:
        """Takes in mono samples in [-1, 1]."""
        self._rest = np.concatenate((self._rest, samples))
        while len(self._rest) >= (size := self._size(self._first + len(self._loud))):
            self._measure(size)

    def finish(self) -> None:
        """The rest is a frame, too."""
        if len(self._rest):
            self._measure(len(self._rest))

    def silent(self, frame: int) -> bool:
        """Whether a frame is; to be asked in ascending order. What has not been heard yet counts as silence."""
        while self._loud and self._first < frame - _BEFORE:
            self._loud.popleft()
            self._first += 1
        return not any(list(self._loud)[: frame + _AFTER + 1 - self._first])

    def _size(self, frame: int) -> int:
        return (frame + 1) * self._rate // self._fps - frame * self._rate // self._fps

    def _measure(self, size: int) -> None:
        block, self._rest = self._rest[:size], self._rest[size:]
        self._loud.append(float(np.mean(np.square(block, dtype=np.float64))) > self._floor)


class Segment:
    """Speech from its first sample to its end."""

    def __init__(
        self,
        rate: int,
        encoding: Encoding,
        fps: int,
        *,
        edge: Edge,
        lookahead_ms: float,
        floor_dbfs: float,
        most_s: float,
        begin_s: float,
    ) -> None:
        """begin_s: when its first speech came, on the session's clock. most_s: how much may wait to be shown."""
        self.begin_s = begin_s
        self.shown = 0
        """Samples whose time has come."""
        self.started = False
        self._stream = FeatureStream(rate, fps, edge, lookahead_ms)
        self._loudness = Loudness(rate, fps, floor_dbfs)
        self._pcm = pcm.pcm16 if encoding == "pcm16" else pcm.pcm_float32
        self._sample = SAMPLE_BYTES[encoding]
        self._most = int(most_s * rate) * self._sample
        self._fed_at_once = int(FED_S * rate) * self._sample
        self._waiting = bytearray()  # came, and is not fed to the stream
        self._held = bytearray()  # came, and was not shown
        self._news = asyncio.Event()
        self._ended = False

    def push(self, data: bytes) -> None:
        """More speech; samples may be cut anywhere. Raises Overloaded where too much waits."""
        if len(self._held) + len(data) > self._most:
            raise Overloaded(
                "too much speech waits to be shown; send it as it is shown, or raise live.buffer_s", retry_after_s=1
            )
        self._waiting += data
        self._held += data
        self._news.set()

    def end(self) -> None:
        """No more will come. Raises InvalidInput where the last sample is not whole."""
        if len(self._waiting) % self._sample:
            raise InvalidInput("the speech ends within a sample: send whole samples", field="audio")
        self._ended = True
        self._news.set()

    @property
    def ended(self) -> bool:
        return self._ended

    def take(self, samples: int) -> bytes:
        """The next `samples` of the speech itself, fewer at its end: they are heard now."""
        size = min(samples * self._sample, len(self._held) // self._sample * self._sample)
        data = bytes(self._held[:size])
        del self._held[:size]
        self.shown += size // self._sample
        return data

    def take_rest(self) -> bytes:
        """What is left of an ended speech after its last frame: a sample, where rate and fps do not divide."""
        return self.take(len(self._held))

    async def frames(
        self, embed: Callable[[Windows], Awaitable[NDArray[np.float32]]]
    ) -> AsyncGenerator[NDArray[np.float32] | None, None]:
        """Each frame's features float32 (32, 16, 16), as soon as its speech is there; None for one with nothing but
        silence around it. `embed` encodes windows, as FeatureStream wants them.

        Raises InvalidInput for samples that are no numbers, and what `embed` raises.
        """
        frame = 0
        while not self._stream.done:
            await self._feed()
            windows = self._stream.take_windows()
            if len(windows):
                self._stream.put_embeddings(await embed(windows))
            features: Features = self._stream.take_features()
            for one in features:
                yield None if self._loudness.silent(frame) else one
                frame += 1

    async def _feed(self) -> None:
        """Hands the stream what has come, or the end; waits where there is neither."""
        while len(self._waiting) < self._sample and not self._ended:
            self._news.clear()
            await self._news.wait()
        size = min(len(self._waiting), self._fed_at_once) // self._sample * self._sample
        if size:
            samples = self._pcm(bytes(self._waiting[:size]), 1)
            del self._waiting[:size]
            self._stream.push(samples)
            self._loudness.push(samples)
        if self._ended and not self._waiting:
            self._stream.finish()
            self._loudness.finish()
