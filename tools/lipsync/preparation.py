"""Prepares a tenant: a checked source and model go in, the tenant's files come out in a folder of their own.

For each frame: the crop that the model sees, the pixels under the mouth's patch, and the frame's JPEG scan with its
idle mouth (rendered once from encoded silence, or the source as it is), so that only the patch is encoded at run time.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from compositor import jpeg
from compositor import manifest as files
from compositor.blending import Blend, Pixels, cut_crop, merge_planes, paste, split_planes
from compositor.errors import InvalidInput, LipsyncError
from compositor.features import clip_features
from compositor.geometry import Box, Subsampling
from compositor.jpeg import Encoding, Layout
from compositor.tenant import FRAME

from .fusing import CropsMode, fuse
from .model_config import TENANT_BATCH
from .model_interface import one_line
from .sources import FrameSource, Source

Report = Callable[[str, int, int], None]
"""Called with (stage, done, total)."""

BATCH = 4
RESIDENT_FRAMES = 1000
"""Longest tenant whose crops go into the model by default: 323 MB on the device."""


@dataclass(frozen=True)
class Choices:
    """How a tenant is prepared. The defaults are those of `lipsync tenant add`."""

    quality: int = 75
    subsampling: Subsampling = Subsampling.S420
    blend: Blend = "feather"
    idle: Literal["rendered", "background"] = "rendered"
    crops: CropsMode | None = None
    encoder: str = files.AUDIO_ENCODER
    fps: int = 25
    max_batch_size: int = TENANT_BATCH


@dataclass(frozen=True)
class Graph:
    """The uploaded graph with a dynamic batch axis, its (visual, audio, output) names, and the upload's SHA-256."""

    model: onnx.ModelProto
    names: tuple[str, str, str]
    sha256: str


class _Idle:
    """Mouths of the uploaded model for encoded silence, by ONNX Runtime in this process: (328, 328, 3) as the crops."""

    def __init__(self, graph: Graph, encoder: Path) -> None:
        self._audio = silence_features(encoder)
        with _refused("the model fails on silence", "check the export, or use --idle background"):
            self._session = session(fuse(graph.model, graph.names, 0, "sent", "").SerializeToString())

    def __call__(self, crops: list[Pixels]) -> list[Pixels]:
        planes = np.stack([split_planes(crop) for crop in crops])
        feed = {"crop": planes, "audio": np.repeat(self._audio, len(crops), axis=0)}
        with _refused("the model fails on silence", "check the export, or use --idle background"):
            mouths, finite = self._session.run(["mouth", "finite"], feed)
        if not finite.all():
            raise InvalidInput("the model predicts NaN or infinity for silence; export the trained weights again")
        return [merge_planes(mouth) for mouth in mouths]


@contextlib.contextmanager
def _refused(fault: str, remedy: str) -> Iterator[None]:
    """Makes any failure of ONNX Runtime one InvalidInput line; its errors have no base class of their own."""
    try:
        yield
    except LipsyncError:
        raise
    except Exception as error:
        raise InvalidInput(f"{fault} ({one_line(str(error), 200)}); {remedy}") from error


def session(model: bytes | str) -> onnxruntime.InferenceSession:
    """An ONNX Runtime CPU session that does not spin while it waits."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def silence_features(encoder: Path) -> NDArray[np.float32]:
    """Audio features float32 (1, 32, 16, 16) of a frame within silence, by an encoder's ONNX file."""
    if not encoder.is_file():
        raise InvalidInput(
            f"{encoder}: the audio encoder is not installed; run `lipsync encoder add`, or use --idle background"
        )
    with _refused(f"{encoder}: not a working audio encoder", "install it anew with `lipsync encoder add --replace`"):
        running = session(str(encoder))

        def encode(windows: NDArray[np.float32]) -> NDArray[np.float32]:
            embeddings: NDArray[np.float32] = running.run(["audio_features"], {"mel_spectrogram": windows})[0]
            return embeddings

        return clip_features(np.zeros(640, np.float32), 16_000, encode, edge="silence")[:1]


