"""What an operator hands in for a tenant: paths go in, the model's path, checked frames and boxes come out.

Every fault is one line that names the file, the fault and the remedy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from compositor.errors import InvalidInput
from compositor.geometry import Box

from .crop_rects import read_rects
from .frames import FrameSource, open_frames

__all__ = ["FrameSource", "Source", "open_source"]


@dataclass(frozen=True)
class Source:
    """The three parts of a tenant's source."""

    model: Path
    frames: FrameSource
    rects: list[Box]


def open_source(
    directory: Path | None, model: Path | None = None, frames: Path | None = None, crop_rects: Path | None = None
) -> Source:
    """Finds and checks the parts: those named, else those of the directory's fixed layout. Raises InvalidInput.

    The layout: `checkpoint/model_best.onnx`, `frames/*.png|jpg`, `crop_rects.json`. The model is only found here;
    `model_check` looks into it.
    """
    if directory is not None and not directory.is_dir():
        raise InvalidInput(
            f"{directory}: no such directory; give the tenant's source directory, or --model, --frames, --crop-rects"
        )
    model = _part(directory, model, "checkpoint/model_best.onnx", "--model")
    frames = _part(directory, frames, "frames", "--frames")
    crop_rects = _part(directory, crop_rects, "crop_rects.json", "--crop-rects")
    opened = open_frames(frames)
    return Source(model, opened, read_rects(crop_rects, opened))


def _part(directory: Path | None, given: Path | None, default: str, option: str) -> Path:
    path = given or (directory and directory / default)
    if path is None:
        raise InvalidInput(
            f"{option} is missing: give a source directory, or all of --model, --frames and --crop-rects"
        )
    if not path.exists():
        raise InvalidInput(f"{path}: not found; put it there, or name another with {option}")
    return path
