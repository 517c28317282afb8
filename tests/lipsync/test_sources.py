"""The three parts of a tenant's source, by layout and by name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from compositor.errors import InvalidInput
from lipsync.sources import open_source

from .conftest import boxes, write_source


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source")


def test_the_fixed_layout_is_found(directory: Path) -> None:
    source = open_source(directory)
    assert source.model == directory / "checkpoint" / "model_best.onnx"
    assert source.frames.path == directory / "frames"
    assert source.rects == boxes()


def test_parts_may_be_named_one_by_one(directory: Path, tmp_path: Path) -> None:
    rects = tmp_path / "other.json"
    (directory / "crop_rects.json").rename(rects)
    assert open_source(directory, crop_rects=rects).rects == boxes()
    model = directory / "checkpoint" / "model_best.onnx"
    source = open_source(None, model, directory / "frames", rects)
    assert (source.model, source.frames.path) == (model, directory / "frames")


@pytest.mark.parametrize(
    ("part", "option"),
    [("checkpoint/model_best.onnx", "--model"), ("frames", "--frames"), ("crop_rects.json", "--crop-rects")],
)
def test_a_missing_part_is_named_with_its_option(directory: Path, part: str, option: str) -> None:
    (directory / part).rename(directory / "elsewhere")
    with pytest.raises(InvalidInput, match=re.escape(f"{directory / part}: not found; put it there")) as caught:
        open_source(directory)
    assert caught.value.message.endswith(f"or name another with {option}")
    parts = {"--model": directory, "--frames": directory, "--crop-rects": directory}
    parts.pop(option)
    given = [parts.get(name) for name in ("--model", "--frames", "--crop-rects")]
    with pytest.raises(InvalidInput, match=f"^{option} is missing: give a source directory, or all of --model"):
        open_source(None, *given)


@pytest.mark.parametrize("make", ["nothing", "file"])
def test_a_source_that_is_no_directory_is_refused(tmp_path: Path, make: str) -> None:
    path = tmp_path / "x"
    if make == "file":
        path.write_text("hello")
    with pytest.raises(InvalidInput, match=re.escape(f"{path}: no such directory; give the tenant's source directory")):
        open_source(path)


def test_a_named_part_that_is_missing_is_refused(directory: Path) -> None:
    with pytest.raises(InvalidInput, match=r"nowhere\.mp4: not found; put it there, or name another with --frames"):
        open_source(directory, frames=directory / "nowhere.mp4")
