"""A tenant's frames: a folder of images or a video file in, checked BGR pictures of one size out.

Every fault is one InvalidInput line that names the file, the fault and the remedy. Knows nothing of rectangles.
"""

from __future__ import annotations

import re
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import av
import numpy as np
from PIL import Image, UnidentifiedImageError

from compositor.blending import Pixels
from compositor.errors import InvalidInput

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg"}
VIDEO_FORMATS = {
    ".mp4": "mp4",
    ".m4v": "mp4",
    ".mov": "mov",
    ".mkv": "matroska",
    ".webm": "matroska",
    ".avi": "avi",
}
"""FFmpeg's demuxer by suffix. It is never guessed from the content: a playlist called .mp4 would make FFmpeg open the
files and addresses that it names."""
MAX_PIXELS = 3840 * 2160
"""Largest frame: 4K UHD."""
MIN_SIDE = 32
"""Smallest side of a frame and of a crop rectangle, pixels; the family's crops are about 180 to 400."""
MAX_FRAMES = 20_000
_MODES = {"RGB", "L", "P", "1", "RGBA", "LA", "PA"}
_EXIF_ORIENTATION = 0x0112
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


def open_frames(path: Path) -> FrameSource:
    """A folder of images or a video file. Raises InvalidInput."""
    if path.is_dir():
        return ImageFolder(path)
    if path.suffix.lower() in VIDEO_FORMATS:
        return VideoFile(path)
    raise InvalidInput(
        f"{path}: neither a folder of images nor a video; give a folder, or {', '.join(sorted(VIDEO_FORMATS))}"
    )


def check_size(path: Path, width: int, height: int) -> None:
    """Raises InvalidInput where a frame of that size is too large or too small."""
    if width * height > MAX_PIXELS:
        raise InvalidInput(f"{path}: {width}x{height} is larger than 3840x2160; scale the frames down")
    if min(width, height) < MIN_SIDE:
        raise InvalidInput(
            f"{path}: {width}x{height} is too small for a face; give frames of at least {MIN_SIDE}x{MIN_SIDE}"
        )


def _check_count(path: Path, count: int) -> None:
    if count == 0:
        raise InvalidInput(f"{path}: no frames in it; put in frame_0000.png, frame_0001.png, ... or .jpg")
    if count > MAX_FRAMES:
        raise InvalidInput(f"{path}: more than {MAX_FRAMES} frames; cut the video")


class ImageFolder:
    """PNG and JPEG files, in the order of the numbers in their names.

    Taken: 8 bits a channel, colour, grey or palette (of 16-bit colour PNGs, the upper 8 bits). Refused: 16-bit grey,
    CMYK, transparent pixels, and JPEGs turned by EXIF, for each of these has several readings. All headers are read at
    once, so that a frame of another size or kind is refused before any pixel is decoded.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files = _image_files(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # check_size is stricter
            sizes = [_header(file) for file in self._files]
        self.size = sizes[0]
        for file, size in zip(self._files, sizes, strict=True):
            self._check_same(file, size)

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

    def _check_same(self, file: Path, size: tuple[int, int]) -> None:
        if size != self.size:
            (width, height), (first_width, first_height) = size, self.size
            raise InvalidInput(
                f"{file}: {width}x{height}, but the first frame has {first_width}x{first_height}; use one size"
            )

    def _read(self, file: Path) -> Pixels:
        with _open(file) as image:
            self._check_same(file, image.size)
            try:
                transparent = image.has_transparency_data
                decoded = np.asarray(image.convert("RGBA" if transparent else "RGB"))
            except Exception as error:  # Pillow's decoders raise what they like
                raise InvalidInput(f"{file}: truncated or damaged ({error}); export it again") from error
        if transparent and decoded[:, :, 3].min() < 255:
            raise InvalidInput(f"{file}: it has transparent pixels; flatten it onto its background")
        return np.ascontiguousarray(decoded[:, :, 2::-1])


def _image_files(folder: Path) -> list[Path]:
    try:
        entries = [entry for entry in folder.iterdir() if entry.suffix.lower() in IMAGE_SUFFIXES]
    except OSError as error:
        raise InvalidInput(f"{folder}: cannot be read ({error.strerror}); make it readable") from error
    files = sorted((entry for entry in entries if not entry.name.startswith(".")), key=_natural)
    _check_count(folder, len(files))
    return files


def _natural(file: Path) -> list[tuple[int, str]]:
    """Sorts frame_2 before frame_10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", file.name)]


def _open(file: Path) -> Image.Image:
    if not file.is_file():
        raise InvalidInput(f"{file}: not a file; remove it, or put the frame there")
    try:
        return Image.open(file, formats=("PNG", "JPEG"))
    except UnidentifiedImageError as error:
        raise InvalidInput(f"{file}: not a PNG or JPEG image; export it again") from error
    except Image.DecompressionBombError as error:
        raise InvalidInput(f"{file}: larger than 3840x2160; scale the frames down") from error
    except Exception as error:  # Pillow's parsers raise what they like, OSError without a number among it
        if isinstance(error, OSError) and error.errno:
            raise InvalidInput(f"{file}: cannot be read ({error.strerror}); make it readable") from error
        raise InvalidInput(f"{file}: truncated or damaged ({error}); export it again") from error


def _header(file: Path) -> tuple[int, int]:
    """The size of an image, after what its header says has been checked; no pixel is decoded."""
    with _open(file) as image:
        width, height = image.size
        check_size(file, width, height)
        if image.mode not in _MODES:
            raise InvalidInput(f"{file}: its pixels are {image.mode}; export it as RGB with 8 bits a channel")
        # Asking a PNG would decode it; viewers do not turn PNGs.
        if image.format != "PNG" and image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
            raise InvalidInput(f"{file}: turned or mirrored by its EXIF orientation; export it upright")
        return width, height


class VideoFile:
    """The frames of a video's first picture stream. A frame that the decoder had to mend is refused."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._count = 0
        try:
            with self._open() as container:
                stream = container.streams.video[0]
                self.size = (stream.codec_context.width, stream.codec_context.height)
                check_size(path, *self.size)
                for packet in container.demux(stream):
                    self._count += packet.size > 0
                    if self._count > MAX_FRAMES:
                        break
        except (av.FFmpegError, IndexError) as error:
            raise InvalidInput(f"{path}: not a readable video ({_reason(error)}); convert it to MP4") from error
        _check_count(path, self._count)

    @property
    def names(self) -> list[str]:
        return [str(number) for number in range(self._count)]

    def __iter__(self) -> Iterator[Pixels]:
        try:
            with self._open() as container:
                stream = container.streams.video[0]
                stream.thread_type = "AUTO"
                for number, frame in enumerate(container.decode(stream)):
                    if (frame.width, frame.height) != self.size:
                        raise InvalidInput(f"{self.path}: frame {number} has another size; convert it to one size")
                    if frame.is_corrupt:
                        raise InvalidInput(f"{self.path}: frame {number} is damaged; convert it again")
                    if frame.rotation:
                        raise InvalidInput(f"{self.path}: turned by its metadata; convert it upright")
                    yield frame.to_ndarray(format="bgr24").astype(np.uint8, copy=False)
        except av.FFmpegError as error:
            raise InvalidInput(f"{self.path}: damaged video ({_reason(error)}); convert it again") from error

    def _open(self) -> av.container.InputContainer:
        # An absolute path, so that a colon in a name is not taken for a protocol's.
        path, demuxer = str(self.path.absolute()), VIDEO_FORMATS[self.path.suffix.lower()]
        return av.open(path, format=demuxer, options={"protocol_whitelist": "file"})


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or "it has no picture stream"
