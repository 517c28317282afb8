"""One frame: a predicted mouth and a prepared frame in, the finished frame's bytes out. Pure; runs in threads.

A mouth may be mixed with the frame's idle mouth, and the patch around it may come alone, for viewers that hold the
prepared frames.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from . import jpeg
from .blending import Pixels, merge_planes, mix, paste
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
    """A finished frame, or its patch alone, and the CPU-bound stages' wall time in seconds.

    mouth: BGR uint8 (328, 328, 3), what was pasted: its own memory, where a prediction's is soon overwritten.
    """

    data: bytes
    mouth: Pixels
    blend_s: float
    encode_s: float


def render(tenant: Tenant, number: int, planes: Pixels, output: Output) -> Rendered:
    """Frame `number` with a predicted mouth, planes of BGR uint8 (3, 328, 328), in its crop rectangle."""
    return compose(tenant, number, merge_planes(planes), output)


def compose(
    tenant: Tenant,
    number: int,
    mouth: Pixels,
    output: Output,
    weight: float = 1.0,
    *,
    borrowed: bool = False,
    alone: bool = False,
) -> Rendered:
    """Frame `number` with a mouth, BGR uint8 (328, 328, 3), in its crop rectangle.

    weight: how much of the mouth there is, 0 to 1; the rest is the prepared frame's own, idle one. borrowed: the mouth
    was predicted for another frame. alone: the patch around the mouth as a JPEG of its own, at the prepared quality,
    whatever the output.
    """
    begin = time.perf_counter()
    frame = tenant.frame(number)
    rect = tenant.rect(number).inside(frame.patch)
    pixels = paste(tenant.background(number), mouth, rect, tenant.manifest.blend)
    if weight < 1 or borrowed:
        pixels = mix(idle_patch(tenant, number), pixels, rect, weight, borrowed=borrowed)
    blended = time.perf_counter()
    data = jpeg.patch_jpeg(frame, pixels) if alone else _encode(tenant, frame, pixels, output)
    return Rendered(data, mouth, blended - begin, time.perf_counter() - blended)


def idle_patch(tenant: Tenant, number: int) -> Pixels:
    """The pixels of a prepared frame's patch, its idle mouth in it: BGR uint8 of the patch's shape."""
    if tenant.manifest.idle == "background":
        return tenant.background(number)
    return jpeg.decode(jpeg.prepared_patch_jpeg(tenant.frame(number)))


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
