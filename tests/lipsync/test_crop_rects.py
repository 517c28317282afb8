"""Crop rectangles: both forms, every way to name frames, and every fault with its one line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compositor.blending import Pixels
from compositor.errors import InvalidInput
from compositor.geometry import Box
from lipsync.crop_rects import read_rects

from .conftest import boxes, rectangles

NAMES = [f"frame_{number:02d}.png" for number in range(8)]


class Frames:
    """Eight frames of 320x240 that nobody reads."""

    path = Path("frames")
    size = (320, 240)

    def __init__(self, names: list[str] | None = None) -> None:
        self.names = names or NAMES

    def __iter__(self) -> Iterator[Pixels]:
        yield np.zeros((240, 320, 3), np.uint8)


def read(folder: Path, data: object, names: list[str] | None = None) -> list[Box]:
    path = folder / "crop_rects.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return read_rects(path, Frames(names))


def refusal(folder: Path, data: object, names: list[str] | None = None) -> str:
    with pytest.raises(InvalidInput) as caught:
        read(folder, data, names)
    message = caught.value.message
    assert message.startswith(f"{folder / 'crop_rects.json'}: ")
    assert "\n" not in message
    assert len(message) < len(str(folder)) + 250
    return message.removeprefix(f"{folder / 'crop_rects.json'}: ")


def changed(value: object, number: int = 3) -> list[Any]:
    rects: list[Any] = rectangles()
    rects[number] = value
    return rects


def test_a_list_gives_a_box_a_frame(tmp_path: Path) -> None:
    assert read(tmp_path, rectangles()) == boxes()
    assert read(tmp_path, [[float(x) for x in rect] for rect in rectangles()]) == boxes()
    assert read(tmp_path, changed([0, 0, 320, 240]))[3] == Box(0, 0, 320, 240)
    assert read(tmp_path, changed([288, 208, 320, 240]))[3] == Box(288, 208, 32, 32)


@pytest.mark.parametrize(
    "keys", [[str(n) for n in range(8)], [f"{n:04d}" for n in range(8)], NAMES, [n[:-4] for n in NAMES]]
)
def test_an_object_names_its_frames(tmp_path: Path, keys: list[str]) -> None:
    pairs = list(zip(keys, rectangles(), strict=True))
    assert read(tmp_path, dict(pairs)) == boxes()
    assert read(tmp_path, dict(reversed(pairs))) == boxes()
    assert read(tmp_path, {key: {"rect": rect, "score": 0.9} for key, rect in pairs}) == boxes()


def test_names_come_before_numbers(tmp_path: Path) -> None:
    names = [f"{number}.png" for number in range(1, 9)]
    by_stem = {str(number + 1): rect for number, rect in enumerate(rectangles())}
    assert read(tmp_path, by_stem, names) == boxes()
    by_number = {str(number): rect for number, rect in enumerate(rectangles())}
    assert read(tmp_path, by_number, names) == boxes()


@pytest.mark.parametrize("count", [0, 7, 9])
def test_unequal_counts_are_refused(tmp_path: Path, count: int) -> None:
    expected = f"{count} rectangles for 8 frames in frames; give one a frame, in order"
    assert refusal(tmp_path, (rectangles() * 2)[:count]) == expected
    assert refusal(tmp_path, {str(n): rect for n, rect in enumerate((rectangles() * 2)[:count])}) == expected


def test_missing_and_repeated_frames_are_named(tmp_path: Path) -> None:
    by_number = {str(number): rect for number, rect in enumerate(rectangles())}
    del by_number["5"]
    assert refusal(tmp_path, by_number) == "no rectangle for frame 5 (frame_05.png); give one a frame"
    assert "key '05' names frame 5 again" in refusal(tmp_path, {**by_number, "5": [1] * 4, "05": [1] * 4})
    by_name = {**dict(zip(NAMES, rectangles(), strict=True)), "frame_02": rectangles()[2]}
    assert "key 'frame_02' names frame 2 again" in refusal(tmp_path, by_name)
    assert refusal(tmp_path, '{"0": [1], "1": [2], "0": [3]}') == "key '0' is there twice; give one rectangle a frame"


@pytest.mark.parametrize("key", ["frame_99.png", "-1", "1.5", "", "²", "9" * 5000, "3"])
def test_keys_that_name_no_frame_are_refused(tmp_path: Path, key: str) -> None:
    by_name: dict[str, object] = dict(zip(NAMES, rectangles(), strict=True))
    by_name.pop("frame_03.png")
    message = refusal(tmp_path, {**by_name, key: rectangles()[3]})
    assert message.startswith("key ")
    assert message.endswith(" names no frame; use frame numbers from 0, or the frames' file names, for all")


def test_stems_that_several_frames_share_name_none(tmp_path: Path) -> None:
    names = [*NAMES[:-1], "frame_00.jpg"]
    assert "'frame_00' names no frame" in refusal(tmp_path, {"frame_00": rectangles()[0]}, names)


def test_mixed_keys_are_refused(tmp_path: Path) -> None:
    assert "names no frame" in refusal(tmp_path, {"0": [0, 0, 50, 50], "frame_01.png": [0, 0, 50, 50]})


@pytest.mark.parametrize(
    "rect",
    [
        [-1, 0, 99, 99],
        [0, -1, 99, 99],
        [100, 100, 321, 200],
        [100, 100, 200, 241],
        [10**5, 10**5, 10**5 + 50, 10**5 + 50],
    ],
)
def test_a_rectangle_outside_of_its_frame_is_refused(tmp_path: Path, rect: list[int]) -> None:
    assert refusal(tmp_path, changed(rect)) == f"frame 3: {rect} is not inside the 320x240 frame; crop inside it"


@pytest.mark.parametrize("rect", [[200, 50, 100, 150], [50, 150, 150, 50], [50, 50, 50, 150]])
def test_a_rectangle_turned_around_is_refused(tmp_path: Path, rect: list[int]) -> None:
    expected = f"frame 3: {rect} is turned around; x2 and y2 are the right and lower edge"
    assert refusal(tmp_path, changed(rect)) == expected


@pytest.mark.parametrize("rect", [[50, 50, 81, 90], [50, 50, 90, 81]])
def test_a_small_rectangle_is_refused(tmp_path: Path, rect: list[int]) -> None:
    assert refusal(tmp_path, changed(rect)) == f"frame 3: {rect} is smaller than 32x32; crop the face larger"


@pytest.mark.parametrize(
    "value",
    [
        [10.5, 10, 90, 90],
        [float("nan"), 10, 90, 90],
        [10, 10, float("inf"), 90],
        [10, 10, 10**400, 90],
        [10, 10, 90],
        [10, 10, 90, 90, 0],
        ["10", 10, 90, 90],
        [None, 10, 90, 90],
        [True, 10, 90, 90],
        [[10], 10, 90, 90],
        [],
        None,
        7,
        "10 10 90 90",
        {"rect": None},
        {"box": [10, 10, 90, 90]},
        {"rect": {"x": 1}},
        ["x" * 5000, 10, 90, 90],
    ],
)
def test_what_is_no_rectangle_is_refused(tmp_path: Path, value: object) -> None:
    message = refusal(tmp_path, changed(value))
    assert message.startswith("frame 3: ")
    assert message.endswith(" is not [x1, y1, x2, y2] in whole pixels; mend the entry")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[[1, 2, 3, 4],]", "hello", "[" * 100_000, '{"a":' * 100_000, "1" * 5000, "\x00", "[1] [2]"],
    ids=["empty", "brace", "comma", "text", "deep list", "deep object", "long number", "nul", "two"],
)
def test_what_is_no_json_is_refused(tmp_path: Path, text: str) -> None:
    message = refusal(tmp_path, text)
    assert message.startswith("not JSON (")
    assert message.endswith("; expected [[x1, y1, x2, y2], ...]")


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "crop_rects.json"
    path.write_bytes(b"[[\xff\xfe\xfd")
    with pytest.raises(InvalidInput, match=r"crop_rects\.json: not JSON"):
        read_rects(path, Frames())


@pytest.mark.parametrize("depth", [50, 400, 900])
def test_a_deep_nest_in_an_entry_is_refused(tmp_path: Path, depth: int) -> None:
    text = json.dumps(changed("@")).replace('"@"', "[" * depth + "]" * depth)
    message = refusal(tmp_path, text)
    assert "not JSON" in message or "is not [x1, y1, x2, y2]" in message


@pytest.mark.parametrize("data", ["7", '"rects"', "null", "true"])
def test_other_json_is_refused(tmp_path: Path, data: str) -> None:
    assert refusal(tmp_path, data) == "expected a list [[x1, y1, x2, y2], ...] or an object keyed by frame"


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"cannot be read \(Is a directory\); give a JSON file"):
        read_rects(tmp_path, Frames())
    with pytest.raises(InvalidInput, match=r"cannot be read \(No such file or directory\)"):
        read_rects(tmp_path / "missing.json", Frames())
    large = tmp_path / "large.json"
    with large.open("wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(InvalidInput, match="larger than 64 MiB; is this the right file"):
        read_rects(large, Frames())
