"""One frame: a predicted mouth and a prepared frame in, the finished frame's bytes out. Pure; runs in threads."""

from __future__ import annotations

import time
from dataclasses import dataclass

from . import jpeg
from .blending import Pixels, merge_planes, paste
from .errors import InvalidInput
from .jpeg import Encoding, PreparedFrame
from .tenant import Tenant


@dataclass(frozen=True)
class Output:
    """How frames are wanted: JPEG at the prepared quality (0, the cheap one) or another, or raw BGR."""

    raw: bool = False
    quality: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.quality <= 100:
            raise InvalidInput(
                f"quality {self.quality} is out of range: use 1 to 100, or 0 for the prepared one",
                field="output.quality",
            )


@dataclass(frozen=True)
class Rendered:
    """A finished frame and the CPU-bound stages' wall time in seconds."""

    data: bytes
    blend_s: float
    encode_s: float


def render(tenant: Tenant, number: int, mouth: Pixels, output: Output) -> Rendered:
    """Frame `number` with a mouth, planes of BGR uint8 (3, 328, 328), in its crop rectangle."""
    begin = time.perf_counter()
    frame = tenant.frame(number)
    rect = tenant.rect(number).inside(frame.patch)
    pixels = paste(tenant.background(number), merge_planes(mouth), rect, tenant.manifest.blend)
    blended = time.perf_counter()
    data = _encode(tenant, frame, pixels, output)
    return Rendered(data, blended - begin, time.perf_counter() - blended)


def _encode(tenant: Tenant, frame: PreparedFrame, pixels: Pixels, output: Output) -> bytes:
    if not output.raw and output.quality in (0, tenant.encoding.quality):
        return jpeg.splice(frame, pixels)
    whole = jpeg.decode(frame.jpeg())
    patch = frame.patch
    whole[patch.y : patch.bottom, patch.x : patch.right] = pixels
    if output.raw:
        return whole.tobytes()
    data = jpeg.encode(whole, Encoding(output.quality, tenant.encoding.subsampling))
    header, scan, _ = jpeg.split(data)
    return b"".join((jpeg.mark_synthetic(header), scan, jpeg.EOI))
