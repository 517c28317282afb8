"""A video file: JPEG frames and the speech beside them go in, H.264 and AAC come out. The only importer of PyAV, which
is an extra: `pip install triton-lipsync[video]`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from . import jpeg
from .disk import FULL
from .errors import DiskFull, InvalidInput
from .pcm import Samples

_STEP = 1024  # samples of an AAC frame
_AAC_RATE = 48_000  # of speech at a rate that AAC has not: 11,111 or 192,000 Hz, say


class Video:
    """An MP4 (or whatever the suffix says), the speech beside the pictures.

    Written beside `path` and renamed once complete. Raises InvalidInput for a format that cannot hold it, and DiskFull.
    """

    def __init__(self, path: Path, samples: Samples, rate: int, fps: int) -> None:
        """samples: mono at `rate` Hz."""
        self._samples, self._rate = samples, rate
        self._fps = fps
        self._path = path
        # The muxer goes by the suffix.
        self._part = path.with_name(f"{path.stem}.part{path.suffix}")
        self._count = 0
        self._spoken = 0  # samples
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._as_video():
            self._container = av.open(self._part, "w")
        try:
            with self._as_video():
                self._video = self._container.add_stream(
                    "libx264", rate=fps, options={"preset": "veryfast", "crf": "18"}
                )
                self._video.pix_fmt = "yuv420p"
                known = self._rate in (av.Codec("aac", "w").audio_rates or ())
                # PyAV resamples what comes at another rate than its stream's.
                self._audio = self._container.add_stream("aac", rate=self._rate if known else _AAC_RATE, layout="mono")
        except BaseException:
            self.discard()
            raise

    def put(self, data: bytes) -> None:
        """The next frame, a JPEG; an odd last row or column is left out."""
        image = jpeg.decode(data)
        height, width = image.shape[0] // 2 * 2, image.shape[1] // 2 * 2
        if self._count == 0:
            self._video.width, self._video.height = width, height
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(image[:height, :width]), format="bgr24")
        picture.pts = self._count
        picture.time_base = Fraction(1, self._fps)
        self._count += 1
        with self._as_video():
            self._container.mux(self._video.encode(picture))
            # Side by side, for players that read a file from its beginning.
            self._speak(self._count * self._rate // self._fps // _STEP * _STEP)

    def close(self) -> None:
        """Completes the file."""
        with self._as_video():
            self._speak(len(self._samples))
            self._container.mux(self._audio.encode(None))
            if self._count:
                self._container.mux(self._video.encode(None))
            self._container.close()
            self._part.replace(self._path)

    def discard(self) -> None:
        """Gives up; a file that was there before stays."""
        # Closing writes what belongs at the end of a file, which may fail where its beginning did.
        with contextlib.suppress(av.FFmpegError, ValueError):
            self._container.close()
        self._part.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _as_video(self) -> Iterator[None]:
        try:
            yield
        except (av.FFmpegError, OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno in FULL:
                words = f"cannot be written ({error.strerror}); free some space there, or name another folder"
                raise DiskFull(f"{self._path}: {words}") from error
            fault = f"{self._path}: cannot be written as a video ({error}); name it such as out.mp4"
            raise InvalidInput(fault) from error

    def _speak(self, until: int) -> None:
        """Adds the speech up to a sample."""
        for begin in range(self._spoken, min(until, len(self._samples)), _STEP):
            chunk = self._samples[begin : min(begin + _STEP, until)]
            sound = av.AudioFrame.from_ndarray(chunk[None, :], format="fltp", layout="mono")
            sound.sample_rate, sound.pts, sound.time_base = self._rate, begin, Fraction(1, self._rate)
            self._container.mux(self._audio.encode(sound))
            self._spoken = begin + len(chunk)
