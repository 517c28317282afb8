"""A tenant on disk: its directory in the model repository, opened by mapping flat files, read frame by frame.

The directory is made by `lipsync tenant add` and never changed in place. Opening checks names, sizes and offsets, so
that no later read can leave a file's end; `verify` checks the checksums too. Knows nothing of Triton or of audio.
"""

from __future__ import annotations

import base64
import mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .blending import CROP_SIZE, Pixels, merge_planes
from .errors import InvalidInput, TenantBroken
from .geometry import Box
from .jpeg import Encoding, Layout, PreparedFrame
from .manifest import CROPS, CUTS, INDEX, MANIFEST, MODEL, PATCHES, SCANS, broken, read_manifest, sha256_of

CROP_BYTES = CROP_SIZE * CROP_SIZE * 3
DESCRIPTORS = 3
"""File descriptors that an open tenant holds: Python's mmap keeps one for each file that it maps."""

FRAME = np.dtype(
    [
        ("scan", "<u8", (2,)),  # begin and end in scans.bin: the prepared frame's entropy-coded bytes
        ("patch_begin", "<u8"),  # begin in patches.bin: the background's pixels under the patch, BGR
        ("cuts", "<u4", (2,)),  # first and last row in cuts.npy
        ("rect", "<i4", (4,)),  # crop rectangle: x, y, width, height
        ("patch", "<i4", (4,)),  # its MCU-aligned patch: x, y, width, height
    ]
)


