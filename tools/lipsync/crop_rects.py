"""A tenant's crop rectangles: a JSON file and the frames it belongs to in, one checked box a frame out."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from compositor.errors import InvalidInput
from compositor.geometry import Box

from .frames import MIN_SIDE, FrameSource

MAX_BYTES = 64 << 20
"""Largest file; 20,000 rectangles are about 1 MB."""
_LARGEST = 1 << 20


class _DuplicateKey(ValueError):
    """A JSON object has a key twice."""


def read_rects(path: Path, frames: FrameSource) -> list[Box]:
    """The crop rectangle of each frame, checked to lie in it. Raises InvalidInput.

    Two forms: a list of [x1, y1, x2, y2], or an object keyed by frame (all by number from 0, or all by file name or its
    stem), each value such a list or an object with `rect`. x2 and y2 are exclusive.
    """
    values = _ordered(path, _read(path), frames.names)
    if len(values) != len(frames.names):
        raise InvalidInput(
            f"{path}: {len(values)} rectangles for {len(frames.names)} frames in {frames.path}; "
            "give one a frame, in order"
        )
    return [_box(path, number, value, frames.size) for number, value in enumerate(values)]


def _read(path: Path) -> Any:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InvalidInput(f"{path}: larger than {MAX_BYTES >> 20} MiB; is this the right file?")
        return json.loads(path.read_bytes(), object_pairs_hook=_unique)
    except _DuplicateKey as error:
        raise InvalidInput(f"{path}: key {error} is there twice; give one rectangle a frame") from error
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{path}: not JSON ({error}); expected [[x1, y1, x2, y2], ...]") from error
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read ({error.strerror}); give a JSON file") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise _DuplicateKey(repr(Counter(key for key, _ in pairs).most_common(1)[0][0][:60]))
    return values


def _ordered(path: Path, data: Any, names: list[str]) -> list[Any]:
    """The values in the order of the frames; as many as the file has, if it has too many or too few."""
    if isinstance(data, list):
        return data
    if not isinstance(data, dict):
        raise InvalidInput(f"{path}: expected a list [[x1, y1, x2, y2], ...] or an object keyed by frame")
    by_number: dict[int, Any] = {}
    for key, number in _numbers(path, list(data), names).items():
        if number in by_number:
            raise InvalidInput(f"{path}: key {key!r} names frame {number} again; give one rectangle a frame")
        by_number[number] = data[key]
    missing = next((number for number in range(len(by_number)) if number not in by_number), None)
    if missing is not None:
        name = f" ({names[missing]})" if missing < len(names) else ""
        raise InvalidInput(f"{path}: no rectangle for frame {missing}{name}; give one a frame")
    return [by_number[number] for number in range(len(by_number))]


def _numbers(path: Path, keys: list[str], names: list[str]) -> dict[str, int]:
    """Each key's frame number. Names come first: the files may be called 1.png to 8.png."""
    stems = Counter(Path(name).stem for name in names)
    named = {Path(name).stem: number for number, name in enumerate(names) if stems[Path(name).stem] == 1}
    named |= {name: number for number, name in enumerate(names)}
    if all(key in named for key in keys):
        return {key: named[key] for key in keys}
    if all(key.isascii() and key.isdecimal() and len(key) < 10 for key in keys):
        return {key: int(key) for key in keys}
    strange = next((key for key in keys if key not in named and not key.isdecimal()), None) or keys[0]
    raise InvalidInput(
        f"{path}: key {strange[:60]!r} names no frame; use frame numbers from 0, or the frames' file names, for all"
    )


def _box(path: Path, number: int, value: Any, size: tuple[int, int]) -> Box:
    rect = value.get("rect") if isinstance(value, dict) else value
    if not isinstance(rect, list) or len(rect) != 4 or not all(_is_whole(entry) for entry in rect):
        raise InvalidInput(
            f"{path}: frame {number}: {_shown(rect)} is not [x1, y1, x2, y2] in whole pixels; mend the entry"
        )
    x1, y1, x2, y2 = map(int, rect)
    where = f"{path}: frame {number}: [{x1}, {y1}, {x2}, {y2}]"
    width, height = size
    if not (x1 >= 0 and y1 >= 0 and x2 <= width and y2 <= height):
        raise InvalidInput(f"{where} is not inside the {width}x{height} frame; crop inside it")
    if x2 <= x1 or y2 <= y1:
        raise InvalidInput(f"{where} is turned around; x2 and y2 are the right and lower edge")
    if x2 - x1 < MIN_SIDE or y2 - y1 < MIN_SIDE:
        raise InvalidInput(f"{where} is smaller than {MIN_SIDE}x{MIN_SIDE}; crop the face larger")
    return Box(x1, y1, x2 - x1, y2 - y1)


def _is_whole(entry: Any) -> bool:
    # The bound keeps NaN and infinity out, too.
    number = isinstance(entry, (int, float)) and not isinstance(entry, bool)
    return number and abs(entry) < _LARGEST and entry == int(entry)


def _shown(value: Any) -> str:
    try:
        return json.dumps(value)[:60]
    except RecursionError:
        return "a deep nest"
