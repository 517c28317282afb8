"""A tenant on disk: its directory in the model repository, opened by mapping flat files, read frame by frame.

The directory is made by `lipsync tenant add` and never changed in place. Opening checks names, sizes and offsets, so
that no later read can leave a file's end; `verify` checks the checksums too. Knows nothing of Triton or of audio.
"""

from __future__ import annotations

import base64
import hashlib
import mmap
import re
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from .blending import CROP_SIZE, Blend, Pixels
from .errors import InvalidInput, TenantBroken, TenantNotFound
from .geometry import Box
from .jpeg import Encoding, Layout, PreparedFrame, Subsampling

FORMAT = 1
"""Version of the files below. A reader refuses what it does not know."""

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
AUDIO_ENCODER = "audio_encoder"
MANIFEST, INDEX, SCANS, PATCHES, CUTS, CROPS, MODEL = (
    "manifest.json",
    "index.npy",
    "scans.bin",
    "patches.bin",
    "cuts.npy",
    "crops.bin",
    "model.onnx",
)
CROP_BYTES = CROP_SIZE * CROP_SIZE * 3

FRAME = np.dtype(
    [
        ("scan", "<u8", (2,)),  # begin and end in scans.bin: the prepared frame's entropy-coded bytes
        ("patch_begin", "<u8"),  # begin in patches.bin: the background's pixels under the patch, BGR
        ("cuts", "<u4", (2,)),  # first and last row in cuts.npy
        ("rect", "<i4", (4,)),  # crop rectangle: x, y, width, height
        ("patch", "<i4", (4,)),  # its MCU-aligned patch: x, y, width, height
    ]
)


class FileRecord(BaseModel):
    """Size in bytes and SHA-256 of a file, as it was written."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int
    sha256: str


class Manifest(BaseModel):
    """What `manifest.json` says of a tenant."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int
    tenant: str
    created: str
    frames: int
    width: int
    height: int
    fps: int
    quality: int
    subsampling: Subsampling
    restart_interval: int
    header: str  # the JPEG header of every prepared frame, base64
    blend: Blend
    idle: Literal["rendered", "background"]
    crops: Literal["resident", "sent"]
    encoder: str
    max_batch_size: int
    model_sha256: str  # of the uploaded graph
    files: dict[str, FileRecord]


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_name(name: str) -> str:
    """`name`, if a tenant may be called so. Raises InvalidInput."""
    if not NAME.fullmatch(name):
        raise InvalidInput(
            f"{name[:80]!r} is no tenant name: use 1 to 64 of a-z 0-9 _ -, the first one a letter or digit",
            field="tenant",
        )
    return name


def tenant_names(repository: Path) -> list[str]:
    """The tenants installed in a model repository, sorted. Encoders and raw models are none."""
    if not repository.is_dir():
        return []
    names = (entry.name for entry in repository.iterdir() if NAME.fullmatch(entry.name))
    return sorted(name for name in names if (repository / name / "1" / MANIFEST).is_file())


def read_manifest(repository: Path, name: str) -> Manifest:
    """The manifest of an installed tenant. Raises InvalidInput, TenantNotFound or TenantBroken."""
    path = repository / check_name(name) / "1" / MANIFEST
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise TenantNotFound(f"no tenant named {name!r} is installed", field="tenant") from error
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        raise TenantBroken(f"{path}: {where}: {fault['msg']}; add the tenant again", field="tenant") from error
    if manifest.format != FORMAT:
        raise TenantBroken(
            f"{path}: format {manifest.format}, but this version reads {FORMAT}; add the tenant again", field="tenant"
        )
    return manifest


class Tenant:
    """An open tenant. Its arrays are views into mapped files, which stay mapped as long as any view of them lives."""

    def __init__(self, repository: Path, name: str) -> None:
        """Opens the tenant: milliseconds, whatever its size. Raises InvalidInput, TenantNotFound or TenantBroken."""
        self.name = name
        self.manifest = read_manifest(repository, name)
        self.directory = repository / name / "1"
        self.encoding = Encoding(self.manifest.quality, self.manifest.subsampling, self.manifest.restart_interval)
        self.layout = Layout(self.manifest.width, self.manifest.height, self.encoding)
        self.header = base64.b64decode(self.manifest.header)
        self._check_sizes()
        self._scans, self._patches, self._crops = (self._map(file) for file in (SCANS, PATCHES, CROPS))
        try:
            self._index: NDArray[np.void] = np.load(self.directory / INDEX)
            self._cuts: NDArray[np.uint32] = np.load(self.directory / CUTS)
        except (OSError, ValueError) as error:
            raise self._broken(f"index is not readable ({error})") from error
        self._check_index()

    def _broken(self, fault: str) -> TenantBroken:
        return TenantBroken(f"tenant {self.name!r} is damaged: {fault}; remove it and add it again", field="tenant")

    def _check_sizes(self) -> None:
        for file, record in self.manifest.files.items():
            try:
                size = (self.directory / file).stat().st_size
            except OSError as error:
                raise self._broken(f"{file} is missing") from error
            if size != record.size:
                raise self._broken(f"{file} has {size} bytes instead of {record.size}")

    def _map(self, file: str) -> memoryview:
        with (self.directory / file).open("rb") as opened:
            return memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))

    def _check_index(self) -> None:
        """Every offset lies inside its file, every rectangle inside its patch and every patch inside the frame."""
        index, frames = self._index, self.manifest.frames
        if index.dtype != FRAME or index.shape != (frames,) or len(self._crops) != frames * CROP_BYTES:
            raise self._broken("the index does not fit the manifest")
        rect, patch = index["rect"].astype(np.int64), index["patch"].astype(np.int64)
        patch_end = index["patch_begin"].astype(np.int64) + patch[:, 2] * patch[:, 3] * 3
        scan, cuts = index["scan"].astype(np.int64), index["cuts"].astype(np.int64)
        frame_size = np.array([self.manifest.width, self.manifest.height])
        sound = (
            (np.diff(scan) > 0).all()
            and scan.max() <= len(self._scans)
            and (patch_end <= len(self._patches)).all()
            and (np.diff(cuts) > 0).all()
            and cuts.max() <= len(self._cuts)
            and (patch[:, :2] >= 0).all()
            and (rect[:, 2:] > 0).all()
            and (rect[:, :2] >= patch[:, :2]).all()
            and (rect[:, :2] + rect[:, 2:] <= patch[:, :2] + patch[:, 2:]).all()
            and (patch[:, :2] + patch[:, 2:] <= frame_size).all()
        )
        if not sound:
            raise self._broken("the index points outside of its files")

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
        """The crop of frame `number` that the model sees: BGR uint8 (328, 328, 3), read-only."""
        return np.frombuffer(self._crops, np.uint8, CROP_BYTES, number * CROP_BYTES).reshape(CROP_SIZE, CROP_SIZE, 3)

    def verify(self) -> None:
        """Compares every file's checksum with the manifest; reads everything. Raises TenantBroken."""
        for file, record in self.manifest.files.items():
            if sha256_of(self.directory / file) != record.sha256:
                raise self._broken(f"the checksum of {file} is wrong")
