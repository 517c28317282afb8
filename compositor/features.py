"""Speech to the audio features of the U-Net: samples come in, mel windows go to an encoder that the caller owns, and
32x16x16 features a video frame come out; whole clips, or as far as the audio has come. Pure: no I/O, no Triton."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from compositor.audio import (
    BANDS,
    FFT_SIZE,
    HOP,
    SAMPLE_RATE,
    SILENCE_MEL,
    MelStream,
    Resampler,
    as_samples,
    mel_spectrogram,
)
from compositor.errors import InferenceFailed, InvalidInput

Edge: TypeAlias = Literal["zeros", "silence"]
"""What a frame hears before the speech begins and after it ends.

A window is outside the speech when it starts before its first or after its last sample, or later than the lookahead
allows.
`silence`: outside windows are the embedding of digital silence, as in a live session.
`zeros`: as in training: zero vectors, but the first one outside on either side repeats its neighbour inside. At other
rates than 25 fps, and where the lookahead is cut, this holds within each frame's own 16 windows, 40 ms apart.
"""
Windows: TypeAlias = NDArray[np.float32]
"""Input of the audio encoder, (n, 1, 80, 16): bands by columns."""
Embeddings: TypeAlias = NDArray[np.float32]
"""Output of the audio encoder, (n, 512)."""
Features: TypeAlias = NDArray[np.float32]
"""Audio features, (frames, 32, 16, 16): embedding j of a frame's 16 fills channels 2j and 2j + 1."""

# The windows of a frame in the model family (SyncTalk_2D): 16 embeddings, 40 ms apart whatever the video's rate.
WINDOW_COLUMNS: Final = 16
WINDOWS_PER_SECOND: Final = 25
FIRST_WINDOW: Final = -9
LAST_WINDOW: Final = 6
EMBEDDING: Final = 512
COLUMNS_PER_SECOND: Final = SAMPLE_RATE // HOP
MAX_FPS: Final = 60
ENCODER_BATCH: Final = 32
"""Most windows in one run of an audio encoder: its max_batch_size, and how the compositor splits."""

_OFFSETS: Final = range(FIRST_WINDOW, LAST_WINDOW + 1)
_OFFSET_MS: Final = 1000 / WINDOWS_PER_SECOND
_FRAME_SHAPE: Final = (32, 16, 16)
_MIN_SAMPLES: Final = (WINDOW_COLUMNS - 1) * HOP  # shorter clips are lengthened with silence to one window
_OUTSIDE: Final = -1  # stands for the start of a window outside the speech


def _samples_needed(start: int) -> int:
    """How much speech completes the window that starts at column `start`: its last column sees 400 samples ahead."""
    return (start + WINDOW_COLUMNS - 1) * HOP + FFT_SIZE // 2


def window_lookahead_ms(offset: int) -> float:
    """How much speech after a frame's start its window at `offset`, -9..6, needs: 40 * offset + 187.5 + 25 ms.

    15 hops of 12.5 ms lead to its last column, which sees 400 samples, 25 ms, ahead. Windows start at whole columns,
    rounded down, so that a frame may need up to 12.5 ms less. Resampling adds its own lag.
    """
    return offset * _OFFSET_MS + 1000 * _samples_needed(0) / SAMPLE_RATE


FULL_LOOKAHEAD_MS: Final = window_lookahead_ms(LAST_WINDOW)
"""Speech after a frame's start that all its windows need: 452.5 ms."""


