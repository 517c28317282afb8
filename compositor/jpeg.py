"""Baseline JPEG with restart markers: encode, decode, splice a freshly encoded patch into a prepared frame, cut it out.

Pixels go in, JPEG bytes come out. Restart markers make runs of MCUs independent of each other, so the runs that a patch
covers can be exchanged without touching the rest: `splice` gives the very bytes that encoding the whole changed frame
would give, and `prepared_patch_jpeg` takes the patch out without decoding anything. This module is the only one that
knows the JPEG library, and knows nothing of tenants.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import turbojpeg
from numpy.typing import NDArray

from .errors import InvalidInput, LipsyncError
from .geometry import Box, Subsampling

LIBRARY = "libturbojpeg.so.0"
EOI = b"\xff\xd9"
_SOS, _DRI, _SOF0, _APP1 = 0xDA, 0xDD, 0xC0, 0xE1
_XMP_NAMESPACE = b"http://ns.adobe.com/xap/1.0/\x00"
_SYNTHETIC_XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"'
    b' Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/'
    b'compositeWithTrainedAlgorithmicMedia"/></rdf:RDF></x:xmpmeta>'
)


class LibraryMissing(LipsyncError):
    """libturbojpeg is not installed, or is one that does not write restart markers."""


_TURBO_SUBSAMPLING = {
    Subsampling.S444: turbojpeg.TJSAMP_444,
    Subsampling.S422: turbojpeg.TJSAMP_422,
    Subsampling.S420: turbojpeg.TJSAMP_420,
}


@dataclass(frozen=True)
class Encoding:
    """How a frame is encoded. `restart_interval` is k: the number of MCUs between two restart markers, 0 for none."""

    quality: int = 75
    subsampling: Subsampling = Subsampling.S420
    restart_interval: int = 0


@dataclass(frozen=True)
class Layout:
    """The MCU grid of a frame of `width` x `height` pixels under an encoding whose k divides the grid's columns."""

    width: int
    height: int
    encoding: Encoding

    @property
    def columns(self) -> int:
        """MCUs in a row."""
        return -(-self.width // self.encoding.subsampling.mcu[0])

    @property
    def segments_per_row(self) -> int:
        return self.columns // self.encoding.restart_interval

    def align(self, box: Box) -> Box:
        """The smallest patch of whole segments around `box`, cut off at the frame's right and lower edge."""
        mcu_width, mcu_height = self.encoding.subsampling.mcu
        step = mcu_width * self.encoding.restart_interval
        x, y = box.x // step * step, box.y // mcu_height * mcu_height
        right = min(-(-box.right // step) * step, self.width)
        bottom = min(-(-box.bottom // mcu_height) * mcu_height, self.height)
        return Box(x, y, right - x, bottom - y)

    def segment_span(self, patch: Box) -> tuple[int, int, int, int]:
        """(first row, rows, first segment in the row, segments in the row) of an aligned patch."""
        mcu_width, mcu_height = self.encoding.subsampling.mcu
        step = mcu_width * self.encoding.restart_interval
        return patch.y // mcu_height, -(-patch.height // mcu_height), patch.x // step, -(-patch.width // step)


def restart_interval_for(width: int, subsampling: Subsampling, boxes: Iterable[Box]) -> int:
    """The k for frames of `width` pixels that keeps the patches around `boxes` smallest.

    k divides the MCU columns, so that no segment wraps around a row's end, and is at least 3, so that the markers stay
    cheap (at 720p, k = 8 costs about 1.5 % of the bytes). Columns without such a divisor fall back to whole rows.
    """
    boxes = list(boxes)
    columns = -(-width // subsampling.mcu[0])
    candidates = [k for k in range(3, columns + 1) if columns % k == 0] or [columns]

    def area(k: int) -> int:
        layout = Layout(width, 1 << 30, Encoding(subsampling=subsampling, restart_interval=k))
        return sum(layout.align(box).area for box in boxes)

    return min(candidates, key=lambda k: (area(k), -k))


class _Ticket:
    """One who waits for a restart interval."""

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self.admitted = threading.Event()


class _RestartGate:
    """libturbojpeg 2.x takes the restart interval from the environment, which is the whole process's: encodes of one k
    run side by side, those of another wait. Whoever comes while somebody waits queues up behind, and the last of a k
    to leave lets in all who wait for the next k, so that no tenant starves."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queue: deque[_Ticket] = deque()
        self._interval = -1
        self._running = 0

    @contextlib.contextmanager
    def __call__(self, interval: int) -> Iterator[None]:
        ticket = None
        with self._lock:
            if not self._queue and (not self._running or self._interval == interval):
                self._admit(interval)
            else:
                ticket = _Ticket(interval)
                self._queue.append(ticket)
        if ticket:
            ticket.admitted.wait()
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1
                if not self._running and self._queue:
                    self._admit_next()

    def _admit(self, interval: int) -> None:
        if self._interval != interval:
            os.environ["TJ_RESTART"] = f"{interval}B"
            self._interval = interval
        self._running += 1

    def _admit_next(self) -> None:
        interval = self._queue[0].interval
        admitted = [ticket for ticket in self._queue if ticket.interval == interval]
        self._queue = deque(ticket for ticket in self._queue if ticket.interval != interval)
        for ticket in admitted:
            self._admit(interval)
            ticket.admitted.set()


# Replacing a variable leaves the C library's table where it is; adding one may move it under another thread's getenv.
os.environ.setdefault("TJ_RESTART", "0B")
_restart_gate = _RestartGate()


@functools.cache
def _library() -> turbojpeg.TurboJPEG:
    try:
        return turbojpeg.TurboJPEG(LIBRARY)
    except OSError as error:
        raise LibraryMissing(
            f"{LIBRARY} is missing: run `apt-get install libturbojpeg0` (the package is libturbojpeg on Ubuntu)"
        ) from error


def encode(image: NDArray[np.uint8], encoding: Encoding) -> bytes:
    """One baseline JPEG (standard Huffman tables) of a BGR image uint8 (height, width, 3). Threads may call it."""
    library = _library()
    with _restart_gate(encoding.restart_interval):
        data: bytes = library.encode(
            image, quality=encoding.quality, jpeg_subsample=_TURBO_SUBSAMPLING[encoding.subsampling]
        )
    return data


def decode(data: bytes) -> NDArray[np.uint8]:
    """The BGR image uint8 (height, width, 3) of a JPEG. InvalidInput when it is not one."""
    try:
        image: NDArray[np.uint8] = _library().decode(data)
    except (OSError, ValueError) as error:
        raise InvalidInput(f"not a readable JPEG: {error}") from error
    return image


def split(data: bytes) -> tuple[bytes, memoryview, int]:
    """(header up to and with SOS, the scan's entropy-coded bytes without EOI, restart interval) of a baseline JPEG."""
    position, interval = 2, 0
    while True:
        if data[position] != 0xFF:
            raise InvalidInput(f"not a baseline JPEG: no marker at byte {position}")
        marker = data[position + 1]
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == _DRI:
            interval = int.from_bytes(data[position + 4 : position + 6], "big")
        position += 2 + length
        if marker == _SOS:
            return data[:position], memoryview(data)[position:-2], interval


def mark_synthetic(header: bytes) -> bytes:
    """`header` with an XMP segment that says that the picture is a composite with generated parts.

    The IPTC digital source type `compositeWithTrainedAlgorithmicMedia`; put behind the JFIF segment.
    """
    payload = _XMP_NAMESPACE + _SYNTHETIC_XMP
    segment = bytes([0xFF, _APP1]) + (len(payload) + 2).to_bytes(2, "big") + payload
    position = 4 + int.from_bytes(header[4:6], "big")
    return header[:position] + segment + header[position:]


def _marker_positions(scan: NDArray[np.uint8]) -> NDArray[np.intp]:
    """Where the RST markers' 0xFF stand: inside a scan 0xFF is followed by 0x00 unless it begins a marker."""
    candidates = np.flatnonzero(scan[:-1] == 0xFF)
    markers: NDArray[np.intp] = candidates[scan[candidates + 1] != 0]
    return markers


def cuts(scan: memoryview | bytes, layout: Layout, patch: Box) -> NDArray[np.uint32]:
    """Where an aligned patch's segments lie in a frame's scan: uint32 (patch rows, 2), byte offsets [begin, end) of the
    run that a patch's row takes the place of. The RST marker behind the run stays the frame's own."""
    data = np.frombuffer(scan, np.uint8)
    markers = _marker_positions(data)
    begins = np.concatenate(([0], markers + 2))
    ends = np.concatenate((markers, [data.size]))
    row, rows, segment, segments = layout.segment_span(patch)
    first = (row + np.arange(rows)) * layout.segments_per_row + segment
    return np.stack((begins[first], ends[first + segments - 1]), axis=1).astype(np.uint32)


@dataclass(frozen=True)
class PreparedFrame:
    """A frame encoded once: its scan (views into memory that the caller keeps alive) and where its patch lies in it."""

    header: bytes
    scan: memoryview
    layout: Layout
    patch: Box
    cuts: NDArray[np.uint32]

    def jpeg(self) -> bytes:
        """The whole frame as it was prepared."""
        return b"".join((self.header, self.scan, EOI))


@functools.lru_cache(maxsize=4096)
def _marker_codes(layout: Layout, patch: Box) -> NDArray[np.uint8]:
    """The RSTm codes (0xD0 + m, m = segment index mod 8) that the patch's own markers carry inside the frame."""
    row, rows, segment, segments = layout.segment_span(patch)
    index = (row + np.arange(rows))[:, None] * layout.segments_per_row + segment + np.arange(segments)[None, :]
    return (0xD0 + index.ravel()[:-1] % 8).astype(np.uint8)


def patch_rows(frame: PreparedFrame, pixels: NDArray[np.uint8]) -> list[memoryview]:
    """The patch's pixels, BGR uint8 of the patch's shape, as one run of entropy-coded segments for each MCU row, with
    the restart markers numbered as the frame numbers them."""
    data = encode(pixels, frame.layout.encoding)
    _, view, interval = split(data)
    if interval != frame.layout.encoding.restart_interval:
        raise LibraryMissing(f"{LIBRARY} does not honour TJ_RESTART: libjpeg-turbo 2.1 or newer is needed")
    scan = np.array(view, np.uint8)
    markers = _marker_positions(scan)
    scan[markers + 1] = _marker_codes(frame.layout, frame.patch)
    segments = frame.layout.segment_span(frame.patch)[3]
    last = markers[segments - 1 :: segments]
    begins = [0, *(last + 2).tolist()]
    ends = [*last.tolist(), scan.size]
    rows = scan.data
    return [rows[begin:end] for begin, end in zip(begins, ends, strict=True)]


def splice(frame: PreparedFrame, pixels: NDArray[np.uint8]) -> bytes:
    """The JPEG of the frame with its patch replaced by `pixels` (BGR uint8 of the patch's shape).

    Byte-identical to encoding the whole changed frame with the same encoding (and header).
    """
    parts: list[bytes | memoryview] = [frame.header]
    position = 0
    for (begin, end), row in zip(frame.cuts.tolist(), patch_rows(frame, pixels), strict=True):
        parts += (frame.scan[position:begin], row)
        position = end
    parts += (frame.scan[position:], EOI)
    return b"".join(parts)


@functools.lru_cache(maxsize=4096)
def _header_for(header: bytes, width: int, height: int) -> bytes:
    """`header` for a picture of another size: everything but SOF0's dimensions stays, the synthetic mark included."""
    position = 2
    while header[position + 1] != _SOF0:
        position += 2 + int.from_bytes(header[position + 2 : position + 4], "big")
    dimensions = height.to_bytes(2, "big") + width.to_bytes(2, "big")  # behind marker, length and precision
    return header[: position + 5] + dimensions + header[position + 9 :]


def patch_jpeg(frame: PreparedFrame, pixels: NDArray[np.uint8]) -> bytes:
    """The frame's patch as a JPEG of its own, showing `pixels` (BGR uint8 of the patch's shape)."""
    scan = split(encode(pixels, frame.layout.encoding))[1]
    return b"".join((_header_for(frame.header, frame.patch.width, frame.patch.height), scan, EOI))


def prepared_patch_jpeg(frame: PreparedFrame) -> bytes:
    """The frame's patch as it was prepared, as a JPEG of its own: the same segments, their markers numbered from 0.

    Decodes to exactly the frame's pixels under the patch under 4:4:4. Where chroma is subsampled, decoders interpolate
    it across the patch's edge, so that its outermost row or column may differ on each side where the frame goes on:
    all four sides under 4:2:0, left and right under 4:2:2.
    """
    rows = [frame.scan[begin:end] for begin, end in frame.cuts.tolist()]
    scan = np.frombuffer(bytearray(b"\xff\xd0".join(rows)), np.uint8)
    markers = _marker_positions(scan)
    scan[markers + 1] = 0xD0 + np.arange(markers.size) % 8
    return b"".join((_header_for(frame.header, frame.patch.width, frame.patch.height), scan.data, EOI))