def prepare(
    folder: Path, name: str, source: Source, graph: Graph, encoder: Path, choices: Choices, report: Report
) -> files.Manifest:
    """Writes every file of version 1 of a tenant into `folder`, the manifest last.

    encoder: the ONNX file of the audio encoder, read only to render idle mouths. Raises InvalidInput for a frame that
    cannot be used and OSError where the disk does not take it.
    """
    count = len(source.frames.names)
    crops = choices.crops or ("resident" if count <= RESIDENT_FRAMES else "sent")
    width, height = source.frames.size
    interval = jpeg.restart_interval_for(width, choices.subsampling, source.rects)
    layout = Layout(width, height, Encoding(choices.quality, choices.subsampling, interval))
    idle = _Idle(graph, encoder) if choices.idle == "rendered" else None
    header = _write_frames(folder, source, layout, choices.blend, idle, report)
    report("model", 0, 1)
    onnx.save(fuse(graph.model, graph.names, count, crops, files.CROPS), folder / files.MODEL)
    manifest = files.Manifest(
        format=files.FORMAT,
        tenant=name,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        frames=count,
        width=width,
        height=height,
        fps=choices.fps,
        quality=choices.quality,
        subsampling=choices.subsampling,
        restart_interval=interval,
        header=base64.b64encode(header).decode(),
        blend=choices.blend,
        idle=choices.idle,
        crops=crops,
        encoder=choices.encoder,
        max_batch_size=choices.max_batch_size,
        model_sha256=graph.sha256,
        files={name: _record(folder / name) for name in sorted(files.FILES)},
    )
    (folder / files.MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")
    report("model", 1, 1)
    return manifest


def _record(path: Path) -> files.FileRecord:
    return files.FileRecord(size=path.stat().st_size, sha256=files.sha256_of(path))


def _write_frames(
    folder: Path, source: Source, layout: Layout, blend: Blend, idle: _Idle | None, report: Report
) -> bytes:
    """Writes crops, patches, scans and the two index files; returns the JPEG header that all frames share."""
    count = len(source.rects)
    index = np.zeros(count, FRAME)
    all_cuts: list[NDArray[np.uint32]] = []
    header = b""
    rows = 0
    with (
        (folder / files.CROPS).open("wb") as crops,
        (folder / files.PATCHES).open("wb") as patches,
        (folder / files.SCANS).open("wb") as scans,
    ):
        for number, (frame, crop, mouth) in enumerate(_with_mouths(source.frames, source.rects, idle)):
            rect = source.rects[number]
            patch = layout.align(rect)
            area = (slice(patch.y, patch.bottom), slice(patch.x, patch.right))
            background = np.ascontiguousarray(frame[area])
            if mouth is not None:
                frame = frame.copy()
                frame[area] = paste(background, mouth, rect.inside(patch), blend)
            header, scan, interval = jpeg.split(jpeg.encode(frame, layout.encoding))
            if interval != layout.encoding.restart_interval:
                raise jpeg.LibraryMissing(f"{jpeg.LIBRARY} writes no restart markers: version 2.1 or newer is needed")
            found = jpeg.cuts(scan, layout, patch)
            entry = index[number]
            entry["patch_begin"] = _append(patches, background.data)
            begin = _append(scans, scan)
            _append(crops, split_planes(crop).data)
            entry["scan"] = (begin, begin + len(scan))
            entry["cuts"] = (rows, rows + len(found))
            entry["rect"], entry["patch"] = rect, patch
            rows += len(found)
            all_cuts.append(found)
            report("frames", number + 1, count)
    _save(folder / files.INDEX, index)
    _save(folder / files.CUTS, np.concatenate(all_cuts))
    return jpeg.mark_synthetic(header)


def _save(path: Path, array: NDArray[Any]) -> None:
    # numpy's own writing to a file loses the errno of a full disk.
    buffer = io.BytesIO()
    np.save(buffer, array)
    path.write_bytes(buffer.getvalue())


def _append(file: BinaryIO, data: memoryview) -> int:
    position = file.tell()
    file.write(data)
    return position


def _with_mouths(
    frames: FrameSource, rects: list[Box], idle: _Idle | None
) -> Iterator[tuple[Pixels, Pixels, Pixels | None]]:
    """(frame, its crop, its idle mouth or None) in order; the model runs in batches."""
    pairs = ((frame, cut_crop(frame, rect)) for frame, rect in zip(_counted(frames), rects, strict=True))
    while batch := list(islice(pairs, BATCH)):
        mouths = idle([crop for _, crop in batch]) if idle else [None] * len(batch)
        for (frame, crop), mouth in zip(batch, mouths, strict=True):
            yield frame, crop, mouth


def _counted(frames: FrameSource) -> Iterator[Pixels]:
    """The frames; a source that holds fewer or more than it said is refused by name."""
    expected, seen = len(frames.names), 0
    for frame in frames:
        seen += 1
        if seen <= expected:
            yield frame
    if seen != expected:
        raise InvalidInput(f"{frames.path}: {seen} frames could be read of {expected}; export or convert it again")