def frame_count(samples: int, fps: int) -> int:
    """Video frames of a clip of `samples` at 16 kHz: ceil(samples * fps / 16000), so that the last one may be part."""
    return -(-samples * fps // SAMPLE_RATE)


@functools.lru_cache(maxsize=128)  # a stream asks three times for each frame
def window_starts(frame: int, fps: int) -> tuple[int, ...]:
    """The mel columns where the 16 windows of a video frame start: floor(80 * (frame / fps + m / 25)), m = -9..6.

    Exact, in integers. At 25 fps that is int(3.2 * k) for k = frame + m. Negative before the speech.
    """
    ticks = WINDOWS_PER_SECOND * fps
    return tuple(COLUMNS_PER_SECOND * (WINDOWS_PER_SECOND * frame + m * fps) // ticks for m in _OFFSETS)


def clip_features(
    samples: NDArray[Any],
    rate: int,
    encode: Callable[[Windows], Embeddings],
    fps: int = 25,
    edge: Edge = "silence",
    batch: int = 32,
    lookahead_ms: float = FULL_LOOKAHEAD_MS,
) -> Features:
    """Features of all frames of a whole clip, (n,) mono samples at `rate` Hz, straight from the definition.

    `encode` turns up to `batch` windows into embeddings. Windows that reach past the end move back to the last 16
    columns; each distinct one is encoded once. `lookahead_ms`: see FeatureStream, which gives the same features from
    chunks. Raises InvalidInput for bad samples, rate, fps or lookahead, and InferenceFailed for what is no embedding.
    """
    _check_options(fps, edge)
    last = _last_offset(lookahead_ms)
    speech = Resampler(rate).push(as_samples(samples), last=True)
    mel = mel_spectrogram(np.pad(speech, (0, max(0, _MIN_SAMPLES - len(speech)))))
    frames = np.arange(frame_count(len(speech), fps), dtype=np.int64)[:, None]
    offsets = np.array(_OFFSETS, dtype=np.int64)
    ticks = WINDOWS_PER_SECOND * frames + offsets * fps  # when windows start, 25 * fps ticks a second
    starts = COLUMNS_PER_SECOND * ticks // (WINDOWS_PER_SECOND * fps)
    inside = (ticks >= 0) & (ticks * SAMPLE_RATE < len(speech) * WINDOWS_PER_SECOND * fps) & (offsets <= last)
    distinct, rows = np.unique(np.minimum(starts[inside], len(mel) - WINDOW_COLUMNS), return_inverse=True)
    windows = _windows(mel, distinct)
    if edge == "silence":
        windows = np.concatenate([_silence(), windows])
    parts = [windows[first : first + batch] for first in range(0, len(windows), batch)]
    encoded = [_embeddings(encode(part), len(part)) for part in parts]
    if edge == "zeros":
        encoded.insert(0, np.zeros((1, EMBEDDING), np.float32))
    sources = np.zeros(starts.shape, np.int64)
    sources[inside] = 1 + rows
    if edge == "zeros":
        _repeat_neighbours(sources, inside)
    return np.concatenate(encoded)[sources].reshape(-1, *_FRAME_SHAPE)


class FeatureStream:
    """Features of the frames of one speech, as early as its audio allows; the caller does the encoding.

        stream.push(samples)                       # any chunking, ended by stream.finish()
        windows = stream.take_windows()            # encode these, in this order
        stream.put_embeddings(embeddings)          # batches come back in the order they were taken
        features = stream.take_features()          # of the frames completed by now, in order

    At 25 fps about one window a frame is to encode. Frame i is complete with its own first sample and the audio up to
    `lookahead_ms` after its start, plus the resampler's lag; windows whose `window_lookahead_ms` is more are outside,
    in every frame alike, whatever has come. FULL_LOOKAHEAD_MS cuts none; 0 leaves a frame its windows -9..-6.
    Memory stays bounded while the caller takes what is there.
    """

    def __init__(
        self, rate: int, fps: int = 25, edge: Edge = "silence", lookahead_ms: float = FULL_LOOKAHEAD_MS
    ) -> None:
        _check_options(fps, edge)
        self._last_offset = _last_offset(lookahead_ms)
        self._resampler = Resampler(rate)
        self._mel_stream = MelStream()
        self._fps = fps
        self._edge: Edge = edge
        self._samples = 0  # of the speech so far, at 16 kHz
        self._samples_needed = _samples_needed(0)
        self._heard: list[NDArray[np.float32]] = []  # samples without mel columns as yet
        self._finished = False
        self._mel = np.empty((0, BANDS), np.float32)  # columns from self._mel_start on
        self._mel_start = 0
        self._next_start = 0  # windows that start before this one are wanted already
        self._wanted: list[int] = []  # starts of windows to take
        self._encoding: deque[list[int]] = deque()  # starts of windows taken, by batch
        self._embeddings: dict[int, Embeddings] = {}
        self._next_frame = 0
        if edge == "silence":
            self._wanted.append(_OUTSIDE)
        else:
            self._embeddings[_OUTSIDE] = np.zeros(EMBEDDING, np.float32)

    @property
    def frames_taken(self) -> int:
        """How many frames' features were taken: the number of the next frame."""
        return self._next_frame

    @property
    def frames_total(self) -> int | None:
        """How many frames the whole speech has, ceil(seconds * fps), once it is finished."""
        return frame_count(self._samples, self._fps) if self._finished else None

    @property
    def done(self) -> bool:
        """Whether the speech is finished and the features of all its frames were taken."""
        return self._next_frame == self.frames_total

    def push(self, samples: NDArray[Any]) -> None:
        """Take in mono samples, (n,) float at the input's rate. Raises InvalidInput for NaN, Inf or another shape."""
        if self._finished:
            raise RuntimeError("pushed samples to a speech that is finished")
        self._hear(self._resampler.push(as_samples(samples)))
        if self._samples >= self._samples_needed:  # by the window: by the chunk costs half as much again
            self._add_columns(self._mel_stream.push(np.concatenate(self._heard)))

    def finish(self) -> None:
        """The speech ends here: what waited for more audio becomes ready to take. Idempotent."""
        if self._finished:
            return
        self._hear(self._resampler.push(np.empty(0, np.float32), last=True))
        self._finished = True
        missing = np.zeros(max(0, _MIN_SAMPLES - self._samples), np.float32)
        last_columns = self._mel_stream.push(np.concatenate([*self._heard, missing]))
        self._add_columns(np.concatenate([last_columns, self._mel_stream.finish()]))
        known = {*self._embeddings, *self._wanted, *(start for batch in self._encoding for start in batch)}
        remaining = range(self._next_frame, frame_count(self._samples, self._fps))
        self._wanted += sorted({start for frame in remaining for start in self._sources(frame)} - known)

    def take_windows(self) -> Windows:
        """Windows to encode now, (n, 1, 80, 16), each distinct one once. With n = 0 there is nothing to put."""
        starts = self._wanted
        if not starts:
            return np.empty((0, 1, BANDS, WINDOW_COLUMNS), np.float32)
        self._wanted = []
        self._encoding.append(starts)
        speech = [start - self._mel_start for start in starts if start != _OUTSIDE]
        windows = _windows(self._mel, np.array(speech, np.int64))
        self._drop_columns()
        return windows if len(speech) == len(starts) else np.concatenate([_silence(), windows])

    def put_embeddings(self, embeddings: Embeddings) -> None:
        """The embeddings, (n, 512), of the oldest batch of windows whose embeddings are missing.

        Raises InferenceFailed, and keeps waiting for that batch, if they are not n finite vectors of 512.
        """
        if not self._encoding:
            if len(embeddings):
                raise RuntimeError("put embeddings of windows that were never taken")
            return
        checked = _embeddings(embeddings, len(self._encoding[0]))
        for start, embedding in zip(self._encoding.popleft(), checked, strict=True):
            self._embeddings[start] = embedding.copy()  # a view would keep the whole batch alive

    def take_features(self) -> Features:
        """Features of the frames completed since the last call, (m, 32, 16, 16), m may be 0."""
        frames: list[NDArray[np.float32]] = []
        while self._next_frame < frame_count(self._samples, self._fps):
            sources = [self._embeddings.get(start) for start in self._sources(self._next_frame)]
            embeddings = [source for source in sources if source is not None]
            if len(embeddings) < len(sources):
                break
            frames.append(np.concatenate(embeddings))
            self._next_frame += 1
        self._drop_embeddings()
        return np.array(frames, np.float32).reshape(-1, *_FRAME_SHAPE)

    def _hear(self, speech: NDArray[np.float32]) -> None:
        self._samples += len(speech)
        self._heard.append(speech)

    def _add_columns(self, columns: NDArray[np.float32]) -> None:
        """Take in the columns of everything heard, and want the windows that they complete."""
        self._heard.clear()
        self._mel = np.concatenate([self._mel, columns])
        pattern = _start_pattern(self._fps, self._last_offset)
        starts = range(self._next_start, max(self._next_start, self._last_start + 1))
        self._wanted += [start for start in starts if pattern[start % COLUMNS_PER_SECOND]]
        self._next_start = starts.stop
        while not pattern[self._next_start % COLUMNS_PER_SECOND]:
            self._next_start += 1
        self._samples_needed = _samples_needed(self._next_start)
        self._drop_columns()

    def _drop_columns(self) -> None:
        """Keep the columns of windows to take, and the last 16: windows past the end move back to them."""
        oldest = min([start for start in self._wanted if start != _OUTSIDE] + [max(self._last_start, 0)])
        if oldest > self._mel_start:
            self._mel = self._mel[oldest - self._mel_start :].copy()
            self._mel_start = oldest

    def _drop_embeddings(self) -> None:
        oldest = min(window_starts(self._next_frame, self._fps)[0], self._last_start)
        for start in [start for start in self._embeddings if _OUTSIDE < start < oldest]:
            del self._embeddings[start]

    def _sources(self, frame: int) -> list[int]:
        """The starts whose embeddings make up a frame, in order; _OUTSIDE for those outside the speech."""
        starts = window_starts(frame, self._fps)
        stop = self._last_offset - FIRST_WINDOW + 1
        if self._finished:
            stop = min(stop, _heard_of(frame, self._fps, self._samples))
        first = min(stop, sum(start < 0 for start in starts))
        within = [min(start, self._last_start) if self._finished else start for start in starts[first:stop]]
        sources = [_OUTSIDE] * first + within + [_OUTSIDE] * (len(starts) - stop)
        if self._edge == "zeros" and within:
            sources[max(first - 1, 0)] = within[0]
            sources[min(stop, LAST_WINDOW - FIRST_WINDOW)] = within[-1]
        return sources

    @property
    def _last_start(self) -> int:
        """Where the last whole window of the columns so far starts; negative while there is none."""
        return self._mel_start + len(self._mel) - WINDOW_COLUMNS


def _last_offset(lookahead_ms: float) -> int:
    """The last window of a frame that `lookahead_ms` allows. Raises InvalidInput for less than none."""
    if not lookahead_ms >= 0:
        raise InvalidInput(f"a lookahead of {lookahead_ms} ms is less than none", field="lookahead_ms")
    return int(min(LAST_WINDOW, (lookahead_ms - window_lookahead_ms(0)) // _OFFSET_MS))


def _heard_of(frame: int, fps: int, samples: int) -> int:
    """How many of a frame's windows start before the end of a speech of `samples`."""
    end = samples * WINDOWS_PER_SECOND * fps
    return sum((WINDOWS_PER_SECOND * frame + m * fps) * SAMPLE_RATE < end for m in _OFFSETS)


@functools.cache
def _start_pattern(fps: int, last: int) -> tuple[bool, ...]:
    """For each column of a second, whether a window up to offset `last` starts there; every second is alike."""
    allowed = last - FIRST_WINDOW + 1
    starts = {start % COLUMNS_PER_SECOND for frame in range(fps) for start in window_starts(frame, fps)[:allowed]}
    return tuple(column in starts for column in range(COLUMNS_PER_SECOND))


def _windows(mel: NDArray[np.float32], starts: NDArray[np.int64]) -> Windows:
    columns = mel[starts[:, None] + np.arange(WINDOW_COLUMNS)]
    return np.ascontiguousarray(columns.transpose(0, 2, 1)[:, None])


def _silence() -> Windows:
    return np.full((1, 1, BANDS, WINDOW_COLUMNS), SILENCE_MEL, np.float32)


def _embeddings(answer: NDArray[Any], count: int) -> Embeddings:
    """`answer` as (count, 512) float32, or InferenceFailed."""
    if answer.shape != (count, EMBEDDING):
        raise InferenceFailed(f"the audio encoder answered {list(answer.shape)}, not [{count}, {EMBEDDING}]")
    if not np.isfinite(answer).all():
        raise InferenceFailed("the audio encoder answered NaN or Inf; check its weights")
    return answer.astype(np.float32, copy=False)


def _repeat_neighbours(sources: NDArray[np.int64], inside: NDArray[np.bool_]) -> None:
    """The edge rule `zeros`, in place: the window next to the speech on either side repeats the one inside."""
    rows, count = np.arange(len(sources)), inside.shape[1]
    first, last = inside.argmax(axis=1), count - 1 - inside[:, ::-1].argmax(axis=1)
    before, after = first > 0, last < count - 1
    sources[rows[before], first[before] - 1] = sources[rows[before], first[before]]
    sources[rows[after], last[after] + 1] = sources[rows[after], last[after]]


def _check_options(fps: int, edge: str) -> None:
    if not 1 <= fps <= MAX_FPS:
        raise InvalidInput(f"{fps} frames a second is outside 1..{MAX_FPS}", field="fps")
    if edge not in ("zeros", "silence"):
        raise InvalidInput(f"edge rule {edge!r} is neither 'zeros' nor 'silence'", field="edge")
