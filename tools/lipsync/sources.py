"""What an operator hands in for a tenant: frames (a folder of images or a video file) and crop rectangles.

Paths go in, checked BGR frames and boxes come out; every fault is one line that names the file, the fault and the
remedy.
"""

from __future__ import annotations

import json
import re
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import av
import numpy as np
from PIL import Image, UnidentifiedImageError

from compositor.blending import Pixels
from compositor.errors import InvalidInput
from compositor.geometry import Box

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg"}
VIDEO_SUFFIXES = {".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v"}
MAX_PIXELS = 3840 * 2160
"""Largest frame: 4K UHD."""
MAX_FRAMES = 20_000
MIN_RECT = 32
"""Smallest side of a crop rectangle, pixels; the family's crops are about 180 to 400."""
_AHEAD = 4


class FrameSource(Protocol):
    """Frames of one size, in order."""

    @property
    def path(self) -> Path: ...

    @property
    def names(self) -> list[str]:
        """One name a frame."""
        ...

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        ...

    def __iter__(self) -> Iterator[Pixels]:
        """BGR uint8 (height, width, 3), one after another. Raises InvalidInput for a frame that cannot be read."""
        ...


@dataclass(frozen=True)
class Source:
    """The three parts of a tenant's source."""

    model: Path
    frames: FrameSource
    rects: list[Box]


def open_source(
    directory: Path | None, model: Path | None = None, frames: Path | None = None, crop_rects: Path | None = None
) -> Source:
    """Finds and checks the parts: those named, else those of the directory's fixed layout.

    The layout: `checkpoint/model_best.onnx`, `frames/*.png|jpg`, `crop_rects.json`.
    """
    if directory is not None and not directory.is_dir():
        raise InvalidInput(
            f"{directory}: no such directory; give the tenant's source directory, or --model, --frames, ..."
        )
    model = _part(directory, model, "checkpoint/model_best.onnx", "--model")
    frames = _part(directory, frames, "frames", "--frames")
    crop_rects = _part(directory, crop_rects, "crop_rects.json", "--crop-rects")
    source = open_frames(frames)
    return Source(model, source, read_rects(crop_rects, source))


def _part(directory: Path | None, given: Path | None, default: str, option: str) -> Path:
    if given is None and directory is None:
        raise InvalidInput(
            f"{option} is missing: give a source directory, or all of --model, --frames and --crop-rects"
        )
    path = given if given is not None else directory / default  # type: ignore[operator]
    if not path.exists():
        raise InvalidInput(f"{path}: not found; put it there, or name another with {option}")
    return path


def open_frames(path: Path) -> FrameSource:
    """A folder of images or a video file."""
    if path.is_dir():
        return ImageFolder(path)
    if path.suffix.lower() in VIDEO_SUFFIXES:
        return VideoFile(path)
    raise InvalidInput(f"{path}: neither a folder of images nor a video ({', '.join(sorted(VIDEO_SUFFIXES))})")


def check_size(path: Path, width: int, height: int) -> None:
    """Raises InvalidInput where a frame of that size is too large or too small."""
    if width * height > MAX_PIXELS:
        raise InvalidInput(f"{path}: {width}x{height} is larger than 3840x2160; scale the frames down")
    if min(width, height) < MIN_RECT:
        raise InvalidInput(
            f"{path}: {width}x{height} is too small for a face; frames are at least {MIN_RECT} pixels wide"
        )


def _check_count(path: Path, count: int) -> None:
    if count == 0:
        raise InvalidInput(f"{path}: no frames in it; put in frame_0000.png, frame_0001.png, ... or .jpg")
    if count > MAX_FRAMES:
        raise InvalidInput(f"{path}: {count} frames are more than {MAX_FRAMES}; cut the video")


class ImageFolder:
    """PNG and JPEG files, in the order of the numbers in their names. Headers are read before any pixel is decoded."""

    def __init__(self, path: Path) -> None:
        self.path = path
        files = [
            file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")
        ]
        self._files = sorted(files, key=_natural)
        _check_count(path, len(files))
        self.size = self._header(self._files[0])

    @property
    def names(self) -> list[str]:
        return [file.name for file in self._files]

    def __iter__(self) -> Iterator[Pixels]:
        # Pillow lets go of the GIL while it decodes.
        with ThreadPoolExecutor(2) as pool:
            waiting: deque[Future[Pixels]] = deque()
            try:
                for file in self._files:
                    waiting.append(pool.submit(self._read, file))
                    if len(waiting) > _AHEAD:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _open(self, file: Path) -> Image.Image:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # check_size is stricter
                return Image.open(file, formats=("PNG", "JPEG"))
        except UnidentifiedImageError as error:
            raise InvalidInput(f"{file}: not a PNG or JPEG image; export it again") from error
        except Image.DecompressionBombError as error:
            raise InvalidInput(f"{file}: larger than 3840x2160; scale the frames down") from error
        except OSError as error:
            raise InvalidInput(f"{file}: cannot be read ({error.strerror or error})") from error

    def _header(self, file: Path) -> tuple[int, int]:
        with self._open(file) as image:
            width, height = image.size
        check_size(file, width, height)
        return width, height

    def _read(self, file: Path) -> Pixels:
        with self._open(file) as image:
            check_size(file, *image.size)
            if image.size != self.size:
                width, height = self.size
                raise InvalidInput(
                    f"{file}: {image.width}x{image.height}, but the first frame has {width}x{height}; use one size"
                )
            try:
                rgb = np.asarray(image.convert("RGB"))
            except (OSError, ValueError, SyntaxError) as error:
                raise InvalidInput(f"{file}: truncated or damaged ({error}); export it again") from error
        return np.ascontiguousarray(rgb[:, :, ::-1])