class Tenant:
    """An open tenant. Its arrays are views into mapped files, which stay mapped as long as any view of them lives."""

    def __init__(self, repository: Path, name: str) -> None:
        """Opens the tenant: milliseconds, whatever its size. Raises InvalidInput, TenantNotFound or TenantBroken."""
        self.name = name
        self.manifest = read_manifest(repository, name)
        self.open_bytes = sum(record.size for file, record in self.manifest.files.items() if file != MODEL)
        """What is mapped or in memory of its files as long as it is open."""
        self.directory = repository / name / "1"
        self.encoding = Encoding(self.manifest.quality, self.manifest.subsampling, self.manifest.restart_interval)
        self.layout = Layout(self.manifest.width, self.manifest.height, self.encoding)
        self.header = base64.b64decode(self.manifest.header)
        if self.layout.columns % self.encoding.restart_interval:
            raise broken(name, f"{MANIFEST}: restart_interval does not divide the width")
        self._scans, self._patches, self._crops = (self._map(file) for file in (SCANS, PATCHES, CROPS))
        self._index: NDArray[np.void] = self._load(INDEX, FRAME, (self.frames,))
        self._cuts: NDArray[np.uint32] = self._load(CUTS, np.dtype("<u4"), (None, 2))
        self._check_size(MODEL, self._stat(MODEL))
        if len(self._crops) != self.frames * CROP_BYTES:
            raise broken(name, f"{CROPS} does not hold {self.frames} crops")
        if fault := self._index_fault():
            raise broken(name, f"{INDEX}: {fault}")

    def _check_size(self, file: str, size: int) -> None:
        expected = self.manifest.files[file].size
        if size != expected:
            raise broken(self.name, f"{file} has {size} bytes instead of {expected}")

    def _stat(self, file: str) -> int:
        try:
            return (self.directory / file).stat().st_size
        except OSError as error:
            raise self._unreadable(file, error) from error

    def _unreadable(self, file: str, error: OSError) -> TenantBroken:
        return broken(self.name, f"{file} cannot be read ({error.strerror})")

    def _map(self, file: str) -> memoryview:
        self._check_size(file, self._stat(file))
        try:
            with (self.directory / file).open("rb") as opened:
                mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise self._unreadable(file, error) from error
        self._check_size(file, len(mapped))
        return memoryview(mapped)

    def _load(self, file: str, dtype: np.dtype[Any], shape: tuple[int | None, ...]) -> NDArray[Any]:
        self._check_size(file, self._stat(file))
        try:
            with (self.directory / file).open("rb") as opened:
                array: NDArray[Any] = np.lib.format.read_array(opened, allow_pickle=False)
        except Exception as error:  # numpy's reader raises what it likes
            raise broken(self.name, f"{file} is not readable ({type(error).__name__})") from error
        fits = len(array.shape) == len(shape) and all(
            wanted in (None, found) for wanted, found in zip(shape, array.shape, strict=True)
        )
        if array.dtype != dtype or not fits:
            raise broken(self.name, f"{file} holds {array.dtype} {array.shape}, which does not fit the manifest")
        return array

    def _index_fault(self) -> str:
        """What is wrong with the index, if anything: each patch is what the frame's rectangle asks for, and the frames'
        pieces lie end to end and fill their files."""
        index = self._index
        rect, patch = index["rect"].astype(np.int64), index["patch"].astype(np.int64)
        size = (self.manifest.width, self.manifest.height)
        if not ((rect[:, :2] >= 0).all() and (rect[:, 2:] > 0).all() and (rect[:, :2] + rect[:, 2:] <= size).all()):
            return "a rectangle is outside of its frame"
        aligned = [self.layout.align(Box(*box)) for box in rect.tolist()]
        if not np.array_equal(patch, aligned):
            return "a patch does not fit its rectangle"
        pixels = np.concatenate(([0], np.cumsum(patch[:, 2] * patch[:, 3] * 3)))
        if pixels[-1] != len(self._patches) or not np.array_equal(index["patch_begin"], pixels[:-1]):
            return f"a patch is outside of {PATCHES}"
        if not _end_to_end(index["scan"], len(self._scans)):
            return f"a frame is outside of {SCANS}"
        rows = -(-patch[:, 3] // self.encoding.subsampling.mcu[1])
        if not _end_to_end(index["cuts"], len(self._cuts)) or not np.array_equal(np.diff(index["cuts"])[:, 0], rows):
            return f"a frame is outside of {CUTS}"
        begins, ends = self._cuts.astype(np.int64).T
        limits = np.repeat(np.diff(index["scan"])[:, 0].astype(np.int64), rows)
        later = np.arange(len(begins)) != np.repeat(index["cuts"][:, 0].astype(np.int64), rows)
        if (begins >= ends).any() or (ends > limits).any() or (begins[1:] < ends[:-1])[later[1:]].any():
            return f"{CUTS} points outside of its frame"
        return ""

    @property
    def frames(self) -> int:
        return self.manifest.frames

    def check_frame(self, number: int) -> None:
        """Raises InvalidInput unless `number` is one of the tenant's frames."""
        if not 0 <= number < self.frames:
            raise InvalidInput(
                f"frame {number} is out of range: {self.name!r} has frames 0 to {self.frames - 1}", field="frames"
            )

    def frame(self, number: int) -> PreparedFrame:
        """Frame `number` as it was prepared, idle mouth and all, ready for splicing."""
        entry = self._index[number]
        begin, end = entry["scan"].tolist()
        first, last = entry["cuts"].tolist()
        patch = Box(*entry["patch"].tolist())
        return PreparedFrame(self.header, self._scans[begin:end], self.layout, patch, self._cuts[first:last])

    def rect(self, number: int) -> Box:
        """The crop rectangle of frame `number`, in the frame."""
        return Box(*self._index[number]["rect"].tolist())

    def background(self, number: int) -> Pixels:
        """The source's own pixels under the patch of frame `number`: BGR uint8, read-only."""
        entry = self._index[number]
        _, _, width, height = entry["patch"].tolist()
        begin = int(entry["patch_begin"])
        return np.frombuffer(self._patches, np.uint8, width * height * 3, begin).reshape(height, width, 3)

    def crop(self, number: int) -> Pixels:
        """The crop of frame `number` that the model sees: BGR uint8 (328, 328, 3)."""
        return merge_planes(self.crop_planes(number))

    def crop_planes(self, number: int) -> Pixels:
        """The same as it is stored, its planes one after another: uint8 (3, 328, 328), read-only."""
        return np.frombuffer(self._crops, np.uint8, CROP_BYTES, number * CROP_BYTES).reshape(3, CROP_SIZE, CROP_SIZE)

    def verify(self) -> None:
        """Compares every file's checksum with the manifest; reads everything. Raises TenantBroken."""
        for file, record in self.manifest.files.items():
            try:
                digest = sha256_of(self.directory / file)
            except OSError as error:
                raise self._unreadable(file, error) from error
            if digest != record.sha256:
                raise broken(self.name, f"the checksum of {file} is wrong")


def _end_to_end(ranges: NDArray[Any], length: int) -> bool:
    """Whether (begin, end) ranges, none of them empty, follow each other without a gap from 0 to `length`."""
    begins, ends = ranges[:, 0], ranges[:, 1]
    return bool(
        begins[0] == 0 and ends[-1] == length and (begins < ends).all() and np.array_equal(begins[1:], ends[:-1])
    )
