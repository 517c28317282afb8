"""One segment of live speech: PCM bytes come in as a client sends them; features come out frame by frame, and the bytes
themselves again, piece by piece, when their frames are shown. Knows no clock, no tenant and no Triton."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .. import pcm
from ..errors import InvalidInput
from ..features import FIRST_WINDOW, LAST_WINDOW, Edge, FeatureStream, Windows, window_lookahead_ms

Encoding = Literal["pcm16", "float32"]
SAMPLE_BYTES = {"pcm16": 2, "float32": 4}
FED_S = 0.48
"""Most speech that becomes features at once, so that a long burst does not hold up the event loop."""
FED_LEAST_S = 0.01
"""Least speech that becomes features at once: by the sample it would take all of a CPU."""
_WINDOW_STEP_MS = 12.5  # windows start at whole columns, and may need this much less
_BEFORE_MS, _AFTER_MS = 160, 80
"""How long before and after a frame loud speech keeps its mouth moving."""


class Loudness:
    """Which frames are silent: those with no speech above a level in them or near them."""

    def __init__(self, rate: int, fps: int, floor_dbfs: float, lookahead_ms: float) -> None:
        self._rate, self._fps = rate, fps
        # No more frames than are sure to be heard by then, or the chunking of the speech would decide what is silent.
        heard_ms = _needed_ms(lookahead_ms) - _WINDOW_STEP_MS
        self._after = max(-1, min(-(-_AFTER_MS * fps // 1000), int(heard_ms * fps / 1000) - 1))
        self._before = -(-_BEFORE_MS * fps // 1000)
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
        """Whether a frame is; to be asked in ascending order, and as soon as its features are there."""
        while self._loud and self._first < frame - self._before:
            self._loud.popleft()
            self._first += 1
        return not any(list(self._loud)[: max(0, frame + self._after + 1 - self._first)])

    def _size(self, frame: int) -> int:
        return (frame + 1) * self._rate // self._fps - frame * self._rate // self._fps

    def _measure(self, size: int) -> None:
        block, self._rest = self._rest[:size], self._rest[size:]
        self._loud.append(float(np.mean(np.square(block, dtype=np.float64))) > self._floor)


def _needed_ms(lookahead_ms: float) -> float:
    """Speech after a frame's begin that its windows need; negative: not even its begin."""
    windows = (window_lookahead_ms(offset) for offset in range(FIRST_WINDOW, LAST_WINDOW + 1))
    return max(window for window in windows if window <= lookahead_ms)


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
        begin_s: float | None,
    ) -> None:
        """begin_s: when its first speech came, on the session's clock; None where other speech is shown before."""
        self.begin_s = begin_s
        self.shown = 0
        """Samples whose time has come."""
        self.started = False
        self._rate, self._fps = rate, fps
        self._stream = FeatureStream(rate, fps, edge, lookahead_ms)
        self._loudness = Loudness(rate, fps, floor_dbfs, lookahead_ms)
        self._pcm = pcm.pcm16 if encoding == "pcm16" else pcm.pcm_float32
        self._sample = SAMPLE_BYTES[encoding]
        self._fed_at_once, self._fed_at_least = (int(seconds * rate) * self._sample for seconds in (FED_S, FED_LEAST_S))
        self._hold = max(0, int(_needed_ms(lookahead_ms) * rate / 1000))
        self._heard = 0  # samples that the stream has
        self._held = bytearray()  # came, and was not shown
        self._fed = 0  # bytes of them that the stream has
        self._frames_shown = 0
        self._news = asyncio.Event()
        self._ended = False
        self._muted = False

    @property
    def held(self) -> int:
        """Bytes that wait to be shown."""
        return len(self._held)

    def push(self, data: bytes) -> None:
        """More speech; samples may be cut anywhere."""
        if not self._muted:
            self._held += data
            self._news.set()

    def end(self) -> None:
        """No more will come. Raises InvalidInput where the last sample is not whole."""
        if len(self._held) % self._sample:
            raise InvalidInput("the speech ends within a sample: send whole samples", field="audio")
        self._ended = True
        self._news.set()

    def mute(self) -> None:
        """Forgets what came, and what else will: the speech cannot be shown."""
        self._muted = True
        self._held.clear()
        self._fed = 0

    def take_frame(self) -> bytes:
        """The speech of the next frame, heard now. What has not come by now, the frame after it makes up for."""
        self._frames_shown += 1
        end = self._frames_shown * self._rate // self._fps
        return self._take(min((end - self.shown) * self._sample, self._fed))

    def take_rest(self) -> bytes:
        """What is left of an ended speech after its last frame: a few samples, where 16 kHz rounds them off."""
        return self._take(len(self._held))

    def _take(self, size: int) -> bytes:
        data = bytes(memoryview(self._held)[:size])
        del self._held[:size]
        self._fed = max(0, self._fed - size)
        self.shown += size // self._sample
        return data

    async def frames(
        self, embed: Callable[[Windows], Awaitable[NDArray[np.float32]]]
    ) -> AsyncGenerator[NDArray[np.float32] | None, None]:
        """Each frame's features float32 (32, 16, 16), as soon as its speech is there; None for one with nothing but
        silence around it. `embed` encodes windows, as FeatureStream wants them.

        Raises InvalidInput for samples that are no numbers, and what `embed` raises.
        """
        frame = 0
        ready: deque[NDArray[np.float32]] = deque()
        while not self._stream.done:
            await self._feed()
            windows = self._stream.take_windows()
            if len(windows):
                self._stream.put_embeddings(await embed(windows))
            ready.extend(self._stream.take_features())
            while ready and self._due(frame):
                features = ready.popleft()
                yield None if self._loudness.silent(frame) else features
                frame += 1

    def _due(self, frame: int) -> bool:
        """Whether a frame's lookahead has come: the first ones need no windows of it, and would run ahead."""
        return self._stream.frames_total is not None or self._heard >= frame * self._rate // self._fps + self._hold

    async def _feed(self) -> None:
        """Hands the stream what has come, or the end; waits where there is neither."""
        while len(self._held) - self._fed < self._fed_at_least and not self._ended:
            self._news.clear()
            await self._news.wait()
        size = min(len(self._held) - self._fed, self._fed_at_once) // self._sample * self._sample
        if size:
            samples = self._pcm(bytes(memoryview(self._held)[self._fed : self._fed + size]), 1)
            self._fed += size
            self._heard += len(samples)
            self._stream.push(samples)
            self._loudness.push(samples)
        if self._ended and self._fed == len(self._held):
            self._stream.finish()
            self._loudness.finish()
