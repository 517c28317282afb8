"""What the files of a model repository say of its models: how much memory one takes, and whether it may be unloaded.

A model's name comes in, its `Facts` go out. Knows nothing of what is loaded where.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from .errors import LipsyncError
from .manifest import MANIFEST, MODEL, NAME, RAW_SUFFIX, read_manifest
from .residency.models import Facts

CONFIG = "config.pbtxt"
MEMORY_PARAMETER = "lipsync_memory_bytes"
"""The parameter of config.pbtxt that says what a model was measured to take; no backend reads it."""

_MEMORY = re.compile(
    rf'^parameters\s*{{\s*key:\s*"{MEMORY_PARAMETER}"\s*value:?\s*{{\s*string_value:\s*"([0-9]{{1,15}})"\s*}}\s*}}',
    re.MULTILINE,
)
_UNKNOWN = Facts(bytes=0, evictable=False, stamp=None)


def memory_of(config: str) -> int:
    """The bytes that a config.pbtxt, as `lipsync` writes it, says that its model takes; 0 where it says nothing."""
    # Not by a search through all of it, which takes ten times as long: `tenant list` reads 11,000.
    begin = config.rfind("parameters", 0, max(0, config.rfind(MEMORY_PARAMETER)))
    found = _MEMORY.match(config, begin) if begin >= 0 else None
    return int(found[1]) if found else 0


class Catalogue:
    """The models of a repository by name. Replaced files are noticed at the next use, by inode and time."""

    def __init__(self, repository: Path) -> None:
        self.repository = repository
        self._known: dict[str, Facts] = {}

    def facts(self, model: str) -> Facts:
        """What the files say of a model: two looks at the file system where they are as before.

        A model whose files are gone keeps the facts that are known of it, for it may still be loaded, but has no stamp.
        One that never was here is not ours to unload. Never raises.
        """
        known = self._known.get(model, _UNKNOWN)
        if not NAME.fullmatch(model.removesuffix(RAW_SUFFIX)):
            return _UNKNOWN
        directory = self.repository / model
        try:
            status = [(directory / file).stat() for file in (CONFIG, f"1/{MODEL}")]
            stamp = tuple(number for file in status for number in (file.st_ino, file.st_mtime_ns))
            if stamp != known.stamp:
                memory = memory_of((directory / CONFIG).read_text(encoding="utf-8", errors="replace"))
                known = Facts(memory, _is_tenants(directory), stamp, encoder=self._encoder(model))
                self._known[model] = known
        except OSError:
            return replace(known, stamp=None, gone=known.evictable and self._is_gone(directory))
        return known

    def _encoder(self, model: str) -> str:
        try:
            return read_manifest(self.repository, model).encoder
        except LipsyncError:  # no tenant, or a damaged one
            return ""

    def _is_gone(self, directory: Path) -> bool:
        """Whether a model was removed. Where the repository is empty or cannot be read, something else is wrong."""
        try:
            return not directory.exists() and any(self.repository.iterdir())
        except OSError:
            return False


def _is_tenants(directory: Path) -> bool:
    """Whether the model is a tenant's, fused or raw, and no audio encoder."""
    return directory.name.endswith(RAW_SUFFIX) or (directory / "1" / MANIFEST).is_file()
