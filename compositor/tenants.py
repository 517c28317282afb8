"""The tenants that this process has open: opened on first use, opened anew when their files were replaced."""

from __future__ import annotations

from pathlib import Path

from .errors import TenantBroken, TenantNotFound
from .tenant import MANIFEST, Tenant, check_name

Stamp = tuple[int, int]


class Tenants:
    """Open tenants by name. Replaced or removed files are noticed at the next use, by the manifest's inode and time."""

    def __init__(self, repository: Path) -> None:
        self.repository = repository
        self._open: dict[str, tuple[Stamp, Tenant]] = {}

    def get(self, name: str) -> tuple[Tenant, bool]:
        """The tenant, and whether it was opened just now, so that what Triton has loaded may be of older files.

        Raises InvalidInput, TenantNotFound or TenantBroken.
        """
        path = self.repository / check_name(name) / "1" / MANIFEST
        try:
            status = path.stat()
        except (FileNotFoundError, NotADirectoryError) as error:
            self._open.pop(name, None)
            raise TenantNotFound(f"no tenant named {name!r} is installed", field="tenant") from error
        except OSError as error:
            raise TenantBroken(f"{path}: cannot be read ({error.strerror})", field="tenant") from error
        stamp = (status.st_ino, status.st_mtime_ns)
        known = self._open.get(name)
        if known is not None and known[0] == stamp:
            return known[1], False
        # What was open is let go of even where the new files turn out to be broken.
        self._open.pop(name, None)
        tenant = Tenant(self.repository, name)
        self._open[name] = (stamp, tenant)
        return tenant, True
