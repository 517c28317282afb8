"""What a model repository says of a tenant before any of its frames is read: names, files, and `manifest.json`."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from .errors import InvalidInput, TenantBroken, TenantNotFound
from .geometry import Subsampling

FORMAT = 2
"""Version of the files below. A reader refuses what it does not know."""

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
AUDIO_ENCODER = "audio_encoder"
RAW_SUFFIX = ".raw"
"""A tenant's uploaded graph is served as `<tenant>.raw`; no tenant can be called so."""
MANIFEST, INDEX, SCANS, PATCHES, CUTS, CROPS, MODEL = (
    "manifest.json",
    "index.npy",
    "scans.bin",
    "patches.bin",
    "cuts.npy",
    "crops.bin",
    "model.onnx",
)
FILES = frozenset((INDEX, SCANS, PATCHES, CUTS, CROPS, MODEL))
"""The files that a manifest records; all of them, and no others."""


class FileRecord(BaseModel):
    """Size in bytes and SHA-256 of a file, as it was written."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(ge=1)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class _Format(BaseModel):
    """The one field that every format has."""

    format: int


class Manifest(BaseModel):
    """What `manifest.json` says of a tenant."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int
    tenant: str
    created: str
    frames: int = Field(ge=1)
    width: int = Field(ge=1, le=65535)
    height: int = Field(ge=1, le=65535)
    fps: int = Field(ge=1)
    quality: int = Field(ge=1, le=100)
    subsampling: Subsampling
    restart_interval: int = Field(ge=1)
    header: str  # the JPEG header of every prepared frame, base64
    blend: Literal["feather", "hard"]
    idle: Literal["rendered", "background"]
    crops: Literal["resident", "sent"]
    encoder: str
    max_batch_size: int = Field(ge=1)
    model_sha256: str  # of the uploaded graph
    files: dict[str, FileRecord]

    @field_validator("header")
    @classmethod
    def _is_header(cls, value: str) -> str:
        if not base64.b64decode(value, validate=True).startswith(b"\xff\xd8"):
            raise ValueError("not a JPEG header in base64")
        return value

    @field_validator("files")
    @classmethod
    def _are_complete(cls, value: dict[str, FileRecord]) -> dict[str, FileRecord]:
        if strange := sorted(FILES ^ value.keys()):
            raise ValueError(f"{strange[0]} is missing or does not belong here")
        return value


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_name(name: str, kind: Literal["tenant", "encoder"] = "tenant") -> str:
    """`name`, if a tenant (or encoder) may be called so. Raises InvalidInput."""
    if not NAME.fullmatch(name):
        raise InvalidInput(
            f"{name[:80]!r} is no {kind} name: use 1 to 64 of a-z 0-9 _ -, the first one a letter or digit",
            field=kind,
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
    except OSError as error:
        raise broken(name, f"{MANIFEST} cannot be read ({error.strerror})") from error
    try:
        # Other formats have other fields, so the format comes first.
        found = _Format.model_validate_json(text).format
        if found != FORMAT:
            raise broken(name, f"{MANIFEST} has format {found}, but this version reads format {FORMAT}")
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ": ".join((MANIFEST, *filter(None, [".".join(map(str, fault["loc"]))])))
        raise broken(name, f"{where}: {fault['msg']}") from error
    if manifest.tenant != name:
        raise broken(name, f"{MANIFEST} belongs to the tenant {manifest.tenant[:80]!r}")
    return manifest


def broken(name: str, fault: str) -> TenantBroken:
    """The error that says that files of a tenant are not what they should be."""
    return TenantBroken(f"tenant {name!r} is damaged: {fault}; remove it and add it again", field="tenant")