class VideoFile:
    """The frames of a video's first picture stream."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with av.open(path) as container:
                stream = container.streams.video[0]
                self.size = (stream.codec_context.width, stream.codec_context.height)
                check_size(path, *self.size)
                self._count = sum(1 for packet in container.demux(stream) if packet.size)
        except (av.FFmpegError, IndexError) as error:
            raise InvalidInput(f"{path}: not a readable video ({error}); convert it to MP4") from error
        _check_count(path, self._count)

    @property
    def names(self) -> list[str]:
        return [str(number) for number in range(self._count)]

    def __iter__(self) -> Iterator[Pixels]:
        try:
            with av.open(path := self.path) as container:
                container.streams.video[0].thread_type = "AUTO"
                for frame in container.decode(video=0):
                    if (frame.width, frame.height) != self.size:
                        raise InvalidInput(f"{path}: its frames change size; convert it to one size")
                    yield frame.to_ndarray(format="bgr24").astype(np.uint8, copy=False)
        except av.FFmpegError as error:
            raise InvalidInput(f"{self.path}: damaged video ({error}); convert it again") from error


def _natural(file: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", file.name)]


def read_rects(path: Path, frames: FrameSource) -> list[Box]:
    """The crop rectangle of each frame, checked to lie in it.

    Two forms: a list of [x1, y1, x2, y2], or an object keyed by frame (its number, file name or stem), each value such
    a list or an object with `rect`. x2 and y2 are exclusive.
    """
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{path}: not JSON ({error}); expected [[x1, y1, x2, y2], ...]") from error
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read ({error.strerror})") from error
    values = _ordered(path, data, frames.names)
    if len(values) != len(frames.names):
        raise InvalidInput(
            f"{path}: {len(values)} rectangles for {len(frames.names)} frames in {frames.path}; give one a frame, in order"
        )
    return [_box(path, number, value, frames.size) for number, value in enumerate(values)]


def _ordered(path: Path, data: Any, names: list[str]) -> list[Any]:
    if isinstance(data, list):
        return data
    if not isinstance(data, dict):
        raise InvalidInput(f"{path}: expected a list [[x1, y1, x2, y2], ...] or an object keyed by frame")
    by_number: dict[int, Any] = {}
    numbers = {key: number for number, name in enumerate(names) for key in (name, Path(name).stem)}
    for key, value in data.items():
        number = numbers.get(key, int(key) if key.isdecimal() else None)
        if number is None or number in by_number:
            fault = "names no frame" if number is None else "names a frame twice"
            raise InvalidInput(f"{path}: key {key!r} {fault}; use frame numbers from 0, or the frames' file names")
        by_number[number] = value
    missing = next((number for number in range(len(by_number)) if number not in by_number), None)
    if missing is not None:
        raise InvalidInput(
            f"{path}: no rectangle for frame {missing} ({names[missing] if missing < len(names) else '?'})"
        )
    return [by_number[number] for number in range(len(by_number))]


def _box(path: Path, number: int, value: Any, size: tuple[int, int]) -> Box:
    where = f"{path}: frame {number}"
    rect = value.get("rect") if isinstance(value, dict) else value
    if not isinstance(rect, list) or len(rect) != 4 or not all(_whole(entry) for entry in rect):
        raise InvalidInput(f"{where}: {json.dumps(value)[:60]} is not [x1, y1, x2, y2] in whole pixels")
    x1, y1, x2, y2 = map(int, rect)
    width, height = size
    if not (x1 >= 0 and y1 >= 0 and x2 <= width and y2 <= height):
        raise InvalidInput(
            f"{where}: [{x1}, {y1}, {x2}, {y2}] is not inside the {width}x{height} frame; crop inside it"
        )
    if x2 - x1 < MIN_RECT or y2 - y1 < MIN_RECT:
        raise InvalidInput(f"{where}: [{x1}, {y1}, {x2}, {y2}] is smaller than {MIN_RECT}x{MIN_RECT} or turned around")
    return Box(x1, y1, x2 - x1, y2 - y1)


def _whole(entry: Any) -> bool:
    return isinstance(entry, (int, float)) and not isinstance(entry, bool) and abs(entry) < 1e6 and entry == int(entry)
