"""The C library's allocator, told to keep large blocks that are freed, for this process or for one that is started.

By its defaults it gives blocks above 32 MB back to the kernel and fetches them anew, page by page: most of the CPU of a
client or service that moves 60 MB a request. Whoever builds one pools its buffers, so no contestant goes without.
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h; mallopt(3)."""
_MMAP_BYTES, _TRIM_BYTES = 1 << 30, (1 << 31) - 1

KEEPING = {
    "MALLOC_MMAP_THRESHOLD_": str(_MMAP_BYTES),
    "MALLOC_TRIM_THRESHOLD_": str(_TRIM_BYTES),
    "MALLOC_ARENA_MAX": "2",
}
"""The environment of a process that keeps them, for all its threads."""


def keep_large_blocks() -> None:
    """From now on this process keeps them; where the C library is not glibc, nothing changes."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_MMAP_THRESHOLD, _MMAP_BYTES)
        library.mallopt(_TRIM_THRESHOLD, _TRIM_BYTES)
