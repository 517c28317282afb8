"""The tenants that this process has open: opened on first use, opened anew when their files were replaced, and let go
of, those first whose use is longest ago, where all together map more than they may.

Nothing is ever closed under a reader: whoever holds a tenant, or a view of its files, keeps them mapped.
"""

from __future__ import annotations

import math
import os
import resource
from collections import OrderedDict
from pathlib import Path
from weakref import WeakKeyDictionary, WeakValueDictionary

from .errors import TenantBroken, TenantNotFound, TenantReplaced
from .manifest import MANIFEST, check_name
from .tenant import DESCRIPTORS, Tenant

Stamp = tuple[int, int]


def most_open() -> int:
    """How many tenants half of the file descriptors that this process may have are enough for."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(2, soft // 2 // DESCRIPTORS) if soft != resource.RLIM_INFINITY else 1 << 20


class Tenants:
    """Open tenants by name. Replaced or removed files are noticed at the next use, by the manifest's inode and time."""

    def __init__(self, repository: Path, most_bytes: float = math.inf, most: int | None = None) -> None:
        """most_bytes, most: how much is kept mapped, and how many tenants are kept open, `most_open` unless said.

        What others hold counts, too, but only what nobody holds can be let go of. The one that was opened last stays
        whatever its size.
        """
        self.repository = repository
        self._most_bytes = most_bytes
        self._most = most or most_open()
        self._stamps: dict[str, Stamp] = {}
        self._kept: OrderedDict[str, Tenant] = OrderedDict()
        self._found: WeakValueDictionary[str, Tenant] = WeakValueDictionary()
        self._open: WeakKeyDictionary[Tenant, Stamp] = WeakKeyDictionary()

    def get(self, name: str) -> tuple[Tenant, bool]:
        """The tenant, and whether its files are others than at its last use, so that Triton may have older ones loaded.

        Raises InvalidInput, TenantNotFound or TenantBroken.
        """
        stamp = self._stamp(name)
        known = self._stamps.get(name) == stamp
        tenant = self._found.get(name) if known else None
        if tenant is None:
            # What was open is let go of even where the new files turn out to be broken.
            self._forget(name)
            tenant = self._found[name] = Tenant(self.repository, name)
            self._open[tenant] = stamp
            self._stamps[name] = stamp
            self._keep(tenant)
            self._make_room()
        else:
            self._keep(tenant)
        return tenant, not known

    def check_current(self, tenant: Tenant) -> None:
        """Raises TenantReplaced where other files are installed under the tenant's name than those that are open."""
        try:
            current = _stamp(self._manifest(tenant.name).stat())
        except OSError:
            return  # removed: Triton has no other model under its name
        if current != self._open.get(tenant, current):
            words = f"the tenant {tenant.name!r} was replaced while it was in use; start again"
            raise TenantReplaced(words, field="tenant", retry_after_s=0)

    @property
    def open_bytes(self) -> int:
        """What is mapped of all tenants that are open, whoever holds them."""
        return sum(tenant.open_bytes for tenant in self._open)

    def __len__(self) -> int:
        """How many are open, whoever holds them."""
        return len(self._open)

    def _stamp(self, name: str) -> Stamp:
        path = self._manifest(check_name(name))
        try:
            return _stamp(path.stat())
        except (FileNotFoundError, NotADirectoryError) as error:
            self._forget(name)
            raise TenantNotFound(f"no tenant named {name!r} is installed", field="tenant") from error
        except OSError as error:
            raise TenantBroken(f"{path}: cannot be read ({error.strerror})", field="tenant") from error

    def _manifest(self, name: str) -> Path:
        return self.repository / name / "1" / MANIFEST

    def _forget(self, name: str) -> None:
        self._stamps.pop(name, None)
        self._found.pop(name, None)
        self._kept.pop(name, None)

    def _keep(self, tenant: Tenant) -> None:
        self._kept[tenant.name] = tenant
        self._kept.move_to_end(tenant.name)

    def _make_room(self) -> None:
        """Lets go of tenants until the rest fits. One that is held elsewhere is found again at its next use."""
        while len(self._kept) > 1 and (len(self) > self._most or self.open_bytes > self._most_bytes):
            self._kept.popitem(last=False)


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_ino, status.st_mtime_ns
